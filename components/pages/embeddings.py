"""What content vectors know: who stands near whom, and how many directions are in use.

Shapes: N items, D width, M items that are looked at, C regions.
"""

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from components.artifacts import ContentEmbeddings, ItemCatalog
from components.pages.figures import Curve, bars, lines
from components.pages.html import Html, check_catalog, item_names, number, tag
from components.pages.page import Section, beside, cards, facts, page

REGIONS = 12
"""Regions that sample items are the middles of."""
NEIGHBOURS = 6
LOOKED_AT = 4096
"""Items, evenly spaced, that regions and spectrum are found from."""
QUERIES = 500
"""Items whose nearest neighbour is looked for, fewer where the catalogue is large."""
PAIRS = 50_000_000
"""Most cosines of one kind that are computed."""


def embeddings_page(embeddings: ContentEmbeddings, catalog: ItemCatalog) -> Html:
    """Show nearest neighbours of items from all over the catalogue, cosines, lengths and spectrum of the vectors.

    Raises
    ------
    ValueError
        The vectors are of another catalogue.
    """
    check_catalog(catalog, embeddings.catalog, "embeddings_page")
    x_ND = embeddings.matrix
    count, width = x_ND.shape
    norms_N = torch.linalg.vector_norm(x_ND, dim=1)
    looked = _evenly(count, LOOKED_AT)
    variance_D = _spectrum(x_ND[looked])
    running_D = np.cumsum(variance_D) / max(variance_D.sum(), 1e-12)
    directions = int((running_D < 0.9).sum()) + 1 if variance_D.any() else 0
    nearest = _nearest(x_ND, norms_N, _evenly(count, max(1, min(QUERIES, PAIRS // count))), 1)[0].flatten()
    figures = [
        ("items", number(count)),
        ("numbers a vector", number(width)),
        ("directions with 90 % of the variance", number(directions)),
        (
            "median cosine to the nearest other item",
            f"{float(nearest.median()):.2f}" if len(nearest) else "none",
        ),
        ("vectors of length 0", number(int((norms_N == 0).sum()))),
    ]
    return page(
        "Embeddings",
        [
            Section(
                "Neighbours",
                [cards(_neighbours(x_ND, norms_N, looked, catalog))],
                f"The item nearest the middle of each of up to {REGIONS} regions of the catalogue, and the "
                "items with the highest cosine to it among all.",
            ),
            Section("Shape", [beside(_shapes(norms_N, running_D, nearest))]),
        ],
        f"Encoder {embeddings.encoder}, revision {embeddings.revision[:12] or 'unknown'}; "
        + ("vectors have length 1." if embeddings.normalised else "vectors keep their lengths."),
        [facts(figures)],
    )


def _evenly(count: int, most: int) -> Tensor:
    return torch.from_numpy(np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)))


def _spectrum(x_MD: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the variance along each principal direction, (D,) descending."""
    centred = (x_MD - x_MD.mean(dim=0)).double()
    found = torch.linalg.eigvalsh(centred.T @ centred / len(centred)).clamp(min=0).flip(0)
    return found.numpy()  # type: ignore[no-any-return]


def _nearest(x_ND: Tensor, norms_N: Tensor, items_M: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return cosines and ids of the ``k`` other items nearest to each of some, (M, k) both, or as many as there are."""
    scale_N = norms_N.clamp(min=1e-12)
    cosine_MN = (x_ND[items_M] @ x_ND.T) / scale_N / scale_N[items_M, None]
    cosine_MN[torch.arange(len(items_M)), items_M] = -2.0
    found = cosine_MN.topk(min(k, len(x_ND) - 1), dim=1)
    return found.values, found.indices


def _neighbours(x_ND: Tensor, norms_N: Tensor, looked_M: Tensor, catalog: ItemCatalog) -> list[Html]:
    unit_MD = torch.nn.functional.normalize(x_ND[looked_M], dim=1).numpy()
    different = len(np.unique(unit_MD, axis=0))
    regions = KMeans(min(REGIONS, different), n_init=1, max_iter=20, random_state=0).fit(unit_MD)
    middles = looked_M[np.unique(regions.transform(unit_MD).argmin(axis=0))]
    cosines, neighbours = _nearest(x_ND, norms_N, middles, NEIGHBOURS)
    names = item_names(catalog, middles.tolist())
    return [
        tag(
            "div",
            tag("h3", name),
            tag(
                "ol",
                *(
                    tag("li", tag("span", f"{value:.2f}"), other)
                    for value, other in zip(values, item_names(catalog, ids), strict=True)
                ),
            ),
        )
        for name, values, ids in zip(names, cosines.tolist(), neighbours.tolist(), strict=True)
    ]


def _shapes(norms_N: Tensor, running_D: np.ndarray, nearest_M: Tensor) -> list[Html]:  # type: ignore[type-arg]
    edges = np.linspace(min([0.0, *nearest_M.tolist()]), 1, 21)
    counts = np.histogram(nearest_M.clamp(max=1).numpy(), edges)[0]
    labels = [f"{low:.2f}" for low in edges[:-1]]
    spread = [
        bars(
            "Cosine to the nearest other item",
            counts.tolist(),
            labels,
            f"{len(nearest_M):,} items, evenly spaced",
            ticks=5,
            unit="items",
        ),
        lines(
            "Spectrum",
            [Curve("", np.arange(1, len(running_D) + 1), 100 * running_D)],
            "% of the variance in so many principal directions",
            from_zero=True,
        ),
    ]
    low, high = float(norms_N.min()), float(norms_N.max())
    if high - low > 1e-3 * max(high, 1e-12):
        edges = np.linspace(low, high, 21)
        counts = np.histogram(norms_N.numpy(), edges)[0]
        labels = [f"{edge:.3g}" for edge in edges[:-1]]
        spread.append(bars("Length of the vectors", counts.tolist(), labels, "items", ticks=4, unit="items"))
    return spread
