"""What a report says of a beam beside the exact ranking."""

import math

import polars as pl
import pytest
import torch

from components.metrics.beam_loss import USERS, beam_loss
from components.metrics.report import EvaluateConfig
from components.seams import Ranking

CONFIG = EvaluateConfig(ks=[1, 2], beams=4, coverage_k=1, seen=["kept"], resamples=100)


def lists(items: list[int]):
    """Rank the same items for everybody; -1 for an empty place."""

    def rank(frame: pl.DataFrame, exclude_seen: bool) -> Ranking:
        rows = torch.tensor(items).expand(len(frame), -1)
        return Ranking(rows, torch.zeros(rows.shape))

    return rank


def test_found_is_the_share_of_the_exact_list_and_order_does_not_matter(tiny) -> None:
    (row,) = beam_loss(lists([7, 3, 1, 9]), lists([1, 2, 3, 4]), tiny.split, CONFIG)
    assert row["seen"] == "kept" and row["users"] == min(USERS, len(tiny.split.test))
    assert row["found"] == pytest.approx(0.5)


def test_places_that_no_item_is_left_for_do_not_count(tiny) -> None:
    (row,) = beam_loss(lists([1, 2, -1, -1]), lists([2, 1, -1, -1]), tiny.split, CONFIG)
    assert row["found"] == 1


def test_recall_and_ndcg_are_those_of_each_list_at_its_depth(tiny) -> None:
    target = tiny.split.test["target"]
    best = int(target.value_counts(sort=True)["target"][0])
    (row,) = beam_loss(lists([best + 1, best + 2, 0, best]), lists([best, 0, 1, 2]), tiny.split, CONFIG)
    assert row["R@4 beam"] == pytest.approx(target.is_in([best + 1, best + 2, 0, best]).mean())
    exact = [(target == item).mean() / math.log2(place + 2) for place, item in enumerate([best, 0, 1, 2])]
    assert row["N@4 exact"] == pytest.approx(sum(exact)) and row["N@4 exact"] > 0


def test_every_treatment_of_seen_items_has_a_row(tiny) -> None:
    both = CONFIG.model_copy(update={"seen": ["kept", "excluded"]})
    rows = beam_loss(lists([1, 2, 3, 4]), lists([1, 2, 3, 4]), tiny.split, both)
    assert [row["seen"] for row in rows] == ["kept", "excluded"]
    assert all(row["found"] == 1 and row["R@4 beam"] == row["R@4 exact"] for row in rows)
