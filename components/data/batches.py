"""Ragged histories to padded batches, by index arithmetic on one flat array of item ids.

Shapes: R rows, B batch, T items of the longest history in a batch, U unique items of a batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from components.seams import SequenceBatch

Ints = npt.NDArray[np.int64]

# Batches are cut from runs of this many batches sorted by length: little padding, still well mixed.
_RUN = 32


class Rows(NamedTuple):
    """Histories as slices of one flat array: row r reads ``values[start:end]``, its target is ``target``."""

    values: Ints
    start: Ints
    end: Ints
    target: Ints


def _flat(lists: pl.Series) -> tuple[Ints, Ints]:
    """Return a list column as (values, offsets)."""
    lengths = lists.list.len().to_numpy().astype(np.int64)
    return lists.explode().to_numpy().astype(np.int64), np.concatenate([[0], np.cumsum(lengths)])


def held_out_rows(frame: pl.DataFrame) -> Rows:
    """Return the rows of a frame with ``history`` and ``target``, in its order."""
    values, offsets = _flat(frame["history"])
    return Rows(values, offsets[:-1], offsets[1:], frame["target"].to_numpy().astype(np.int64))


def prefix_rows(train: pl.DataFrame, max_history: int) -> Rows:
    """Return every (prefix, next item) pair of the training sequences, the latest ``max_history`` items kept.

    For recommenders that predict one item a row. R = ``SequenceSplit.num_training_targets``.
    """
    values, offsets = _flat(train["sequence"])
    begin = np.repeat(offsets[:-1], np.diff(offsets))
    at = np.arange(len(values))
    has_history = at > begin
    begin, at = begin[has_history], at[has_history]
    return Rows(values, np.maximum(begin, at - max_history), at, values[at])


def window_rows(train: pl.DataFrame, max_history: int, generator: torch.Generator) -> Rows:
    """Cut every training sequence into windows of ``max_history + 1`` items that share their border item.

    For recommenders that predict at every position: each event after a user's first is a target exactly
    once. The cuts are shifted at random for each call, so that an item is not always met at the same depth.
    """
    values, offsets = _flat(train["sequence"])
    begin, last = offsets[:-1], np.diff(offsets) - 1
    begin, last = begin[last > 0], last[last > 0]
    drawn = torch.randint(1, max_history + 1, (len(begin),), generator=generator).numpy()
    cut = np.where(last <= max_history, last, drawn)
    windows = 1 - (cut - last) // max_history
    index = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
    begin, last, cut = (np.repeat(a, windows) for a in (begin, last, cut))
    start = begin + np.where(index == 0, 0, cut + (index - 1) * max_history)
    end = begin + np.minimum(cut + index * max_history, last)
    return Rows(values, start, end, values[end])


def pad(rows: Rows, which: Ints) -> SequenceBatch:
    """Gather some rows into one padded batch; the items are indices into its unique items."""
    start, end = rows.start[which], rows.end[which]
    at = start[:, None] + np.arange(int((end - start).max()))[None, :]
    mask = at < end[:, None]
    items = rows.values[np.where(mask, at, start[:, None])]
    both = torch.from_numpy(np.concatenate([items, rows.target[which][:, None]], axis=1))
    unique, inverse = torch.unique(both, return_inverse=True)
    return SequenceBatch(unique, inverse[:, :-1], torch.from_numpy(mask), inverse[:, -1])


def training_batches(rows: Rows, batch_size: int, generator: torch.Generator) -> Iterator[SequenceBatch]:
    """Shuffle rows, sort runs of batches by length, and yield the batches in random order."""
    order = torch.randperm(len(rows.start), generator=generator).numpy()
    run = batch_size * _RUN
    within = np.lexsort((rows.end[order] - rows.start[order], np.arange(len(order)) // run))
    order = order[within]
    count = -(-len(order) // batch_size)
    for index in torch.randperm(count, generator=generator).tolist():
        yield pad(rows, order[index * batch_size : (index + 1) * batch_size])


def ranking_batches(rows: Rows, batch_size: int) -> Iterator[tuple[Ints, SequenceBatch]]:
    """Yield (row numbers, batch) with rows of like length together, longest first."""
    order = np.argsort(rows.start - rows.end, kind="stable")
    for begin in range(0, len(order), batch_size):
        which = order[begin : begin + batch_size]
        yield which, pad(rows, which)
