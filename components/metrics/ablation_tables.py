"""An ablation as tables: values and differences, cold items, codes, lengths; in a terminal, in Markdown and in HTML."""

from collections import Counter
from typing import Literal, NamedTuple

import polars as pl
from rich import box
from rich.table import Table
from rich.text import Text

from components.artifacts import Ablation
from components.metrics.ablation import DECISIVE, ERRORS, chance_adoption
from components.metrics.compare import HEADLINE, short, signed
from components.metrics.report import COLD, blocks_of

DIFFERENCES = ("R@10", "N@10")
"""Metrics whose differences are shown."""
STYLES = {"": "", "good": "bold green", "bad": "red"}


class Column(NamedTuple):
    """One column about lengths or reconstruction: a figure, or the same by item and by interaction."""

    title: str
    figures: tuple[str, ...]
    """Columns of ``Ablation.tables``."""
    places: int
    meaning: str
    """What the caption says of it."""


LENGTHS = (
    Column("codes item / draw", ("codes_per_item", "codes_per_interaction"), 2, "codes: without the suffix."),
    Column(
        "tokens per history",
        ("tokens_per_history",),
        1,
        "tokens per history: symbols of all events of a user, suffixes among them.",
    ),
    Column(
        "events in budget",
        ("events_in_budget",),
        1,
        "events in budget: the latest events of a user that fit into collisions.token_budget symbols.",
    ),
)
"""What tells something where SIDs differ in length."""
RECONSTRUCTION = Column(
    "D item / draw",
    ("reconstruction", "reconstruction_draw"),
    3,
    "D: squared distance, from 0 to 4, between an item's unit vector and what all its codes decode to.",
)
"""What tells something of SIDs of any length."""


class Grid(NamedTuple):
    """A table before it is drawn."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    marks: list[Literal["", "good", "bad"]]
    """How each row stands out."""
    caption: str


def grids(ablation: Ablation) -> list[Grid]:
    """Lay the ablation out: values for each treatment of seen items, cold items, codes, lengths and reconstruction."""
    values = [_values_grid(ablation, seen) for seen in blocks_of(ablation.summary["seen"])]
    cold = _cold_grid(ablation)
    values += [cold] if cold else []
    if not len(ablation.tables):
        return values
    lengths = _lengths_grid(ablation)
    return [*values, _codes_grid(ablation), *([lengths] if lengths else [])]


def tables(ablation: Ablation) -> list[Table]:
    """Draw the tables for a terminal of 120 columns."""
    return [_rich(grid) for grid in grids(ablation)]


def markdown_table(ablation: Ablation, longest: int | None = None) -> str:
    """Write the tables as Markdown; those at the end are left out if the text would be longer than ``longest``."""
    parts = [_markdown(grid) for grid in grids(ablation)]
    while len(parts) > 1 and longest is not None and len("\n\n".join(parts)) > longest:
        parts.pop()
    return "\n\n".join(parts)


def _values_grid(ablation: Ablation, seen: str) -> Grid:
    several = len(ablation.seeds) > 1
    rows: list[list[str]] = []
    marks: list[Literal["", "good", "bad"]] = []
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
        marks.append("good" if decisive["adopted"] else "")
    error, interval = (" ± SE", " ± 95 %") if several else ("", "")
    return Grid(
        f"Seen items {seen}" if seen == "excluded" else "Seen items kept in the ranking",
        ["arm", *(m + error for m in HEADLINE), *(f"Δ {m}{interval}" for m in DIFFERENCES), "adopted"],
        rows,
        marks,
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
            f"With {len(ablation.seeds)} seeds an arm without effect passes with probability "
            f"{short(chance_adoption(len(ablation.seeds)), 2)}; {len(pairs)} "
            f"{'arm was' if len(pairs) == 1 else 'arms were'} compared. "
        )
    return text + "Baselines have no seed. Other users would add to these errors."


def _cold_grid(ablation: Ablation) -> Grid | None:
    """Lay out R@10 on cold targets, a column a treatment of seen items; None if the split has none.

    A table of its own: beside the differences, a terminal has no room for it.
    """
    found = ablation.summary.filter(metric=COLD)
    if found.is_empty():
        return None
    blocks = blocks_of(found["seen"])
    rows = [
        [
            str(arm),
            *(
                short(row["mean"]) + _margin(row["standard_error"])
                for seen in blocks
                for row in of_arm.filter(seen=seen).iter_rows(named=True)
            ),
        ]
        for (arm,), of_arm in found.group_by("arm", maintain_order=True)
    ]
    error, over = (
        (" ± SE", "mean and standard error over seeds") if len(ablation.seeds) > 1 else ("", "one seed")
    )
    return Grid(
        "Cold items",
        ["arm", *(f"R@10, seen {seen}{error}" for seen in blocks)],
        rows,
        ["" for _ in rows],
        f"{ablation.cold_users:,} of {ablation.users:,} test users, those whose target training never met; {over}. "
        "What knows items by their interactions alone finds these by chance.",
    )


def _codes_grid(ablation: Ablation) -> Grid:
    levels = ablation.codes.group_by("arm", "level", maintain_order=True).agg(
        pl.col("perplexity").mean(), pl.col("codebook_size").max()
    )
    found = {(row["arm"], row["level"]): row for row in levels.iter_rows(named=True)}
    sizes = {
        level: set(rows["codebook_size"])
        for (level,), rows in levels.sort("level").group_by("level", maintain_order=True)
    }
    rows: list[list[str]] = []
    marks: list[Literal["", "good", "bad"]] = []
    means = ablation.tables.group_by("arm", maintain_order=True).agg(
        pl.col("distinct", "collision_rate").mean(), pl.col("largest_group").max()
    )
    for whole in means.iter_rows(named=True):
        arm = whole["arm"]
        cells = [arm]
        for level, several in sizes.items():
            row = found.get((arm, level))
            of = f" of {row['codebook_size']}" if row and len(several) > 1 else ""
            cells.append(f"{row['perplexity']:.1f}{of}" if row else "")
        cells += [
            f"{whole['distinct']:,.0f}",
            f"{whole['collision_rate']:.1%}",
            f"{whole['largest_group']:,}",
            _state(ablation.tables.filter(arm=arm)),
        ]
        rows.append(cells)
        marks.append("bad" if "collapsed" in cells[-1] or "stopped" in cells[-1] else "")
    titles = [
        f"level {level}" + (f" of {next(iter(size))}" if len(size) == 1 else "")
        for level, size in sizes.items()
    ]
    return Grid(
        "Semantic IDs",
        ["arm", *titles, "distinct", "colliding", "largest", "state"],
        rows,
        marks,
        f"The tables that were evaluated, {ablation.items:,} items, means over seeds. level: perplexity of its codes; "
        "distinct: strings of codes in use; colliding: items that share their codes; largest: most items of one "
        "string, at any seed. Stopped at an epoch: codes, or walks through them, collapsed in training there, and "
        "an epoch before it was evaluated.",
    )


def _lengths_grid(ablation: Ablation) -> Grid | None:
    """Lay out lengths if SIDs differ in them, and reconstruction if it is known; None if there is nothing to show.

    A table of its own: beside a column a level, a terminal has no room for these.
    """
    differ = (ablation.tables["codes_per_item"] != ablation.codes["level"].max()).any()
    known = ablation.tables.select(pl.all().count()).row(0, named=True)
    columns = [*(LENGTHS if differ else ()), RECONSTRUCTION]
    shown = [column for column in columns if any(known[name] for name in column.figures)]
    if not shown:
        return None
    names = [name for column in shown for name in column.figures]
    means = ablation.tables.group_by("arm", maintain_order=True).agg(pl.col(names).mean())
    rows = [
        [
            row["arm"],
            *(" / ".join(_figure(row[name], column.places) for name in column.figures) for column in shown),
        ]
        for row in means.iter_rows(named=True)
    ]
    return Grid(
        "Lengths and reconstruction" if differ else "Reconstruction",
        ["arm", *(column.title for column in shown)],
        rows,
        ["" for _ in rows],
        "The same SID tables, means over seeds. item: every item counts once; draw: once an interaction. "
        + " ".join(column.meaning for column in shown),
    )


def _figure(value: float | None, places: int) -> str:
    return "–" if value is None else short(value, places)


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
    when = f"stopped at epoch {', '.join(map(str, sorted(set(epochs))))}"
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
            view.add_column(column, max_width=22)
        else:
            text = column in ("adopted", "state")
            view.add_column(column, justify="left" if text else "right", no_wrap=column != "state")
    for cells, mark in zip(grid.rows, grid.marks, strict=True):
        view.add_row(*map(_in_terminal, cells), style=STYLES[mark])
    return view


def _markdown(grid: Grid) -> str:
    rules = ["---", *("---" if column in ("adopted", "state") else "--:" for column in grid.columns[1:])]
    lines = [f"| {' | '.join(row)} |" for row in (grid.columns, rules, *grid.rows)]
    return f"**{grid.title}**\n\n" + "\n".join(lines) + f"\n\n{grid.caption}"
