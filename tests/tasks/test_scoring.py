"""A file of histories is scored as a stage: by call, and by the command that the README shows."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from flytekit.types.file import FlyteFile

from components.artifacts import Bundle
from components.embeddings import LsaConfig, fit_encoder
from components.recommenders.batch_scoring import ScoreConfig
from components.recommenders.causal import CausalConfig
from components.recommenders.serving import training_popularity
from components.training.loop import LoopConfig
from components.training.recommender import RecommenderStage, train_recommender
from tasks.scoring import score_histories
from tasks.tracking import open_store

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"dim": 16, "layers": 1, "heads": 2, "head_dim": 8, "hidden": 32}


@pytest.fixture(scope="module")
def bundle(tiny, module_home) -> Bundle:
    stage = RecommenderStage(model=CausalConfig(**SIZES), loop=LoopConfig(epochs=1), device="cpu")
    return Bundle(
        catalog=tiny.catalog,
        encoder=fit_encoder(tiny.catalog, LsaConfig(dim=16)),
        tokenizer=tiny.tokenizer,
        sids=tiny.sids,
        recommender=train_recommender(tiny.split, tiny.sids, tiny.embeddings, stage, lambda *_: None),
        popularity=training_popularity(tiny.split, tiny.catalog),
    )


@pytest.fixture
def histories(tiny, tmp_path: Path) -> Path:
    """Eight rows: two of them without a known item, five of 19 entries unknown."""
    ids = tiny.catalog.items["raw_id"].to_list()
    rows = [
        ids[:3],
        ids[3:6],
        ["x", *ids[6:9]],
        [],
        ["x", "y"],
        ids[9:11],
        [*ids[11:13], "z", "z"],
        ids[13:14],
    ]
    path = tmp_path / "histories.parquet"
    pl.DataFrame({"who": range(8), "history": rows}).write_parquet(path)
    return path


def runs():
    client = open_store()
    experiment = client.get_experiment_by_name("stages").experiment_id
    return client.search_runs([experiment], order_by=["attributes.start_time DESC"])


def test_the_run_knows_what_was_scored_and_how(bundle: Bundle, histories: Path, module_home: Path) -> None:
    given = FlyteFile(str(histories))
    found = score_histories(bundle=bundle, histories=given, config=ScoreConfig(k=4, rows=3))
    answers = Path(found.path)
    assert answers.parent == module_home / "scores"
    frame = pl.read_parquet(answers)
    assert frame["who"].to_list() == list(range(8)) and set(frame["items"].list.len()) == {4}

    run = runs()[0]
    assert (run.info.run_name, run.info.status) == ("score_histories", "FINISHED")
    assert run.data.params["k"] == "4" and run.data.tags["parent.Bundle"] == bundle.fingerprint
    figures = run.data.metrics
    assert figures["rows"] == 8 and figures["rows_per_second"] > 0
    assert figures["unknown_share"] == pytest.approx(5 / 19)
    assert figures["popular_share"] == pytest.approx(2 / 8)
    digests = {each.dataset.name: each.dataset.digest for each in run.inputs.dataset_inputs}
    for path in (histories, answers):
        assert digests[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_two_scorings_of_one_file_are_two_files_of_equal_content(bundle: Bundle, histories: Path) -> None:
    first, second = (
        Path(score_histories(bundle=bundle, histories=str(histories), config=ScoreConfig()).path)
        for _ in range(2)
    )
    assert first != second and first.read_bytes() == second.read_bytes()


def test_a_file_that_cannot_be_scored_fails_the_run_and_leaves_no_answers(
    bundle: Bundle, tmp_path: Path, module_home: Path
) -> None:
    wrong = tmp_path / "wrong.parquet"
    pl.DataFrame({"past": [["a"]]}).write_parquet(wrong)
    before = list((module_home / "scores").iterdir())
    with pytest.raises(Exception, match=r"wrong\.parquet: no column history among \['past'\]"):
        score_histories(bundle=bundle, histories=str(wrong), config=ScoreConfig())
    assert runs()[0].info.status == "FAILED" and "no column history" in runs()[0].data.tags["error.message"]
    assert list((module_home / "scores").iterdir()) == before


def test_a_file_is_scored_by_command(
    bundle: Bundle, histories: Path, module_home: Path, tmp_path: Path
) -> None:
    bundle.save(tmp_path / "bundle")
    script = str(Path(sys.executable).with_name("pyflyte"))
    stage = [script, "run", str(ROOT / "tasks" / "scoring.py"), "score_histories", "--config", '{"k": 2}']
    done = subprocess.run(
        [*stage, "--bundle", str(tmp_path / "bundle"), "--histories", str(histories)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 rows" in done.stdout
    answers = Path(done.stdout.split()[-1])
    assert answers.parent == module_home / "scores"
    assert pl.read_parquet(answers)["items"].list.len().to_list() == [2] * 8
