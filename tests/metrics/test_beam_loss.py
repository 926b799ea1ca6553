"""What a report says of a beam beside the exact ranking."""

import math
from functools import partial

import polars as pl
import pytest
import torch

from components.metrics.beam_loss import USERS, beam_loss
from components.metrics.report import EvaluateConfig
from components.seams import Ranking

CONFIG = EvaluateConfig(ks=[1, 2], beams=4, coverage_k=1, seen=["kept"], resamples=100)


def lists(items: list[int], excluded: list[int] | None = None):
    """Rank the same items for everybody, others where seen items are excluded; -1 for an empty place."""

    def rank(frame: pl.DataFrame, exclude_seen: bool) -> Ranking:
        rows = torch.tensor(excluded if excluded and exclude_seen else items).expand(len(frame), -1)
        return Ranking(rows, torch.zeros(rows.shape))

    return rank


def lost(beam, exact, split, config=CONFIG):
    return beam_loss(partial(beam, split.test), exact, split, config)


def test_found_is_the_share_of_the_exact_list_and_order_does_not_matter(tiny) -> None:
    (row,) = lost(lists([7, 3, 1, 9]), lists([1, 2, 3, 4]), tiny.split)
    assert row["seen"] == "kept" and row["users"] == min(USERS, len(tiny.split.test))
    assert row["found"] == pytest.approx(0.5)


def test_places_that_no_item_is_left_for_do_not_count(tiny) -> None:
    (row,) = lost(lists([1, 2, -1, -1]), lists([2, 1, -1, -1]), tiny.split)
    assert row["found"] == 1


def test_recall_and_ndcg_are_those_of_each_list_at_its_depth(tiny) -> None:
    target = tiny.split.test["target"]
    best = int(target.value_counts(sort=True)["target"][0])
    (row,) = lost(lists([best + 1, best + 2, 0, best]), lists([best, 0, 1, 2]), tiny.split)
    assert row["R@4 beam"] == pytest.approx(target.is_in([best + 1, best + 2, 0, best]).mean())
    exact = [(target == item).mean() / math.log2(place + 2) for place, item in enumerate([best, 0, 1, 2])]
    assert row["N@4 exact"] == pytest.approx(sum(exact)) and row["N@4 exact"] > 0


def test_every_treatment_of_seen_items_has_a_row_of_its_own(tiny) -> None:
    both = CONFIG.model_copy(update={"seen": ["kept", "excluded"]})
    rows = lost(lists([1, 2, 3, 4], [1, 2, 8, 9]), lists([1, 2, 3, 4], [5, 6, 1, 7]), tiny.split, both)
    assert [(row["seen"], row["found"]) for row in rows] == [("kept", 1), ("excluded", 0.25)]
    assert rows[0]["R@4 beam"] == rows[0]["R@4 exact"] and rows[1]["R@4 beam"] != rows[1]["R@4 exact"]


def test_some_of_many_users_are_looked_at_and_each_beside_its_own_list(tiny, monkeypatch) -> None:
    """The first entry of every list is its user's own target."""
    monkeypatch.setattr("components.metrics.beam_loss.USERS", 5)
    asked = []

    def own(frame: pl.DataFrame, exclude_seen: bool) -> Ranking:
        asked.append(len(frame))
        first = torch.from_numpy(frame["target"].to_numpy().astype("int64"))[:, None]
        rows = first + torch.arange(4) * tiny.split.num_items
        return Ranking(rows, torch.zeros(rows.shape))

    (row,) = lost(own, own, tiny.split)
    assert asked == [len(tiny.split.test), 5] and row["users"] == 5 and row["found"] == 1
