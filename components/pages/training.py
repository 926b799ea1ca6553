"""How a training went: what was logged over its steps, and what the kept epoch says."""

import re
from collections.abc import Iterator, Mapping, Sequence

import polars as pl

from components.pages.figures import Curve, lines
from components.pages.html import Html, number, words
from components.pages.page import Section, badge, beside, facts, page, paragraph, table

LEVEL = r"/(?:level)?(\d+)$"
"""End of the name of a figure that there is one of each level."""
HEADS = {
    "": "Validation",
    "train": "Training",
    "sids": "Semantic IDs",
    "items": "Items",
    "probe": "Probe of fixed length",
}
NOTES = {
    "": "At the end of each epoch that was validated; loss is the mean over its batches.",
    "train": "Means since the last point.",
}


def training_page(
    title: str,
    history: Sequence[tuple[int, Mapping[str, float]]],
    figures: Mapping[str, float],
    kept: int,
    top: Sequence[tuple[str, str]] = (),
    collapsed: str = "",
) -> Html:
    """Show curves of everything that was logged, and the figures of what was kept.

    Figures of all levels share a chart; all others have one of their own.

    Parameters
    ----------
    title : str
        Heading.
    history : sequence of (step, values)
        As logged; not every step has every name. Of a resumed training: since it was resumed.
    figures : mapping of str to float
        Those of the kept epoch.
    kept : int
        Step of the kept state.
    top : sequence of (what, figure)
        Facts that stand first.
    collapsed : str
        Why training was stopped; empty where it was not.
    """
    points = _points(history)
    sections = [
        Section(
            HEADS.get(head, words(head).capitalize()),
            [beside(_panels(found, kept))],
            NOTES.get(head, ""),
        )
        for head, found in _by_head(points)
        if found["step"].n_unique() > 1
    ]
    lead = f"The dashed line is the kept state, step {kept:,}." if sections else ""
    warning = [badge("collapsed", warn=True), paragraph(collapsed)] if collapsed else []
    return page(
        title, [*sections, Section("What was kept", [_figures(figures)])], lead, [*warning, facts(top)]
    )


def _points(history: Sequence[tuple[int, Mapping[str, float]]]) -> pl.DataFrame:
    """One row a logged value: step, name, value; finite, in the order of steps, each once."""
    rows = [(step, name, float(value)) for step, values in history for name, value in values.items()]
    return (
        pl.DataFrame(rows, schema={"step": pl.Int64, "name": pl.String, "value": pl.Float64}, orient="row")
        # The score only puts epochs in order.
        .filter(~pl.col("name").is_in(["epoch", "keep/score"]), pl.col("value").is_finite())
        .unique(["step", "name"], keep="first", maintain_order=True)
        .sort("step", maintain_order=True)
    )


def _by_head(points: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """Split by what stands before the first slash; figures of the validation, which have none, come first."""
    parts = points.with_columns(
        panel=pl.col("name").str.replace(LEVEL, ""), level=pl.col("name").str.extract(LEVEL)
    ).with_columns(
        head=pl.when(pl.col("name").str.starts_with("train/"))
        .then(pl.lit("train"))
        .otherwise(pl.col("panel").str.extract("^([^/]*)/").fill_null(""))
    )
    for part in sorted(
        parts.partition_by("head", maintain_order=True), key=lambda part: part["head"][0] != ""
    ):
        yield part["head"][0], part


def _panels(points: pl.DataFrame, kept: int) -> Iterator[Html]:
    """Draw one chart a figure, with a curve a level where it has levels."""
    for panel in points.partition_by("panel", maintain_order=True):
        name, head = panel["panel"][0], panel["head"][0]
        # train/level1 is the loss of the first code.
        title = "loss of each code" if name == head else words(name.removeprefix(f"{head}/"))
        levels = panel.drop_nulls("level")
        curves = [
            Curve(curve["level"][0] or "", curve["step"].to_list(), curve["value"].to_list())
            for curve in panel.partition_by("level", maintain_order=True)
        ]
        last = curves[0].y[-1]
        note = "by level" if len(levels) else f"last {number(last)}"
        yield lines(title, sorted(curves, key=lambda curve: int(curve.label or 0)), note, kept=kept)


def _figures(figures: Mapping[str, float]) -> Html:
    """Set out figures, those of all levels in one row."""
    rows: dict[str, dict[str, str]] = {}
    for name, value in figures.items():
        level = re.search(LEVEL, name)
        rows.setdefault(re.sub(LEVEL, "", name), {})[level[1] if level else ""] = number(value)
    levels = sorted({level for row in rows.values() for level in row} - {""}, key=int)
    return table(
        ["figure", "value", *(f"level {level}" for level in levels)],
        [[words(name), *(row.get(level, "") for level in ["", *levels])] for name, row in rows.items()],
        range(1, 2 + len(levels)),
    )
