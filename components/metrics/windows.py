"""The same pipeline at several moments of one log: which moments have enough data, and methods over time."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table

from components.artifacts import Comparison
from components.config import Config, require
from components.data.ingest import IngestConfig, read, settle
from components.data.raw import DataError
from components.data.splits import SplitConfig, hold_out
from components.data.times import Moment
from components.metrics.compare import TITLES, short
from components.metrics.figures import FAINT, GREY, INK, LINES
from components.metrics.report import BASELINES, blocks_of

METRICS = ("R@10", "N@10")
"""What is followed over time."""
COLOURS = {"popularity": GREY, "itemknn": LINES[4]}


class Window(Config):
    """A moment, and what the log holds of it. Counts of a skipped one are null."""

    until: Moment
    """End of the test window; nothing later is read."""
    events: int | None = None
    """Events of the log as it was then."""
    items: int | None = None
    """Items of the catalogue as it was then."""
    new_items: int | None = None
    """Items that the last window before it, of those not skipped, did not have; null in the first of them."""
    test_users: int | None = None
    """Users with a target in the test window."""
    skipped: str = ""
    """Why there is too little data, in the words of the stage that would fail."""


def moments(first: datetime, last: datetime, every_days: int) -> list[datetime]:
    """List the moments from the first, so many days apart, that are not after the last.

    Raises
    ------
    ValueError
        The order is wrong, or the step is not positive.
    """
    require(every_days >= 1, f"every_days must be >= 1, got {every_days}")
    require(first <= last, f"first must not be after last, got {first} and {last}")
    step = timedelta(days=every_days)
    return [first + k * step for k in range((last - first) // step + 1)]


def survey(ingest: IngestConfig, split: SplitConfig, ends: Sequence[datetime]) -> list[Window]:
    """Say of every moment what ingestion and split would find then. The source is read once.

    Parameters
    ----------
    ingest : IngestConfig
        Source and rules, ``until`` unset.
    split : SplitConfig
        Protocol by_time, ``until`` unset.
    ends : sequence of datetime
        The moments, ascending, with a time zone.

    Raises
    ------
    DataError
        The data break a rule at the last moment, whatever the amounts; or no moment at all has enough data.
    """
    raw = read(ingest.source, ingest.malformed)
    # Earlier logs are parts of the last: what is wrong with the data themselves is wrong there, and raised here. What
    # then goes wrong at a moment is for want of data.
    settle(raw, ingest.model_copy(update={"until": ends[-1]}))
    windows, before = [], None
    for end in ends:
        try:
            log, catalog = settle(raw, ingest.model_copy(update={"until": end}))
            held = hold_out(log, catalog, split.model_copy(update={"until": end}))
        except DataError as error:
            windows.append(Window(until=end, skipped=str(error)))
            continue
        items = catalog.items["raw_id"]
        windows.append(
            Window(
                until=end,
                events=len(log.events),
                items=len(items),
                new_items=None if before is None else int((~items.is_in(before.implode())).sum()),
                test_users=len(held.test),
            )
        )
        before = items
    if all(window.skipped for window in windows):
        raise DataError(f"none of {len(windows)} windows has enough data; the last: {windows[-1].skipped}")
    return windows


def over_windows(windows: Sequence[Window], comparisons: Sequence[Comparison]) -> pl.DataFrame:
    """Put the values of all windows into one frame.

    Parameters
    ----------
    windows : sequence of Window
        All of them.
    comparisons : sequence of Comparison
        One for each window that was not skipped, in their order.

    Returns
    -------
    pl.DataFrame
        ``until``, then the columns of ``Comparison.metrics``: ``METRICS`` over all test users.

    Raises
    ------
    ValueError
        The two do not fit.
    """
    kept = [window for window in windows if not window.skipped]
    require(
        len(kept) == len(comparisons),
        f"{len(kept)} windows were not skipped, and there are {len(comparisons)} comparisons: give one for each",
    )
    return pl.concat(
        comparison.metrics.filter(pl.col("slice") == "all", pl.col("metric").is_in(METRICS)).select(
            pl.lit(window.until).alias("until"), pl.all()
        )
        for window, comparison in zip(kept, comparisons, strict=True)
    )


TITLE_ROW = ("until", "users", "items", "new", "seen", "method", *METRICS)


def rows(windows: Sequence[Window], values: pl.DataFrame) -> list[list[str]]:
    """Write the table's cells below ``TITLE_ROW``; what holds of a whole window stands in its first row alone."""
    cells = values.with_columns(cell=_cell()).pivot(
        on="metric", index=["until", "seen", "method"], values="cell", maintain_order=True
    )
    lines = []
    for window in windows:
        head = [f"{window.until:%Y-%m-%d}", *map(_count, (window.test_users, window.items, window.new_items))]
        if window.skipped:
            lines.append([*head, "", "skipped", *("–" for _ in METRICS)])
        for seen in blocks_of(values["seen"]):
            for row in cells.filter(until=window.until, seen=seen).iter_rows(named=True):
                lines.append([*head, seen, row["method"], *(row[metric] for metric in METRICS)])
                head = [""] * len(head)
    return lines


def skipped(windows: Sequence[Window]) -> list[str]:
    """Say for each skipped window why."""
    return [f"{window.until:%Y-%m-%d} skipped: {window.skipped}" for window in windows if window.skipped]


CAPTION = (
    "until: nothing at or after this day was read. users: with a target in the test window before it. "
    "new: items that the last window before it, of those not skipped, did not have. "
    "Value and 95 % interval over test users."
)


def table(windows: Sequence[Window], values: pl.DataFrame) -> Table:
    """Lay all windows out for a terminal of 100 columns."""
    view = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        caption=CAPTION,
        caption_style="dim",
        caption_justify="left",
        pad_edge=False,
    )
    for title in TITLE_ROW:
        side = "left" if title in ("until", "seen", "method") else "right"
        view.add_column(title, justify=side, no_wrap=True)  # type: ignore[arg-type]
    lines = rows(windows, values)
    for line, following in zip(lines, [*lines[1:], [""]], strict=True):
        view.add_row(*line, end_section=bool(following[0]))
    return view


def markdown_table(windows: Sequence[Window], values: pl.DataFrame) -> str:
    """Lay all windows out as Markdown, and say why some were skipped."""
    lines = [TITLE_ROW, ("---",) * len(TITLE_ROW), *rows(windows, values)]
    return "\n\n".join(["\n".join(f"| {' | '.join(line)} |" for line in lines), *skipped(windows), CAPTION])


def windows_figure(windows: Sequence[Window], values: pl.DataFrame) -> Figure:
    """Draw every method over the windows with its 95 % interval: a row a treatment of seen items, a column a metric."""
    blocks = blocks_of(values["seen"])
    methods = values["method"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(5.2 * len(METRICS), 0.9 + 2.6 * len(blocks)), dpi=120)
    figure.set_layout_engine("constrained", wspace=0.06)
    axes = figure.subplots(len(blocks), len(METRICS), squeeze=False, sharex=True)
    for row, seen in enumerate(blocks):
        for column, metric in enumerate(METRICS):
            _draw(axes[row, column], windows, values.filter(seen=seen, metric=metric), methods)
            axes[row, column].set_title(f"{metric}, {TITLES[seen]}", loc="left", fontsize=10, color=INK)
    handles = [
        Line2D([], [], color=_colour(method, methods), marker="o", markersize=5, label=method)
        for method in methods
    ]
    note = "mean over the test users of each window and its 95 % interval"
    if any(window.skipped for window in windows):
        note += "; dotted: skipped"
    figure.legend(
        handles=handles,
        title=note,
        title_fontsize=9,
        loc="outside lower center",
        ncols=len(methods),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    return figure


def _draw(ax: Axes, windows: Sequence[Window], values: pl.DataFrame, methods: list[str]) -> None:
    """Draw one panel. Places are windows, not days: all are equally far apart, whatever was skipped."""
    place = {window.until: number for number, window in enumerate(windows)}
    for number, method in enumerate(methods):
        part = values.filter(method=method)
        # Beside one another, so that intervals of equal values stay apart.
        x = [place[until] + 0.07 * (number - (len(methods) - 1) / 2) for until in part["until"]]
        colour = _colour(method, methods)
        ax.vlines(x, part["low"], part["high"], color=colour, linewidth=2, alpha=0.45)
        ax.plot(x, part["value"], "o-", color=colour, linewidth=1.4, markersize=5)
    for window in windows:
        if window.skipped:
            ax.axvline(place[window.until], color=GREY, linewidth=1, linestyle=":")
    ax.set_ylim(bottom=0)
    ax.set_xlim(-0.5, len(windows) - 0.5)
    shown = range(0, len(windows), -(-len(windows) // 8))
    ax.set_xticks(list(shown), [_tick(windows[number]) for number in shown])
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.tick_params(length=0, labelsize=8, colors=INK)


def _tick(window: Window) -> str:
    users = "skipped" if window.skipped else f"{window.test_users:,} users"
    return f"{window.until:%Y-%m-%d}\n{users}"


def _colour(method: str, methods: list[str]) -> str:
    own = [name for name in methods if name not in BASELINES]
    return COLOURS.get(method) or LINES[own.index(method) % len(LINES)]


def _count(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"


def _cell() -> pl.Expr:
    """Write a value with its interval."""

    def write(row: dict[str, float | None]) -> str:
        value, low, high = row["value"], row["low"], row["high"]
        if value is None:
            return "–"
        return (
            short(value)
            if low is None or high is None
            else f"{short(value)} {short(low, 3)}–{short(high, 3)}"
        )

    return pl.struct("value", "low", "high").map_elements(write, return_dtype=pl.String)
