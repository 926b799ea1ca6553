"""Laws of the rows and batches that training and ranking read."""

from collections import Counter

import numpy as np
import polars as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.artifacts import HELD_OUT, SEQUENCE
from components.data.batches import (
    Rows,
    held_out_rows,
    pad,
    prefix_rows,
    ranking_batches,
    training_batches,
    window_rows,
)
from components.seams import SequenceBatch

# An event is named by its own number, so that a row tells which events it holds.
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=12)
caps = st.integers(1, 6)
laws = settings(max_examples=30, deadline=None)


def train(counts: list[int]) -> tuple[pl.DataFrame, list[list[int]]]:
    ends = np.cumsum(counts)
    sequences = [list(range(end - n, end)) for end, n in zip(ends, counts, strict=True)]
    return pl.DataFrame({"user_id": range(len(counts)), "sequence": sequences}, schema=SEQUENCE), sequences


def read(rows: Rows) -> list[tuple[list[int], int]]:
    spans = zip(rows.start, rows.end, rows.target, strict=True)
    return [(rows.values[start:end].tolist(), int(target)) for start, end, target in spans]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def contents(batch: SequenceBatch) -> list[tuple[list[int], int]]:
    items, target = batch.unique[batch.items], batch.unique[batch.target]
    kept = [row[mask].tolist() for row, mask in zip(items, batch.mask, strict=True)]
    return list(zip(kept, target.tolist(), strict=True))


@given(lengths, caps)
@laws
def test_prefix_rows_are_all_prefixes_cut_to_the_latest(counts: list[int], cap: int) -> None:
    frame, sequences = train(counts)
    rows = read(prefix_rows(frame, cap))
    assert rows == [(s[:at][-cap:], s[at]) for s in sequences for at in range(1, len(s))]
    assert len(rows) == sum(counts) - len(counts)


@given(lengths, caps, st.integers(0, 100))
@laws
def test_windows_predict_every_event_after_the_first_exactly_once(
    counts: list[int], cap: int, seed: int
) -> None:
    frame, sequences = train(counts)
    rows = read(window_rows(frame, cap, generator(seed)))
    predicted = Counter(event for history, target in rows for event in [*history[1:], target])
    assert predicted == Counter(event for s in sequences for event in s[1:])
    user = {event: number for number, s in enumerate(sequences) for event in s}
    for history, target in rows:
        assert 1 <= len(history) <= cap
        # Events are numbered in order, so a contiguous window that ends before its target counts up to it.
        assert [*history, target] == list(range(history[0], target + 1))
        assert user[history[0]] == user[target]


def test_window_cuts_move_with_the_generator_and_repeat_with_the_seed() -> None:
    frame, _ = train([50] * 20)
    first, again, other = (read(window_rows(frame, 7, generator(seed))) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    # Every depth occurs, so no item is always met at the same place of its window.
    assert {len(history) for history, _ in first} == set(range(1, 8))


def test_a_sequence_that_fits_is_one_window() -> None:
    frame, sequences = train([2, 8, 1])
    assert read(window_rows(frame, 7, generator())) == [(s[:-1], s[-1]) for s in sequences[:2]]


def test_users_with_one_event_give_no_rows() -> None:
    frame, _ = train([1, 1, 1])
    assert read(prefix_rows(frame, 5)) == []
    assert read(window_rows(frame, 5, generator())) == []
    assert list(training_batches(prefix_rows(frame, 5), 4, generator())) == []


def test_held_out_rows_keep_order_history_and_target() -> None:
    frame = pl.DataFrame({"user_id": [4, 9], "history": [[3, 1, 3], [7]], "target": [2, 7]}, schema=HELD_OUT)
    assert read(held_out_rows(frame)) == [([3, 1, 3], 2), ([7], 7)]


@st.composite
def ragged(draw: st.DrawFn) -> tuple[Rows, list[tuple[list[int], int]]]:
    """Rows over repeating item ids."""
    item = st.integers(0, 9)
    rows = draw(st.lists(st.tuples(st.lists(item, min_size=1, max_size=6), item), min_size=1, max_size=12))
    frame = pl.DataFrame(
        {
            "user_id": range(len(rows)),
            "history": [history for history, _ in rows],
            "target": [target for _, target in rows],
        },
        schema=HELD_OUT,
    )
    return held_out_rows(frame), rows


@given(ragged(), st.data())
@laws
def test_padding_loses_nothing_and_adds_nothing(
    drawn: tuple[Rows, list[tuple[list[int], int]]], data: st.DataObject
) -> None:
    rows, expected = drawn
    some = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, unique=True))
    batch = pad(rows, np.array(some))
    assert contents(batch) == [expected[row] for row in some]
    # Left-aligned, no wider than the longest row.
    assert bool((batch.mask[:, :-1] | ~batch.mask[:, 1:]).all()) and bool(batch.mask[:, 0].all())
    assert bool(batch.mask[:, -1].any())
    # The unique items are exactly those of the rows: padding brings in none.
    present = sorted({item for row in some for item in [*expected[row][0], expected[row][1]]})
    assert batch.unique.tolist() == present
    assert batch.items.dtype == batch.target.dtype == torch.long


@given(ragged(), st.integers(1, 5))
@laws
def test_ranking_batches_cover_every_row_once_longest_first(
    drawn: tuple[Rows, list[tuple[list[int], int]]], size: int
) -> None:
    rows, expected = drawn
    found = {}
    widths = []
    for which, batch in ranking_batches(rows, size):
        assert 1 <= len(which) <= size
        widths.append(batch.items.shape[1])
        for row, content in zip(which.tolist(), contents(batch), strict=True):
            assert row not in found
            found[row] = content
    assert [found[row] for row in range(len(expected))] == expected
    assert widths == sorted(widths, reverse=True)


@given(ragged(), st.integers(1, 5), st.integers(0, 100))
@laws
def test_training_batches_are_a_shuffle_of_all_rows(
    drawn: tuple[Rows, list[tuple[list[int], int]]], size: int, seed: int
) -> None:
    rows, expected = drawn
    batches = [contents(batch) for batch in training_batches(rows, size, generator(seed))]
    assert all(1 <= len(batch) <= size for batch in batches)
    assert len(batches) == -(-len(expected) // size)
    key = Counter((tuple(history), target) for batch in batches for history, target in batch)
    assert key == Counter((tuple(history), target) for history, target in expected)
    assert batches == [contents(batch) for batch in training_batches(rows, size, generator(seed))]


def test_training_batches_waste_little_padding_and_still_mix() -> None:
    """Sorted runs: far less padding than a plain shuffle, another order every epoch."""
    counts = np.random.default_rng(0).integers(2, 40, size=600).tolist()
    frame, sequences = train(counts)
    rows = window_rows(frame, 40, generator())
    epochs = [list(training_batches(rows, 16, generator(seed))) for seed in (1, 2)]
    filled = np.mean([float(batch.mask.float().mean()) for batch in epochs[0]])
    assert filled > 0.9
    first, second = ([sorted(b.unique.tolist()) for b in batches] for batches in epochs)
    assert sum(batch in second for batch in first) < 0.1 * len(first)
    widths = [batch.items.shape[1] for batch in epochs[0]]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)
