"""Laws of the rows and batches that training and ranking read."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.artifacts import HELD_OUT, SEQUENCE
from components.data.batches import (
    Ints,
    Rows,
    cut_batches,
    held_out_rows,
    pad,
    prefix_rows,
    ranking_batches,
    row_symbols,
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


def closed_form_windows(train: pl.DataFrame, max_history: int, generator: torch.Generator) -> Rows:
    """Windows of ``max_history + 1`` items by arithmetic alone, as they are where nothing but items counts."""
    lengths = train["sequence"].list.len().to_numpy().astype(np.int64)
    values, offsets = train["sequence"].explode().to_numpy().astype(np.int64), np.cumsum(lengths) - lengths
    begin, last = offsets[lengths > 1], lengths[lengths > 1] - 1
    drawn = torch.randint(1, max_history + 1, (len(begin),), generator=generator).numpy()
    cut = np.where(last <= max_history, last, drawn)
    windows = 1 - (cut - last) // max_history
    index = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
    begin, last, cut = (np.repeat(a, windows) for a in (begin, last, cut))
    start = begin + np.where(index == 0, 0, cut + (index - 1) * max_history)
    end = begin + np.minimum(cut + index * max_history, last)
    return Rows(values, start, end, values[end])


@given(lengths, caps, st.integers(0, 100), st.booleans())
@laws
def test_windows_without_a_budget_are_cut_by_items_alone(
    counts: list[int], cap: int, seed: int, ample: bool
) -> None:
    """Rows and draws equal the closed form to the bit, also where symbols are counted and never run out."""
    frame, _ = train(counts)
    drawn, expected = generator(seed), generator(seed)
    symbols = np.random.default_rng(seed).integers(1, 6, size=sum(counts))
    found = window_rows(frame, cap, drawn, symbols, 5 * cap if ample else None)
    for one, other in zip(found, closed_form_windows(frame, cap, expected), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    assert torch.equal(drawn.get_state(), expected.get_state())


@given(lengths, st.integers(1, 20), st.integers(4, 14), st.integers(0, 100))
@laws
def test_windows_under_a_budget_predict_every_event_once_and_read_no_more_than_it_allows(
    events: list[int], cap: int, budget: int, seed: int
) -> None:
    frame, sequences = train(events)
    counts = np.random.default_rng(seed).integers(2, 5, size=sum(events))
    windows = read(window_rows(frame, cap, generator(seed), counts, budget))
    predicted = Counter(event for history, target in windows for event in [*history[1:], target])
    assert predicted == Counter(event for s in sequences for event in s[1:])
    user = {event: number for number, s in enumerate(sequences) for event in s}
    for history, target in windows:
        assert [*history, target] == list(range(history[0], target + 1)) and user[history[0]] == user[target]
        assert len(history) <= cap and counts[history].sum() <= budget
    # A window that follows another and is followed by one could not have read its target too.
    for (_, before), (history, target), (after, _) in zip(windows, windows[1:], windows[2:], strict=False):
        if before == history[0] and target == after[0]:
            assert len(history) == cap or counts[[*history, target]].sum() > budget


def test_a_sequence_that_fits_the_budget_is_one_window_and_the_cuts_of_others_move() -> None:
    frame, sequences = train([4, 30])
    counts = np.full(34, 3)
    cuts = set()
    for seed in range(60):
        whole, first, *_ = read(window_rows(frame, 20, generator(seed), counts, 12))
        assert whole == (sequences[0][:-1], sequences[0][-1])
        cuts.add(len(first[0]))
    assert cuts == {1, 2, 3, 4}


def test_an_item_that_no_window_can_hold_is_refused() -> None:
    frame, _ = train([3, 3])
    with pytest.raises(ValueError, match="item 4 has 6 symbols, max_tokens is 5"):
        window_rows(frame, 20, generator(), np.array([2, 3, 5, 2, 6, 2]), 5)


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


def sorted_runs(rows: Rows, batch_size: int, generator: torch.Generator) -> list[SequenceBatch]:
    """Batches of ``batch_size`` rows from shuffled runs of 32, sorted by items, in random order."""
    order = torch.randperm(len(rows.start), generator=generator).numpy()
    runs = [order[at : at + 32 * batch_size] for at in range(0, len(order), 32 * batch_size)]
    order = np.concatenate([run[np.argsort((rows.end - rows.start)[run], kind="stable")] for run in runs])
    count = -(-len(order) // batch_size)
    return [
        pad(rows, order[at * batch_size : (at + 1) * batch_size])
        for at in torch.randperm(count, generator=generator).tolist()
    ]


@pytest.mark.parametrize("counts", [None, np.full(4000, 4)], ids=["items", "one length"])
def test_batches_of_so_many_rows_are_cut_from_runs_sorted_by_items(counts: Ints | None) -> None:
    """To the bit, and so they are where all items have as many symbols."""
    frame, _ = train(np.random.default_rng(0).integers(2, 12, size=500).tolist())
    rows = window_rows(frame, 6, generator())
    cost = None if counts is None else row_symbols(rows, counts)
    found = list(training_batches(rows, 5, generator(3), cost))
    for one, other in zip(found, sorted_runs(rows, 5, generator(3)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@given(ragged())
@laws
def test_a_row_costs_the_symbols_of_its_items_and_its_target(
    drawn: tuple[Rows, list[tuple[list[int], int]]],
) -> None:
    rows, expected = drawn
    counts = np.array([2, 5, 3, 4, 2, 2, 6, 3, 5, 4])
    costs = [sum(counts[item] for item in [*history, target]) for history, target in expected]
    assert row_symbols(rows, counts).tolist() == costs


@given(ragged(), st.integers(1, 40), st.integers(0, 100))
@laws
def test_packed_batches_hold_every_row_once_and_no_more_than_the_budget(
    drawn: tuple[Rows, list[tuple[list[int], int]]], budget: int, seed: int
) -> None:
    rows, expected = drawn
    cost = row_symbols(rows, np.array([2, 5, 3, 4, 2, 2, 6, 3, 5, 4]))
    batches = cut_batches(rows, 1, generator(seed), cost, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(expected)))
    assert all(cost[batch].sum() <= budget or len(batch) == 1 for batch in batches)
    yielded = Counter(
        tuple(contents(batch)[0][0]) for batch in training_batches(rows, 1, generator(seed), cost, budget)
    )
    assert yielded == Counter(tuple(expected[batch[0]][0]) for batch in batches)


def test_packed_batches_are_full_but_for_the_ends_of_runs() -> None:
    """About 33 batches a run: 32 would be full to the last symbol, and what is left over is one more."""
    frame, _ = train(np.random.default_rng(0).integers(2, 40, size=3000).tolist())
    rows = window_rows(frame, 40, generator())
    cost = row_symbols(rows, np.random.default_rng(1).integers(2, 6, size=len(rows.values)))
    batches = cut_batches(rows, 1, generator(), cost, 600)
    filled = np.array([cost[batch].sum() for batch in batches]) / 600
    assert np.median(filled) > 0.9
    assert len(batches) <= 1.1 * cost.sum() / 600
    # What starts a batch would not have fitted into the one before, unless a run ended there.
    opened = np.array([cost[batch[0]] for batch in batches[1:]]) + 600 * filled[:-1] > 600
    assert (~opened).sum() <= cost.sum() / (32 * 600) + 1


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
