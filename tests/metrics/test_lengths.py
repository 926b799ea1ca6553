"""Figures of lengths are those of the hand and of loops over items, users and events."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.artifacts import SidTable
from components.metrics.lengths import (
    count_lengths,
    describe_lengths,
    history_figures,
    lengths_differ,
    mean_lengths,
    popularity_deciles,
)
from components.metrics.sids import CollisionConfig, analyze
from components.tokenizers.sids import padded_codes

LEVELS = 4


def table_of(lengths: list[int], levels: int = LEVELS) -> SidTable:
    """A table of SIDs of these lengths: item i is written with code i at every level."""
    frame = pl.DataFrame(
        {"item_id": range(len(lengths)), "codes": [[item] * n for item, n in enumerate(lengths)]},
        schema={"item_id": pl.UInt32, "codes": pl.List(pl.UInt16)},
    ).with_columns(suffix=pl.lit(0, pl.UInt16))
    sizes = [len(lengths)] * levels
    return SidTable(codes=frame, codebook_sizes=sizes, suffix_size=1, shared=True, tokenizer="")


def histories(*items: list[int]) -> pl.Series:
    return pl.Series(items, dtype=pl.List(pl.UInt32))


LENGTHS = st.lists(st.integers(1, LEVELS), min_size=1, max_size=40)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(0, 99))
def test_the_histogram_and_the_means_equal_loops(lengths: list[int], seed: int) -> None:
    events = torch.from_numpy(np.random.default_rng(seed).integers(1, 9, len(lengths)))
    table = table_of(lengths)
    frame = count_lengths(table, events)
    assert frame["codes"].to_list() == [1, 2, 3, 4]
    for codes, items, drawn in frame.iter_rows():
        assert items == Counter(lengths)[codes]
        assert drawn == sum(int(n) for n, length in zip(events, lengths, strict=True) if length == codes)
    assert frame["items"].sum() == len(lengths) and frame["events"].sum() == int(events.sum())
    figures = mean_lengths(table, events)
    assert figures["codes_per_item"] == pytest.approx(np.mean(lengths))
    assert figures["codes_per_interaction"] == pytest.approx(np.average(lengths, weights=events.numpy()))


def test_without_interactions_nothing_is_said_of_them() -> None:
    table = table_of([1, 4, 4])
    assert count_lengths(table, None)["events"].to_list() == [None] * 4
    assert mean_lengths(table, None) == {"codes_per_item": 3.0}
    report = analyze(table, None, CollisionConfig())
    assert report.figures.keys() & {"codes_per_interaction", "tokens_per_history", "reconstruction"} == set()
    assert not len(report.deciles) and report.levels["reconstruction"].null_count() == LEVELS
    nobody = analyze(table, None, CollisionConfig(), events=torch.zeros(3, dtype=torch.long))
    assert nobody.fingerprint == report.fingerprint


def test_padded_codes_are_those_of_the_table() -> None:
    table = table_of([2, 4, 1])
    assert padded_codes(table).tolist() == [[0, 0, -1, -1], [1, 1, 1, 1], [2, -1, -1, -1]]
    assert padded_codes(table).dtype == torch.long


def test_deciles_go_from_the_most_popular_items_down_and_ties_by_item_id() -> None:
    """20 items, two a tenth. Item 19 leads; 0 to 17 tie, so tenths hold them in order; 18 is nobody's."""
    events = torch.tensor([5] * 18 + [0, 100])
    lengths = [1 + item % 4 for item in range(20)]
    frame = popularity_deciles(table_of(lengths), events)
    assert frame["decile"].to_list() == list(range(1, 11)) and set(frame["items"]) == {2}
    assert frame["events"].to_list() == [105] + [10] * 8 + [5]
    members = [[19, 0], *([n, n + 1] for n in range(1, 17, 2)), [17, 18]]
    assert frame["codes"].to_list() == [np.mean([lengths[item] for item in pair]) for pair in members]


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(0, 99))
def test_deciles_cover_every_item_once_and_differ_by_one_at_most(lengths: list[int], seed: int) -> None:
    events = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, len(lengths)))
    frame = popularity_deciles(table_of(lengths), events)
    assert frame["items"].sum() == len(lengths) and frame["events"].sum() == int(events.sum())
    assert frame["items"].max() - frame["items"].min() <= 1
    assert (frame["codes"] * frame["items"]).sum() == pytest.approx(sum(lengths))
    assert (frame["events"] / frame["items"]).is_sorted(descending=True)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 999), st.integers(1, 40))
def test_history_figures_equal_loops_over_users_and_events(
    lengths: list[int], seed: int, budget: int
) -> None:
    rng = np.random.default_rng(seed)
    users = [rng.integers(0, len(lengths), rng.integers(0, 13)).tolist() for _ in range(6)]
    figures = history_figures(table_of(lengths), histories(*users), budget)

    def held(items: list[int], symbols: list[int]) -> int:
        left, count = budget, 0
        for item in reversed(items):
            left -= symbols[item]
            if left < 0:
                break
            count += 1
        return count

    own, longest = [n + 1 for n in lengths], [LEVELS + 1] * len(lengths)
    totals = [sum(own[item] for item in items) for items in users]
    assert figures["tokens_per_history"] == pytest.approx(np.mean(totals))
    assert figures["events_in_budget"] == pytest.approx(np.mean([held(items, own) for items in users]))
    assert figures["events_in_budget_full_length"] == pytest.approx(
        np.mean([held(items, longest) for items in users])
    )
    assert figures["histories_cut"] == pytest.approx(np.mean([total > budget for total in totals]))
    assert figures["events_in_budget"] >= figures["events_in_budget_full_length"]


def test_the_latest_events_are_kept_and_only_whole_ones() -> None:
    """Symbols 2, 5 and 3 for the items 0, 1 and 2: a budget of 8 holds the events 1, 2 of [0, 1, 2]."""
    table = table_of([1, 4, 2])
    assert history_figures(table, histories([0, 1, 2]), 8)["events_in_budget"] == 2
    assert history_figures(table, histories([0, 1, 2]), 7)["events_in_budget"] == 1
    assert history_figures(table, histories([1, 0, 0]), 7)["events_in_budget"] == 2
    assert history_figures(table, histories([1, 0, 0]), 9)["histories_cut"] == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 60))
def test_where_all_sids_have_all_levels_the_budget_holds_what_full_length_holds(
    seed: int, budget: int
) -> None:
    rng = np.random.default_rng(seed)
    users = [rng.integers(0, 5, rng.integers(1, 20)).tolist() for _ in range(8)]
    figures = history_figures(table_of([LEVELS] * 5), histories(*users), budget)
    assert figures["events_in_budget"] == figures["events_in_budget_full_length"]
    assert figures["tokens_per_history"] == (LEVELS + 1) * np.mean([len(items) for items in users])


def test_sequences_of_another_catalogue_and_none_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="a sequence has item 3, the SidTable 3 items"):
        history_figures(table_of([1, 2, 3]), histories([0, 3]), 80)
    with pytest.raises(ValueError, match="no sequences: give one a user"):
        history_figures(table_of([1, 2, 3]), histories(), 80)


def _words(lengths: list[int], events: list[int], budget: int = 6) -> dict[str, str]:
    table, drawn = table_of(lengths), torch.tensor(events)
    users = histories([item for item, count in enumerate(events) for _ in range(count)])
    figures = mean_lengths(table, drawn) | history_figures(table, users, budget)
    return describe_lengths(count_lengths(table, drawn), figures, budget)


def test_words_say_whose_sids_are_short_and_what_it_buys() -> None:
    words = _words([4, 2, 1], [1, 1, 8])
    assert words["codes_per_item"] == (
        "items have 1 to 4 codes, 2.33 on average and 1.40 by interaction: "
        "SIDs of popular items are shorter than those of others"
    )
    assert words["events_in_budget"] == (
        "6 symbols hold the latest 3.0 events of a user, and 1.0 if every SID had 4 codes; 100.0% of the users have "
        "more than fits: short SIDs let a recommender see 200% more events"
    )
    assert "are longer than those of others" in _words([4, 2, 1], [8, 1, 1])["codes_per_item"]
    assert "are as long as those of others" in _words([4, 2, 1], [2, 2, 2])["codes_per_item"]
    assert "hardly let a recommender see more" in _words([4, 2, 1], [1, 1, 1], 80)["events_in_budget"]
    assert "does not fit at all" in _words([4, 2, 1], [1, 1, 1], 4)["events_in_budget"]


def test_words_warn_where_next_to_all_items_have_one_length() -> None:
    assert "but 97.5% of the items have length 1" in _words([1] * 39 + [2], [1] * 40)["codes_per_item"]
    assert "but" not in _words([1] * 9 + [2], [1] * 10)["codes_per_item"]


@pytest.mark.parametrize("lengths", [[LEVELS] * 3, [2, 2, 2]])
def test_of_one_length_there_is_nothing_to_say(lengths: list[int]) -> None:
    assert _words(lengths, [1, 2, 3]) == {}
    assert not lengths_differ(analyze(table_of(lengths), None, CollisionConfig()))
    assert lengths_differ(analyze(table_of([1, 2]), None, CollisionConfig()))


def test_a_report_carries_them_and_its_own_budget() -> None:
    table, users = table_of([4, 2, 1]), histories([0, 1, 2, 2])
    events = torch.tensor([1, 1, 2])
    report = analyze(table, None, CollisionConfig(token_budget=7), events=events, sequences=users)
    assert report.lengths.equals(count_lengths(table, events))
    assert report.deciles.equals(popularity_deciles(table, events))
    expected = mean_lengths(table, events) | history_figures(table, users, 7)
    assert expected.items() <= report.figures.items()
    assert report.bands["events_in_budget"].startswith("7 symbols hold the latest 3.0 events")
