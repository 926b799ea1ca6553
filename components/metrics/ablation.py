"""Arms over seeds: means, differences paired by seed, and who is adopted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import polars as pl
from scipy import stats

from components.artifacts import Ablation, CollisionReport, EvaluationReport, RecommenderCheckpoint
from components.folders import ArtifactError, Provenance
from components.metrics.compare import HEADLINE, TITLES, short, signed
from components.metrics.ranking import COVERAGE
from components.metrics.report import BASELINES, COLD, headline_rows
from components.metrics.sids import COLLAPSED_AT

DECISIVE = "N@10"
"""Metric that decides: the one that epochs are chosen by on validation."""
ERRORS = 2
"""An arm is adopted if its mean gain is more than so many standard errors."""
KNOWN_FIGURES = (
    "codes_per_item",
    "codes_per_interaction",
    "tokens_per_history",
    "events_in_budget",
    "reconstruction",
    "reconstruction_draw",
)
"""Figures of a collision report that an ablation keeps where a report has them; the last columns of its ``tables``."""
BASELINE = "baseline"
"""Method of what no seed changes."""


class Measured(NamedTuple):
    """One arm at one seed."""

    arm: str
    method: str
    against: str | None
    """Arm that the difference is taken to."""
    seed: int
    report: EvaluationReport
    collisions: CollisionReport | None
    """Of the table that was evaluated; None for methods without SIDs."""
    recommender: RecommenderCheckpoint | None
    """What was evaluated; None for methods without SIDs."""


def chance_adoption(seeds: int) -> float:
    """Return the probability that an arm without any effect is adopted, ``P(t > ERRORS)`` at seeds - 1 degrees.

    The differences of the seeds are taken as normal and independent, which few seeds cannot check.

    Parameters
    ----------
    seeds : int
        Seeds of each arm, >= 2.
    """
    return float(stats.t.sf(ERRORS, seeds - 1))


def run_name(arm: str, seed: int) -> str:
    """Name one arm at one seed in reports, as MLflow also takes it in names of tags."""
    return f"{arm} seed {seed}"


def ablate(measured: Sequence[Measured]) -> Ablation:
    """Put arms over seeds together and take their differences, paired by seed.

    A seed moves an arm and what it is compared with alike, in so far as they share weights and batches at the
    start; the spread of the paired differences over seeds is what another seed would change, which the users of one
    test set cannot show.

    Parameters
    ----------
    measured : sequence of Measured
        Every arm at every one of its seeds; the baselines stand in each report.

    Returns
    -------
    Ablation
        ``summary`` holds means over seeds with standard errors, differences with their 95 % Student-t intervals over
        seeds, and whether the mean gain is more than two standard errors. With one seed all errors are null, and
        nothing is adopted.

    Raises
    ------
    ArtifactError
        Reports of different splits, users or treatments of seen items; an arm that is missing at a seed, or there
        twice; codes of another table than that of the recommender.
    """
    if not measured:
        raise ArtifactError("nothing to put together: give at least one arm at one seed")
    _check(measured)
    first = measured[0].report
    runs = pl.concat([_baselines(first), *map(_values, measured)])
    return Ablation(
        runs=runs,
        summary=summarise(runs, {each.arm: each.against for each in measured}),
        codes=pl.concat([Ablation.SCHEMAS["codes"].to_frame(), *map(_codes, measured)]),
        tables=pl.DataFrame(
            [_table_row(each) for each in measured if each.collisions is not None],
            schema=Ablation.SCHEMAS["tables"],
            orient="row",
        ),
        users=int(first.details["users"]["all"]),
        cold_users=int(first.details["users"].get("cold", 0)),
        items=next((int(m.collisions.figures["items"]) for m in measured if m.collisions is not None), 0),
        seeds=sorted({each.seed for each in measured}),
        split=first.split,
        provenance=Provenance(parents=dict(_parents(measured))),
    )


def summarise(runs: pl.DataFrame, against: dict[str, str | None]) -> pl.DataFrame:
    """Take means over seeds, and differences paired by seed.

    Parameters
    ----------
    runs : DataFrame
        As in ``Ablation.runs``.
    against : dict
        Arm to the arm that it is compared with; arms without a partner have no difference.
    """
    keys = ["arm", "method", "seen", "metric"]
    partner = pl.DataFrame(
        {"arm": list(against), "against": list(against.values())},
        schema={"arm": pl.String, "against": pl.String},
    )
    own = runs.join(partner, on="arm", how="left", maintain_order="left")
    other = runs.select(against="arm", seed="seed", seen="seen", metric="metric", other="value")
    paired = own.join(
        other, on=["against", "seed", "seen", "metric"], how="left", maintain_order="left"
    ).with_columns(gap=pl.col("value") - pl.col("other"))
    summary = paired.group_by(*keys, "against", maintain_order=True).agg(
        seeds=pl.col("seed").count(),
        mean=pl.col("value").mean(),
        standard_error=_standard_error("value"),
        difference=pl.col("gap").mean(),
        difference_se=_standard_error("gap"),
    )
    factor = pl.Series(
        [float(stats.t.ppf((1 + COVERAGE) / 2, n - 1)) if n > 1 else None for n in summary["seeds"]],
        dtype=pl.Float64,
    )
    half = pl.col("difference_se") * factor
    return summary.with_columns(
        low=pl.col("difference") - half,
        high=pl.col("difference") + half,
        adopted=pl.col("difference") > ERRORS * pl.col("difference_se"),
    ).select(pl.col(name).cast(dtype) for name, dtype in Ablation.SCHEMAS["summary"].items())


def _standard_error(column: str) -> pl.Expr:
    return (pl.col(column).var(ddof=1) / pl.col(column).count()).sqrt()


def _check(measured: Sequence[Measured]) -> None:
    first = measured[0]
    users = _users(first)
    places = Counter((each.arm, each.seed) for each in measured)
    arms, seeds = {arm: None for arm, _ in places}, sorted({seed for _, seed in places})
    if missing := [run_name(arm, seed) for arm in arms for seed in seeds if (arm, seed) not in places]:
        raise ArtifactError(
            f"{missing} are missing: differences are paired by seed, so every arm is run with every seed"
        )
    for each in measured:
        name = run_name(each.arm, each.seed)
        if places[each.arm, each.seed] > 1:
            raise ArtifactError(f"{name!r} is there {places[each.arm, each.seed]} times: give it once")
        if each.against is not None and each.against not in arms:
            raise ArtifactError(
                f"{name!r} is compared with {each.against!r}, which is not among {list(arms)}"
            )
        if each.report.split != first.report.split:
            raise ArtifactError(
                f"{name!r} was evaluated on split {each.report.split[:12]}, {run_name(first.arm, first.seed)!r} on "
                f"{first.report.split[:12]}: their numbers do not compare; evaluate all arms on one split"
            )
        if name not in each.report.ranks["method"]:
            raise ArtifactError(
                f"the report given as {name!r} holds {each.report.ranks['method'].unique().sort().to_list()}"
            )
        if not _users(each).equals(users):
            raise ArtifactError(
                f"{name!r} was ranked for other users, or with seen items treated otherwise, than "
                f"{run_name(first.arm, first.seed)!r}: evaluate all arms with the same settings"
            )
        table, trained = each.collisions, each.recommender
        if table is not None and trained is not None and table.sids != trained.sids:
            raise ArtifactError(
                f"{name!r}: codes of SidTable {table.sids[:12]}, recommender of {trained.sids[:12]}: "
                "take those of one run"
            )


def _users(each: Measured) -> pl.DataFrame:
    own = each.report.ranks.filter(pl.col("method") == run_name(each.arm, each.seed))
    return own.select("seen", "user_id", "target").sort("seen", "user_id")


def _baselines(report: EvaluationReport) -> pl.DataFrame:
    rows = headline_rows(report.metrics).filter(pl.col("method").is_in(BASELINES))
    return rows.select(
        pl.col("method").alias("arm"),
        pl.lit(BASELINE).alias("method"),
        pl.lit(None, pl.Int64).alias("seed"),
        "seen",
        "metric",
        "value",
    )


def _values(each: Measured) -> pl.DataFrame:
    name = run_name(each.arm, each.seed)
    rows = headline_rows(each.report.metrics).filter(method=name)
    return rows.select(
        pl.lit(each.arm).alias("arm"),
        pl.lit(each.method).alias("method"),
        pl.lit(each.seed, pl.Int64).alias("seed"),
        "seen",
        "metric",
        "value",
    )


def _codes(each: Measured) -> pl.DataFrame:
    schema = Ablation.SCHEMAS["codes"]
    if each.collisions is None:
        return schema.to_frame()
    levels = each.collisions.levels
    return levels.select(
        pl.lit(each.arm).alias("arm"), pl.lit(each.seed, pl.Int64).alias("seed"), *list(schema)[2:]
    )


def _table_row(each: Measured) -> tuple[Any, ...]:
    assert each.collisions is not None
    figures = each.collisions.figures
    epoch = each.recommender.metrics.get(COLLAPSED_AT) if each.recommender is not None else None
    return (
        each.arm,
        each.seed,
        int(figures["distinct_sids"]),
        figures["collision_rate"],
        int(figures["largest_group"]),
        each.collisions.verdict,
        None if epoch is None else int(epoch),
        *map(figures.get, KNOWN_FIGURES),
    )


def _parents(measured: Sequence[Measured]) -> Iterator[tuple[str, str]]:
    for each in measured:
        for part in (each.report, each.collisions, each.recommender):
            if part is not None:
                yield f"{part.kind()} {run_name(each.arm, each.seed)}", part.fingerprint


def headline(ablation: Ablation, metrics: Sequence[str] = HEADLINE) -> dict[str, float]:
    """Return means, and differences with their errors, as ``arm/seen/metric/mean``; what is null is left out."""
    figures = ("mean", "standard_error", "difference", "difference_se")
    rows = ablation.summary.filter(pl.col("metric").is_in([*metrics, COLD])).iter_rows(named=True)
    return {
        f"{row['arm']}/{row['seen']}/{row['metric']}/{figure}": row[figure]
        for row in rows
        for figure in figures
        if row[figure] is not None
    }


def verdicts(ablation: Ablation, metric: str = DECISIVE) -> list[str]:
    """Say each difference in one sentence, and whether the arm is adopted."""
    rows = ablation.summary.filter(pl.col("metric") == metric, pl.col("difference").is_not_null())
    return [_verdict(row) for row in rows.iter_rows(named=True)]


def decision(ablation: Ablation) -> list[str]:
    """Say in a sentence a treatment of seen items who is adopted and who is not."""
    lines = []
    for seen, rows in ablation.summary.filter(
        pl.col("metric") == DECISIVE, pl.col("difference").is_not_null()
    ).group_by("seen", maintain_order=True):
        if len(ablation.seeds) == 1:
            lines.append(f"{DECISIVE}, {TITLES[str(seen[0])]}: nothing is adopted on one seed.")
            continue
        adopted, others = (rows.filter(adopted=is_so)["arm"].to_list() for is_so in (True, False))
        lines.append(
            f"{DECISIVE}, {TITLES[str(seen[0])]}: adopted {', '.join(adopted) or 'none'}; "
            f"not adopted {', '.join(others) or 'none'}."
        )
    return lines


def _verdict(row: dict[str, Any]) -> str:
    gap = row["difference"]
    place = f"{row['metric']}, {TITLES[row['seen']]}: {row['arm']}"
    side = f"{'above' if gap >= 0 else 'below'} {row['against']} by {short(abs(gap))}"
    if row["difference_se"] is None:
        return f"{place} is {side} with one seed, which says nothing about another: not adopted."
    interval = f"95 % interval {signed(row['low'])} to {signed(row['high'])} over {row['seeds']} seeds"
    reason = f"{'' if row['adopted'] else 'not '}more than {ERRORS} standard errors"
    if gap <= 0:
        return f"{place} is {side} ({interval}): not adopted."
    return f"{place} is {side} ({interval}), {reason}: {'' if row['adopted'] else 'not '}adopted."
