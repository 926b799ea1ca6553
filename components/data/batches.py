"""Ragged histories to padded batches, by index arithmetic on one flat array of item ids.

Shapes: R rows, B batch, T items of the longest history in a batch, U unique items of a batch, N items of the
catalogue.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from components.seams import SequenceBatch

Ints = npt.NDArray[np.int64]

# Batches are cut from runs of about this many batches sorted by length: little padding, still well mixed.
_RUN = 32
# Symbols vary more than items do: with twice the run 97 % of the positions are symbols instead of 95 %.
_RUN_OF_SYMBOLS = 64


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


def window_rows(
    train: pl.DataFrame,
    max_history: int,
    generator: torch.Generator,
    counts: Ints | None = None,
    max_tokens: int | None = None,
) -> Rows:
    """Cut every training sequence into windows that share their border item.

    For recommenders that predict at every position: each event after a user's first is a target exactly
    once. The cuts are shifted at random for each call, so that an item is not always met at the same depth.

    Parameters
    ----------
    train : DataFrame
        Column ``sequence``, oldest item first.
    max_history : int
        Most items of a window that are read; its last item is a target alone.
    generator : torch.Generator
        Draws where the first window of a sequence ends; a sequence that fits is one window.
    counts : array, optional
        (N,) symbols of each item, by item id; None: one each.
    max_tokens : int, optional
        Most symbols of the items that are read; None: any number.

    Raises
    ------
    ValueError
        An item alone has more than ``max_tokens`` symbols.
    """
    values, offsets = _flat(train["sequence"])
    spent = _spent(values, counts)
    budget = spent[-1] if max_tokens is None else max_tokens
    if max_tokens is not None and np.diff(spent).max(initial=0) > max_tokens:
        longest = int(np.diff(spent).argmax())
        raise ValueError(
            f"item {values[longest]} has {np.diff(spent)[longest]} symbols, max_tokens is {max_tokens}: "
            "no window could hold it; raise max_tokens"
        )

    def reach(start: Ints, last: Ints) -> Ints:
        """Return the border item of the longest windows that start here."""
        affordable = np.searchsorted(spent, spent[start] + budget, side="right") - 1
        return np.minimum(np.minimum(start + max_history, affordable), last)

    begin, last = offsets[:-1], offsets[1:] - 1
    begin, last = begin[last > begin], last[last > begin]
    drawn = torch.randint(1, max_history + 1, (len(begin),), generator=generator).numpy()
    longest_end = reach(begin, last)
    shifted = begin + 1 + (drawn - 1) * (longest_end - begin) // max_history
    starts, ends = [begin], [np.where(longest_end == last, last, shifted)]
    while (goes_on := ends[-1] < last).any():  # one round a window of the longest sequence
        start, last = ends[-1][goes_on], last[goes_on]
        starts.append(start)
        ends.append(reach(start, last))
    # Windows do not overlap but for their border, so both sort into the order of the sequences.
    start, end = np.sort(np.concatenate(starts)), np.sort(np.concatenate(ends))
    return Rows(values, start, end, values[end])


def row_symbols(rows: Rows, counts: Ints) -> Ints:
    """Return how many symbols each row has (R,), its target included, from those of each item (N,)."""
    spent = _spent(rows.values, counts)
    return spent[rows.end] - spent[rows.start] + counts[rows.target]


def _spent(values: Ints, counts: Ints | None) -> Ints:
    """Return the symbols before each place of the flat array, and after its last."""
    symbols = np.ones_like(values) if counts is None else counts[values]
    return np.concatenate([[0], np.cumsum(symbols)])


def pad(rows: Rows, which: Ints) -> SequenceBatch:
    """Gather some rows into one padded batch; the items are indices into its unique items."""
    start, end = rows.start[which], rows.end[which]
    at = start[:, None] + np.arange(int((end - start).max()))[None, :]
    mask = at < end[:, None]
    items = rows.values[np.where(mask, at, start[:, None])]
    both = torch.from_numpy(np.concatenate([items, rows.target[which][:, None]], axis=1))
    unique, inverse = torch.unique(both, return_inverse=True)
    return SequenceBatch(unique, inverse[:, :-1], torch.from_numpy(mask), inverse[:, -1])


def cut_batches(
    rows: Rows,
    batch_size: int,
    generator: torch.Generator,
    cost: Ints | None = None,
    batch_tokens: int | None = None,
) -> list[Ints]:
    """Shuffle rows, sort runs of batches by cost, and cut them into batches, each the numbers of its rows.

    Parameters
    ----------
    rows : Rows
        R histories.
    batch_size : int
        Rows of a batch; not read where ``batch_tokens`` is given.
    generator : torch.Generator
        Draws the order.
    cost : array, optional
        (R,) symbols of each row (``row_symbols``); None: its items, without the target.
    batch_tokens : int, optional
        Most that the rows of a batch cost together; a row that costs more is a batch of its own.
    """
    order = torch.randperm(len(rows.start), generator=generator).numpy()
    cost = rows.end - rows.start if cost is None else cost
    if batch_tokens is None:
        share, room, batches = np.ones_like(cost), batch_size, _RUN
    else:
        share, room, batches = cost, batch_tokens, _RUN_OF_SYMBOLS
    run = (np.cumsum(share[order]) - share[order]) // (room * batches)
    order = order[np.lexsort((cost[order], run))]
    filled = np.concatenate([[0], np.cumsum(share[order])])
    borders = [0]
    while (first := borders[-1]) < len(order):
        full = int(np.searchsorted(filled, filled[first] + room, side="right")) - 1
        # Not past a run: its longest rows and the shortest of the next would be mostly padding.
        end_of_run = int(np.searchsorted(run, run[first], side="right"))
        borders.append(max(first + 1, min(full, end_of_run)))
    return [order[begin:end] for begin, end in pairwise(borders)]


def training_batches(
    rows: Rows,
    batch_size: int,
    generator: torch.Generator,
    cost: Ints | None = None,
    batch_tokens: int | None = None,
) -> Iterator[SequenceBatch]:
    """Yield the batches that ``cut_batches`` cuts, in random order."""
    batches = cut_batches(rows, batch_size, generator, cost, batch_tokens)
    for index in torch.randperm(len(batches), generator=generator).tolist():
        yield pad(rows, batches[index])


def ranking_batches(rows: Rows, batch_size: int) -> Iterator[tuple[Ints, SequenceBatch]]:
    """Yield (row numbers, batch) with rows of like length together, longest first."""
    order = np.argsort(rows.start - rows.end, kind="stable")
    for begin in range(0, len(order), batch_size):
        which = order[begin : begin + batch_size]
        yield which, pad(rows, which)
