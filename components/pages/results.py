"""How well items were recommended: values with intervals, slices, and recommendations with names.

Shapes: U test users, k length of a list.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from components.artifacts import Comparison, EvaluationReport, ItemCatalog, SequenceSplit
from components.config import require
from components.metrics.compare import TITLES, html_table, short, signed
from components.metrics.report import blocks_of
from components.pages.figures import Interval, intervals
from components.pages.html import Html, check_catalog, item_names, join, number, percent, tag
from components.pages.page import Section, beside, cards, facts, page, table

SHOWN = ("R@10", "N@10")
"""Metrics that are drawn."""
EXAMPLES = 6
"""Users shown whose target is in the shown part of their list, and as many whose target is not."""
LISTED = 10
"""Places of a list that are shown; a target among them is a hit."""
RECENT = 6
"""Latest events of a history that are shown."""
SLICES = {
    "all": "all users",
    "head": "targets among the most popular items",
    "tail": "targets among the others",
    "cold": "targets that training never met",
}


def results_page(
    name: str,
    report: EvaluationReport,
    split: SequenceSplit,
    catalog: ItemCatalog,
    items_Uk: NDArray[np.int64],
    seen: str,
) -> Html:
    """Show a method beside the baselines, by slice, and what it recommends to some users.

    Parameters
    ----------
    name : str
        The method; the report names it so.
    report : EvaluationReport
        Of the method and the baselines.
    split : SequenceSplit
        Where test users come from.
    catalog : ItemCatalog
        Names of the items.
    items_Uk : array
        (U, k) the method's lists for the test users, with seen items treated as ``seen`` says.
    seen : str
        "kept" or "excluded".

    Raises
    ------
    ValueError
        The lists are not one a test user, or the split is of another catalogue.
    """
    check_catalog(catalog, split.catalog, "results_page")
    require(
        len(items_Uk) == len(split.test),
        f"results_page: {len(items_Uk)} lists for {len(split.test)} test users; give one a user, in their order",
    )
    own = report.metrics.filter(method=name)
    found = own.filter(slice="all", seen=seen)
    values = dict(found.select("metric", "value").iter_rows())
    top = [(f"{metric}, {TITLES[seen]}", short(value)) for metric, value in values.items() if metric in SHOWN]
    coverage = [
        (f"of the catalogue recommended ({m})", percent(v)) for m, v in values.items() if m.startswith("cov")
    ]
    charts = [
        chart for block in blocks_of(report.metrics["seen"]) for chart in _charts(report.metrics, block)
    ]
    hits, misses = _choose(items_Uk, split)
    return page(
        f"Results of {name}",
        [
            Section(
                "Beside the baselines",
                [beside(charts, two=True)],
                "Mean over test users and its 95 % interval.",
            ),
            Section("By target", [_slices(own)]),
            Section(
                "Found",
                [cards(_examples(hits, items_Uk, split, catalog))],
                _note(hits, items_Uk, split, "is", seen),
            ),
            Section(
                "Missed",
                [cards(_examples(misses, items_Uk, split, catalog))],
                _note(misses, items_Uk, split, "is not", seen),
            ),
        ],
        f"{len(split.test):,} test users, the whole catalogue of {split.num_items:,} items ranked.",
        [facts([("test users", number(len(split.test))), *top, *coverage])],
    )


def comparison_page(comparison: Comparison) -> Html:
    """Show methods side by side, and in sentences which differences are more than chance."""
    charts = [
        chart
        for block in blocks_of(comparison.metrics["seen"])
        for chart in _charts(comparison.metrics, block)
    ]
    return page(
        "Comparison",
        [
            Section("Values", [tag("div.scroll", Html(html_table(comparison)))]),
            Section("Pictures", [beside(charts, two=True)], "Mean over test users and its 95 % interval."),
            Section(
                "Differences",
                [_differences(comparison)],
                "Paired user by user; only where the 95 % interval leaves out 0 is a method called above or below.",
            ),
        ],
        "Every method ranked the same users' targets.",
    )


def _differences(comparison: Comparison) -> Html:
    def told(low: float, high: float) -> Html | str:
        if low > 0 or high < 0:
            return tag("span.accent", "above" if low > 0 else "below")
        return "cannot be told apart"

    rows = comparison.differences.filter(pl.col("metric").is_in(SHOWN))
    return table(
        ["method", "against", "seen items", "metric", "difference", "95 % interval", ""],
        [
            [method, baseline, seen, metric, signed(gap), f"{signed(low)} to {signed(high)}", told(low, high)]
            for method, baseline, seen, metric, gap, low, high in rows.iter_rows()
        ],
        [4, 5],
    )


def _charts(metrics: pl.DataFrame, seen: str) -> Iterator[Html]:
    """Draw one chart a metric, a row a method."""
    rows = metrics.filter(slice="all", seen=seen)
    for metric in SHOWN:
        found = rows.filter(metric=metric)
        if len(found):
            yield intervals(
                metric,
                [Interval(*row) for row in found.select("method", "value", "low", "high").iter_rows()],
                TITLES[seen],
            )


def _slices(own: pl.DataFrame) -> Html:
    """Lay out the values of one method, a row a slice, a column a metric."""
    rows = own.filter(~pl.col("metric").str.starts_with("coverage"))
    metrics = rows["metric"].unique(maintain_order=True).to_list()
    blocks = rows.partition_by("seen", "slice", maintain_order=True)

    def cell(found: dict[str, Any] | None) -> Html | str:
        if found is None:
            return ""
        low, high = found["low"], found["high"]
        interval = "" if low is None or high is None else f" {short(low, 3)}–{short(high, 3)}"
        return join([short(found["value"]), tag("div.soft", interval)])

    return table(
        ["users", "seen items", *metrics],
        [
            [
                SLICES.get(block["slice"][0], block["slice"][0]),
                block["seen"][0],
                *(cell(by_metric.get(metric)) for metric in metrics),
            ]
            for block in blocks
            for by_metric in [{row["metric"]: row for row in block.iter_rows(named=True)}]
        ],
        range(2, 2 + len(metrics)),
    )


def _found(items_Uk: NDArray[np.int64], split: SequenceSplit) -> NDArray[np.bool_]:
    targets = split.test["target"].to_numpy().astype(np.int64)
    hit: NDArray[np.bool_] = (items_Uk[:, :LISTED] == targets[:, None]).any(axis=1)
    return hit


def _choose(items_Uk: NDArray[np.int64], split: SequenceSplit) -> tuple[list[int], list[int]]:
    """Choose rows evenly spaced among the hits and among the misses: by order, not by looks."""
    hit = _found(items_Uk, split)
    hits, misses = (
        rows[np.unique(np.linspace(0, len(rows) - 1, EXAMPLES).astype(int))].tolist() if len(rows) else []
        for rows in (np.flatnonzero(hit), np.flatnonzero(~hit))
    )
    return hits, misses


def _note(rows: Sequence[int], items_Uk: NDArray[np.int64], split: SequenceSplit, how: str, seen: str) -> str:
    hits = int(_found(items_Uk, split).sum())
    count = hits if how == "is" else len(split.test) - hits
    return (
        f"{len(rows)} of {count:,} users whose target {how} among the first {LISTED} places, {TITLES[seen]}; evenly "
        "spaced, not chosen. Histories with the latest first."
    )


def _examples(
    rows: Sequence[int], items_Uk: NDArray[np.int64], split: SequenceSplit, catalog: ItemCatalog
) -> Iterator[Html]:
    for row in rows:
        user, history, target = split.test.row(row)
        listed = [item for item in items_Uk[row, :LISTED].tolist() if 0 <= item < catalog.num_items]
        recent = history[::-1][:RECENT]
        more = len(history) - len(recent)
        yield tag(
            "div",
            tag("h3", f"User {user}"),
            tag("p.note", "History" + (f", and {more:,} earlier" if more else "")),
            tag("ol.soft", *(tag("li", name) for name in item_names(catalog, recent))),
            tag("p.note", "Recommended"),
            tag("ol", *_places(listed, target, catalog)),
            tag("p.note", "Target", _place(items_Uk[row], target)),
            tag("ol", *(tag("li", name) for name in item_names(catalog, [target]))),
        )


def _place(items_k: NDArray[np.int64], target: int) -> str:
    found = np.flatnonzero(items_k == target)
    return f", place {found[0] + 1}" if len(found) else f", not among {len(items_k)}"


def _places(listed: Sequence[int], target: int, catalog: ItemCatalog) -> Iterator[Html]:
    """Write a list; the target stands out by colour, weight and sign."""
    for place, (item, name) in enumerate(zip(listed, item_names(catalog, listed), strict=True), start=1):
        if item == target:
            yield tag("li.accent", tag("span", str(place)), name, tag("span", "✓"))
        else:
            yield tag("li", tag("span", str(place)), name)
