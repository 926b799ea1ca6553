"""Popularity: everybody gets the items with most training events."""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from components.recommenders.full_ranking import flatten


def count_events(sequences: pl.Series, num_items: int) -> NDArray[np.int64]:
    """Count the training events of every item.

    Parameters
    ----------
    sequences : series of list
        Training sequences of item ids.
    num_items : int
        Size of the catalogue.

    Returns
    -------
    array
        (N,) events, 0 for items that nobody met in training.
    """
    return np.bincount(flatten(sequences).items, minlength=num_items)


@dataclass(frozen=True)
class Popularity:
    """Score items by their training events, the same for all users."""

    counts: NDArray[np.int64]
    """(N,) training events."""

    @classmethod
    def fit(cls, sequences: pl.Series, num_items: int) -> "Popularity":
        """Count events in the training sequences, the same training data that every other method gets."""
        return cls(count_events(sequences, num_items))

    def scores(self, histories: pl.Series) -> NDArray[np.float64]:
        """Return (U, N) scores."""
        return np.tile(self.counts.astype(np.float64), (len(histories), 1))
