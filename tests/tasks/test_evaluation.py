"""Evaluation as a task: what is ranked how often, and what the report says of it."""

import pytest
import torch

from components.artifacts import EvaluationReport, RecommenderCheckpoint
from components.metrics.report import EvaluateConfig
from components.seams import Ranking
from tasks import evaluation
from tasks.evaluation import RankFns, evaluate_baselines, evaluate_recommender

EVALUATE = EvaluateConfig(ks=[1, 5], beams=10, resamples=100)


@pytest.fixture(scope="module")
def baselines(tiny, module_home) -> EvaluationReport:
    return evaluate_baselines(split=tiny.split, config=EVALUATE)


def evaluated(tiny, baselines, config: EvaluateConfig, ways: RankFns) -> EvaluationReport:
    """Evaluate a method that ranks in these ways, under a name of its own so that nothing comes from the cache."""
    checkpoint = RecommenderCheckpoint(
        weights={"w": torch.zeros(1)}, config={}, sids=tiny.sids.fingerprint, step=1, epoch=1, metrics={}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "rankers", lambda *_: ways)
        return evaluate_recommender(
            name=f"{config.decode} {ways.exact is not None}",
            recommender=checkpoint,
            sids=tiny.sids,
            split=tiny.split,
            baselines=baselines,
            catalog=tiny.catalog,
            config=config,
        )


def watched(asked: list[tuple[int, bool]]):
    """Rank items 0 to 9 for everybody, and note how many rows were asked for."""

    def rank(frame, exclude_seen: bool) -> Ranking:
        asked.append((len(frame), exclude_seen))
        return Ranking(torch.arange(10).expand(len(frame), -1), torch.zeros(len(frame), 10))

    return rank


@pytest.mark.parametrize("decode", ["beam", "exact"])
def test_the_test_set_is_ranked_once_for_each_treatment_of_seen_items(
    tiny, baselines, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the report is of; a beam is held against exact lists of some users alone."""
    monkeypatch.setattr("components.metrics.beam_loss.USERS", 7)
    asked: dict[str, list[tuple[int, bool]]] = {"beam": [], "exact": []}
    ways = RankFns(watched(asked["beam"]), watched(asked["exact"]))
    report = evaluated(tiny, baselines, EVALUATE.model_copy(update={"decode": decode}), ways)
    every = [(len(tiny.split.test), False), (len(tiny.split.test), True)]
    assert asked == (
        {"beam": every, "exact": [(7, False), (7, True)]}
        if decode == "beam"
        else {"beam": [], "exact": every}
    )
    assert report.details["decode"] == decode
    lost = report.details.get("beam_loss", [])
    assert [(row["method"], row["seen"], row["found"]) for row in lost] == (
        [("beam True", seen, 1) for seen in ("kept", "excluded")] if decode == "beam" else []
    )


def test_a_method_without_exact_scores_has_a_beam_and_no_loss(tiny, baselines) -> None:
    ways = RankFns(watched([]), None)
    report = evaluated(tiny, baselines, EVALUATE, ways)
    assert report.details["decode"] == "beam" and "beam_loss" not in report.details
    with pytest.raises(Exception, match="decode=exact scores every item"):
        evaluated(tiny, baselines, EVALUATE.model_copy(update={"decode": "exact"}), ways)
