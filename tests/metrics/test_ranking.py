"""Metrics equal naive loops; intervals cover, repeat and narrow when paired."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.metrics.ranking import (
    bootstrap,
    contributions,
    metric_names,
    paired_bootstrap,
    ranks_in_lists,
)

RANKS = st.lists(st.integers(0, 40), min_size=1, max_size=30)


def _naive(ranks: list[int], name: str) -> float:
    total = 0.0
    for rank in ranks:
        if rank == 0:
            continue
        if name == "MRR":
            total += 1 / rank
        elif rank <= int(name[2:]):
            total += 1.0 if name[0] == "R" else 1 / math.log2(rank + 1)
    return total / len(ranks)


@settings(max_examples=30, deadline=None)
@given(RANKS)
def test_metrics_equal_naive_loops(ranks: list[int]) -> None:
    names = metric_names([1, 5, 10, 20])
    means = contributions(ranks, names).mean(axis=0)
    assert means.tolist() == pytest.approx([_naive(ranks, name) for name in names])


@settings(max_examples=30, deadline=None)
@given(RANKS)
def test_metrics_lie_between_0_and_1_and_grow_with_k(ranks: list[int]) -> None:
    values = contributions(ranks, metric_names([1, 5, 10, 20]))
    assert np.isfinite(values).all() and (values >= 0).all() and (values <= 1).all()
    recall, ndcg = values[:, :4], values[:, 4:8]
    assert (np.diff(recall, axis=1) >= 0).all() and (np.diff(ndcg, axis=1) >= 0).all()
    assert (ndcg <= recall).all()


def test_a_miss_adds_nothing_and_the_first_place_everything() -> None:
    names = metric_names([1, 10])
    assert contributions([0, 0], names).sum() == 0
    assert (contributions([1], names) == 1).all()


@pytest.mark.parametrize("name", ["P@5", "R@0", "recall@10", "R@", "R@10 "])
def test_unknown_metric_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="unknown metric"):
        contributions([1], [name])


def test_negative_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="ranks count from 1"):
        contributions([1, -1], ["R@1"])


def test_place_in_list_is_the_first_one() -> None:
    items = np.array([[4, 2, 9], [2, 2, 2], [7, 8, -1], [1, 3, 5]])
    assert ranks_in_lists(items, np.array([9, 2, 6, 1])).tolist() == [3, 1, 0, 1]


def test_interval_equals_a_naive_bootstrap() -> None:
    rng = np.random.default_rng(0)
    values = contributions(rng.integers(0, 30, 300), ["R@10", "N@10"])
    ours = bootstrap(values, resamples=4000, seed=1)
    naive = np.array([values[rng.integers(0, 300, 300)].mean(axis=0) for _ in range(4000)])
    low, high = np.quantile(naive, [0.025, 0.975], axis=0)
    assert ours.value.tolist() == pytest.approx(values.mean(axis=0).tolist())
    assert ours.low.tolist() == pytest.approx(low.tolist(), abs=0.008)
    assert ours.high.tolist() == pytest.approx(high.tolist(), abs=0.008)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(200):
        interval = bootstrap((rng.random((150, 1)) < 0.3).astype(float), resamples=300, seed=trial)
        inside += int(interval.low[0] <= 0.3 <= interval.high[0])
    assert 175 <= inside <= 199


def test_equal_seeds_give_equal_intervals_and_others_do_not() -> None:
    values = contributions(np.arange(200) % 23, ["N@10"])
    first, again, other = (bootstrap(values, resamples=200, seed=seed) for seed in (3, 3, 4))
    assert first.low == again.low and first.high == again.high
    assert (first.low, first.high) != (other.low, other.high)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = contributions(np.arange(50) % 23, ["N@10", "MRR"])
    whole = bootstrap(values, resamples=130, seed=0)
    monkeypatch.setattr("components.metrics.ranking.CELLS", 50 * 17)
    parts = bootstrap(values, resamples=130, seed=0)
    assert np.allclose(whole.low, parts.low) and np.allclose(whole.high, parts.high)


def test_pairing_narrows_the_interval_of_methods_that_agree() -> None:
    rng = np.random.default_rng(5)
    ranks = rng.integers(0, 20, 400)
    better = np.where((ranks > 1) & (rng.random(400) < 0.3), ranks - 1, ranks)
    a, b = contributions(better, ["MRR"]), contributions(ranks, ["MRR"])
    gap = paired_bootstrap(a, b, resamples=500, seed=0)
    alone = bootstrap(a, resamples=500, seed=0)
    assert gap.value[0] == pytest.approx(a.mean() - b.mean())
    assert gap.low[0] > 0
    assert gap.high[0] - gap.low[0] < 0.5 * (alone.high[0] - alone.low[0])


def test_no_users_and_unequal_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no users"):
        bootstrap(np.zeros((0, 2)), resamples=100, seed=0)
    with pytest.raises(ValueError, match="equal shapes"):
        paired_bootstrap(np.zeros((3, 1)), np.zeros((4, 1)), resamples=100, seed=0)
