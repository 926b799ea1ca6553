"""Promotion against a real registry, also by two processes at once."""

import subprocess
import sys
from dataclasses import replace

import polars as pl
import pytest
import torch

from components.artifacts import Bundle, EvaluationReport, ItemCatalog, Promotion
from components.data.batches import held_out_rows
from components.embeddings import LsaConfig, fit_encoder
from components.metrics.promotion import CHAMPION, PromoteConfig
from components.metrics.report import EvaluateConfig, evaluate_baselines, evaluate_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.serving import BundleRanker, training_popularity
from components.training.recommender import RecommenderStage, train_recommender
from tasks.promotion import DECISION, PENDING, REASON, answers_of, promote
from tasks.runs import open_store
from tasks.store import keep
from tasks.tracking import everywhere_one_store

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
        return evaluate_recommender("mine", ranks, tiny.split, SETTINGS, baselines)

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
    assert not done.promoted and done.reason == "kept: version 1 is the champion already"
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
    assert open_store().get_model_version("sidflow", "2").tags[REASON] == "failed: no GPU left"
    assert promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=config).promoted


def test_a_promotion_that_died_is_not_waited_for_longer_than_patience(flyte_home, tiny, bundles, reports):
    client = open_store()
    client.create_registered_model("sidflow")
    experiment = client.create_experiment("dead")
    model = client.create_logged_model(experiment, "dead")
    with everywhere_one_store():
        client.create_model_version("sidflow", model.model_uri, tags={DECISION: PENDING})
    config = PromoteConfig(patience_minutes=0.01)
    assert promote(bundle=bundles[0], report=reports[0], split=tiny.split, config=config).promoted
    assert client.get_model_version("sidflow", "1").tags[DECISION] == "abandoned"


def test_report_and_bundle_of_different_catalogues_are_refused(flyte_home, tiny, bundles, reports):
    wrong = replace(tiny.split, catalog="other")
    with pytest.raises(Exception, match="must be of one catalogue and one split"):
        promote(bundle=bundles[0], report=reports[0], split=wrong, config=PromoteConfig())
    assert not open_store().search_registered_models()


def test_two_promotions_at_once_end_with_one_champion_and_both_reasons(flyte_home, tiny, bundles, reports):
    """Two processes, the better and the worse model, started together: whichever is first, the better one stands."""
    script = (
        "import sys; from tasks.promotion import promote; from components.metrics.promotion import PromoteConfig\n"
        "bundle, report, split = sys.argv[1:]\n"
        "promote(bundle=bundle, report=report, split=split, config=PromoteConfig())"
    )
    split = keep(tiny.split)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(keep(bundle)), str(keep(report)), str(split)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for bundle, report in zip(bundles, reports, strict=True)
    ]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    versions = open_store().search_model_versions("name = 'sidflow'")
    assert len(versions) == 2
    assert champion_of().tags["sidflow.bundle"] == bundles[0].fingerprint
    reasons = {version.tags["sidflow.bundle"]: version.tags[REASON] for version in versions}
    assert reasons[bundles[0].fingerprint].startswith("promoted: ")
    assert len(set(reasons.values())) == 2 and all(reasons.values())
    assert CHAMPION not in {version.tags[DECISION] for version in versions}
