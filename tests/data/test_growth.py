"""A log as of a day, and a catalogue that grows under it: what is known stays where and what it is."""

from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.artifacts import ItemCatalog
from components.data.growth import leave_out, newcomers
from components.data.ingest import IngestConfig, Ingested, ingest, settle
from components.data.interactions import k_core
from components.data.raw import EVENTS, ITEMS, DataError, RawData
from components.data.samples import SampleSource
from components.folders import ArtifactError

LAW = settings(max_examples=50, deadline=None)
PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60)
EVENT = st.tuples(st.integers(0, 4), st.integers(0, 7), st.integers(0, 5))
ROWS = st.lists(EVENT, min_size=1, max_size=40)
FEW = IngestConfig(k_core=0)


def raw(rows: list[tuple[int, int, int]], word: str = "title", timed: bool = True) -> RawData:
    """Events as (user, item, seconds) in source order; the items met are described by ``word`` and number."""
    events = {
        "user": [f"u{user}" for user, _, _ in rows],
        "item": [f"i{item}" for _, item, _ in rows],
        "time_ms": [time * 1000 if timed else None for _, _, time in rows],
        "rating": None,
        "order": range(1, len(rows) + 1),
    }
    names = [f"i{item}" for item in sorted({item for _, item, _ in rows})]
    items = {"raw_id": names, "title": [f"{word} {name}" for name in names]}
    blank = dict.fromkeys(("brand", "categories", "description"))
    sources = [{"name": name, "sha256": "", "bytes": 0} for name in ("events.csv", "items.csv")]
    return RawData(
        pl.DataFrame(events, schema=EVENTS), pl.DataFrame(items | blank, schema=ITEMS), sources, {}
    )


def at(second: int) -> datetime:
    return datetime.fromtimestamp(second, UTC)


def met(ingested: Ingested) -> list[tuple[str, str, int]]:
    log, catalog = ingested
    named = log.events.join(log.users, on="user_id", maintain_order="left").join(
        catalog.items.select("item_id", item="raw_id"), on="item_id", maintain_order="left"
    )
    return named.select("raw_id", "item", "timestamp").rows()


@LAW
@given(ROWS, st.integers(0, 6), st.integers(0, 3))
def test_an_end_gives_the_log_of_a_source_that_ended_there(rows, end: int, k: int) -> None:
    early = [row for row in rows if row[2] < end]
    config = IngestConfig(k_core=k, until=at(end))
    if not early:
        with pytest.raises(DataError, match="events.csv: no event before until, .* choose a later day"):
            settle(raw(rows), config)
        return
    try:
        wanted = settle(raw(early), IngestConfig(k_core=k))
    except DataError as error:
        with pytest.raises(DataError) as found:
            settle(raw(rows), config)
        assert str(found.value) == str(error)
        return
    ended = settle(raw(rows), config)
    assert ended.log.events.equals(wanted.log.events)
    assert ended.catalog.fingerprint == wanted.catalog.fingerprint
    assert ended.log.statistics["events_after_until"] == len(rows) - len(early)


def test_an_end_counts_milliseconds() -> None:
    data = raw([(0, 0, 1), (0, 1, 2)])
    late = data._replace(events=data.events.with_columns(pl.col("time_ms") + 250))
    kept = [
        len(settle(late, IngestConfig(k_core=0, until=f"1970-01-01T00:00:{s}Z")).log.events)
        for s in ("02.25", "02.251")
    ]
    assert kept == [1, 2]


def test_an_end_needs_times() -> None:
    with pytest.raises(
        DataError, match="events.csv: until 1970.* needs times, and events have none; leave until out"
    ):
        settle(raw([(0, 0, 0)], timed=False), IngestConfig(k_core=0, until=at(9)))


def naive_core(pairs: list[tuple[int, int]], k: int, known: set[int]) -> list[tuple[int, int]]:
    """Remove one poor user or newcomer at a time: the oracle."""
    while True:
        users, items = [user for user, _ in pairs], [item for _, item in pairs]
        poor_users = [user for user in users if users.count(user) < k]
        poor_items = [item for item in items if items.count(item) < k and item not in known]
        if poor_users:
            pairs = [pair for pair in pairs if pair[0] != poor_users[0]]
        elif poor_items:
            pairs = [pair for pair in pairs if pair[1] != poor_items[0]]
        else:
            return pairs


@LAW
@given(PAIRS, st.integers(0, 4), st.sets(st.integers(0, 7)))
def test_known_items_are_in_the_core_however_few_their_events(pairs, k: int, known: set[int]) -> None:
    frame = pl.DataFrame(pairs, schema={"user": pl.Int64, "item": pl.Int64}, orient="row")
    core = k_core(frame, k, pl.Series(sorted(known), dtype=pl.Int64))
    assert core.rows() == naive_core(pairs, k, known)


@LAW
@given(ROWS, ROWS, st.integers(0, 2))
def test_a_grown_catalogue_begins_with_the_known_one_and_newcomers_follow(old, new, k: int) -> None:
    known = settle(raw(old), FEW).catalog
    new = [*new, (9, old[0][1], 0), (9, old[0][1], 1)]
    grown = settle(raw(new, "other words"), IngestConfig(k_core=k), known)
    catalog = grown.catalog
    assert catalog.items.head(known.num_items).equals(known.items)
    core = naive_core([(user, item) for user, item, _ in new], k, {item for _, item, _ in old})
    late = sorted({item for _, item in core} - {item for _, item, _ in old})
    assert catalog.items.slice(known.num_items).select("item_id", "raw_id", "text").rows() == [
        (known.num_items + place, f"i{item}", f"other words i{item}") for place, item in enumerate(late)
    ]
    assert sorted(met(grown)) == sorted((f"u{u}", f"i{i}", t) for u, i, t in new if (u, i) in core)
    assert newcomers(catalog, known)["item_id"].to_list() == list(range(known.num_items, catalog.num_items))
    anew = {item for _, item, _ in old} & {item for _, item, _ in new}
    assert grown.log.statistics["known_items_described_anew"] == len(anew)
    assert (grown.log.statistics["known_items"], grown.log.statistics["new_items"]) == (
        known.num_items,
        len(late),
    )
    assert grown.log.provenance.parents == {"ItemCatalog": known.fingerprint}
    if late:
        assert catalog.provenance.parents == {"ItemCatalog": known.fingerprint}
    else:
        assert catalog is known


@LAW
@given(ROWS, ROWS)
def test_newcomers_are_dropped_on_demand_with_their_events(old, new) -> None:
    known = settle(raw(old), FEW).catalog
    new = [*new, (9, old[0][1], 0)]
    kept = [row for row in new if row[1] in {item for _, item, _ in old}]
    dropped = settle(raw(new), IngestConfig(k_core=0, newcomers="drop"), known)
    assert dropped.catalog is known
    assert sorted(met(dropped)) == sorted((f"u{u}", f"i{i}", t) for u, i, t in kept)
    assert dropped.log.statistics["events_of_newcomers_dropped"] == len(new) - len(kept)
    assert dropped.log.statistics["newcomers_dropped"] == len(
        {i for _, i, _ in new} - {i for _, i, _ in kept}
    )


@LAW
@given(ROWS, ROWS, st.sets(st.integers(0, 7)))
def test_what_is_left_out_is_as_if_the_source_had_not_had_it(old, new, out: set[int]) -> None:
    known = settle(raw(old), FEW).catalog
    new = [*new, (9, old[0][1], 0)]
    grown = settle(raw(new), FEW, known)
    fresh = newcomers(grown.catalog, known).join(grown.catalog.items, on="item_id")
    items = fresh.filter(pl.col("raw_id").is_in([f"i{item}" for item in out]))
    log, catalog = leave_out(grown.log, grown.catalog, known, items["item_id"])
    gone = {int(name[1:]) for name in items["raw_id"]}
    wanted = settle(raw([row for row in new if row[1] not in gone]), FEW, known)
    assert log.events.equals(wanted.log.events) and log.users.equals(wanted.log.users)
    assert catalog.fingerprint == wanted.catalog.fingerprint
    if not len(items):
        assert log is grown.log and catalog is grown.catalog
        return
    statistics = dict(log.statistics)
    assert statistics.pop("items_set_aside") == len(items)
    assert statistics.pop("events_of_items_set_aside") == len(new) - len(log.events) > 0
    assert statistics.pop("users_set_aside") == grown.log.num_users - log.num_users
    read = ("events_read", "items_read")
    assert {k: v for k, v in statistics.items() if k not in read} == {
        k: v for k, v in wanted.log.statistics.items() if k not in read
    }
    assert (catalog is known) == (len(items) == len(fresh))


def test_only_newcomers_are_left_out_and_never_everything() -> None:
    known = settle(raw([(0, 0, 0)]), FEW).catalog
    data = raw([(0, 1, 0), (0, 2, 0)])._replace(items=raw([(0, 0, 0), (0, 1, 0), (0, 2, 0)]).items)
    log, catalog = settle(data, FEW, known)
    with pytest.raises(ValueError, match=r"items \[0\] are no newcomers to a catalogue of 1 items"):
        leave_out(log, catalog, known, pl.Series([0, 1], dtype=pl.UInt32))
    with pytest.raises(DataError, match="all 2 events are of the 2 items; nothing is left"):
        leave_out(log, catalog, known, pl.Series([1, 2], dtype=pl.UInt32))


def test_newcomers_that_are_dropped_need_no_metadata_and_are_counted_once() -> None:
    known = settle(raw([(0, 0, 0)]), FEW).catalog
    data = raw([(0, 0, 5), (0, 1, 6), (1, 2, 6), (1, 0, 7)])
    data = data._replace(items=data.items.filter(pl.col("raw_id") != "i2"))
    for unknown in ("fail", "drop", "keep"):
        config = IngestConfig(k_core=0, newcomers="drop", unknown_items=unknown)
        statistics = settle(data, config, known).log.statistics
        assert statistics["events_of_unknown_items"] == 0
        assert (statistics["newcomers_dropped"], statistics["events_of_newcomers_dropped"]) == (2, 2)


def test_events_of_known_items_need_no_metadata() -> None:
    known = settle(raw([(0, 0, 0), (0, 1, 0)]), FEW).catalog
    data = raw([(0, 0, 5), (0, 2, 6)])
    grown = settle(data._replace(items=data.items.filter(pl.col("raw_id") != "i0")), FEW, known)
    assert grown.catalog.items["raw_id"].to_list() == ["i0", "i1", "i2"]
    with pytest.raises(DataError, match="row 2: item 'i2' is not in the item metadata"):
        settle(data._replace(items=data.items.filter(pl.col("raw_id") == "i0")), FEW, known)


def test_newcomers_without_events_join_on_demand_only() -> None:
    known = settle(raw([(0, 0, 0)]), FEW).catalog
    data = raw([(0, 0, 5), (0, 1, 6)])
    unmet = data._replace(events=data.events.head(1))
    assert settle(unmet, FEW, known).catalog is known
    assert settle(unmet, IngestConfig(k_core=0, keep_cold_items=True), known).catalog.num_items == 2


def test_a_newcomer_without_text_is_refused_and_a_known_item_is_not() -> None:
    silent = raw([(0, 0, 0)])._replace(
        items=raw([(0, 0, 0)]).items.with_columns(title=pl.lit(None, pl.String))
    )
    known = settle(silent, IngestConfig(k_core=0, empty_text="keep")).catalog
    assert settle(silent, FEW, known).catalog is known
    data = raw([(0, 0, 0), (0, 1, 0)])
    with pytest.raises(DataError, match="items.csv: item 'i1' has no text"):
        settle(data._replace(items=data.items.with_columns(title=pl.lit(None, pl.String))), FEW, known)


def test_dropping_newcomers_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="none is given: ingest onto one .* or set newcomers to add"):
        settle(raw([(0, 0, 0)]), IngestConfig(k_core=0, newcomers="drop"))


def test_another_catalogue_is_no_past_of_this_one() -> None:
    one, other = (settle(raw([(0, item, 0), (0, 3, 0)]), FEW).catalog for item in (0, 1))
    with pytest.raises(ArtifactError, match=r"\(2 items\) did not grow from .*ids mean other items"):
        newcomers(other, one)
    longer = settle(raw([(0, 0, 0), (0, 3, 0), (0, 4, 0)]), FEW).catalog
    with pytest.raises(ArtifactError, match=r"\(2 items\) did not grow from .* \(3 items\)"):
        newcomers(one, longer)


def test_the_shop_of_october_grows_to_that_of_december() -> None:
    old = ingest(IngestConfig(until="2011-10-01"))
    assert (len(old.log.events), old.log.num_users, old.catalog.num_items) == (77_187, 3_027, 2_333)
    assert old.log.statistics["events_after_until"] == 59_830
    assert old.log.events["timestamp"].max() < at(1_317_427_200).timestamp()
    grown = ingest(IngestConfig(), old.catalog)
    afresh = ingest(IngestConfig())
    assert sorted(met(grown)) == sorted(met(afresh))
    assert (grown.catalog.num_items, len(newcomers(grown.catalog, old.catalog))) == (2_718, 385)
    kept = ingest(IngestConfig(newcomers="drop"), old.catalog)
    assert isinstance(kept.catalog, ItemCatalog) and kept.catalog is old.catalog
    assert kept.log.statistics["events_of_newcomers_dropped"] == 7_496
    assert (len(kept.log.events), kept.log.num_users) == (130_533, 4_061)


def test_films_are_no_newcomers_to_a_shop() -> None:
    films = IngestConfig(source=SampleSource(name="movietweetings"))
    with pytest.raises(
        DataError, match=r"none of its 2414 items is among the 2718 of the known catalogue .*'tt0013442' here"
    ):
        ingest(films, ingest(IngestConfig()).catalog)
