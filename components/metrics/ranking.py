"""Ranking metrics from one rank a user, and how far they would move with other users.

Shapes: U users, M metrics.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

COVERAGE = 0.95
"""Share of resamples inside an interval."""

CELLS = 4_000_000
"""Draws held at once while resampling: 32 MB, whatever the number of users."""

METRIC = re.compile(r"(?P<kind>[RN])@(?P<k>[1-9]\d*)|MRR")


class Intervals(NamedTuple):
    """Means over users with their percentile intervals."""

    value: NDArray[np.float64]
    """(M,) means over the users at hand."""
    low: NDArray[np.float64]
    """(M,) lower end."""
    high: NDArray[np.float64]
    """(M,) upper end."""


def metric_names(ks: Sequence[int]) -> list[str]:
    """Name the metrics of a report: recall and NDCG at every k, then the mean reciprocal rank."""
    return [f"{kind}@{k}" for kind in "RN" for k in ks] + ["MRR"]


def ranks_in_lists(items_Uk: NDArray[np.int64], targets_U: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (U,) the place of each target in its user's list, from 1; 0 where it is not listed."""
    hits = items_Uk == targets_U[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)


def contributions(ranks_U: ArrayLike, metrics: Sequence[str]) -> NDArray[np.float64]:
    """Compute what each user adds to each metric; the metric is the mean over users.

    With one relevant item a user, the ideal discounted gain is 1: NDCG@k is 1 / log2(rank + 1) up to k, else 0.

    Parameters
    ----------
    ranks_U : array of int
        (U,) rank of the target from 1; 0 where the target is not in the list.
    metrics : sequence of str
        ``R@k``, ``N@k`` or ``MRR``.

    Returns
    -------
    array
        (U, M) between 0 and 1, never NaN.

    Raises
    ------
    ValueError
        A metric of another name, or a rank below 0.
    """
    ranks = np.asarray(ranks_U, dtype=np.int64)
    if ranks.ndim != 1 or (ranks < 0).any():
        raise ValueError(f"ranks count from 1 and 0 is a miss, one a user; got shape {ranks.shape}")
    found = ranks > 0
    place = np.maximum(ranks, 1)
    gain = found / np.log2(place + 1)
    columns = []
    for name in metrics:
        match = METRIC.fullmatch(name)
        if match is None:
            raise ValueError(f"unknown metric {name!r}: write R@k, N@k or MRR, k >= 1")
        if match["kind"] is None:
            columns.append(found / place)
        else:
            listed = found & (ranks <= int(match["k"]))
            columns.append(np.where(listed, gain if match["kind"] == "N" else 1.0, 0.0))
    return np.stack(columns, axis=1) if columns else np.zeros((len(ranks), 0))


def bootstrap(contributions_UM: NDArray[np.float64], *, resamples: int, seed: int) -> Intervals:
    """Take means over users, with 95 % percentile intervals from users drawn with replacement.

    Parameters
    ----------
    contributions_UM : array
        (U, M) values of the users, U >= 1. All columns see the same draws.
    resamples : int
        How often the users are drawn.
    seed : int
        Equal seeds give equal intervals.

    Raises
    ------
    ValueError
        No users.

    References
    ----------
    B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    """
    users = len(contributions_UM)
    if not users:
        raise ValueError("a mean over no users: the slice is empty")
    rng = np.random.default_rng(seed)
    step = max(1, CELLS // users)
    means = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(0, users, (size, users))
        drawn += users * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * users).reshape(size, users)
        means.append(times @ contributions_UM / users)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return Intervals(contributions_UM.mean(axis=0), low, high)


def paired_bootstrap(
    contributions_UM: NDArray[np.float64], baseline_UM: NDArray[np.float64], *, resamples: int, seed: int
) -> Intervals:
    """Take the mean difference of two methods on the same users, row by row, with its interval.

    Users that both methods find easy or hard cancel out, so this interval is narrower than what two separate
    intervals suggest.

    Raises
    ------
    ValueError
        The shapes differ: the rows of both arrays must be the same users.
    """
    if contributions_UM.shape != baseline_UM.shape:
        raise ValueError(f"pairs need equal shapes, got {contributions_UM.shape} and {baseline_UM.shape}")
    return bootstrap(contributions_UM - baseline_UM, resamples=resamples, seed=seed)
