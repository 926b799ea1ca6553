import numpy as np
import polars as pl
import pytest

from components.artifacts import EvaluationReport
from components.folders import ArtifactError
from components.metrics.promotion import CHAMPION, PromoteConfig, decide, method_of

USERS = 400


def report(seen: str = "excluded", **ranks) -> EvaluationReport:
    """Ranks of every method, one a user, 0 for a miss."""
    frames = [
        pl.DataFrame({"rank": np.broadcast_to(values, USERS)}).select(
            method=pl.lit(method),
            seen=pl.lit(seen),
            user_id=pl.int_range(pl.len(), dtype=pl.UInt32),
            target=pl.lit(0, pl.UInt32),
            rank=pl.col("rank").cast(pl.UInt32).replace(0, None),
        )
        for method, values in ({"popularity": 0, "itemknn": 0} | ranks).items()
    ]
    metrics = pl.DataFrame(schema=EvaluationReport.SCHEMAS["metrics"])
    return EvaluationReport(ranks=pl.concat(frames), metrics=metrics, split="s", details={})


def some(share: float, seed: int = 0) -> np.ndarray:
    """Hits at rank 1 for a share of the users, misses for the others."""
    return (np.random.default_rng(seed).random(USERS) < share).astype(int)


def test_the_first_model_is_promoted():
    decision = decide(report(mine=some(0.3)), PromoteConfig())
    assert decision.promoted and "there was no champion" in decision.reason
    assert decision.figures == {"value": pytest.approx(some(0.3).mean())}


def test_an_equal_model_is_promoted():
    decision = decide(report(mine=some(0.3), champion=some(0.3)), PromoteConfig(), "version 3")
    assert decision.promoted and decision.figures["difference"] == decision.figures["low"] == 0
    assert "of version 3, difference +.0000" in decision.reason


def test_a_model_that_is_worse_beyond_the_margin_is_refused():
    worse = some(0.3) * (np.arange(USERS) % 2)
    decision = decide(report(mine=worse, champion=some(0.3)), PromoteConfig(margin=0.05))
    assert not decision.promoted and decision.reason.startswith("refused: N@10")
    assert decision.figures["high"] < -0.05 * decision.figures["champion"]


def test_the_margin_is_a_share_of_the_champion_and_the_interval_must_stay_above_it():
    """A tenth of the hits lost, seen with an interval: passes only where a good deal more than a tenth may be lost."""
    champion = some(0.5)
    lost = champion * (np.arange(USERS) % 10 > 0)
    both = report(mine=lost, champion=champion)
    low = -decide(both, PromoteConfig()).figures["low"] / champion.mean()
    assert low > 0.1
    assert decide(both, PromoteConfig(margin=low + 0.001)).promoted
    assert not decide(both, PromoteConfig(margin=low - 0.001)).promoted


def test_a_model_that_may_be_worse_by_chance_is_refused_and_the_reason_names_the_interval():
    decision = decide(report(mine=some(0.3, seed=1), champion=some(0.3, seed=2)), PromoteConfig(margin=0.0))
    assert not decision.promoted
    assert "reaches below" in decision.reason and "95 % interval −" in decision.reason


def test_below_the_least_nothing_is_promoted():
    decision = decide(report(mine=some(0.3)), PromoteConfig(least=0.5))
    assert not decision.promoted and "below the least that is asked for, .5000" in decision.reason


def test_the_order_of_the_users_does_not_matter():
    straight = report(mine=some(0.3), champion=some(0.4, seed=3))
    turned = EvaluationReport(ranks=straight.ranks[::-1], metrics=straight.metrics, split="s", details={})
    assert decide(straight, PromoteConfig()) == decide(turned, PromoteConfig())


def test_a_report_without_the_wanted_ranking_says_what_to_set():
    with pytest.raises(
        ArtifactError, match="no ranks with seen items excluded: evaluate it with evaluate.seen"
    ):
        decide(report(seen="kept", mine=1), PromoteConfig())


@pytest.mark.parametrize("methods", [{}, {"one": 1, "two": 1}], ids=["none", "two"])
def test_a_report_is_of_one_model(methods):
    with pytest.raises(ArtifactError, match="give the report of the one model"):
        method_of(report(**methods))
    assert method_of(report(mine=1, **{CHAMPION: 1})) == "mine"
