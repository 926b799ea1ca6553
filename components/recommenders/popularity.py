"""Popularity: everybody gets the items with most training events."""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from components.data.splits import count_events


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
