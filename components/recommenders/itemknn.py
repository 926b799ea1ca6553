"""Item-kNN: what was bought together with the items of the history, newer items counting more.

Seconds to fit, and on many logs ahead of trained generative recommenders: a row that no table should lack.
"""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field

from components.config import Config
from components.recommenders.full_ranking import flatten


class ItemKnnConfig(Config):
    """Settings of the item-kNN baseline."""

    decays: list[float] = Field([0.2, 0.3, 0.5, 0.7, 0.85, 1.0], min_length=1)
    """Recency decays to try on validation; the weight of an event is decay ** age, and 1 ignores order."""
    neighbours: int | None = Field(None, ge=1)
    """Most similar items kept of each item; none keeps all."""


@dataclass(frozen=True)
class ItemKnn:
    """Score items by decayed similarity to the history.

    The similarity of two items is the cosine of their columns in the binary user-item matrix of the
    *training* sequences: validation events are not used, as no other method learns from them.
    """

    similarity: sp.csr_array
    """(N, N), zero on the diagonal."""
    decay: float
    """Weight of an event relative to the next newer one, in (0, 1]."""

    @classmethod
    def fit(
        cls, sequences: pl.Series, num_items: int, *, decay: float = 1.0, neighbours: int | None = None
    ) -> "ItemKnn":
        """Compute item similarities.

        Parameters
        ----------
        sequences : series of list
            Training sequences of item ids, one a user.
        num_items : int
            Size of the catalogue.
        decay : float
            Weight of an event relative to the next newer one.
        neighbours : int, optional
            Most similar items kept of each item.

        References
        ----------
        B. Sarwar et al., "Item-based collaborative filtering recommendation algorithms", WWW 2001.
        """
        events = flatten(sequences)
        met = sp.csr_array(
            (np.ones(len(events.items)), (events.rows, events.items)), shape=(len(sequences), num_items)
        )
        met.data[:] = 1.0  # an item met twice by one user is met
        norm = np.sqrt(met.sum(axis=0))
        together = (met.T @ met).tocoo()
        apart = together.row != together.col
        row, column = together.row[apart], together.col[apart]
        cosine = together.data[apart] / (norm[row] * norm[column])
        similarity = sp.csr_array((cosine, (row, column)), shape=(num_items, num_items))
        return cls(similarity if neighbours is None else keep_largest(similarity, neighbours), decay)

    def with_decay(self, decay: float) -> "ItemKnn":
        """Return the same similarities under another recency decay."""
        return replace(self, decay=decay)

    def scores(self, histories: pl.Series) -> NDArray[np.float64]:
        """Return (U, N) scores: the sum over the history of decay ** age times similarity."""
        events = flatten(histories)
        shape = (len(histories), self.similarity.shape[0])
        weights = sp.csr_array((self.decay**events.ages, (events.rows, events.items)), shape=shape)
        dense: NDArray[np.float64] = (weights @ self.similarity).toarray()
        return dense


def keep_largest(matrix: sp.csr_array, count: int) -> sp.csr_array:
    """Keep the ``count`` largest entries of each row, ties by column."""
    matrix = matrix.sorted_indices()
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    place = np.arange(len(rows)) - matrix.indptr[rows]
    kept = order[place < count]
    return sp.csr_array((matrix.data[kept], (rows[kept], matrix.indices[kept])), shape=matrix.shape)
