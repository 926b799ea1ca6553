"""Figures show what they are given and leave no trace in matplotlib's global state."""

import sys
from io import BytesIO

import numpy as np
import polars as pl
import pytest
from matplotlib import get_backend
from matplotlib.figure import Figure

from components.artifacts import Comparison, SidTable
from components.metrics.figures import code_usage, collision_histogram, comparison_figure, loss_curves
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


def test_no_global_figure_is_left_behind(report) -> None:
    code_usage(report)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
    assert get_backend()
