"""Promotion against a real registry, also by two processes at once."""

import subprocess
import sys
import time
from dataclasses import replace

import polars as pl
import pytest
import torch
from mlflow import MlflowClient

from components.artifacts import Bundle, EvaluationReport, ItemCatalog, Promotion
from components.data.batches import held_out_rows
from components.embeddings import LsaConfig, fit_encoder
from components.metrics.promotion import PromoteConfig, decide
from components.metrics.report import EvaluateConfig, evaluate_baselines, evaluate_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.serving import BundleRanker, training_popularity
from components.training.recommender import RecommenderStage, train_recommender
from tasks.promotion import DECISION, PENDING, REASON, answers_of, promote
from tasks.runs import everywhere_one_store, open_store
from tasks.store import keep
from tasks.tracking import start_pipeline

SETTINGS = EvaluateConfig(ks=[5, 10], resamples=100)
MODEL = CausalConfig(dim=16, layers=1, heads=2, head_dim=8, hidden=32)


@pytest.fixture(scope="module")
def bundles(tiny) -> tuple[Bundle, Bundle]:
    """A model of two epochs and one of none worth the name: same table, other weights."""
    encoder, made = fit_encoder(tiny.catalog, LsaConfig(dim=16)), []
    for rate in (3e-3, 1e-6):
        stage = RecommenderStage.model_validate(
            {"model": MODEL.model_dump(), "loop": {"epochs": 4}, "optim": {"lr": rate, "warmup_steps": 1}}
        )
        trained = train_recommender(tiny.split, tiny.sids, tiny.embeddings, stage, lambda step, values: None)
        popularity = training_popularity(tiny.split, tiny.catalog)
        parts = {"catalog": tiny.catalog, "tokenizer": tiny.tokenizer, "sids": tiny.sids, "encoder": encoder}
        made.append(Bundle(**parts, recommender=trained, popularity=popularity))
    return made[0], made[1]


@pytest.fixture(scope="module")
def reports(tiny, bundles) -> tuple[EvaluationReport, EvaluationReport]:
    baselines = evaluate_baselines(tiny.split, SETTINGS)

    def report(bundle: Bundle) -> EvaluationReport:
        ranks = answers_of(BundleRanker(bundle, torch.device("cpu")), tiny.catalog, SETTINGS.beams)
        details = {"recommender": bundle.recommender.fingerprint}
        return evaluate_recommender("mine", ranks, tiny.split, SETTINGS, baselines, details)

    return report(bundles[0]), report(bundles[1])


def champion_of(model: str = "sidflow"):
    return open_store().get_model_version_by_alias(model, "champion")


def test_a_model_answers_a_split_as_its_recommender_ranks_it(tiny, bundles):
    ranker = BundleRanker(bundles[0], torch.device("cpu"))
    ours = answers_of(ranker, tiny.catalog, 20)(tiny.split.test, True)
    rows = held_out_rows(tiny.split.test)
    assert len(rows.start) == len(ours.items)
    titles = ranker.recommend(
        pl.Series([[tiny.catalog.items["raw_id"][i] for i in tiny.split.test["history"][0]]]), 20
    )
    listed = [tiny.catalog.items["raw_id"][i] for i in ours.items[0].tolist()]
    assert listed == titles["items"][0].to_list()


def test_a_model_of_another_catalogue_is_asked_by_raw_ids(tiny, bundles):
    """The items turned around, and two that the model does not know: the same answers under other numbers."""
    ranker = BundleRanker(bundles[0], torch.device("cpu"))
    n = tiny.catalog.num_items
    turned = tiny.catalog.items[::-1].with_columns(item_id=pl.int_range(n, dtype=pl.UInt32))
    new = turned[:2].with_columns(
        item_id=pl.Series([n, n + 1], dtype=pl.UInt32), raw_id=pl.Series(["x", "y"])
    )
    other = ItemCatalog(items=pl.concat([turned, new]))
    frame = tiny.split.test.with_columns(
        history=pl.col("history")
        .list.eval(n - 1 - pl.element())
        .list.concat(pl.lit([n], pl.List(pl.UInt32))),
        target=(n - 1 - pl.col("target").cast(pl.Int64)).cast(pl.UInt32),
    )
    same = answers_of(ranker, tiny.catalog, 20)(tiny.split.test, False).items
    assert torch.equal(answers_of(ranker, other, 20)(frame, False).items, n - 1 - same)


def test_the_first_model_becomes_the_champion_and_says_why(flyte_home, tiny, bundles, reports):
    done = promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=PromoteConfig())
    assert isinstance(done, Promotion) and done.promoted and done.version == 1
    version = champion_of()
    assert version.version == 1 or version.version == "1"
    assert version.tags[DECISION] == "promoted"
    assert version.tags[REASON] == version.description == done.reason
    assert "there was no champion" in done.reason
    model = open_store().get_logged_model(version.source.removeprefix("models:/"))
    assert model.tags["part.SidTable"] == tiny.sids.fingerprint
    (value,) = [metric for metric in model.metrics if metric.key == "value"]
    assert (value.dataset_name, value.dataset_digest) == ("SequenceSplit", tiny.split.fingerprint[:16])
    assert value.value == done.figures["value"]


def test_a_worse_model_leaves_the_champion_alone_and_its_reason_stands(flyte_home, tiny, bundles, reports):
    promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=PromoteConfig())
    done = promote(bundle=bundles[1], report=reports[1], split=tiny.split, config=PromoteConfig())
    assert not done.promoted and done.version == 2 and done.figures["high"] < 0
    assert str(champion_of().version) == "1"
    refused = open_store().get_model_version("sidflow", "2")
    assert refused.tags[DECISION] == "refused" and "of version 1" in refused.tags[REASON]
    assert done.figures["champion"] == pytest.approx(
        reports[0].metrics.filter(method="mine", seen="excluded", slice="all", metric="N@10")["value"].item()
    )


def test_a_better_model_takes_the_place(flyte_home, tiny, bundles, reports):
    promote(bundle=bundles[1], report=reports[1], split=tiny.split, config=PromoteConfig())
    assert promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=PromoteConfig()).promoted
    assert str(champion_of().version) == "2"


def test_the_champion_itself_is_not_registered_again(flyte_home, tiny, bundles, reports):
    for _ in range(2):
        done = promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=PromoteConfig())
    assert not done.promoted and done.reason == "kept: version 1, the champion, is the same model"
    assert str(champion_of().version) == "1"
    assert len(open_store().search_model_versions("name = 'sidflow'")) == 1


def test_a_promotion_that_breaks_leaves_the_champion_and_does_not_block_the_next(
    flyte_home, tiny, bundles, reports, monkeypatch
):
    config = PromoteConfig()
    promote(bundle=bundles[1], report=reports[1], split=tiny.split, config=config)
    with monkeypatch.context() as patch, pytest.raises(Exception, match="no GPU left"):
        patch.setattr("tasks.promotion.decide", lambda *_: (_ for _ in ()).throw(RuntimeError("no GPU left")))
        promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=config)
    assert str(champion_of().version) == "1"
    assert open_store().get_model_version("sidflow", "2").tags[REASON] == "failed: RuntimeError: no GPU left"
    assert promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=config).promoted


def test_a_promotion_that_died_is_not_waited_for_longer_than_patience(flyte_home, tiny, bundles, reports):
    client = open_store()
    client.create_registered_model("sidflow")
    experiment = client.create_experiment("dead")
    model = client.create_logged_model(experiment, "dead")
    with everywhere_one_store():
        client.create_model_version("sidflow", model.model_uri, tags={DECISION: PENDING})
    config = PromoteConfig(patience_minutes=0.005)
    assert promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=config).promoted
    assert client.get_model_version("sidflow", "1").tags[DECISION] == "abandoned"


def test_a_report_of_another_model_and_a_split_of_another_catalogue_are_refused(
    flyte_home, tiny, bundles, reports
):
    wrong = replace(tiny.split, catalog="other")
    for report, split in ((reports[0], wrong), (reports[1], tiny.split)):
        with pytest.raises(Exception, match="the report must be of this bundle's recommender"):
            promote(bundle=bundles[0], report=report, split=split, config=PromoteConfig())
    assert not open_store().search_registered_models()


def test_a_model_that_was_built_on_another_than_the_one_in_use_is_refused(flyte_home, tiny, bundles, reports):
    """Two runs began from version 1 (or from nothing): the second to end would undo what the first has done."""
    config = PromoteConfig()
    worse, better = (
        {"bundle": bundle, "report": report, "split": tiny.split, "config": config}
        for bundle, report in ((bundles[1], reports[1]), (bundles[0], reports[0]))
    )
    assert promote(**worse, base="none").promoted
    late = promote(**better, base="none")
    assert not late.promoted and late.reason == "refused: built on none, version 1 is in use"
    assert promote(**better, base="1").promoted
    assert str(champion_of().version) == "3"


def test_an_alias_that_somebody_moves_meanwhile_is_compared_with_anew(
    flyte_home, tiny, bundles, reports, monkeypatch
):
    """The worst is champion; while a middling model is judged against it, somebody sets the best one by hand."""
    config = PromoteConfig()
    promote(bundle=bundles[1], report=reports[1], split=tiny.split, config=config)
    promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=config)
    client, seen = open_store(), []
    client.set_registered_model_alias("sidflow", "champion", "1")
    middling = replace(bundles[1], recommender=replace(bundles[1].recommender, step=10**6))
    report = replace(
        reports[1], details=reports[1].details | {"recommender": middling.recommender.fingerprint}
    )

    def by_hand(*arguments):
        if not seen:
            client.set_registered_model_alias("sidflow", "champion", "2")
        seen.append(arguments[-1])
        return decide(*arguments)

    monkeypatch.setattr("tasks.promotion.decide", by_hand)
    done = promote(bundle=middling, report=report, split=tiny.split, config=config)
    assert seen == ["version 1", "version 2"]
    assert not done.promoted and str(champion_of().version) == "2"


def test_a_promotion_that_was_given_up_does_not_move_the_alias_later(
    flyte_home, tiny, bundles, reports, monkeypatch
):
    client = open_store()

    def slow(*arguments):
        client.set_model_version_tag("sidflow", "1", DECISION, "abandoned")
        return decide(*arguments)

    monkeypatch.setattr("tasks.promotion.decide", slow)
    with pytest.raises(Exception, match="was given up by a later promotion"):
        promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=PromoteConfig())
    assert not client.get_registered_model("sidflow").aliases


def test_a_second_attempt_goes_on_with_the_version_of_the_first(
    flyte_home, tiny, bundles, reports, monkeypatch
):
    """Broken before the decision, and broken right after the alias moved: one version, one champion, one reason."""
    config = PromoteConfig()
    pipeline = start_pipeline("two_stage", "sidflow", config)
    given = {
        "bundle": bundles[0],
        "report": reports[0],
        "split": tiny.split,
        "config": config,
        "run_id": pipeline,
    }
    with monkeypatch.context() as patch, pytest.raises(Exception, match="machine lost"):
        patch.setattr(
            "tasks.promotion.decide", lambda *_: (_ for _ in ()).throw(RuntimeError("machine lost"))
        )
        promote(**given)
    real = MlflowClient.set_registered_model_alias

    def moved_and_lost(self, *arguments):
        real(self, *arguments)
        raise RuntimeError("machine lost")

    with monkeypatch.context() as patch, pytest.raises(Exception, match="machine lost"):
        patch.setattr(MlflowClient, "set_registered_model_alias", moved_and_lost)
        promote(**given)
    done, again = promote(**given), promote(**given)  # the second after all was said: the answer was lost
    assert done.promoted and done.version == 1
    assert again.fingerprint == done.fingerprint and done.figures["value"] > 0
    assert len(open_store().search_model_versions("name = 'sidflow'")) == 1
    version = champion_of()
    assert version.tags[DECISION] == "promoted"


def test_two_promotions_at_once_end_with_one_champion_and_both_reasons(
    flyte_home, tmp_path, tiny, bundles, reports
):
    """The worse model is first in the queue and slow: the better one waits, meets it as the champion and replaces it.

    Without the queue the better one would find no champion, and the slow one would then replace it.
    """
    script = (
        "import sys, time; from pathlib import Path; from tasks import promotion\n"
        "from components.metrics.promotion import PromoteConfig\n"
        "bundle, report, split, go = sys.argv[1:]\n"
        "real = promotion._decide\n"
        "def held(*arguments):\n"
        "    while not Path(go).exists(): time.sleep(.05)\n"
        "    return real(*arguments)\n"
        "promotion._decide = held\n"
        "promotion.promote(bundle=bundle, report=report, split=split, config=PromoteConfig())"
    )
    go, split, client = tmp_path / "go", str(keep(tiny.split)), open_store()

    def start(number: int) -> subprocess.Popen[str]:
        given = [str(keep(bundles[number])), str(keep(reports[number])), split, str(go)]
        return subprocess.Popen(
            [sys.executable, "-u", "-c", script, *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    worse = start(1)
    wait_until(lambda: len(client.search_model_versions("name = 'sidflow'")) == 1)
    better = start(0)
    wait_until(lambda: len(client.search_model_versions("name = 'sidflow'")) == 2)
    go.touch()
    said = [process.communicate(timeout=240)[0] for process in (worse, better)]
    assert [worse.returncode, better.returncode] == [0, 0], said
    assert champion_of().tags["sidflow.bundle"] == bundles[0].fingerprint
    first, second = (client.get_model_version("sidflow", str(number)).tags for number in (1, 2))
    assert "there was no champion" in first[REASON]
    assert "of version 1" in second[REASON] and second[DECISION] == "promoted"


def wait_until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
