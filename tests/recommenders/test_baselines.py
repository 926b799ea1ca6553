"""The simple rules: equal to loops on small data, and at their known numbers on the shipped sample."""

from importlib.resources import files

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from components.data.splits import count_events
from components.metrics.ranking import contributions
from components.recommenders.full_ranking import best_items, flatten, rank_exactly
from components.recommenders.itemknn import ItemKnn
from components.recommenders.popularity import Popularity

N = 8
SEQUENCES = st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=6), min_size=1, max_size=8)


def _lists(values: list[list[int]]) -> pl.Series:
    return pl.Series(values, dtype=pl.List(pl.UInt32))


def _naive_similarity(sequences: list[list[int]]) -> NDArray[np.float64]:
    similarity = np.zeros((N, N))
    for a in range(N):
        for b in range(N):
            with_a = {u for u, items in enumerate(sequences) if a in items}
            with_b = {u for u, items in enumerate(sequences) if b in items}
            if a != b and with_a and with_b:
                similarity[a, b] = len(with_a & with_b) / np.sqrt(len(with_a) * len(with_b))
    return similarity


def _naive_rank(scores: list[float], target: int, removed: set[int]) -> int:
    higher = equal = 0
    for item, score in enumerate(scores):
        if item == target or item in removed:
            continue
        higher += score > scores[target]
        equal += score == scores[target]
    return 1 + higher + equal // 2


@settings(max_examples=30, deadline=None)
@given(SEQUENCES, SEQUENCES, st.sampled_from([0.3, 0.5, 1.0]))
def test_itemknn_equals_loops(train: list[list[int]], histories: list[list[int]], decay: float) -> None:
    knn = ItemKnn.fit(_lists(train), N, decay=decay)
    similarity = _naive_similarity(train)
    assert np.allclose(knn.similarity.toarray(), similarity)
    expected = [
        sum(decay ** (len(h) - 1 - place) * similarity[item] for place, item in enumerate(h))
        for h in histories
    ]
    assert np.allclose(knn.scores(_lists(histories)), expected)


@settings(max_examples=30, deadline=None)
@given(SEQUENCES, st.integers(1, 3))
def test_neighbours_keep_the_most_similar_of_each_item(train: list[list[int]], count: int) -> None:
    kept = ItemKnn.fit(_lists(train), N, neighbours=count).similarity.toarray()
    for row, full in zip(kept, ItemKnn.fit(_lists(train), N).similarity.toarray(), strict=True):
        assert np.allclose(np.sort(row)[::-1][:count], np.sort(full)[::-1][:count])
        assert (row > 0).sum() <= count


class Fixed:
    """Scores given beforehand, in the order of the calls."""

    def __init__(self, scores: NDArray[np.float64]) -> None:
        self.scores_UN, self.given = scores, 0

    def scores(self, histories: pl.Series) -> NDArray[np.float64]:
        start, self.given = self.given, self.given + len(histories)
        return self.scores_UN[start : self.given].astype(np.float64)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.booleans(), st.integers(1, 4))
def test_ranks_equal_loops_with_ties_and_removed_items(
    data: st.DataObject, exclude: bool, batch: int
) -> None:
    histories = data.draw(SEQUENCES)
    users = len(histories)
    row = st.lists(st.integers(0, 3), min_size=N, max_size=N)
    scores = np.array(data.draw(st.lists(row, min_size=users, max_size=users)))
    targets = data.draw(st.lists(st.integers(0, N - 1), min_size=users, max_size=users))
    exact = rank_exactly(
        Fixed(scores),
        _lists(histories),
        pl.Series(targets, dtype=pl.UInt32),
        k=N,
        exclude_seen=exclude,
        batch_size=batch,
    )
    for user, (history, target) in enumerate(zip(histories, targets, strict=True)):
        removed = set(history) if exclude else set()
        hidden = target in removed
        assert exact.ranks[user] == (0 if hidden else _naive_rank(scores[user].tolist(), target, removed))
        open_items = [i for i in range(N) if i not in removed]
        expected = sorted(open_items, key=lambda i: (-scores[user, i], i))
        assert exact.items[user].tolist() == expected + [-1] * (N - len(expected))


def test_a_constant_score_puts_every_target_in_the_middle() -> None:
    exact = rank_exactly(
        Fixed(np.zeros((3, 101))),
        _lists([[1], [2], [3]]),
        pl.Series([0, 50, 100]),
        k=0,
        exclude_seen=False,
        batch_size=8,
    )
    assert exact.ranks.tolist() == [51, 51, 51]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 14))
def test_best_items_equal_a_full_sort(scores: list[int], k: int) -> None:
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    assert best_items(np.array([scores], dtype=float), k)[0].tolist() == expected


def test_ages_count_back_from_the_newest_event() -> None:
    events = flatten(_lists([[5, 6, 7], [], [8]]))
    assert events.items.tolist() == [5, 6, 7, 8]
    assert events.rows.tolist() == [0, 0, 0, 2]
    assert events.ages.tolist() == [2, 1, 0, 0]


def test_popularity_counts_training_events_and_ignores_the_history() -> None:
    train = _lists([[0, 1], [1, 2, 1]])
    assert count_events(train, 4).tolist() == [1, 3, 1, 0]
    scores = Popularity.fit(train, 4).scores(_lists([[0], [3]]))
    assert scores.tolist() == [[1, 3, 1, 0]] * 2


@pytest.fixture(scope="module")
def retail() -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """Training sequences and test rows of Online Retail, last item held out, straight from the shipped file."""
    path = files("components.data.samples") / "online-retail" / "interactions.parquet"
    with path.open("rb") as file:
        events = pl.read_parquet(file).sort("user_id", "position", maintain_order=True)
    users = events.group_by("user_id", maintain_order=True).agg(items="item_id")
    items = pl.col("items")
    train = users.select(sequence=items.list.head(items.list.len() - 2))
    test = users.select(history=items.list.head(items.list.len() - 1), target=items.list.last())
    return train, test, int(events["item_id"].n_unique())


@pytest.mark.parametrize(
    ("exclude", "popularity", "itemknn"),
    [(False, (0.0373, 0.0174), (0.2709, 0.1888)), (True, (0.0395, 0.0188), (0.2886, 0.2063))],
)
def test_known_numbers_on_online_retail(
    retail: tuple[pl.DataFrame, pl.DataFrame, int],
    exclude: bool,
    popularity: tuple[float, float],
    itemknn: tuple[float, float],
) -> None:
    train, test, num_items = retail
    methods = (
        (Popularity.fit(train["sequence"], num_items), popularity),
        (ItemKnn.fit(train["sequence"], num_items, decay=0.5), itemknn),
    )
    for method, expected in methods:
        exact = rank_exactly(
            method, test["history"], test["target"], k=0, exclude_seen=exclude, batch_size=256
        )
        means = contributions(exact.ranks, ["R@10", "N@10"]).mean(axis=0)
        assert means.tolist() == pytest.approx(expected, abs=5e-5)
