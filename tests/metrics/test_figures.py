"""Figures show what they are given and leave no trace in matplotlib's global state."""

import dataclasses
import sys
from io import BytesIO

import numpy as np
import polars as pl
import pytest
import torch
from matplotlib import get_backend
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text

from components.artifacts import Ablation, Comparison, SidTable
from components.metrics.ablation import summarise
from components.metrics.figures import (
    ablation_figure,
    code_usage,
    collision_histogram,
    comparison_figure,
    length_by_popularity,
    loss_curves,
    reconstruction_by_level,
)
from components.metrics.sids import CollisionConfig, analyze

PNG = b"\x89PNG"


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    codes = [[int(a), int(b)] for a, b in zip(rng.integers(0, 20, 300), rng.integers(0, 9, 300), strict=True)]
    frame = pl.DataFrame(
        {"item_id": range(300), "codes": codes}, schema={"item_id": pl.UInt32, "codes": pl.List(pl.UInt16)}
    ).with_columns(suffix=pl.int_range(pl.len()).over("codes").cast(pl.UInt16))
    table = SidTable(codes=frame, codebook_sizes=[32, 16], suffix_size=300, shared=False, tokenizer="")
    return analyze(table, None, CollisionConfig())


def test_curves_have_a_panel_a_group_and_every_point() -> None:
    history = [(s, {"epoch": s, "train/loss": 3.0 - s, "train/suffix": 1.0}) for s in range(3)]
    history += [(2, {"valid/R@10": 0.1})]
    figure = loss_curves(history)
    train, valid = (ax for ax in figure.axes if ax.lines)
    assert [line.get_label() for line in train.lines] == ["loss", "suffix"]
    assert train.lines[0].get_xydata().tolist() == [[0, 3], [1, 2], [2, 1]]
    assert valid.get_title("left") == "valid, R@10"
    assert _png(figure).startswith(PNG)


def test_curves_of_unlike_size_get_a_log_axis_unless_they_reach_0() -> None:
    for low, scale in ((0.5, "log"), (0.0, "linear")):
        figure = loss_curves([(s, {"a/large": 1000.0, "a/small": low}) for s in range(4)])
        assert figure.axes[0].get_yscale() == scale


def test_curves_leave_out_what_is_not_finite_and_refuse_nothing() -> None:
    figure = loss_curves([(0, {"loss": float("nan")}), (1, {"loss": 2.0})])
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 2]]
    for empty in ([], [(0, {"epoch": 1.0})], [(0, {"loss": float("inf")})]):
        with pytest.raises(ValueError, match="no curves"):
            loss_curves(empty)


def test_code_usage_and_histogram_show_the_figures(report) -> None:
    usage = code_usage(report)
    words = " ".join(text.get_text() for ax in usage.axes for text in ax.texts)
    for level in report.levels.iter_rows(named=True):
        assert f"perplexity {level['perplexity']:.1f} of {level['codebook_size']}" in words
    histogram = collision_histogram(report)
    heights = [bar.get_height() for bar in histogram.axes[0].patches]
    assert sum(heights) == 300
    assert heights[0] == 300 - report.figures["colliding_items"]
    assert _png(usage).startswith(PNG) and _png(histogram).startswith(PNG)


def test_a_table_without_collisions_can_be_drawn() -> None:
    frame = pl.DataFrame(
        {"item_id": [0, 1], "codes": [[0], [1]], "suffix": [0, 0]}, schema=SidTable.SCHEMAS["codes"]
    )
    table = SidTable(codes=frame, codebook_sizes=[2], suffix_size=1, shared=False, tokenizer="")
    report = analyze(table, None, CollisionConfig())
    assert _png(collision_histogram(report)).startswith(PNG) and _png(code_usage(report)).startswith(PNG)


@pytest.fixture(scope="module")
def unequal():
    """40 items of 1 to 4 codes, the longer the rarer, with errors and interactions; level 4 is reached by ten."""
    lengths = [1 + item // 10 for item in range(40)]
    frame = pl.DataFrame(
        {
            "item_id": range(40),
            "codes": [[item % 10] * n for item, n in enumerate(lengths)],
            "suffix": [0] * 40,
        },
        schema=SidTable.SCHEMAS["codes"],
    )
    table = SidTable(codes=frame, codebook_sizes=[10] * 4, suffix_size=1, shared=True, tokenizer="")
    errors = torch.tensor([[1 / m if m <= n else float("nan") for m in range(1, 5)] for n in lengths])
    events = torch.tensor([50 - item for item in range(40)])
    return analyze(table, None, CollisionConfig(), events=events, errors=errors)


def test_lengths_are_drawn_as_shares_and_by_tenths_of_popularity(unequal) -> None:
    figure = length_by_popularity(unequal)
    left, right = figure.axes
    items, events = ([bar.get_height() for bar in bars] for bars in left.containers[:2])
    assert items == [0.25] * 4
    assert events == pytest.approx((unequal.lengths["events"] / unequal.lengths["events"].sum()).to_list())
    mean, curve = right.lines
    assert set(mean.get_ydata()) == {unequal.figures["codes_per_item"]}
    assert curve.get_xydata().tolist() == unequal.deciles.select("decile", "codes").to_numpy().tolist()
    figure.draw_without_rendering()
    first, *_, last = (label.get_text() for label in right.get_xticklabels())
    assert (first, last) == ("1\n16%", "10\n4%")
    assert right.get_ylim()[0] < 1 and right.get_ylim()[1] > 4
    assert "2.50 codes an item" in figure.get_suptitle()
    assert _png(figure).startswith(PNG)


def test_reconstruction_is_drawn_by_item_and_by_interaction_with_who_is_left(unequal) -> None:
    figure = reconstruction_by_level(unequal)
    (ax,) = figure.axes
    for line, name in zip(ax.lines, ("reconstruction", "reconstruction_draw"), strict=True):
        assert line.get_xydata().tolist() == unequal.levels.select("level", name).to_numpy().tolist()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1\n100%", "2\n75%", "3\n50%", "4\n25%"]
    assert ax.get_ylim()[0] == 0
    assert _png(figure).startswith(PNG)


def test_reconstruction_of_equal_lengths_without_interactions_has_one_curve() -> None:
    frame = pl.DataFrame(
        {"item_id": [0, 1], "codes": [[0, 1], [1, 0]], "suffix": [0, 0]}, schema=SidTable.SCHEMAS["codes"]
    )
    table = SidTable(codes=frame, codebook_sizes=[2, 2], suffix_size=1, shared=False, tokenizer="")
    errors = torch.tensor([[0.5, 0.25], [0.5, 0.25]])
    (ax,) = reconstruction_by_level(analyze(table, None, CollisionConfig(), errors=errors)).axes
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[1, 0.5], [2, 0.25]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2"]


def test_what_the_report_does_not_know_is_not_drawn(report) -> None:
    with pytest.raises(ValueError, match="knows no interactions"):
        length_by_popularity(report)
    with pytest.raises(ValueError, match="knows no reconstruction"):
        reconstruction_by_level(report)


def test_code_usage_names_how_many_items_reach_a_level_where_lengths_differ(report, unequal) -> None:
    def names(figure: Figure) -> list[str]:
        return [label.get_text() for label in figure.axes[0].get_yticklabels()]

    assert names(code_usage(report)) == ["level 1", "level 2"]
    assert names(code_usage(unequal))[::3] == ["level 1", "level 4\n10 items"]


def test_comparison_shows_every_value() -> None:
    rows = [
        (method, seen, "all", metric, value, value - 0.01, value + 0.02)
        for method, value in (("popularity", 0.03), ("joint", 0.2))
        for seen in ("kept", "excluded")
        for metric in ("R@10", "N@10")
    ]
    comparison = Comparison(
        metrics=pl.DataFrame(rows, schema=Comparison.SCHEMAS["metrics"], orient="row"),
        differences=pl.DataFrame(schema=Comparison.SCHEMAS["differences"]),
        reports=[],
    )
    figure = comparison_figure(comparison)
    for ax in figure.axes:
        assert [line.get_xdata().tolist() for line in ax.lines] == [[0.03, 0.2]] * 2
    assert _png(figure).startswith(PNG)
    with pytest.raises(ValueError, match="holds no R@5"):
        comparison_figure(comparison, ["R@5"])


def test_a_comparison_of_one_treatment_of_seen_items_draws_that_one() -> None:
    rows = [("joint", "excluded", "all", metric, 0.2, 0.1, 0.3) for metric in ("R@10", "N@10")]
    comparison = Comparison(
        metrics=pl.DataFrame(rows, schema=Comparison.SCHEMAS["metrics"], orient="row"),
        differences=pl.DataFrame(schema=Comparison.SCHEMAS["differences"]),
        reports=[],
    )
    figure = comparison_figure(comparison)
    assert [line.get_label() for line in figure.axes[0].lines] == ["seen items excluded"]


def _ablation(arms: int, seeds=(0, 1, 2), blocks=("kept",), near: float = 0.05) -> Ablation:
    """Joint arms crowded around one point, a collapsed one, and methods without codes near and far."""
    rng = np.random.default_rng(3)
    names = [f"arm number {n}" for n in range(arms)]
    place = {name: (rng.normal(2000, near * 1000), rng.normal(0.17, near / 10)) for name in names}
    runs = [
        (name, "baseline", None, seen, "R@10", value)
        for name, value in (("popularity", 0.03), ("itemknn", 0.19))
        for seen in blocks
    ]
    runs += [
        (
            name,
            "two_stage" if name == names[0] else "joint",
            seed,
            seen,
            "R@10",
            place[name][1] + 0.001 * seed,
        )
        for name in names
        for seed in seeds
        for seen in blocks
    ]
    runs += [("sasrec", "sasrec", seed, seen, "R@10", 0.18) for seed in seeds for seen in blocks]
    tables = [
        (name, seed, int(place[name][0]) + seed, 0.3, 40, "healthy", 5 if name == names[-1] else None)
        + (None,) * 6
        for name in names
        for seed in seeds
    ]
    frame = pl.DataFrame(runs, schema=Ablation.SCHEMAS["runs"], orient="row")
    return Ablation(
        runs=frame,
        summary=summarise(frame, {}),
        codes=Ablation.SCHEMAS["codes"].to_frame(),
        tables=pl.DataFrame(tables, schema=Ablation.SCHEMAS["tables"], orient="row"),
        users=100,
        cold_users=0,
        items=2500,
        seeds=list(seeds),
        split="",
    )


def _points(ax) -> dict[str, ErrorbarContainer]:
    return {bars.get_label(): bars for bars in ax.containers}


def test_an_ablation_shows_every_arm_at_its_codes_and_mean_with_its_error_and_seeds() -> None:
    ablation = _ablation(4)
    (ax,) = ablation_figure(ablation).axes
    for row in ablation.summary.filter(pl.col("method").is_in(["two_stage", "joint"])).iter_rows(named=True):
        bars = _points(ax)[row["arm"]]
        distinct = ablation.tables.filter(arm=row["arm"])["distinct"].mean()
        assert bars[0].get_xydata().tolist() == [[distinct, row["mean"]]]
        (low, high) = bars[2][0].get_segments()[0][:, 1]
        assert high - low == pytest.approx(2 * row["standard_error"])
    seeds = [line for line in ax.lines if line.get_alpha() is not None]
    assert [len(line.get_xdata()) for line in seeds] == [3] * 4
    assert [_points(ax)[f"arm number {n}"][0].get_marker() for n in range(4)] == ["o", "o", "o", "X"]
    assert _points(ax)["arm number 0"][0].get_color() != _points(ax)["arm number 1"][0].get_color()


def test_the_legend_says_what_a_cross_is_where_there_is_one() -> None:
    crossed = _ablation(3)
    sound = crossed.tables.with_columns(collapsed_at_epoch=pl.lit(None, pl.UInt32))
    for ablation, words in ((crossed, True), (dataclasses.replace(crossed, tables=sound), False)):
        (legend,) = ablation_figure(ablation).legends
        assert ("stopped by a collapse" in [text.get_text() for text in legend.get_texts()]) == words


def test_methods_without_codes_are_lines_or_named_at_the_edge_if_far_off() -> None:
    (ax,) = ablation_figure(_ablation(12)).axes
    words = [text.get_text() for text in ax.texts]
    assert "sasrec" in words and "itemknn" in words and "↓ popularity 0.030" in words
    low, high = ax.get_ylim()
    assert low > 0.1 and high > 0.19


@pytest.mark.parametrize("near", [0.004, 0.02, 0.05])
def test_what_stands_at_a_tick_is_its_value(near: float) -> None:
    figure = ablation_figure(_ablation(8, near=near))
    figure.draw_without_rendering()
    (ax,) = figure.axes
    shown = [float(label.get_text()) for label in ax.get_yticklabels()]
    assert len(set(shown)) >= 4 and shown == pytest.approx(ax.get_yticks().tolist(), abs=1e-12)


@pytest.mark.parametrize("near", [0.02, 0.05, 0.125])
def test_names_cover_neither_each_other_nor_marks(near: float) -> None:
    figure = ablation_figure(_ablation(12, near=near))
    (ax,) = figure.axes
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    names = [t for t in ax.texts if t.get_text().startswith("arm")]
    boxes = [Text.get_window_extent(name, renderer) for name in names]
    marks = [ax.transData.transform(bars[0].get_xydata())[0] for bars in _points(ax).values()]
    seeds = [line for line in ax.lines if len(line.get_xdata()) == 3]
    marks += [point for line in seeds for point in ax.transData.transform(line.get_xydata())]
    across = [line.get_window_extent(renderer) for line in ax.lines if line.get_linestyle() == "--"]
    assert len(boxes) == 12 and len(marks) == 12 + 12 * 3 and across
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert not any(box.contains(*mark) for mark in marks)
        assert not any(box.overlaps(line) for line in across)
        assert ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 and ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1


def test_an_ablation_with_one_seed_both_treatments_or_no_codes_can_be_drawn() -> None:
    assert len(ablation_figure(_ablation(3, seeds=(0,), blocks=("kept", "excluded"))).axes) == 2
    bare = _ablation(0, seeds=(0,))
    assert _png(ablation_figure(bare)).startswith(PNG)
    with pytest.raises(ValueError, match="holds no N@10"):
        ablation_figure(bare, "N@10")


def test_no_global_figure_is_left_behind(report) -> None:
    code_usage(report)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
    assert get_backend()
