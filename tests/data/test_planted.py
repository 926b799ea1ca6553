"""The planted structure is there: the last item's group and popularity are enough for the stated recall."""

import polars as pl
import pytest

from components.artifacts import InteractionLog
from components.data.planted import GROUPS, best_recall, plant
from components.data.splits import SplitConfig, hold_out


@pytest.fixture(scope="module")
def groups() -> dict[int, int]:
    items = plant().catalog.items
    return {i: GROUPS.index(c[0]) for i, c in items.select("item_id", "categories").iter_rows()}


def test_the_next_group_is_settled_by_the_last(groups: dict[int, int]) -> None:
    events = plant().log.events.with_columns(group=pl.col("item_id").replace_strict(groups))
    step = events.select(
        ((pl.col("group") - pl.col("group").shift(1).over("user_id")) % len(GROUPS)).drop_nulls()
    )
    assert step["group"].unique().to_list() == [1]
    wait = events.select(pl.col("timestamp").diff().over("user_id").drop_nulls())["timestamp"]
    assert wait.min() > 0


@pytest.mark.parametrize("k", [5, 10])
def test_group_and_popularity_reach_the_best_recall_and_popularity_alone_does_not(groups, k: int) -> None:
    log, catalog = plant(num_users=4000, seed=3)
    test = hold_out(log, catalog, SplitConfig()).test
    last = test.select(
        next=(pl.col("history").list.last().replace_strict(groups) + 1) % len(GROUPS), target="target"
    )
    # Item ids go group by group, popular ones first.
    per_group = catalog.num_items // len(GROUPS)
    hits = last.select((pl.col("target") - pl.col("next") * per_group).is_between(0, k - 1).mean()).item()
    assert hits == pytest.approx(best_recall(k), abs=0.03)
    top = log.events["item_id"].value_counts().sort("count", descending=True)["item_id"].head(k).to_list()
    popular = last.select(pl.col("target").is_in(top).mean()).item()
    assert popular == pytest.approx({5: 0.23, 10: 0.37}[k], abs=0.03)


def test_equal_seeds_give_equal_logs_and_other_seeds_do_not() -> None:
    def fingerprint(seed: int) -> str:
        log: InteractionLog = plant(num_users=20, num_items=13, seed=seed).log
        return log.fingerprint

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)


def test_every_item_is_in_the_catalogue_with_its_group_in_the_text() -> None:
    items = plant(num_users=3, num_items=20).catalog.items
    assert len(items) == 20
    assert items.select(pl.col("text").str.starts_with(pl.col("categories").list.first())).to_series().all()


@pytest.mark.parametrize(("users", "items"), [(0, 120), (10, 5)])
def test_too_small_is_refused(users: int, items: int) -> None:
    with pytest.raises(ValueError, match=f"got {users} and {items}"):
        plant(users, items)
