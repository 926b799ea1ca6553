"""Figures of a run. Each function returns a matplotlib figure of its own and touches no global state."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

from components.artifacts import Ablation, CollisionReport, Comparison
from components.metrics.labels import label_points
from components.metrics.report import blocks_of
from components.metrics.sids import group_sizes

# Okabe and Ito's palette: told apart by readers with any kind of colour vision, and in grey.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, INK, FAINT = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#333333",
    "#D9D9D9",
)
LINES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("-", "--", ":")
SPREAD = 30.0
"""Curves of one panel whose typical values differ by more than this factor get a logarithmic axis."""
GREY = "#777777"
ARMS = {"two_stage": BLUE, "joint": RED}
ARM_NAMES = {"two_stage": "two-stage", "joint": "joint"}
BEHIND = 1.0
"""Z-order of lines that run behind the points."""
NEAR = 0.35
"""A line further from the arms than this share of their range is named at the panel's edge."""
MARKS = {"kept": ("o", BLUE), "excluded": ("s", RED)}


def loss_curves(history: Sequence[tuple[int, Mapping[str, float]]]) -> Figure:
    """Draw logged numbers over steps, one panel for each group of names.

    A name's group is what stands before its last slash (``perplexity/level1``); names without one share a panel.
    ``epoch`` is a second clock, not a curve, and is left out, as are values that are not finite.

    Parameters
    ----------
    history : sequence of (step, values)
        As logged; not every step has every name.

    Raises
    ------
    ValueError
        Nothing was logged.
    """
    rows = [(step, name, float(value)) for step, values in history for name, value in values.items()]
    points = (
        pl.DataFrame(rows, schema={"step": pl.Int64, "name": pl.String, "value": pl.Float64}, orient="row")
        .filter(pl.col("name") != "epoch", pl.col("value").is_finite())
        .sort("step", maintain_order=True)
        .with_columns(
            group=pl.col("name").str.extract(r"^(.*)/[^/]*$").fill_null("values"),
            label=pl.col("name").str.extract(r"([^/]*)$").str.replace_all("_", " "),
        )
    )
    panels = points.partition_by("group", maintain_order=True)
    if not panels:
        raise ValueError("no curves: nothing finite was logged")
    columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.1 * height), dpi=120, layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    for ax, panel in zip(axes, panels, strict=False):
        _draw_curves(ax, panel)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return figure


def _draw_curves(ax: Axes, panel: pl.DataFrame) -> None:
    """Draw one group of curves: step, value, label."""
    group = panel["group"][0].replace("_", " ").replace("/", ", ")
    curves = panel.partition_by("label", maintain_order=True)
    for number, curve in enumerate(curves):
        ax.plot(
            curve["step"],
            curve["value"],
            color=LINES[number % len(LINES)],
            linestyle=DASHES[number // len(LINES) % len(DASHES)],
            linewidth=1.6,
            marker="o" if len(curve) <= 25 else None,
            markersize=3.5,
            label=curve["label"][0],
        )
    _clean(ax, grid="y")
    typical = panel.group_by("label").agg(pl.col("value").median())["value"]
    if len(curves) > 1 and panel["value"].min() > 0 and typical.max() > SPREAD * typical.min():  # type: ignore[operator]
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        group += " (log scale)"
    if len(curves) == 1:
        group = f"{group}, {curves[0]['label'][0]}".removeprefix("values, ")
    else:
        # Beside the curves, where it hides none of them.
        ax.legend(
            loc="upper left",
            bbox_to_anchor=(1, 1),
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            handlelength=1.4,
        )
    ax.set_title(group, loc="left", fontsize=10, color=INK)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def code_usage(report: CollisionReport) -> Figure:
    """Draw how the items spread over the codes of each level, most used code first.

    Colour is the code's load relative to an even spread; codes without items are grey.
    """
    levels = report.levels
    width = int(levels["codebook_size"].max())  # type: ignore[arg-type]
    load = np.full((len(levels), width), np.nan)
    for row, usage in enumerate(report.usage.partition_by("level", maintain_order=True)):
        counts = np.sort(usage["count"].to_numpy())[::-1]
        load[row, : len(counts)] = counts / max(counts.mean(), 1e-9)
    unused, absent = load == 0, np.isnan(load)

    figure = Figure(figsize=(9, 1.5 + 0.62 * len(levels)), dpi=120, layout="constrained")
    ax = figure.subplots()
    shown = np.ma.masked_where(unused | absent, np.log2(np.where(unused | absent, 1.0, load)))
    image = ax.imshow(shown, aspect="auto", cmap="viridis", vmin=-3, vmax=3, interpolation="nearest")
    ax.imshow(
        np.ma.masked_where(~unused, np.ones_like(load)),
        aspect="auto",
        cmap=ListedColormap([FAINT]),
        interpolation="nearest",
    )
    _clean(ax)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_yticks(range(len(levels)), _level_names(report))
    ax.set_yticks(np.arange(len(levels) + 1) - 0.5, minor=True)
    ax.grid(which="minor", axis="y", color="white", linewidth=5)
    ax.tick_params(which="minor", length=0)
    ax.set_xticks([0, width - 1], ["most used code", "least used"])
    ax.get_xticklabels()[0].set_horizontalalignment("left")
    ax.get_xticklabels()[1].set_horizontalalignment("right")
    for row, level in enumerate(levels.iter_rows(named=True)):
        ax.text(
            1.01,
            row,
            f"perplexity {level['perplexity']:.1f} of {level['codebook_size']}\n"
            f"{level['codes_in_use']} codes in use",
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=INK,
        )
    bar = figure.colorbar(image, ax=ax, location="bottom", shrink=0.5, aspect=40, pad=0.06, extend="both")
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["1/8", "1/4", "1/2", "even", "2×", "4×", "8×"])
    bar.set_label("items of the code, relative to an even spread; grey: no item", fontsize=8, color=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, length=2, color=INK, labelcolor=INK)
    ax.set_title("How evenly items spread over the codes", loc="left", fontsize=11, color=INK)
    return figure


def _level_names(report: CollisionReport) -> list[str]:
    """Name the levels, and where SIDs differ in length how many items reach them."""
    return [
        f"level {row['level']}"
        + ("" if row["items"] == report.figures["items"] else f"\n{row['items']:,} items")
        for row in report.levels.iter_rows(named=True)
    ]


def collision_histogram(report: CollisionReport) -> Figure:
    """Draw how many items share their codes with how many others."""
    sizes = group_sizes(report)
    last = int(sizes["size"].max())  # type: ignore[arg-type]
    starts = [1, 2, 3, 4, *(2**k + 1 for k in range(2, 15))]
    starts = [start for start in starts if start <= max(last, 2)]
    ends = [following - 1 for following in starts[1:]] + [max(last, 2)]
    spans = list(zip(starts, ends, strict=True))
    items = [int(sizes.filter(pl.col("size").is_between(a, b))["items"].sum()) for a, b in spans]
    total = report.figures["items"]

    figure = Figure(figsize=(7.2, 3.6), dpi=120, layout="constrained")
    ax = figure.subplots()
    place = np.arange(len(starts))
    bars = ax.bar(place, items, width=0.72, color=[BLUE] + [ORANGE] * (len(starts) - 1))
    ax.bar_label(bars, [f"{count / total:.1%}" for count in items], padding=2, fontsize=8, color=INK)
    labels = [f"{a}" if a == b else f"{a}–{b}" for a, b in spans]
    ax.set_xticks(place, ["codes of\ntheir own", *labels[1:]])
    _clean(ax, grid="y")
    ax.margins(y=0.12)
    ax.set_ylabel("items")
    ax.set_xlabel("items with the same codes")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_title(
        f"{report.figures['collision_rate']:.1%} of {total:,.0f} items share their codes; "
        f"largest group {report.figures['largest_group']:,.0f}",
        loc="left",
        fontsize=11,
        color=INK,
    )
    return figure


def length_by_popularity(report: CollisionReport) -> Figure:
    """Draw how long SIDs are: shares of items and interactions by number of codes, and mean codes by popularity.

    Raises
    ------
    ValueError
        The report knows no interactions.
    """
    if not len(report.deciles):
        raise ValueError("the report knows no interactions: give analyze the events of each item")
    figure = Figure(figsize=(10.4, 3.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_shares(left, report.lengths)
    _draw_deciles(right, report)
    figure.suptitle(
        f"{report.figures['codes_per_item']:.2f} codes an item, "
        f"{report.figures['codes_per_interaction']:.2f} an interaction",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
    )
    return figure


def _draw_shares(ax: Axes, lengths: pl.DataFrame) -> None:
    """Draw the shares of items and of interactions that have so many codes."""
    place, width = lengths["codes"].to_numpy(), 0.38
    for name, label, colour, side in (
        ("items", "of the items", BLUE, -1),
        ("events", "of the interactions", ORANGE, 1),
    ):
        share = (lengths[name] / lengths[name].sum()).to_numpy()
        bars = ax.bar(place + side * width / 2, share, width=width, color=colour, label=label)
        ax.bar_label(bars, [f"{part:.0%}" for part in share], padding=2, fontsize=8, color=INK)
    _clean(ax, grid="y")
    ax.margins(y=0.12)
    ax.set_xticks(place)
    ax.set_xlabel("codes of a SID, without its suffix")
    ax.set_ylabel("share")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    # Above the bars, of which any may be the tallest.
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        borderpad=0,
    )


def _draw_deciles(ax: Axes, report: CollisionReport) -> None:
    """Draw mean codes of each tenth of the items, and the mean over all items."""
    deciles, mean = report.deciles, report.figures["codes_per_item"]
    ax.axhline(mean, color=GREY, linewidth=1.1, linestyle=(0, (5, 3)), zorder=BEHIND)
    ax.plot(deciles["decile"], deciles["codes"], color=BLUE, linewidth=1.6, marker="o", markersize=5)
    over = deciles["codes"][-1] < mean  # the side of the line that the curve leaves free at its end
    ax.annotate(
        "all items",
        (1, mean),
        xycoords=ax.get_yaxis_transform(),
        xytext=(-2, 3 if over else -3),
        textcoords="offset points",
        ha="right",
        va="bottom" if over else "top",
        fontsize=8.5,
        color=GREY,
    )
    share = deciles["events"] / deciles["events"].sum()
    _clean(ax, grid="y")
    # All lengths there are, so that what is nearly flat looks flat.
    used = report.lengths.filter(pl.col("items") > 0)["codes"]
    ax.set_ylim(used[0] - 0.2, used[-1] + 0.2)
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.set_xticks(
        deciles["decile"],
        [f"{decile}\n{part:.0%}" for decile, part in zip(deciles["decile"], share, strict=True)],
    )
    ax.set_xlabel("tenth of the items, most popular first; its share of interactions")
    ax.set_ylabel("mean codes of a SID")


def reconstruction_by_level(report: CollisionReport) -> Figure:
    """Draw how far items lie from what their first codes decode to, by item and by interaction.

    Raises
    ------
    ValueError
        The report knows no errors.
    """
    known = report.levels.drop_nulls("reconstruction")
    if not len(known):
        raise ValueError("the report knows no reconstruction: give analyze the errors of each item")
    figure = Figure(figsize=(6.4, 3.8), dpi=120, layout="constrained")
    ax = figure.subplots()
    curves = (
        ("reconstruction", "by item", BLUE, "o"),
        ("reconstruction_draw", "by interaction", ORANGE, "s"),
    )
    for name, label, colour, mark in curves:
        points = known.drop_nulls(name)
        if len(points):
            ax.plot(points["level"], points[name], color=colour, linewidth=1.6, marker=mark, label=label)
    _clean(ax, grid="y")
    ax.set_ylim(bottom=0)
    ax.margins(x=0.08)
    total = report.figures["items"]
    everybody = known["items"].min() == total
    ticks = [
        str(row["level"]) if everybody else f"{row['level']}\n{row['items'] / total:.0%}"
        for row in known.iter_rows(named=True)
    ]
    ax.set_xticks(known["level"], ticks)
    ax.set_xlabel("codes read" + ("" if everybody else ", and the share of items that have so many"))
    ax.set_ylabel("mean squared distance (0 to 4)")
    ax.legend(frameon=False, fontsize=9, labelcolor=INK)
    ax.set_title("How far items lie from what their codes decode to", loc="left", fontsize=11, color=INK)
    return figure


def comparison_figure(comparison: Comparison, metrics: Sequence[str] = ("R@10", "N@10")) -> Figure:
    """Draw every method's value and 95 % interval, seen items kept and excluded, one panel a metric.

    Raises
    ------
    ValueError
        The comparison lacks a metric.
    """
    rows = comparison.metrics.filter(pl.col("slice") == "all")
    methods = rows["method"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(4.2 * len(metrics) + 1, 1.5 + 0.5 * len(methods)), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for ax, metric in zip(axes, metrics, strict=True):
        panel = rows.filter(pl.col("metric") == metric)
        if not len(panel):
            raise ValueError(f"the comparison holds no {metric}; it holds {sorted(set(rows['metric']))}")
        for (seen, (mark, colour)), shift in zip(MARKS.items(), (-0.14, 0.14), strict=True):
            part = panel.filter(pl.col("seen") == seen)
            if not len(part):
                continue
            height = [methods.index(method) + shift for method in part["method"]]
            ax.hlines(height, part["low"], part["high"], color=colour, linewidth=2, alpha=0.45)
            ax.plot(
                part["value"],
                height,
                mark,
                color=colour,
                markersize=6,
                markerfacecolor=colour if seen == "kept" else "white",
                markeredgewidth=1.6,
                label=f"seen items {seen}",
            )
        _clean(ax, grid="x")
        ax.set_xlim(left=0)
        ax.set_title(metric, loc="left", fontsize=11, color=INK)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="mean over test users and its 95 % interval",
        title_fontsize=9,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    return figure


def ablation_figure(ablation: Ablation, metric: str = "R@10") -> Figure:
    """Draw every arm's value against the strings of codes that tell its items apart, a panel a treatment of seen items.

    Large marks are means over seeds with their standard error, small ones the seeds. Methods without codes are
    horizontal lines; one that lies far from all arms is named at the edge instead, so that arms stay apart.

    Raises
    ------
    ValueError
        The ablation lacks the metric.
    """
    rows = ablation.summary.filter(pl.col("metric") == metric)
    if not len(rows):
        raise ValueError(
            f"the ablation holds no {metric}; it holds {sorted(set(ablation.summary['metric']))}"
        )
    blocks = blocks_of(rows["seen"])
    figure = Figure(figsize=(9.6 * len(blocks), 6.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # labels are placed by their size in pixels
    axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    drawn = [_draw_arms(ax, ablation, rows.filter(seen=seen)) for ax, seen in zip(axes, blocks, strict=True)]
    for ax, seen in zip(axes, blocks, strict=True):
        ax.set_title(f"{metric}, seen items {seen}", loc="left", fontsize=11, color=INK)
    if len(ablation.tables):
        _explain_arms(figure, ablation)
    figure.draw_without_rendering()
    for ax, (dots, lines) in zip(axes, drawn, strict=True):
        label_points(ax, dots, lines)
    return figure


class _Drawn(NamedTuple):
    """What names of arms must not cover, beside marks and texts."""

    dots: list[Line2D]
    """The seeds of each arm."""
    lines: list[Line2D]
    """Methods without codes."""


def _draw_arms(ax: Axes, ablation: Ablation, rows: pl.DataFrame) -> _Drawn:
    """Draw arms as points and methods without codes as lines; ``rows`` are of one metric and block."""
    place = dict(
        ablation.tables.group_by("arm", maintain_order=True).agg(pl.col("distinct").mean()).iter_rows()
    )
    stopped = set(ablation.tables.filter(pl.col("collapsed_at_epoch").is_not_null())["arm"])
    seeds = ablation.runs.filter(
        pl.col("metric") == rows["metric"][0], pl.col("seen") == rows["seen"][0]
    ).join(ablation.tables.select("arm", "seed", "distinct"), on=["arm", "seed"], maintain_order="left")
    arms = rows.filter(pl.col("arm").is_in(list(place)))
    dots: list[Line2D] = []
    for row in arms.iter_rows(named=True):
        own, colour = seeds.filter(arm=row["arm"]), ARMS[row["method"]]
        dots += ax.plot(
            own["distinct"], own["value"], "o", color=colour, markersize=3.5, alpha=0.4, markeredgewidth=0
        )
        ax.errorbar(
            place[row["arm"]],
            row["mean"],
            row["standard_error"],
            fmt="X" if row["arm"] in stopped else "o",
            color=colour,
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=0.8,
            elinewidth=1.5,
            capsize=0,
            label=row["arm"],
        )
    _clean(ax, grid="y")
    ax.margins(x=0.09, y=0.09)
    lines = _draw_lines(ax, rows.filter(~pl.col("arm").is_in(list(place))))
    ax.set_xlabel(f"distinct strings of content codes, for {ablation.items:,} items")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    return _Drawn(dots, lines)


def _draw_lines(ax: Axes, rows: pl.DataFrame) -> list[Line2D]:
    """Draw methods without codes as lines across the panel, and name those too far off at its edge."""
    values: dict[str, float] = dict(rows.sort("mean").select("arm", "mean").iter_rows())
    low, high = ax.get_ylim() if ax.has_data() else (min(values.values()), max(values.values()))
    reach = NEAR * (high - low)
    near = {arm: value for arm, value in values.items() if low - reach <= value <= high + reach}
    spread = [low, high, *near.values()]
    pad = 0.06 * (max(spread) - min(spread))
    ax.set_ylim(
        min([low, *(value - pad for value in near.values())]), max([high, *(v + pad for v in near.values())])
    )
    style: dict[str, Any] = {"fontsize": 8.5, "color": GREY}
    lines = []
    for arm, value in near.items():
        lines.append(ax.axhline(value, color=GREY, linewidth=1.1, linestyle=(0, (5, 3)), zorder=BEHIND))
        across = ax.get_yaxis_transform()
        ax.annotate(arm, (0, value), xycoords=across, xytext=(4, 2), textcoords="offset points", **style)
    far = {arm: f"{arm} {value:.3f}" for arm, value in values.items() if arm not in near}
    below = ", ".join(name for arm, name in far.items() if values[arm] < low)
    above = ", ".join(name for arm, name in far.items() if values[arm] > high)
    edge: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", **style}
    if below:
        ax.text(0.995, 0.015, f"↓ {below}", va="bottom", **edge)
    if above:
        ax.text(0.995, 0.985, f"↑ {above}", va="top", **edge)
    return lines


def _explain_arms(figure: Figure, ablation: Ablation) -> None:
    """Add the legend: colours are methods, a cross is a training that a collapse has stopped."""

    def mark(colour: str, label: str, shape: str = "o", size: float = 8) -> Line2D:
        return Line2D([], [], color=colour, marker=shape, linestyle="", markersize=size, label=label)

    methods = set(ablation.summary["method"])
    handles = [mark(colour, ARM_NAMES[method]) for method, colour in ARMS.items() if method in methods]
    if ablation.tables["collapsed_at_epoch"].is_not_null().any():
        handles.append(mark(GREY, "stopped by a collapse", "X"))
    if len(ablation.seeds) > 1:
        handles.append(mark(GREY, "one seed", size=4))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )


def _clean(ax: Axes, grid: str = "") -> None:
    """Give an axis the common look: little ink, light grid behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=INK, labelsize=9, length=3)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)
    ax.set_axisbelow(True)
    if grid == "x":
        ax.xaxis.grid(color="#E5E5E5", linewidth=0.8)
    elif grid == "y":
        ax.yaxis.grid(color="#E5E5E5", linewidth=0.8)
