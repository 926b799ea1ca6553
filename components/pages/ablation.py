"""Arms over seeds: the figure, the tables and what is adopted."""

from base64 import b64encode
from io import BytesIO

from matplotlib.figure import Figure

from components.artifacts import Ablation
from components.metrics.ablation import verdicts
from components.metrics.ablation_tables import Grid, grids
from components.pages.html import Html, tag
from components.pages.page import Section, page, table

WORDS = ("arm", "adopted", "state")
"""Columns that hold words; the others hold figures and stand right."""


def ablation_page(ablation: Ablation, figure: Figure) -> Html:
    """Show arms side by side.

    Parameters
    ----------
    ablation : Ablation
        Arms over seeds.
    figure : Figure
        What is drawn of them; it becomes part of the page.
    """
    png = BytesIO()
    figure.savefig(png, format="png")
    drawn = tag(
        "img",
        alt="arms",
        style="max-width:100%",
        src=f"data:image/png;base64,{b64encode(png.getvalue()).decode()}",
    )
    said = [Section("Verdicts", [tag("ul", *(tag("li", line) for line in verdicts(ablation)))])]
    tables = [
        Section(grid.title, [tag("div.scroll", _table(grid))], note=grid.caption) for grid in grids(ablation)
    ]
    lead = f"{len(ablation.summary['arm'].unique()):,} rows, seeds {', '.join(map(str, ablation.seeds))}."
    return page("Ablation", [Section("Differences", [drawn]), *tables, *said], lead=lead)


def _table(grid: Grid) -> Html:
    numbers = [number for number, column in enumerate(grid.columns) if column not in WORDS]
    rows = [
        [tag("strong", cells[0]) if mark == "good" else cells[0], *cells[1:]]
        for cells, mark in zip(grid.rows, grid.marks, strict=True)
    ]
    return table(grid.columns, rows, numbers)
