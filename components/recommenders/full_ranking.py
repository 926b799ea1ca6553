"""Exact ranks of targets among all items, for methods that score the whole catalogue.

Shapes: U users, N items of the catalogue, E events of all histories together.
"""

from typing import NamedTuple, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray


class Scorer(Protocol):
    """A method that gives every item of the catalogue a score for every user."""

    def scores(self, histories: pl.Series) -> NDArray[np.float64]:
        """Return (U, N) finite scores for histories (U lists of item ids, oldest first); higher is better."""
        ...


class ExactRanking(NamedTuple):
    """Where the targets stand among all items, and the top of each list."""

    ranks: NDArray[np.int64]
    """(U,) from 1; 0 where the target is not in the ranking."""
    items: NDArray[np.int64]
    """(U, k) item ids, best first, ties by item id; -1 where fewer than k items may be listed."""
    scores: NDArray[np.float64]
    """(U, k) scores of the listed items, -inf beside -1."""


class Events(NamedTuple):
    """Ragged lists laid flat."""

    rows: NDArray[np.int64]
    """(E,) number of the list."""
    items: NDArray[np.int64]
    """(E,) item ids, oldest first within a list."""
    ages: NDArray[np.int64]
    """(E,) steps back from the newest event of the list, which has 0."""


def flatten(lists: pl.Series) -> Events:
    """Lay a polars list column flat."""
    lengths = lists.list.len().to_numpy().astype(np.int64)
    items = lists.filter(lists.list.len() > 0).explode().to_numpy().astype(np.int64)
    ends = np.repeat(np.cumsum(lengths), lengths)
    return Events(np.repeat(np.arange(len(lists)), lengths), items, ends - 1 - np.arange(len(items)))


def rank_exactly(
    scorer: Scorer, histories: pl.Series, targets: pl.Series, *, k: int, exclude_seen: bool, batch_size: int
) -> ExactRanking:
    """Rank every target among all items.

    Items of equal score share their places: the rank is 1 + (items that score higher) + (other items of equal
    score) // 2, so a method that gives one score to everything lands in the middle, neither first nor last.

    Parameters
    ----------
    scorer : Scorer
        What scores the catalogue.
    histories : series of list
        U lists of item ids, oldest first.
    targets : series
        U item ids.
    k : int
        Length of the lists to return.
    exclude_seen : bool
        Take the items of the history out of the ranking, for all methods alike: a target among them is a miss.
    batch_size : int
        Users scored at once; sets the memory, not the result.
    """
    num_users, wanted = len(histories), targets.to_numpy().astype(np.int64)
    ranks = np.empty(num_users, dtype=np.int64)
    items = np.full((num_users, k), -1, dtype=np.int64)
    listed = np.full((num_users, k), -np.inf)
    for start in range(0, num_users, batch_size):
        block = slice(start, min(start + batch_size, num_users))
        rows = np.arange(block.stop - block.start)
        scores = scorer.scores(histories[block])
        own = scores[rows, wanted[block]].copy()
        hidden = np.zeros(len(rows), dtype=bool)
        if exclude_seen:
            seen = flatten(histories[block])
            scores[seen.rows, seen.items] = -np.inf
            hidden = scores[rows, wanted[block]] == -np.inf
        higher = (scores > own[:, None]).sum(axis=1)
        equal = (scores == own[:, None]).sum(axis=1) - 1
        ranks[block] = np.where(hidden, 0, 1 + higher + equal // 2)
        top = best_items(scores, k)
        items[block, : top.shape[1]] = top
        listed[block, : top.shape[1]] = np.where(top < 0, -np.inf, np.take_along_axis(scores, top, axis=1))
    return ExactRanking(ranks, items, listed)


def best_items(scores_UN: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """List the k best items of each row, ties by item id; -1 where only items of score -inf are left.

    Returns
    -------
    array
        (U, min(k, N)).
    """
    num_users, num_items = scores_UN.shape
    k = min(k, num_items)
    if k == 0:
        return np.empty((num_users, 0), dtype=np.int64)
    # A full stable sort costs ten times as much; only the items at or above the k-th score can be listed,
    # and where many tie with it the lowest ids are the ones that stay.
    threshold = -np.partition(-scores_UN, k - 1, axis=1)[:, k - 1 : k]
    above = scores_UN > threshold
    level = scores_UN == threshold
    room = k - above.sum(axis=1, keepdims=True)
    chosen = above | (level & (np.cumsum(level, axis=1) <= room))
    items = np.nonzero(chosen)[1].reshape(num_users, k)
    values = np.take_along_axis(scores_UN, items, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    listed = np.take_along_axis(items, order, axis=1)
    return np.where(np.isneginf(np.take_along_axis(values, order, axis=1)), -1, listed)
