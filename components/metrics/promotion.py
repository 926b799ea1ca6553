"""Whether a new model may take the champion's place, by what both do for the same test users."""

import re
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from components.artifacts import EvaluationReport
from components.config import Config
from components.folders import ArtifactError
from components.metrics.compare import TITLES, short, signed
from components.metrics.ranking import contributions, paired_bootstrap
from components.metrics.report import BASELINES

CHAMPION = "champion"
"""Name of the champion's rows in a report that holds both."""


class PromoteConfig(Config):
    """Where models are registered, and what a new one must show."""

    model: str = Field("sidflow", min_length=1, pattern=r"^[^/@:]+$")
    """Registered model that versions are added to."""
    alias: str = Field(CHAMPION, min_length=1, pattern=r"^[A-Za-z][\w-]*$")
    """Alias that names the version in use, and moves to a version that passes; not latest or v1, which MLflow keeps."""
    metric: str = Field("N@10", pattern=r"^(R@\d+|N@\d+|MRR)$")
    """What is compared, over all test users."""
    seen: Literal["kept", "excluded"] = "excluded"
    """Which ranking is compared: with the items of the history kept, or without them, as a shop shows them."""
    margin: float = Field(0.05, ge=0, lt=1)
    """Share of the champion's value that may be lost: the lower end of the 95 % interval of the paired difference must
    stay above it. Two models that are equally good differ by chance; a margin below their interval promotes neither."""
    least: float = Field(0.0, ge=0, le=1)
    """A model below this value is refused, also where there is no champion."""
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples behind the interval."""
    seed: int = Field(0, ge=0)
    """Seed of the bootstrap."""
    patience_minutes: float = Field(60.0, gt=0)
    """How long to wait for the promotion of the same model whose turn it is; after that it is taken for dead."""

    @field_validator("alias")
    @classmethod
    def _free(cls, alias: str) -> str:
        if re.fullmatch(r"latest|[vV]\d+", alias):
            raise ValueError(f"{alias!r} is an alias that MLflow keeps for itself: choose another")
        return alias


class Decision(NamedTuple):
    """What becomes of a model, and why."""

    promoted: bool
    reason: str
    """One sentence with the figures."""
    figures: dict[str, float]
    """``value``; with a champion its value as ``champion``, and the paired ``difference`` with its interval ``low`` to
    ``high``."""


def method_of(report: EvaluationReport) -> str:
    """Return the one method of a report that is no baseline and not the champion.

    Raises
    ------
    ArtifactError
        There is none, or there are several.
    """
    methods = [
        m for m in report.ranks["method"].unique(maintain_order=True) if m not in (*BASELINES, CHAMPION)
    ]
    if len(methods) != 1:
        raise ArtifactError(
            f"the EvaluationReport holds {methods or 'no method but baselines'}: give the report of the one "
            "model that is to be promoted"
        )
    return str(methods[0])


def decide(report: EvaluationReport, config: PromoteConfig, version: str = "") -> Decision:
    """Compare a model with the champion, user by user.

    Parameters
    ----------
    report : EvaluationReport
        Ranks of the model and, where there is one, of the champion under the name ``CHAMPION``.
    config : PromoteConfig
        Metric, margin and interval.
    version : str
        What the champion is called in the reason.

    Raises
    ------
    ArtifactError
        The report has no rows of the wanted treatment of seen items, or no single model.
    """
    method = method_of(report)
    ours = _values(report, method, config)
    value = float(ours.mean())
    what = f"{config.metric}, {TITLES[config.seen]}, {len(ours):,} test users: {short(value)}"
    if value < config.least:
        return Decision(
            False,
            f"refused: {what}, below the least that is asked for, {short(config.least)}",
            {"value": value},
        )
    if CHAMPION not in report.ranks["method"]:
        return Decision(True, f"promoted: {what}; there was no champion", {"value": value})
    theirs = _values(report, CHAMPION, config)
    held = float(theirs.mean())
    gap = paired_bootstrap(ours, theirs, resamples=config.resamples, seed=config.seed)
    difference, low, high = (float(column[0]) for column in gap)
    floor = -config.margin * held
    verdict, side = ("promoted", "stays above") if low >= floor else ("refused", "reaches below")
    reason = (
        f"{verdict}: {what} against {short(held)} of {version or 'the champion'}, difference {signed(difference)} "
        f"(95 % interval {signed(low)} to {signed(high)}), which {side} {signed(floor)}, the margin of "
        f"{config.margin:.0%}"
    )
    figures = {"value": value, "champion": held, "difference": difference, "low": low, "high": high}
    return Decision(low >= floor, reason, figures)


def _values(report: EvaluationReport, method: str, config: PromoteConfig) -> NDArray[np.float64]:
    """Return the contributions (U, 1) of a method's users, in the order of the users."""
    rows = report.ranks.filter(method=method, seen=config.seen).sort("user_id")
    if rows.is_empty():
        raise ArtifactError(
            f"the EvaluationReport of {method!r} has no ranks with seen items {config.seen}: evaluate it with "
            f"evaluate.seen={config.seen}, or set promote.seen"
        )
    return contributions(rows["rank"].fill_null(0).to_numpy(), [config.metric])
