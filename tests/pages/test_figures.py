"""What is drawn lies where its axis says, whatever the values."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.pages.figures import (
    MOST_CELLS,
    MOST_POINTS,
    Curve,
    Interval,
    Strip,
    bars,
    heat_strips,
    intervals,
    lines,
)
from components.pages.html import Html

VALUES = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


def svg(figure: Html) -> ElementTree.Element:
    found = ElementTree.fromstring(figure).find("svg")
    assert found is not None
    return found


def of_class(figure: Html, kind: str) -> list[ElementTree.Element]:
    return [element for element in svg(figure).iter() if element.get("class") == kind]


def y_axis(figure: Html) -> np.ndarray:
    """The two coefficients that turn a height in the picture into a value, from the labels of the axis."""
    labels = [element for element in svg(figure).iter("text") if element.get("text-anchor") == "end"]
    pairs = [
        (float(label.get("y", "")) - 4, float((label.text or "").replace(",", "").replace("−", "-")))
        for label in labels
        if float(label.get("x", "")) < 100
    ]
    return np.polyfit(*zip(*pairs, strict=True), 1)


@given(st.lists(VALUES, min_size=2, max_size=30))
def test_a_curve_passes_through_its_points(values: list[float]) -> None:
    figure = lines("", [Curve("", range(len(values)), values)])
    (path,) = of_class(figure, "line")
    heights = [float(point.split()[1]) for point in path.get("d", "")[1:].split("L")]
    slack = max(abs(np.ptp(values)), abs(max(values, key=abs)) * 0.1, 0.01) * 0.02
    assert np.polyval(y_axis(figure), heights) == pytest.approx(values, abs=slack)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_columns_are_as_high_as_they_count(counts: list[int]) -> None:
    figure = bars("", counts, [f"c{i}" for i in range(len(counts))], unit="items")
    columns = of_class(figure, "fill")
    told = [int((bar.find("title").text or "").split(": ")[1].split()[0].replace(",", "")) for bar in columns]  # type: ignore[union-attr]
    assert told == [count for count in counts if count]
    tops = np.array([float(bar.get("y", "")) for bar in columns])
    if len(tops):
        assert np.polyval(y_axis(figure), tops) == pytest.approx(told, abs=max(counts) * 0.02)
        feet = [float(bar.get("y", "")) + float(bar.get("height", "")) for bar in columns]
        assert np.polyval(y_axis(figure), feet) == pytest.approx([0] * len(feet), abs=max(counts) * 0.02)


def test_the_kept_step_is_marked_on_the_axis_of_steps() -> None:
    figure = lines("", [Curve("", [0, 100], [1, 2])], kept=25)
    (path,) = of_class(figure, "line")
    first, last = (float(point.split()[0]) for point in path.get("d", "")[1:].split("L"))
    (mark,) = of_class(figure, "kept")
    place = float(re.match(r"M([\d.]+) ", mark.get("d", ""))[1])  # type: ignore[index]
    assert place == pytest.approx(first + (last - first) / 4, abs=0.1)


@pytest.mark.parametrize("kept", [-50, 0, 100, 400])
def test_the_kept_step_is_inside_the_chart_wherever_the_curve_lies(kept: int) -> None:
    """A resumed training shows what came since, and may keep what came before."""
    figure = lines("", [Curve("", [0, 100], [1, 2])], kept=kept)
    (mark,) = of_class(figure, "kept")
    place = float(re.match(r"M([\d.-]+) ", mark.get("d", ""))[1])  # type: ignore[index]
    assert 42 <= place <= 336


def test_labels_of_curves_do_not_cover_one_another() -> None:
    figure = lines(
        "", [Curve(str(i), [0, 1], [0, i / 100]) for i in range(5)] + [Curve("far", [0, 1], [0, 1])]
    )
    marks = [element for element in svg(figure).iter("text") if element.text in [*"01234", "far"]]
    heights = sorted(float(mark.get("y", "")) for mark in marks if mark.get("text-anchor") is None)
    assert len(heights) == 6 and min(np.diff(heights)) >= 10


def test_long_curves_and_strips_are_drawn_as_means() -> None:
    curve = lines("", [Curve("", np.arange(10_000), np.arange(10_000) % 2)])
    (path,) = of_class(curve, "line")
    heights = [float(point.split()[1]) for point in path.get("d", "")[1:].split("L")]
    assert len(heights) == MOST_POINTS
    assert np.polyval(y_axis(curve), heights) == pytest.approx([0.5] * MOST_POINTS, abs=0.02)
    strip = heat_strips("", [Strip("level 1", np.arange(1000.0), "")])
    titles = [title.text or "" for title in svg(strip).iter("title")]
    assert len(titles) == 250 <= MOST_CELLS and titles[0] == "codes 0 to 3, mean: 1.5"


def test_a_strip_shades_by_load_and_leaves_what_is_unused_empty() -> None:
    figure = heat_strips("", [Strip("level 1", np.array([0.0, 1, 4, 15]), "")])
    cells = [element for element in svg(figure).iter("rect") if element.find("title") is not None]
    assert [cell.get("class") for cell in cells] == ["none", "fill", "fill", "fill"]
    shades = [float(cell.get("fill-opacity", "0")) for cell in cells]
    assert shades == sorted(set(shades))


def test_intervals_share_one_axis_and_an_unknown_one_has_no_whisker() -> None:
    rows = [Interval("a", 0.2, 0.1, 0.3), Interval("<b>", 0.4, None, None)]
    figure = intervals("R@10", rows)
    a, b = (float(dot.get("cx", "")) for dot in of_class(figure, "fill"))
    (whisker,) = of_class(figure, "whisker")
    low, high = map(float, re.match(r"M([\d.]+) [\d.]+H([\d.]+)", whisker.get("d", "")).groups())  # type: ignore[union-attr]
    assert (b - a) == pytest.approx(high - low, abs=0.2) and a == pytest.approx((low + high) / 2, abs=0.1)
