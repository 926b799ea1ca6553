"""Nights on a planted catalogue that grows: a first training, two nights with news and one without, run once."""

from typing import NamedTuple

import mlflow
import pandas as pd
import pytest
from mlflow.entities import Run

from components.artifacts import Bundle, SidDrift
from components.metrics.promotion import PromoteConfig
from tasks.champion import in_use
from tasks.promotion import DECISION
from tasks.runs import CHAMPION, everywhere_one_store, open_store, stages_of
from workflows.new_items import new_items
from workflows.retrain import retrain

from .conftest import NEXT, NIGHT, QUIET, TRAINED, latest_pipeline


class After(NamedTuple):
    """What stood after an execution: the MLflow run, the champion, the drift."""

    run: Run
    version: int
    bundle: Bundle
    drift: SidDrift | None

    @property
    def names(self) -> dict[str, tuple]:
        rows = self.bundle.sids.codes.join(self.bundle.catalog.items, on="item_id")
        return {
            raw: (*codes, suffix)
            for raw, codes, suffix in rows.select("raw_id", "codes", "suffix").iter_rows()
        }


def stages() -> dict[str, Run]:
    return {run.info.run_name: run for run in stages_of(open_store(), latest_pipeline())}


def champion() -> tuple[int, Bundle]:
    version, bundle = in_use(open_store(), PromoteConfig())
    return int(version.version), bundle


@pytest.fixture(scope="module")
def nights(growing_settings) -> list[After]:
    """The first training, and the three nights after it."""
    config, found = growing_settings(), []
    retrain(config=config, until=TRAINED)
    found.append(After(latest_pipeline(), *champion(), None))
    for until in (NIGHT, NEXT, QUIET):
        result = new_items(config=config, until=until)
        found.append(After(latest_pipeline(), *champion(), result.drift))
        assert result.sids.fingerprint == found[-1].bundle.sids.fingerprint
        assert result.promotion.version == found[-1].version
    return found


def test_without_a_champion_the_run_fails_and_says_how_the_first_is_made(growing_settings):
    nobody = growing_settings(promote={"model": "nobody"})
    with pytest.raises(
        Exception, match="no version of the model 'nobody' holds the alias 'champion'.*retrain"
    ):
        new_items(config=nobody, until=NIGHT)
    run = latest_pipeline()
    assert run.info.status == "FAILED" and "retrain.py" in run.data.tags["error.message"]


def test_new_items_are_named_behind_the_others_and_no_name_changes(nights):
    sizes = [len(after.names) for after in nights]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3] == 60
    for before, after in zip(nights, nights[1:], strict=False):
        assert before.names.items() <= after.names.items()
        n = before.bundle.catalog.num_items
        assert after.bundle.catalog.items.head(n).equals(before.bundle.catalog.items)
    first, night, following, quiet = (after.bundle.sids for after in nights)
    assert night.provenance.parents["SidTable"] == first.fingerprint
    assert following.provenance.parents["SidTable"] == night.fingerprint
    assert quiet.fingerprint == following.fingerprint
    assert quiet.provenance.parents == following.provenance.parents


def test_every_night_ends_finished_and_leaves_a_champion_that_knows_the_day(nights):
    assert [after.run.info.status for after in nights] == ["FINISHED"] * 4
    assert [after.version for after in nights] == [1, 2, 3, 4]
    # The last one knows no more items: what is popular has changed.
    last, before = nights[3].bundle, nights[2].bundle
    assert last.recommender.fingerprint == before.recommender.fingerprint
    assert not last.popularity.equals(before.popularity)
    decisions = [open_store().get_model_version("sidflow", str(n)).tags[DECISION] for n in range(1, 5)]
    assert decisions == ["promoted"] * 4


def test_nothing_is_trained_and_the_encoder_is_that_of_the_training(nights):
    client = open_store()
    ran = [{run.info.run_name.split()[0] for run in stages_of(client, after.run)} for after in nights]
    assert ran[1] == {
        "open_champion",
        "ingest_onto",
        "set_aside",
        "split_newcomers",
        "embed_shard",
        "assemble_embeddings",
        "extend_sids",
        "analyze_collisions",
        "extend_recommender",
        "evaluate_baselines",
        "evaluate_recommender",
        "report_drift",
        "compare_reports",
        "log_model",
        "promote",
    }
    assert len({after.bundle.encoder.fingerprint for after in nights}) == 1
    assert len({after.bundle.tokenizer.fingerprint for after in nights}) == 1


def test_drift_and_cold_items_count_from_the_last_training_not_from_the_last_night(nights):
    trained, known = nights[0].bundle.sids.fingerprint, len(nights[0].names)
    for after in nights[1:]:
        assert after.drift.trained == trained
        assert after.drift.grown == after.bundle.sids.fingerprint
        assert after.drift.figures["newcomers"] == len(after.names) - known
        assert after.run.info.status == "FINISHED"
        runs = {run.info.run_name: run for run in stages_of(open_store(), after.run)}
        assert runs["split_newcomers"].data.metrics["cold_items"] == len(after.names) - known
        assert runs["open_champion"].data.metrics["trained_items"] == known
    # A limit of 15 %: each night brings less, both together more.
    added = [len(b.names) - len(a.names) for a, b in zip(nights, nights[1:], strict=False)]
    assert max(added) / 60 < 0.16 < sum(added) / 60
    assert [after.drift.verdict for after in nights[1:]] == ["keep"] + ["full retraining due"] * 2
    marks = [after.run.data.tags.get("sidflow.retraining_due.report_drift", "") for after in nights]
    assert marks[:2] == ["", ""] and all("of the catalogue is new" in mark for mark in marks[2:])


def test_recall_on_new_items_stands_beside_that_on_known_ones(nights):
    runs = {run.info.run_name: run for run in stages_of(open_store(), nights[2].run)}
    assert "extended/kept/cold/R_at_10" in runs["evaluate_recommender extended"].data.metrics
    assert {"recall_newcomers", "recall_known"} <= runs["report_drift"].data.metrics.keys()
    assert "| extended | kept |" in nights[2].run.data.tags["mlflow.note.content"]


def test_the_run_says_in_mlflows_own_terms_which_model_it_opened(nights):
    client = open_store()
    assert [after.run.data.tags[CHAMPION] for after in nights] == [
        "none",
        "mlflow:sidflow/1",
        "mlflow:sidflow/2",
        "mlflow:sidflow/3",
    ]
    (opened,) = [r for r in stages_of(client, nights[2].run) if r.info.run_name == "open_champion"]
    (model,) = client.get_run(opened.info.run_id).inputs.model_inputs
    assert client.get_model_version("sidflow", "2").source == f"models:/{model.model_id}"


def test_the_served_model_reads_and_lists_new_items(nights):
    with everywhere_one_store():
        served = mlflow.pyfunc.load_model("models:/sidflow@champion")
    new = sorted(nights[3].names.keys() - nights[0].names.keys())
    old = next(iter(nights[0].names))
    answer = served.predict(pd.DataFrame({"history": [[old], new[:1]]}), params={"k": 59})
    assert set(new) < set(answer["items"][0])
    assert answer["warning"].to_list() == ["", ""]


def test_a_night_on_which_nothing_changed_keeps_the_champion_and_says_so(nights, growing_settings, capsys):
    result = new_items(config=growing_settings(), until=QUIET)
    assert not result.promotion.promoted and result.promotion.reason.startswith("kept: version 4")
    assert champion()[0] == 4
    assert len(open_store().search_model_versions("name = 'sidflow'")) == 4
    assert latest_pipeline().info.status == "FINISHED"
    assert latest_pipeline().data.tags[
        "sidflow.retraining_due.report_drift"
    ]  # though the report came from the cache
    page = " ".join(capsys.readouterr().out.split())
    for words in (
        "No new items: all names are as they were. Since the last training: 13 of 60.",
        "share their codes, of the items that it knew",
        "where the target came since,",
        "full retraining due",
        "of the catalogue is new since the last training; at most 15%",
        "kept: version 4",
    ):
        assert words in page, words


def test_a_failure_in_the_middle_leaves_the_champion(nights, growing_settings):
    strict = growing_settings(collisions={"max_collision_rate": 0.01, "watch_collision_rate": 0.01})
    with pytest.raises(Exception, match="collapsed"):
        new_items(config=strict, until=QUIET)
    assert latest_pipeline().info.status == "FAILED" and "promote" not in stages()
    assert champion()[0] == 4
