"""Methods side by side: one table, and differences paired user by user."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field
from rich import box
from rich.table import Table
from rich.text import Text

from components.artifacts import Comparison, EvaluationReport
from components.config import Config
from components.folders import ArtifactError, Provenance
from components.metrics.ranking import contributions, paired_bootstrap
from components.metrics.report import BASELINES, COLD, blocks_of, headline_rows

HEADLINE = ("R@5", "R@10", "N@5", "N@10")
TITLES = {
    "kept": "seen items kept in the ranking",
    "excluded": "seen items excluded",
}
COLD_MEANING = f" {COLD}: only users whose target training never met."


class CompareConfig(Config):
    """Settings of a comparison."""

    metrics: list[str] = Field(list(HEADLINE), min_length=1)
    """Metrics to take differences of: R@k, N@k or MRR."""
    resamples: int = Field(1000, ge=100)
    """Bootstrap resamples behind each 95 % interval."""
    seed: int = Field(0, ge=0)
    """Seed of the bootstrap."""


def compare(reports: Sequence[EvaluationReport], config: CompareConfig) -> Comparison:
    """Set methods side by side and take their paired differences.

    Baselines stand in every report and are taken once. Every method is compared with the baselines and with
    the methods of earlier reports: put the parent or the plainer method first.

    Raises
    ------
    ArtifactError
        No report, reports of different splits, users or treatments of seen items, or one method with two different
        rankings.
    """
    if not reports:
        raise ArtifactError("nothing to compare: give at least one report")
    for report in reports:
        if report.split != reports[0].split:
            raise ArtifactError(
                f"reports are of different splits ({reports[0].split[:12]} and {report.split[:12]}): "
                "their numbers do not compare; evaluate all methods on one split"
            )
        ours, theirs = (blocks_of(r.ranks["seen"]) for r in (reports[0], report))
        if ours != theirs:
            raise ArtifactError(
                f"reports rank with seen items {' and '.join(ours)}, and with seen items {' and '.join(theirs)}: "
                "evaluate all methods with the same evaluate.seen"
            )
    ranks, metrics = reports[0].ranks, reports[0].metrics
    for report in reports[1:]:
        ranks, metrics = _merge(ranks, metrics, report)
    methods = _in_order(ranks["method"].unique(maintain_order=True).to_list())
    order = pl.Enum(methods)
    sides = list(_sides(ranks, methods, config.metrics))
    columns = [side.contributions for side in sides]
    rows = []
    for later, earlier in _pairs(sides):
        gap = paired_bootstrap(columns[later], columns[earlier], resamples=config.resamples, seed=config.seed)
        names = zip(config.metrics, *(column.tolist() for column in gap), strict=True)
        rows += [(sides[later].method, sides[earlier].method, sides[later].seen, *row) for row in names]
    return Comparison(
        metrics=metrics.sort(pl.col("method").cast(order), maintain_order=True),
        differences=pl.DataFrame(rows, schema=Comparison.SCHEMAS["differences"], orient="row"),
        reports=[report.fingerprint for report in reports],
        provenance=Provenance(
            config=config.model_dump(mode="json"),
            parents={f"report {i + 1}": report.fingerprint for i, report in enumerate(reports)},
            seed=config.seed,
        ),
    )


def verdicts(comparison: Comparison, metrics: Sequence[str] = ("R@10", "N@10")) -> list[str]:
    """Say each difference in one sentence; only an interval that leaves out 0 is called a difference."""
    return [
        verdict(*row) for row in comparison.differences.filter(pl.col("metric").is_in(metrics)).iter_rows()
    ]


def verdict(
    method: str, baseline: str, seen: str, metric: str, difference: float, low: float, high: float
) -> str:
    """Say one difference in a sentence."""
    place, interval = f"{metric}, {TITLES[seen]}", f"95 % interval {signed(low)} to {signed(high)}"
    if low > 0 or high < 0:
        side = "above" if low > 0 else "below"
        return f"{place}: {method} is {side} {baseline} by {short(abs(difference))} ({interval})."
    return f"{place}: {method} cannot be told apart from {baseline} ({signed(difference)}, {interval})."


def table(comparison: Comparison, metrics: Sequence[str] = HEADLINE) -> Table:
    """Lay the comparison out for a terminal of 100 columns; in a narrower one intervals go below their values.

    The best value of each column stands out, apart for seen items kept and excluded: the two never compare.
    """
    wide = _wide(comparison, metrics)
    cold = COLD in wide.columns
    view = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        caption="value and 95 % interval over test users; best of its block in green"
        + (f".{COLD_MEANING}" if cold else ""),
        caption_style="dim",
        caption_justify="left",
        pad_edge=False,
        padding=(0, 0 if cold else 1, 0, 1),  # one column more in the same 80
    )
    view.add_column("method", no_wrap=True, overflow="ellipsis", max_width=18)
    view.add_column("seen", no_wrap=True, style="dim")
    for metric in wide.columns[2:]:
        view.add_column(metric, justify="right")
    for block in blocks_of(wide["seen"]):
        rows = wide.filter(pl.col("seen") == block)
        for number, row in enumerate(rows.iter_rows(named=True)):
            cells = [_cell(row[metric], best=row[metric]["best"]) for metric in wide.columns[2:]]
            view.add_row(row["method"], block, *cells, end_section=number == len(rows) - 1)
    return view


def headline(comparison: Comparison, metrics: Sequence[str] = HEADLINE) -> dict[str, float]:
    """Return the values over all users, and on cold targets, as ``method/seen/metric``."""
    rows = headline_rows(comparison.metrics).filter(pl.col("metric").is_in([*metrics, COLD]))
    name = pl.concat_str("method", "seen", "metric", separator="/")
    return dict(rows.select(name, "value").iter_rows())


def markdown_table(comparison: Comparison, metrics: Sequence[str] = HEADLINE) -> str:
    """Lay the comparison out as Markdown, with the 95 % intervals."""
    wide = _wide(comparison, metrics)
    columns = wide.columns[2:]
    lines = ["| method | seen | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for block in blocks_of(wide["seen"]):
        for row in wide.filter(pl.col("seen") == block).iter_rows(named=True):
            cells = [f"{short(row[metric]['value'])} ({_interval(row[metric])})" for metric in columns]
            method = row["method"].replace("|", "\\|")
            lines.append(f"| {method} | {block} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def html_table(comparison: Comparison, metrics: Sequence[str] = HEADLINE) -> str:
    """Lay the comparison out as an HTML fragment with its own styles, for a page that has none.

    Ink and rules are those of the page around it, light or dark; the best cells have the class ``best``, by which a
    dark page gives them a lighter green.
    """
    wide = _wide(comparison, metrics)
    columns = wide.columns[2:]
    number = "padding:4px 14px;text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap"
    name = "padding:4px 14px 4px 0;text-align:left"
    head = "".join(
        f'<th style="{number if i else name};border-bottom:2px solid">{escape(title)}</th>'
        for i, title in enumerate(["method", *columns])
    )
    best = ' class="best"'
    body = []
    for block in blocks_of(wide["seen"]):
        body.append(
            f'<tr><td colspan="{len(columns) + 1}" style="padding:12px 0 3px;font-style:italic;'
            f'border-bottom:1px solid">{escape(TITLES[block])}</td></tr>'
        )
        for row in wide.filter(pl.col("seen") == block).iter_rows(named=True):
            cells = "".join(
                f'<td{best if row[m]["best"] else ""} style="{number}'
                f'{";font-weight:600;color:#00684a" if row[m]["best"] else ""}">'
                f"{short(row[m]['value'])}"
                f'<span style="font-weight:400;font-size:85%"> {_interval(row[m])}</span></td>'
                for m in columns
            )
            body.append(f'<tr><td style="{name}">{escape(row["method"])}</td>{cells}</tr>')
    apart = " The two blocks do not compare with one another." if len(blocks_of(wide["seen"])) > 1 else ""
    return (
        '<table style="border-collapse:collapse;font:14px/1.4 system-ui,sans-serif;color:inherit">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        '<p style="font:12px system-ui,sans-serif">Value and 95 % interval over test users; '
        f"best of its block in green.{COLD_MEANING if COLD in columns else ''}{apart}</p>"
    )


def short(value: float, places: int = 4) -> str:
    """Write a fraction without its leading zero."""
    text = f"{value:.{places}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def signed(value: float) -> str:
    """Write a difference with its sign; a minus sign, not a hyphen."""
    return ("+" if value >= 0 else "−") + short(abs(value))


class _Side(NamedTuple):
    method: str
    seen: str
    contributions: NDArray[np.float64]


def _merge(
    ranks: pl.DataFrame, metrics: pl.DataFrame, report: EvaluationReport
) -> tuple[pl.DataFrame, pl.DataFrame]:
    known = ranks["method"].unique()
    again = pl.col("method").is_in(known.implode())
    for frame, other in ((ranks, report.ranks), (metrics, report.metrics)):
        theirs = other.filter(again)
        for method in theirs["method"].unique(maintain_order=True):
            same = pl.col("method") == method
            if not frame.filter(same).equals(theirs.filter(same)):
                raise ArtifactError(
                    f"two reports hold different results of {method!r}: name the methods apart, "
                    "and evaluate the baselines once for all"
                )
    return pl.concat([ranks, report.ranks.filter(~again)]), pl.concat(
        [metrics, report.metrics.filter(~again)]
    )


def _in_order(methods: list[str]) -> list[str]:
    return [m for m in BASELINES if m in methods] + [m for m in methods if m not in BASELINES]


def _sides(ranks: pl.DataFrame, methods: list[str], metrics: Sequence[str]) -> Iterator[_Side]:
    """Give every method's contributions with the users in one order."""
    users = None
    for seen in blocks_of(ranks["seen"]):
        for method in methods:
            rows = ranks.filter(pl.col("method") == method, pl.col("seen") == seen).sort("user_id")
            if users is not None and not rows["user_id"].equals(users):
                raise ArtifactError(
                    f"{method!r} with seen items {seen} was ranked for other users than the rest"
                )
            users = rows["user_id"]
            yield _Side(method, seen, contributions(rows["rank"].fill_null(0).to_numpy(), metrics))


def _pairs(sides: list[_Side]) -> Iterator[tuple[int, int]]:
    for earlier, later in combinations(range(len(sides)), 2):
        if sides[earlier].seen == sides[later].seen and sides[later].method not in BASELINES:
            yield later, earlier


def _wide(comparison: Comparison, metrics: Sequence[str]) -> pl.DataFrame:
    """One row a method and treatment of seen items; a struct of value, low, high, best for each metric.

    The metrics stand in the order given, behind them R@10 on cold targets if the reports have it.
    """
    rows = headline_rows(comparison.metrics).filter(pl.col("metric").is_in([*metrics, COLD]))
    found = set(rows["metric"])
    missing = sorted(set(metrics) - found)
    if missing:
        raise ValueError(
            f"the reports hold no {missing}; they hold {sorted(set(comparison.metrics['metric']))}"
        )
    best = (pl.col("value") == pl.col("value").max().over("seen", "metric")).alias("best")
    return (
        rows.with_columns(cell=pl.struct("value", "low", "high", best))
        .pivot(on="metric", index=["method", "seen"], values="cell")
        .select("method", "seen", *metrics, *found.intersection([COLD]))
    )


def _interval(cell: dict[str, Any]) -> str:
    low, high = cell["low"], cell["high"]
    return "" if low is None or high is None else f"{short(low, 3)}–{short(high, 3)}"


def _cell(cell: dict[str, Any], *, best: bool) -> Text:
    value = Text(short(cell["value"]), style="bold green" if best else "bold")
    return value.append(f" {_interval(cell)}", style="not bold dim default")
