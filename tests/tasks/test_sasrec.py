"""SASRec as Flyte tasks: trained, evaluated beside the baselines, cached, resumed and logged."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from mlflow import MlflowClient

from components.artifacts import EvaluationReport, SasRecCheckpoint
from components.metrics.ranking import contributions
from components.metrics.report import EvaluateConfig
from components.recommenders.full_ranking import rank_exactly
from components.recommenders.sasrec import SasRecConfig, load_sasrec
from components.training.loop import LoopConfig
from components.training.recommender import OptimConfig
from components.training.sasrec import SasRecStage
from tasks import sasrec
from tasks.checkpoints import Resumable
from tasks.evaluation import evaluate_baselines
from tasks.sasrec import evaluate_sasrec, exact_ranker, fit_sasrec
from tasks.tracking import open_store

STAGE = SasRecStage(
    model=SasRecConfig(dim=16, layers=1, heads=2, head_dim=8, hidden=32, dropout=0.1),
    loop=LoopConfig(epochs=4),
    batch_size=32,
    optim=OptimConfig(lr=2e-2, warmup_steps=10),
    validation_users=50,
    device="cpu",
)
EVALUATE = EvaluateConfig(resamples=100)


@pytest.fixture(scope="module")
def evaluated(tiny, module_home: Path) -> tuple[SasRecCheckpoint, EvaluationReport]:
    baselines = evaluate_baselines(split=tiny.split, config=EVALUATE)
    model = fit_sasrec(split=tiny.split, config=STAGE)
    report = evaluate_sasrec(
        name="sasrec", model=model, split=tiny.split, baselines=baselines, config=EVALUATE
    )
    return model, report


def _runs(client: MlflowClient, name: str):
    experiments = [e.experiment_id for e in client.search_experiments()]
    return [run for run in client.search_runs(experiments) if run.info.run_name == name]


def _value(report: EvaluationReport, method: str, seen: str, metric: str) -> float:
    wanted = {"method": method, "seen": seen, "slice": "all", "metric": metric}
    return report.metrics.filter(**wanted)["value"].item()


def test_the_report_holds_the_exact_ranks_beside_the_baselines(tiny, evaluated) -> None:
    model, report = evaluated
    assert set(report.metrics["method"]) == {"popularity", "itemknn", "sasrec"}
    scorer, test = load_sasrec(model, tiny.split), tiny.split.test
    for seen in set(report.ranks["seen"]):
        exact = rank_exactly(
            scorer, test["history"], test["target"], k=0, exclude_seen=seen == "excluded", batch_size=500
        )
        assert _value(report, "sasrec", seen, "N@10") == pytest.approx(
            contributions(exact.ranks, ["N@10"]).mean()
        )
        assert _value(report, "sasrec", seen, "R@10") > _value(report, "popularity", seen, "R@10") + 0.1
    faults = [row for row in report.details["lists"] if row["method"] == "sasrec"]
    assert all(row["invalid"] == row["duplicates"] == row["seen_items"] == 0 for row in faults)


def test_the_runs_hold_curves_metrics_and_lineage(evaluated) -> None:
    client = open_store()
    model, report = evaluated
    (fitted,) = _runs(client, "fit_sasrec")
    (ranked,) = _runs(client, "evaluate_sasrec sasrec")
    assert fitted.info.status == ranked.info.status == "FINISHED"
    assert fitted.data.tags["output.SasRecCheckpoint"] == model.fingerprint
    assert fitted.data.metrics["kept/valid_N_at_10"] == pytest.approx(model.metrics["valid_N@10"])
    assert fitted.data.params["model.dim"] == "16"
    assert ranked.data.tags["parent.SasRecCheckpoint"] == model.fingerprint
    found = ranked.data.metrics["sasrec/kept/all/N_at_10"]
    assert found == pytest.approx(_value(report, "sasrec", "kept", "N@10"))
    assert ranked.data.metrics["faults/kept/invalid"] == 0


def test_equal_inputs_are_trained_once(tiny, evaluated) -> None:
    again = fit_sasrec(split=tiny.split, config=STAGE, run_id="another pipeline")
    assert again.fingerprint == evaluated[0].fingerprint
    assert len(_runs(open_store(), "fit_sasrec")) == 1


def test_an_interrupted_attempt_is_continued(tiny, evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list = []
    fit = fit_sasrec.task_function
    monkeypatch.setattr(sasrec, "resumable", lambda: Resumable(states.append, None))
    whole = fit(split=tiny.split, config=STAGE)
    assert [state["epoch"] for state in states] == [1, 2, 3, 4]
    later: list = []
    monkeypatch.setattr(sasrec, "resumable", lambda: Resumable(later.append, states[1]))
    assert fit(split=tiny.split, config=STAGE).fingerprint == whole.fingerprint
    assert [state["epoch"] for state in later] == [3, 4]


def test_lists_come_with_their_log_probabilities(tiny, evaluated) -> None:
    scorer, frame = load_sasrec(evaluated[0], tiny.split), tiny.split.test.head(10)
    config = EvaluateConfig(beams=tiny.split.num_items, batch_size=4)
    scores = scorer.scores(frame["history"])
    ranking = exact_ranker(scorer, config)(frame, True)
    for user, history in enumerate(frame["history"]):
        room = tiny.split.num_items - history.n_unique()
        items, found = ranking.items[user].numpy(), ranking.scores[user].numpy()
        assert set(items[:room]) == set(range(tiny.split.num_items)) - set(history)
        np.testing.assert_allclose(found[:room], np.sort(scores[user, items[:room]])[::-1], atol=1e-5)
        assert (items[room:] == -1).all() and np.isneginf(found[room:]).all()


def test_the_catalogue_is_scored_once_for_each_user(tiny, evaluated) -> None:
    model, asked = load_sasrec(evaluated[0], tiny.split), []

    class Counting:
        def scores(self, histories: pl.Series):
            asked.append(len(histories))
            return model.scores(histories)

    exact_ranker(Counting(), EvaluateConfig(batch_size=4))(tiny.split.test.head(10), False)
    assert asked == [4, 4, 2]


def test_another_split_is_refused(tiny, evaluated) -> None:
    other = dataclasses.replace(tiny.split, test=tiny.split.test.sort(pl.col("user_id"), descending=True))
    baselines = evaluate_baselines(split=other, config=EVALUATE)
    with pytest.raises(Exception, match="it may have learned test targets"):
        evaluate_sasrec(name="sasrec", model=evaluated[0], split=other, baselines=baselines, config=EVALUATE)
