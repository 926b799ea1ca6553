"""Laws of k-core, ids, order and text; and the rules that ingestion refuses by."""

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.ingest import IngestConfig, Ingested, settle
from components.data.interactions import k_core, number
from components.data.raw import EVENTS, ITEMS, DataError, RawData

LAW = settings(max_examples=30, deadline=None)
PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60)
TIMED = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40)


def naive_core(pairs: list[tuple[int, int]], k: int) -> list[tuple[int, int]]:
    """Remove one poor user or item at a time: the oracle."""
    while True:
        for side in (0, 1):
            ids = [pair[side] for pair in pairs]
            poor = [x for x in set(ids) if ids.count(x) < k]
            if poor:
                pairs = [pair for pair in pairs if pair[side] != poor[0]]
                break
        else:
            return pairs


def frame(pairs: list[tuple[int, int]]) -> pl.DataFrame:
    return pl.DataFrame(pairs, schema={"user": pl.Int64, "item": pl.Int64}, orient="row")


def raw(rows: list[tuple[str, str, int]], items: dict[str, str | None]) -> RawData:
    """Events as (user, item, seconds) in source order, and items by title."""
    events = pl.DataFrame(
        {
            "user": [row[0] for row in rows],
            "item": [row[1] for row in rows],
            "time_ms": [row[2] * 1000 for row in rows],
            "rating": None,
            "order": range(1, len(rows) + 1),
        },
        schema=EVENTS,
    )
    described = pl.DataFrame(
        {
            "raw_id": list(items),
            "title": list(items.values()),
            "brand": None,
            "categories": None,
            "description": None,
        },
        schema=ITEMS,
    )
    sources = [{"name": name, "sha256": "", "bytes": 0} for name in ("events.csv", "items.csv")]
    return RawData(events, described, sources, {"events": 0, "items": 0})


def timed(rows: list[tuple[int, int, int]]) -> RawData:
    return raw([(f"u{u}", f"i{i}", t) for u, i, t in rows], {f"i{i}": f"title {i}" for i in range(6)})


def met(ingested: Ingested) -> list[tuple[str, str]]:
    log, catalog = ingested
    joined = log.events.join(log.users, on="user_id", maintain_order="left").join(
        catalog.items, on="item_id", maintain_order="left"
    )
    return list(zip(joined["raw_id"], joined["raw_id_right"], strict=True))


@LAW
@given(PAIRS, st.integers(0, 4))
def test_k_core_is_the_naive_fixpoint(pairs: list[tuple[int, int]], k: int) -> None:
    core = k_core(frame(pairs), k)
    assert core.rows() == naive_core(pairs, k)
    assert k_core(core, k).equals(core)


@LAW
@given(PAIRS, st.integers(2, 3), st.randoms(use_true_random=False))
def test_k_core_does_not_depend_on_order(pairs: list[tuple[int, int]], k: int, random) -> None:
    shuffled = pairs.copy()
    random.shuffle(shuffled)
    assert sorted(k_core(frame(pairs), k).rows()) == sorted(k_core(frame(shuffled), k).rows())


@LAW
@given(TIMED)
def test_users_keep_every_event_in_time_order_with_ties_as_in_the_source(
    rows: list[tuple[int, int, int]],
) -> None:
    ingested = settle(timed(rows), IngestConfig(k_core=0))
    wanted = [
        (f"u{user}", f"i{item}")
        for user in sorted({row[0] for row in rows})
        for _, item, _ in sorted((row for row in rows if row[0] == user), key=lambda row: row[2])
    ]
    assert met(ingested) == wanted
    events = ingested.log.events
    for _, one in events.group_by("user_id"):
        assert one["position"].to_list() == list(range(len(one)))
    assert sorted(events["item_id"].unique()) == list(range(ingested.catalog.num_items))


@LAW
@given(TIMED)
def test_dropping_repeats_keeps_the_first(rows: list[tuple[int, int, int]]) -> None:
    kept = met(settle(timed(rows), IngestConfig(k_core=0)))
    once = settle(timed(rows), IngestConfig(k_core=0, repeats="drop"))
    assert met(once) == list(dict.fromkeys(kept))
    assert once.log.statistics["repeats_dropped"] == len(kept) - len(set(kept))
    assert once.log.statistics["repeated_events"] == 0


def test_ids_keep_the_order_of_numbers() -> None:
    assert number(pl.Series(["10", "9", "a", "9", "100"]))["raw_id"].to_list() == ["9", "a", "10", "100"]


def test_core_is_counted_after_repeats_are_dropped() -> None:
    rows = [("u", "a", t) for t in range(5)]
    assert len(settle(raw(rows, {"a": "x"}), IngestConfig()).log.events) == 5
    with pytest.raises(DataError, match="k_core 5 leaves 0 of 1 events"):
        settle(raw(rows, {"a": "x"}), IngestConfig(repeats="drop"))


def test_empty_core_says_k_and_what_was_left() -> None:
    rows = [(f"u{u}", f"i{i}", 1) for u in range(3) for i in range(3)] + [("u9", "i0", 1)]
    wanted = (
        r"events.csv: k_core 5 leaves 0 of 10 events \(4 users, 3 items\); "
        r"the largest k that leaves any is 3, with 9 events"
    )
    with pytest.raises(DataError, match=wanted):
        settle(raw(rows, {f"i{i}": "x" for i in range(3)}), IngestConfig())


def test_no_events_at_all() -> None:
    with pytest.raises(DataError, match=r"events.csv: no events"):
        settle(raw([], {"a": "x"}), IngestConfig())


UNKNOWN = [("u", "a", 1), ("u", "ghost", 2), ("v", "b", 3), ("v", "ghost", 4), ("v", "spook", 5)]


def test_unknown_items() -> None:
    data = raw(UNKNOWN, {"a": "x", "b": "y"})
    with pytest.raises(
        DataError, match=r"events.csv row 2: item 'ghost' is not in the item .*\(3 events, 2 items\)"
    ):
        settle(data, IngestConfig(k_core=0))
    dropped = settle(data, IngestConfig(k_core=0, unknown_items="drop"))
    assert met(dropped) == [("u", "a"), ("v", "b")]
    kept = settle(data, IngestConfig(k_core=0, unknown_items="keep", empty_text="keep"))
    assert met(kept) == [(user, item) for user, item, _ in UNKNOWN]
    assert kept.catalog.items["raw_id"].to_list() == ["a", "b", "ghost", "spook"]
    assert kept.catalog.items["text"].to_list() == ["x", "y", "", ""]
    assert dropped.log.statistics["events_of_unknown_items"] == 3


def test_duplicate_items() -> None:
    data = raw([("u", "a", 1)], {"a": "first", "b": "other"})
    again = data._replace(items=pl.concat([data.items, data.items.with_columns(title=pl.lit("second"))]))
    with pytest.raises(DataError, match=r"items.csv: item 'a' is described 2 times \(2 items"):
        settle(again, IngestConfig(k_core=0))
    ingested = settle(again, IngestConfig(k_core=0, duplicate_items="first"))
    assert ingested.catalog.items["text"].to_list() == ["first"]
    assert ingested.log.statistics["duplicate_items_dropped"] == 2


def test_item_without_text() -> None:
    data = raw([("u", "a", 1), ("u", "b", 2)], {"a": "x", "b": "  ", "cold": None})
    with pytest.raises(
        DataError, match=r"items.csv: item 'b' has no text in title, brand.*\(1 of 2 items have none\)"
    ):
        settle(data, IngestConfig(k_core=0))
    assert settle(data, IngestConfig(k_core=0, empty_text="keep")).catalog.items["text"].to_list() == [
        "x",
        "",
    ]


def test_cold_items_are_kept_on_demand_only() -> None:
    data = raw([("u", "b", 1)], {"a": "cold one", "b": "warm one"})
    assert settle(data, IngestConfig(k_core=0)).catalog.items["raw_id"].to_list() == ["b"]
    kept = settle(data, IngestConfig(k_core=0, keep_cold_items=True))
    assert kept.catalog.items["raw_id"].to_list() == ["a", "b"]
    assert kept.log.events["item_id"].to_list() == [1]


def test_text_is_the_named_fields_in_their_order() -> None:
    items = pl.DataFrame(
        {"raw_id": ["a"], "title": ["T"], "brand": ["B"], "categories": [["c", "d"]], "description": [None]},
        schema=ITEMS,
    )
    data = raw([("u", "a", 1)], {})._replace(items=items)
    assert settle(data, IngestConfig(k_core=0)).catalog.items["text"].to_list() == ["T. B. c, d"]
    fields = IngestConfig(k_core=0, text_fields=["categories", "title"])
    assert settle(data, fields).catalog.items["text"].to_list() == ["c, d. T"]


def test_equal_content_has_equal_fingerprints_and_survives_the_disk(tmp_path: Path) -> None:
    data = raw(UNKNOWN[:1], {"a": "x"})
    first, second = settle(data, IngestConfig(k_core=0)), settle(data, IngestConfig(k_core=1))
    assert first.log.fingerprint == second.log.fingerprint
    first.log.save(tmp_path / "log")
    assert type(first.log).load(tmp_path / "log").fingerprint == first.log.fingerprint
    assert first.log.provenance.config["k_core"] == 0
