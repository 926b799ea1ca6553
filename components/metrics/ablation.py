"""Arms over seeds: one table of values and paired differences, one of codes, and who is adopted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

import polars as pl
from rich import box
from rich.table import Table
from rich.text import Text
from scipy import stats

from components.artifacts import Ablation, CollisionReport, EvaluationReport, RecommenderCheckpoint
from components.folders import ArtifactError, Provenance
from components.metrics.compare import HEADLINE, TITLES, short, signed
from components.metrics.ranking import COVERAGE
from components.metrics.report import BASELINES, SEEN

DIFFERENCES = ("R@10", "N@10")
"""Metrics whose differences tables show."""
DECISIVE = "N@10"
"""Metric that decides: the one that epochs are chosen by on validation."""
ERRORS = 2
"""An arm is adopted if its mean gain is more than so many standard errors."""
BASELINE = "baseline"
"""Method of what no seed changes."""
COLLAPSED = "sids/collapsed_at_epoch"
"""Figure that joint training leaves in a checkpoint if it stopped because the codes collapsed."""


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
    arms, seeds = (sorted({place[axis] for place in places}) for axis in (0, 1))
    if missing := [run_name(arm, seed) for arm in arms for seed in seeds if (arm, seed) not in places]:
        raise ArtifactError(
            f"{missing} are missing: differences are paired by seed, so every arm is run with every seed"
        )
    for each in measured:
        name = run_name(each.arm, each.seed)
        if places[each.arm, each.seed] > 1:
            raise ArtifactError(f"{name!r} is there {places[each.arm, each.seed]} times: give it once")
        if each.against is not None and each.against not in arms:
            raise ArtifactError(f"{name!r} is compared with {each.against!r}, which is not among {arms}")
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
    rows = report.metrics.filter(pl.col("method").is_in(BASELINES), pl.col("slice") == "all")
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
    rows = each.report.metrics.filter(pl.col("method") == name, pl.col("slice") == "all")
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
    epoch = each.recommender and each.recommender.metrics.get(COLLAPSED)
    return (
        each.arm,
        each.seed,
        int(figures["distinct_sids"]),
        figures["collision_rate"],
        int(figures["largest_group"]),
        each.collisions.verdict,
        None if epoch is None else int(epoch),
    )


def _parents(measured: Sequence[Measured]) -> Iterator[tuple[str, str]]:
    for each in measured:
        for part in (each.report, each.collisions, each.recommender):
            if part is not None:
                yield f"{part.kind()} {run_name(each.arm, each.seed)}", part.fingerprint


def headline(ablation: Ablation, metrics: Sequence[str] = HEADLINE) -> dict[str, float]:
    """Return means, and differences with their errors, as ``arm/seen/metric/mean``; what is null is left out."""
    figures = ("mean", "standard_error", "difference", "difference_se")
    rows = ablation.summary.filter(pl.col("metric").is_in(list(metrics))).iter_rows(named=True)
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


class Grid(NamedTuple):
    """A table before it is drawn."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    marked: list[bool]
    """Rows that stand out."""
    caption: str


def grids(ablation: Ablation) -> list[Grid]:
    """Lay the ablation out: values for each treatment of seen items, then codes."""
    blocks = [seen for seen in SEEN if seen in ablation.summary["seen"]]
    values = [_values_grid(ablation, seen) for seen in blocks]
    return [*values, _codes_grid(ablation)] if len(ablation.tables) else values


def tables(ablation: Ablation) -> list[Table]:
    """Draw the tables for a terminal of 120 columns."""
    return [_rich(grid) for grid in grids(ablation)]


def markdown_table(ablation: Ablation) -> str:
    """Write the tables as Markdown."""
    return "\n\n".join(map(_markdown, grids(ablation)))


def html_table(ablation: Ablation) -> str:
    """Write the tables as an HTML fragment with its own styles, for a page that has none."""
    sentences = "".join(f"<li>{escape(line)}</li>" for line in verdicts(ablation))
    return (
        '<div style="font:14px/1.45 system-ui,sans-serif;color:#222">'
        + "".join(map(_html, grids(ablation)))
        + (f'<ul style="padding-left:18px">{sentences}</ul></div>' if sentences else "</div>")
    )


def _values_grid(ablation: Ablation, seen: str) -> Grid:
    several = len(ablation.seeds) > 1
    rows, marked = [], []
    usual = _usual_partner(ablation)
    for (arm,), found in ablation.summary.filter(seen=seen).group_by("arm", maintain_order=True):
        by_metric = {row["metric"]: row for row in found.iter_rows(named=True)}
        decisive = by_metric[DECISIVE]
        cells = [short(by_metric[m]["mean"]) + _margin(by_metric[m]["standard_error"]) for m in HEADLINE]
        for metric in DIFFERENCES:
            row = by_metric[metric]
            half = None if row["high"] is None else row["high"] - row["difference"]
            cells.append("" if row["difference"] is None else signed(row["difference"]) + _margin(half))
        if decisive["difference"] is None:
            cells.append("")
        else:
            cells.append("yes" if decisive["adopted"] else "no")
        rows.append([str(arm), *cells])
        marked.append(decisive["adopted"] is True)
    error, interval = (" ± SE", " ± 95 %") if several else ("", "")
    return Grid(
        f"Seen items {seen}" if seen == "excluded" else "Seen items kept in the ranking",
        ["arm", *(m + error for m in HEADLINE), *(f"Δ {m}{interval}" for m in DIFFERENCES), "adopted"],
        rows,
        marked,
        _values_caption(ablation, usual),
    )


def _usual_partner(ablation: Ablation) -> str | None:
    """Return the arm that most arms are compared with."""
    pairs = ablation.summary.select("arm", "against").unique(maintain_order=True)["against"].drop_nulls()
    return Counter(pairs).most_common(1)[0][0] if len(pairs) else None


def _values_caption(ablation: Ablation, usual: str | None) -> str:
    seeds = ", ".join(map(str, ablation.seeds))
    pairs = ablation.summary.select("arm", "against").unique(maintain_order=True).drop_nulls()
    others = [f"{arm} to {against}" for arm, against in pairs.iter_rows() if against != usual]
    delta = f"Δ is the difference to {usual}" + (f" ({'; '.join(others)})" if others else "")
    if len(ablation.seeds) == 1:
        return (
            f"{ablation.users:,} test users, one seed ({seeds}): there is no error over seeds, and nothing can be "
            f"adopted; give more seeds. " + (f"{delta}. " if usual else "")
        ).strip()
    text = f"{ablation.users:,} test users; mean and standard error over seeds {seeds}. "
    if usual:
        text += (
            f"{delta}, paired by seed, with the half-width of its 95 % Student-t interval. "
            f"Adopted: Δ {DECISIVE} is more than {ERRORS} of its standard errors. "
        )
    return text + "Baselines have no seed. Other users would add to these errors."


def _codes_grid(ablation: Ablation) -> Grid:
    levels = ablation.codes.group_by("arm", "level", maintain_order=True).agg(
        pl.col("perplexity").mean(), pl.col("codebook_size").max()
    )
    found = {(row["arm"], row["level"]): row for row in levels.iter_rows(named=True)}
    numbers = sorted(set(levels["level"]))
    rows, marked = [], []
    for (arm,), table in ablation.tables.group_by("arm", maintain_order=True):
        cells = [
            f"{found[arm, level]['perplexity']:.1f} of {found[arm, level]['codebook_size']}"
            if (arm, level) in found
            else ""
            for level in numbers
        ]
        rows.append(
            [
                str(arm),
                *cells,
                f"{table['distinct'].mean():,.0f}",
                f"{table['collision_rate'].mean():.1%}",
                f"{table['largest_group'].max():,}",
                _state(table),
            ]
        )
        marked.append(False)
    return Grid(
        "Semantic IDs",
        ["arm", *(f"level {level}" for level in numbers), "distinct", "colliding", "largest", "state"],
        rows,
        marked,
        f"Of the tables that were evaluated, {ablation.items:,} items; means over seeds. level: perplexity of codes; "
        "distinct: strings of codes in use; colliding: items that share their codes; largest: most items of one "
        "string, at any seed. Collapsed at an epoch: training stopped there, an epoch before it was evaluated.",
    )


def _state(table: pl.DataFrame) -> str:
    """Say what the tables of one arm are, and whether training was stopped by a collapse."""
    verdicts = Counter(table["verdict"])
    state = (
        str(table["verdict"][0])
        if len(verdicts) == 1
        else ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    )
    epochs = table["collapsed_at_epoch"].drop_nulls()
    if not len(epochs):
        return state
    when = f"collapsed, epoch {', '.join(map(str, sorted(set(epochs))))}"
    part = "" if len(epochs) == len(table) else f" ({len(epochs)} of {len(table)} seeds)"
    return f"{when}{part}; kept: {state}"


def _margin(half: float | None) -> str:
    return "" if half is None else f" ± {short(half)}"


def _in_terminal(cell: str) -> Text:
    """Write a cell with its error in the background, a column narrower."""
    value, plus_minus, error = cell.partition(" ±")
    return Text(value).append(plus_minus + error.lstrip(), style="not bold dim")


def _rich(grid: Grid) -> Table:
    view = Table(
        title=grid.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        caption=grid.caption,
        caption_style="dim",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    for number, column in enumerate(grid.columns):
        if number == 0:
            view.add_column(column, no_wrap=True, overflow="ellipsis", max_width=22)
        else:
            text = column in ("adopted", "state")
            view.add_column(column, justify="left" if text else "right", no_wrap=column != "state")
    for cells, marked in zip(grid.rows, grid.marked, strict=True):
        view.add_row(*map(_in_terminal, cells), style="bold green" if marked else "")
    return view


def _markdown(grid: Grid) -> str:
    rules = ["---", *("---" if column in ("adopted", "state") else "--:" for column in grid.columns[1:])]
    lines = [f"| {' | '.join(row)} |" for row in (grid.columns, rules, *grid.rows)]
    return f"**{grid.title}**\n\n" + "\n".join(lines) + f"\n\n{grid.caption}"


def _html(grid: Grid) -> str:
    def cell(tag: str, column: str, text: str, style: str) -> str:
        side = "left" if column in ("arm", "adopted", "state") else "right"
        start = "0" if column == "arm" else "14px"
        return (
            f'<{tag} style="padding:4px 14px 4px {start};text-align:{side};white-space:nowrap;'
            f'font-variant-numeric:tabular-nums;{style}">{text}</{tag}>'
        )

    head = "".join(cell("th", c, escape(c), "border-bottom:2px solid #333") for c in grid.columns)
    body = []
    for cells, marked in zip(grid.rows, grid.marked, strict=True):
        style = "font-weight:600;color:#00684a" if marked else ""
        texts = (
            escape(text).replace(" ± ", ' <span style="color:#777;font-weight:400">± ')
            + ("</span>" if " ± " in text else "")
            for text in cells
        )
        row = "".join(cell("td", c, text, style) for c, text in zip(grid.columns, texts, strict=True))
        body.append(f"<tr>{row}</tr>")
    return (
        f'<h3 style="margin:18px 0 6px">{escape(grid.title)}</h3>'
        '<table style="border-collapse:collapse"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        f'<p style="font-size:12px;color:#777;max-width:62em">{escape(grid.caption)}</p>'
    )
