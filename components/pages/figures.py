"""Small charts as inline SVG, in the colours of the page that they stand on.

Shapes: P points of a curve, M bars or cells.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from components.pages.html import Html, join, number, tag

MOST_POINTS = 160
"""Points of a drawn curve; longer ones are drawn as means of so many stretches."""
MOST_CELLS = 256
"""Cells of a strip; a longer one shows means of neighbours."""
LABEL_HEIGHT = 11.0
CHARACTER = 6.2
"""Width of a character of the labels, about."""
SHADES = (1 / 4, 1 / 2, 1, 2, 4)
"""Loads, relative to an even spread, between the shades of a strip."""

Series = Sequence[float] | NDArray[Any]


class Curve(NamedTuple):
    """A line."""

    label: str
    """Written at its end where there are several."""
    x: Series
    """(P,) ascending."""
    y: Series
    """(P,) finite."""


class Interval(NamedTuple):
    """A value and how sure it is."""

    label: str
    value: float
    low: float | None
    high: float | None


class Strip(NamedTuple):
    """A row of cells."""

    label: str
    loads: NDArray[np.float64]
    """(M,) 0 or more."""
    note: str
    """Written behind it."""


class _Frame(NamedTuple):
    """Where data come to lie."""

    left: float
    right: float
    top: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / ((high - low) or 1) * (self.right - self.left)

    def up(self, value: float) -> float:
        low, high = self.y
        return self.bottom - (value - low) / ((high - low) or 1) * (self.bottom - self.top)


def bars(
    caption: str,
    counts: Series,
    labels: Sequence[str],
    note: str = "",
    *,
    ticks: int = 6,
    size: tuple[int, int] = (340, 180),
    top: float | None = None,
    unit: str = "",
) -> Html:
    """Draw columns.

    Parameters
    ----------
    caption, note : str
        Above the chart.
    counts : sequence of float
        (M,) heights, 0 or more.
    labels : sequence of str
        (M,) what each column is; shown when it is pointed at, and of some of them below the axis.
    ticks : int
        Most labels below the axis.
    size : (int, int)
        Width and height.
    top : float, optional
        Upper end of the axis; the highest column.
    unit : str
        What the heights count, shown when a column is pointed at.
    """
    width, height = size
    places = _ticks(0, max(top or 0, *counts, 1e-9))
    frame = _Frame(_margin(places), width, 8, height - 22, (0, len(counts)), (0, places[-1]))
    step = (frame.right - frame.left) / len(counts)
    gap = min(2.0, step * 0.2)
    columns = [
        tag(
            "rect.fill",
            tag("title", f"{label}: {number(count)} {unit}".rstrip()),
            x=_at(frame.across(place) + gap / 2),
            y=_at(frame.up(count)),
            width=_at(step - gap),
            height=_at(frame.bottom - frame.up(count)),
        )
        for place, (count, label) in enumerate(zip(counts, labels, strict=True))
        if count
    ]
    shown = range(0, len(labels), -(-len(labels) // ticks))
    below = [_label(frame.across(place + 0.5), height - 6, labels[place], frame, "middle") for place in shown]
    return _figure(caption, note, size, [*_grid(frame, places), *columns, *below])


def lines(
    caption: str,
    curves: Sequence[Curve],
    note: str = "",
    *,
    kept: float | None = None,
    size: tuple[int, int] = (340, 180),
    from_zero: bool = False,
) -> Html:
    """Draw curves over one axis, the first strongest.

    Parameters
    ----------
    caption, note : str
        Above the chart.
    curves : sequence of Curve
        At least one, each of at least one point.
    kept : float, optional
        Place on the x-axis that is marked; the axis reaches it.
    size : (int, int)
        Width and height.
    from_zero : bool
        Let the y-axis begin at 0.
    """
    width, height = size
    curves = [_thinned(curve) for curve in curves]
    every_x, every_y = (np.concatenate([np.asarray(c[i], float) for c in curves]) for i in (1, 2))
    low, high = float(every_y.min()), float(every_y.max())
    places = _ticks(0.0 if from_zero else low, high)
    several = len(curves) > 1
    right = width - (10 + CHARACTER * max(len(curve.label) for curve in curves) if several else 4)
    marked = every_x if kept is None else np.append(every_x, kept)
    x = (float(marked.min()), float(marked.max()))
    frame = _Frame(_margin(places), right, 16, height - 22, x, (places[0], places[-1]))
    drawn = [*_grid(frame, places)]
    if kept is not None:
        drawn += [
            tag("path.kept", d=f"M{_at(frame.across(kept))} {frame.top}V{frame.bottom}"),
            _label(frame.across(kept), frame.top - 5, "kept", frame, "middle"),
        ]
    for place, curve in enumerate(curves):
        drawn.append(_draw(curve, frame, strength=1 - 0.62 * place / max(1, len(curves) - 1)))
    if several:
        drawn += _end_labels(curves, frame)
    ends = sorted({x[0], x[1]})
    drawn += [
        _label(frame.across(value), height - 6, number(value), frame, "middle" if len(ends) == 1 else side)
        for value, side in zip(ends, ("start", "end"), strict=False)
    ]
    return _figure(caption, note, size, drawn)


def intervals(caption: str, rows: Sequence[Interval], note: str = "", *, size_label: int = 120) -> Html:
    """Draw values with their intervals, a row each, on an axis that begins at 0.

    Parameters
    ----------
    caption, note : str
        Above the chart.
    rows : sequence of Interval
        At least one.
    size_label : int
        Width left for the labels.
    """
    width, row_height = 480, 26
    height = row_height * len(rows) + 30
    places = _ticks(0, max(max(row.value, row.high or 0) for row in rows) or 1e-9)
    frame = _Frame(size_label, width - 52, 4, height - 24, (0, places[-1]), (0, 1))
    drawn = [
        tag("path.axis", d=f"M{_at(frame.across(value))} {frame.top}V{frame.bottom}") for value in places
    ]
    drawn += [_label(frame.across(value), height - 8, number(value), frame, "middle") for value in places]
    longest = int((size_label - 8) / CHARACTER)
    for place, row in enumerate(rows):
        y = frame.top + row_height * (place + 0.5)
        label = row.label if len(row.label) <= longest else row.label[: longest - 1] + "…"
        drawn.append(tag("text.strong", label, tag("title", row.label), x=0, y=_at(y + 4)))
        if row.low is not None and row.high is not None:
            ends = f"M{_at(frame.across(row.low))} {_at(y)}H{_at(frame.across(row.high))}"
            drawn.append(tag("path.whisker", d=ends))
        drawn.append(tag("circle.fill", cx=_at(frame.across(row.value)), cy=_at(y), r=4))
        drawn.append(tag("text.strong", f"{row.value:.4f}", x=width, y=_at(y + 4), text_anchor="end"))
    return _figure(caption, note, (width, height), drawn)


def heat_strips(caption: str, strips: Sequence[Strip], note: str = "") -> Html:
    """Draw rows of cells in shades of how far each is above or below its row's mean; what is 0 stays empty.

    Parameters
    ----------
    caption, note : str
        Above the chart.
    strips : sequence of Strip
        One a row; rows may differ in length.
    """
    width, left, right, row_height = 1056, 64, 190, 34
    drawn: list[Html] = []
    for row, strip in enumerate(strips):
        y = row * row_height + 4
        means, size = _cells(strip.loads)
        step = (width - left - right) / len(means)
        shade = np.searchsorted(SHADES, means / max(float(strip.loads.mean()), 1e-9))
        drawn.append(tag("text.strong", strip.label, x=0, y=y + 17))
        for place, (load, strength) in enumerate(zip(means.tolist(), shade.tolist(), strict=True)):
            first, last = place * size, min((place + 1) * size, len(strip.loads)) - 1
            which = f"code {first}" if first == last else f"codes {first} to {last}, mean"
            drawn.append(
                tag(
                    "rect.fill" if load else "rect.none",
                    tag("title", f"{which}: {number(round(load, 2))}"),
                    x=_at(left + place * step),
                    y=y,
                    width=_at(max(step - (0.8 if step > 3 else 0), 0.4)),
                    height=row_height - 10,
                    fill_opacity=f"{0.15 + 0.17 * strength:.2f}" if load else None,
                )
            )
        drawn.append(tag("text", strip.note, x=width - right + 12, y=y + 17))
    legend = row_height * len(strips) + 12
    drawn.append(tag("rect.none", x=left, y=legend, width=16, height=10))
    drawn.append(tag("text", "no item", x=left + 22, y=legend + 9))
    for strength in range(len(SHADES) + 1):
        drawn.append(
            tag(
                "rect.fill",
                x=left + 82 + 18 * strength,
                y=legend,
                width=17,
                height=10,
                fill_opacity=f"{0.15 + 0.17 * strength:.2f}",
            )
        )
    drawn.append(
        tag(
            "text",
            "under a quarter of an even share, up to over four times",
            x=left + 90 + 18 * (len(SHADES) + 1),
            y=legend + 9,
        )
    )
    return _figure(caption, note, (width, legend + 16), drawn)


def _cells(loads: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Return at most ``MOST_CELLS`` means of neighbours, and how many neighbours each is of."""
    size = -(-len(loads) // MOST_CELLS)
    starts = np.arange(0, len(loads), size)
    return np.add.reduceat(loads, starts) / np.diff(np.append(starts, len(loads))), size


def _thinned(curve: Curve) -> Curve:
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    if len(x) > MOST_POINTS:
        parts = np.array_split(np.arange(len(x)), MOST_POINTS)
        x, y = (np.array([values[part].mean() for part in parts]) for values in (x, y))
    return Curve(curve.label, x, y)


def _draw(curve: Curve, frame: _Frame, strength: float) -> Html:
    points = [f"{_at(frame.across(x))} {_at(frame.up(y))}" for x, y in zip(curve.x, curve.y, strict=True)]
    if len(points) == 1:
        cx, cy = points[0].split()
        return tag("circle.fill", cx=cx, cy=cy, r=3, fill_opacity=f"{strength:.2f}")
    return tag("path.line", d="M" + "L".join(points), stroke_opacity=f"{strength:.2f}")


def _end_labels(curves: Sequence[Curve], frame: _Frame) -> list[Html]:
    """Write each curve's label behind its end, as near as the others let it."""
    order = sorted(range(len(curves)), key=lambda i: frame.up(float(curves[i].y[-1])))
    height = min(LABEL_HEIGHT, (frame.bottom - frame.top) / len(curves))
    labels, last = [], -np.inf
    for rank, i in enumerate(order):
        y = max(frame.up(float(curves[i].y[-1])), last + height)
        last = min(y, frame.bottom - height * (len(order) - 1 - rank))
        labels.append(tag("text", curves[i].label, x=_at(frame.right + 6), y=_at(last + 4)))
    return labels


def _margin(places: Sequence[float]) -> float:
    """Return the room for the labels of an axis; equal for most, so that charts below one another share their sides."""
    return max(42.0, 10 + CHARACTER * max(len(number(value)) for value in places))


def _ticks(low: float, high: float) -> list[float]:
    """Return round places that reach from ``low`` or below to ``high`` or above."""
    if low == high:
        low, high = low - (abs(low) * 0.05 or 1), high + (abs(high) * 0.05 or 1)
    found = MaxNLocator(3, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2).tick_values(low, high)
    return [round(float(value), 12) + 0.0 for value in found]


def _grid(frame: _Frame, places: Sequence[float]) -> list[Html]:
    drawn = [
        tag("path.axis", d=f"M{_at(frame.left)} {_at(frame.up(value))}H{_at(frame.right)}")
        for value in places
    ]
    return drawn + [
        tag("text", number(value), x=_at(frame.left - 6), y=_at(frame.up(value) + 4), text_anchor="end")
        for value in places
    ]


def _label(x: float, y: float, label: str, frame: _Frame, side: str) -> Html:
    """Write below or above the axis, kept inside the chart."""
    half = CHARACTER * len(label) / 2
    if side == "middle":
        x = min(max(x, frame.left + half - 4), max(frame.right - half + 4, frame.left + half - 4))
    return tag("text", label, x=_at(x), y=_at(y), text_anchor=side)


def _figure(caption: str, note: str, size: tuple[float, float], drawn: Sequence[Html]) -> Html:
    width, height = size
    head = tag("figcaption", caption, tag("span.soft", note) if note else "")
    picture = tag(
        "svg", join(drawn), viewBox=f"0 0 {_at(width)} {_at(height)}", role="img", aria_label=caption
    )
    return tag("figure", head, picture)


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
