"""Names beside the points of a figure that cover neither each other nor what is drawn.

Shapes: P points, B boxes (left, bottom, right, top; pixels), C places that a name may take.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from numpy.typing import NDArray

LEADER = 11.0
"""Points between a mark and its name beyond which a thin line joins them."""
SWEEPS = 6
"""Most rounds in which names look for a better place."""


def label_points(ax: Axes, dots: Sequence[Line2D], lines: Sequence[Line2D]) -> None:
    """Write the label of each error-bar point beside it.

    Names touch no other name, mark, error bar, dot, line or text where there is room; a name away from its mark is
    joined to it by a thin line. The figure has an Agg canvas and its layout is done: marks must not move afterwards,
    and names do not make them.

    Parameters
    ----------
    ax : Axes
        Panel whose error bars have labels.
    dots : sequence of Line2D
        Small marks that are not named and not to be covered, any number each.
    lines : sequence of Line2D
        Lines across the panel that are not to be covered.
    """
    canvas, unit = ax.figure.canvas, ax.figure.dpi / 72
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    points = [bars for bars in ax.containers if isinstance(bars, ErrorbarContainer)]
    if not points:
        return
    style: dict[str, Any] = {"fontsize": 9, "ha": "center", "va": "center"}
    centres_P2 = np.array([ax.transData.transform(bars[0].get_xydata())[0] for bars in points])
    sizes_P2 = np.zeros_like(centres_P2)
    for number, bars in enumerate(points):
        draft = ax.text(0, 0, str(bars.get_label()), **style)
        sizes_P2[number] = draft.get_window_extent(renderer).size
        draft.remove()
    ends = [ax.transData.transform(bar.get_segments()[0]) for bars in points for bar in bars[2]]
    drawn = [line.get_window_extent(renderer).padded(unit) for line in lines]
    drawn += [text.get_window_extent(renderer) for text in ax.texts]
    dots_D2 = np.concatenate([*(ax.transData.transform(dot.get_xydata()) for dot in dots), np.zeros((0, 2))])
    solid_B4 = np.array(
        [[*c - 5.5 * unit, *c + 5.5 * unit] for c in centres_P2]
        + [[*c - 2 * unit, *c + 2 * unit] for c in dots_D2]
        + [[*end.min(0) - unit, *end.max(0) + unit] for end in ends]
        + [box.extents for box in drawn]
    )
    places_P2 = _spread(
        centres_P2, sizes_P2, solid_B4, np.array(ax.get_window_extent(renderer).extents), unit
    )
    for bars, centre, place, size in zip(points, centres_P2, places_P2, sizes_P2, strict=True):
        nearest = np.clip(centre, place - size / 2, place + size / 2)
        far = np.hypot(*(nearest - centre)) > LEADER * unit
        leader = {"arrowstyle": "-", "color": bars[0].get_color(), "alpha": 0.6, "linewidth": 0.7}
        label = ax.annotate(
            str(bars.get_label()),
            bars[0].get_xydata()[0],
            xytext=tuple((place - centre) / unit),
            textcoords="offset points",
            color=bars[0].get_color(),
            arrowprops=leader | {"shrinkA": 0, "shrinkB": 5} if far else None,
            **style,
        )
        label.set_in_layout(False)  # else the panel would shrink to make room, and marks would move


def _spread(
    centres_P2: NDArray[np.float64],
    sizes_P2: NDArray[np.float64],
    solid_B4: NDArray[np.float64],
    frame_4: NDArray[np.float64],
    unit: float,
) -> NDArray[np.float64]:
    """Find places for the names of points, (P, 2) middles in pixels.

    Each name in turn takes the cheapest of some hundred places around its point, given where the others are, until
    none moves. Covering something costs most, then leaving the panel, then distance.
    """
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    gaps = np.arange(8, 100, 5)
    turn_C2 = np.stack([np.cos(angles), np.sin(angles)], 1).repeat(len(gaps), 0)
    gap_C = np.tile(gaps, len(angles)).astype(float)
    places_P2, boxes_P4 = np.full_like(centres_P2, np.nan), np.full((len(centres_P2), 4), np.nan)
    for _ in range(SWEEPS):
        before = places_P2.copy()
        for p in np.argsort(-centres_P2[:, 1], kind="stable"):
            half = sizes_P2[p] / 2
            middle_C2 = centres_P2[p] + turn_C2 * (half + gap_C[:, None] * unit)
            box_C4 = np.concatenate([middle_C2 - half, middle_C2 + half], 1)
            others = boxes_P4[(np.arange(len(boxes_P4)) != p) & ~np.isnan(boxes_P4[:, 0])]
            others = others + 3 * unit * np.array([-1, 0, 1, 0])
            # What else the leader runs over: not the mark and the error bar that it comes from.
            own_B = (solid_B4[:, :2] < centres_P2[p]).all(1) & (solid_B4[:, 2:] > centres_P2[p]).all(1)
            on_the_way = np.concatenate([solid_B4[~own_B], others])
            way_C2 = np.clip(centres_P2[p], box_C4[:, :2], box_C4[:, 2:]) - centres_P2[p]
            steps = [centres_P2[p] + share * way_C2 for share in (0.4, 0.6, 0.8)]
            crossed_C = sum(
                (_shared(np.concatenate([s - 1, s + 1], 1), on_the_way) > 0).sum(1) for s in steps
            )
            covered_C = (_shared(box_C4, solid_B4) > 0).sum(1) + 3 * (_shared(box_C4, others) > 0).sum(1)
            outside_C = 1 - _shared(box_C4, frame_4[None])[:, 0] / np.prod(sizes_P2[p])
            cost_C = covered_C + 10 * outside_C + 0.5 * crossed_C + 0.025 * gap_C
            best = int(cost_C.argmin())
            places_P2[p], boxes_P4[p] = middle_C2[best], box_C4[best]
        if np.array_equal(before, places_P2):
            break
    return places_P2


def _shared(one_A4: NDArray[np.float64], other_B4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the areas (A, B) that boxes of left, bottom, right and top share."""
    low = np.maximum(one_A4[:, None, :2], other_B4[None, :, :2])
    high = np.minimum(one_A4[:, None, 2:], other_B4[None, :, 2:])
    area: NDArray[np.float64] = np.clip(high - low, 0, None).prod(-1)
    return area
