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
MARKS = {"good": "strong.best", "bad": "span.warn"}
"""How the name of an arm that is adopted, or whose codes collapsed, stands out."""


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
    figure.savefig(png, format="png", transparent=True)
    drawn = tag(
        "img",
        alt="Values of the arms by the number of strings of codes that tell their items apart",
        src=f"data:image/png;base64,{b64encode(png.getvalue()).decode()}",
    )
    lines = verdicts(ablation)
    said = [Section("Verdicts", [tag("ul", *(tag("li", line) for line in lines))])] if lines else []
    tables = [Section(grid.title, [_table(grid)], note=grid.caption) for grid in grids(ablation)]
    seeds = f"seed{'s' * (len(ablation.seeds) > 1)} {', '.join(map(str, ablation.seeds))}"
    lead = (
        f"{ablation.summary['arm'].n_unique():,} arms and baselines, {seeds}, {ablation.users:,} test users."
    )
    return page("Ablation", [Section("Values and codes", [drawn]), *tables, *said], lead=lead)


def _table(grid: Grid) -> Html:
    numbers = [number for number, column in enumerate(grid.columns) if column not in WORDS]
    rows = [
        [tag(MARKS[mark], cells[0]) if mark else cells[0], *cells[1:]]
        for cells, mark in zip(grid.rows, grid.marks, strict=True)
    ]
    return table(grid.columns, rows, numbers)
