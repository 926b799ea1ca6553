"""Methods over the windows of a log: one chart a method and metric, and the whole table."""

from collections.abc import Sequence

import polars as pl

from components.metrics.compare import TITLES
from components.metrics.report import blocks_of
from components.metrics.windows import CAPTION, METRICS, TITLE_ROW, Window, rows, skipped
from components.pages.figures import Interval, intervals
from components.pages.html import Html
from components.pages.page import Section, beside, facts, page, paragraph, table


def windows_page(windows: Sequence[Window], values: pl.DataFrame) -> Html:
    """Show what ``over_windows`` returned.

    Parameters
    ----------
    windows : sequence of Window
        All of them, skipped ones too.
    values : pl.DataFrame
        Values of those that were not skipped.
    """
    sections = [
        Section(f"Over time, {TITLES[seen]}", [beside(_charts(values.filter(seen=seen)), two=True)])
        for seen in blocks_of(values["seen"])
    ]
    sections.append(
        Section("All windows", [table(TITLE_ROW, rows(windows, values), numbers=(1, 2, 3, 6, 7))], CAPTION)
    )
    why = skipped(windows)
    if why:
        sections.append(Section("Skipped", map(paragraph, why)))
    done = len(windows) - len(why)
    return page(
        "The same pipeline, day after day",
        sections,
        "Each window knows nothing of what came after it: the data are read as they were on that day.",
        [facts([("windows", str(done)), ("skipped for want of data", str(len(why)))])],
    )


def _charts(values: pl.DataFrame) -> list[Html]:
    """Draw a chart for each method and metric, a row a window; the method of the most interest comes last."""
    return [
        intervals(
            f"{metric} of {method}",
            [
                Interval(f"{until:%Y-%m-%d}", value, low, high)
                for until, value, low, high in values.filter(metric=metric, method=method)
                .select("until", "value", "low", "high")
                .iter_rows()
            ],
        )
        for method in values["method"].unique(maintain_order=True)
        for metric in METRICS
    ]
