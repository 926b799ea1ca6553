"""A small log whose answers are known: what comes next is planted, so a model can be held to it.

Items belong to groups, and a user goes round the groups in a fixed cycle: after an item of group g comes one
of group g + 1. Inside the group the item is drawn by popularity alone, the item of rank r (from 0) with
weight 1 / (r + 1), whatever the user did before. Titles say group and sub group, so vectors made of them
find the groups. All times of a user differ.

To know the last item is thus to know the next group and nothing more, and the best ranking is that group's
items by popularity: ``best_recall(k)``, 0.63 at 5 and 0.81 at 10 with the default sizes. Ranking by
popularity over all items reaches 0.23 and 0.37, and chance 0.04 and 0.08.
"""

import numpy as np
import polars as pl

from components.data.ingest import IngestConfig, Ingested, settle
from components.data.raw import EVENTS, ITEMS, RawData

GROUPS = ["garden", "kitchen", "office", "camping", "music", "nursery"]
SUB_GROUPS = ["tools", "lights", "boxes", "covers"]
FINISHES = ["oak", "steel", "linen", "glass", "cork"]
SHORTEST, LONGEST = 8, 16


def plant(num_users: int = 400, num_items: int = 120, seed: int = 0) -> Ingested:
    """Draw a log with planted structure.

    Parameters
    ----------
    num_users : int
        Each has 8 to 16 events.
    num_items : int
        At least one a group; spread evenly over the six groups.
    seed : int
        Equal seeds give equal logs.

    Returns
    -------
    Ingested
        The log, and the catalogue of all ``num_items`` items (item ids go group by group, popular first).

    Raises
    ------
    ValueError
        ``num_users`` is below 1 or ``num_items`` below the number of groups.
    """
    if num_users < 1 or num_items < len(GROUPS):
        raise ValueError(f"plant wants >= 1 user and >= {len(GROUPS)} items, got {num_users} and {num_items}")
    draw = np.random.default_rng(seed)
    lengths = draw.integers(SHORTEST, LONGEST + 1, num_users)
    user = np.repeat(np.arange(num_users), lengths)
    step = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    group = (draw.integers(len(GROUPS), size=num_users)[user] + step) % len(GROUPS)
    item = np.empty(len(user), dtype=np.int64)
    for g, members in enumerate(_members(num_items)):
        here = group == g
        item[here] = draw.choice(members, size=int(here.sum()), p=_shares(len(members)))
    start = draw.integers(1_600_000_000, 1_610_000_000, num_users)
    time = start[user] + step * 86_400 + draw.integers(80_000, size=len(user))
    events = pl.DataFrame(
        {
            "user": [f"user-{u:05d}" for u in user],
            "item": [f"item-{i:05d}" for i in item],
            "time_ms": time * 1000,
            "rating": None,
            "order": np.arange(1, len(user) + 1),
        },
        schema=EVENTS,
    )
    source = {"name": f"planted-{num_users}-{num_items}-{seed}", "sha256": "", "bytes": 0}
    raw = RawData(events, _items(num_items), [source], {})
    return settle(raw, IngestConfig(k_core=0, keep_cold_items=True))


def best_recall(k: int, num_items: int = 120) -> float:
    """Return the recall@k of the best ranking: the next group's items by popularity, seen items kept."""
    return float(np.mean([_shares(len(members))[:k].sum() for members in _members(num_items)]))


def _members(num_items: int) -> list[np.ndarray]:
    return np.array_split(np.arange(num_items), len(GROUPS))


def _shares(size: int) -> np.ndarray:
    """Popularity inside a group, most popular first."""
    weights = 1 / np.arange(1, size + 1)
    shares: np.ndarray = weights / weights.sum()
    return shares


def _items(num_items: int) -> pl.DataFrame:
    rows = [
        (GROUPS[g], SUB_GROUPS[rank % len(SUB_GROUPS)], FINISHES[rank % len(FINISHES)], item)
        for g, members in enumerate(_members(num_items))
        for rank, item in enumerate(members)
    ]
    return pl.DataFrame(
        {
            "raw_id": [f"item-{item:05d}" for *_, item in rows],
            "title": [f"{group} {sub_group} {finish} no {item}" for group, sub_group, finish, item in rows],
            "brand": None,
            "categories": [[group, sub_group] for group, sub_group, *_ in rows],
            "description": None,
        },
        schema=ITEMS,
    )
