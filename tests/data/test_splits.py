"""Held-out events: counts, histories and the law that nothing later leaks."""

import dataclasses
import os
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.artifacts import InteractionLog, ItemCatalog, SequenceSplit
from components.config import load_preset
from components.data.ingest import IngestConfig, Ingested, ingest
from components.data.raw import DataError
from components.data.splits import SplitConfig, check_no_leak, hold_out
from components.folders import ArtifactError
from workflows.config import AblationConfig

LAW = settings(max_examples=20, deadline=None)
# One list of (item, wait in seconds) a user; a wait of 0 stays in the basket.
USERS = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=9), min_size=1, max_size=8
)


def logged(users: list[list[tuple[int, int]]], timed: bool = True) -> Ingested:
    rows = []
    for user, events in enumerate(users):
        clock = 0
        for position, (item, wait) in enumerate(events):
            clock += wait
            rows.append((user, item, position, clock if timed else None, None))
    log = InteractionLog(
        events=pl.DataFrame(rows, schema=InteractionLog.SCHEMAS["events"], orient="row"),
        users=pl.DataFrame(
            {"user_id": range(len(users)), "raw_id": [str(u) for u in range(len(users))]},
            schema=InteractionLog.SCHEMAS["users"],
        ),
        sources=[],
        statistics={},
    )
    items = {
        "item_id": range(6),
        "raw_id": list("abcdef"),
        "title": None,
        "brand": None,
        "categories": None,
        "text": "x",
    }
    return Ingested(log, ItemCatalog(items=pl.DataFrame(items, schema=ItemCatalog.SCHEMAS["items"])))


def baskets(events: list[tuple[int, int]]) -> list[list[int]]:
    parted: list[list[int]] = []
    for place, (item, wait) in enumerate(events):
        if place == 0 or wait:
            parted.append([])
        parted[-1].append(item)
    return parted


def rows(frame: pl.DataFrame) -> dict[int, tuple]:
    return {user: tuple(rest) for user, *rest in frame.iter_rows()}


def flat(parts: list[list[int]]) -> list[int]:
    return [item for part in parts for item in part]


@LAW
@given(USERS, st.integers(1, 4))
def test_leave_one_out_is_the_naive_split(users: list[list[tuple[int, int]]], cap: int) -> None:
    users = [*users, [(0, 1), (1, 1), (2, 1)]]
    log, catalog = logged(users, timed=False)
    split = hold_out(log, catalog, SplitConfig(max_history=cap))
    for user, events in enumerate(users):
        v, n = [item for item, _ in events], len(events)
        assert rows(split.train)[user] == ((v[: n - 2] if n >= 3 else v),)
        if n >= 3:
            assert rows(split.valid)[user] == (v[: n - 2][-cap:], v[n - 2])
            assert rows(split.test)[user] == (v[: n - 1][-cap:], v[n - 1])
        else:
            assert user not in rows(split.valid)
            assert user not in rows(split.test)
    assert split.cold.is_empty()
    lengths = [len(events) for events in users]
    assert split.num_training_targets == sum(n - 3 if n >= 3 else n - 1 for n in lengths)


@LAW
@given(USERS, st.integers(1, 4))
def test_last_basket_is_the_naive_split(users: list[list[tuple[int, int]]], cap: int) -> None:
    users = [*users, [(0, 1), (1, 1), (2, 1)]]
    log, catalog = logged(users)
    split = hold_out(log, catalog, SplitConfig(protocol="last_basket", max_history=cap))
    for user, events in enumerate(users):
        b = baskets(events)
        assert rows(split.train)[user] == (flat(b[: -min(len(b) - 1, 2)] if len(b) > 1 else b),)
        if len(b) >= 3:
            assert rows(split.valid)[user] == (flat(b[:-2])[-cap:], b[-2][0])
        else:
            assert user not in rows(split.valid)
        if len(b) >= 2:
            assert rows(split.test)[user] == (flat(b[:-1])[-cap:], b[-1][0])
        else:
            assert user not in rows(split.test)


def latest(users: list[list[tuple[int, int]]], number: int) -> set[int]:
    first: dict[int, int] = {}
    for events in users:
        clock = 0
        for item, wait in events:
            clock += wait
            first[item] = min(clock, first.get(item, clock))
    return set(sorted(first, key=lambda item: (first[item], item))[-number:])


@settings(max_examples=100, deadline=None)
@given(USERS, st.integers(1, 4), st.integers(1, 2), st.sampled_from(["leave_one_out", "last_basket"]))
def test_cold_items_are_the_latest_and_test_alone_meets_them(
    users: list[list[tuple[int, int]]], cap: int, number: int, protocol: str
) -> None:
    """The naive split of a log of 6 items, 1 or 2 of them cold, row by row."""
    users = [*users, [(0, 1), (1, 1), (2, 1), (0, 1), (3, 1)]]
    log, catalog = logged(users)
    cold = latest(users, number)
    train, valid, test = {}, {}, {}
    for user, events in enumerate(users):
        v, n = [item for item, _ in events], len(events)
        begins = [at for at, (_, wait) in enumerate(events) if at == 0 or wait]
        if protocol == "leave_one_out":
            valid_at, test_at = (n - 2, n - 1) if n >= 3 else (None, None)
        else:
            valid_at = begins[-2] if len(begins) >= 3 else None
            test_at = begins[-1] if len(begins) >= 2 else None
        end = next(at for at in (valid_at, test_at, n) if at is not None)
        if warm := [item for item in v[:end] if item not in cold]:
            train[user] = (warm,)
            if valid_at is not None and v[valid_at] not in cold:
                valid[user] = (warm[-cap:], v[valid_at])
        if test_at is not None:
            test[user] = (v[:test_at][-cap:], v[test_at])
    config = SplitConfig(protocol=protocol, max_history=cap, cold_share=number / 6)
    if not valid:
        with pytest.raises(DataError, match=r"cold_share 0\.\d+ no user has .* lower cold_share"):
            hold_out(log, catalog, config)
        return
    split = hold_out(log, catalog, config)
    assert split.cold["item_id"].to_list() == sorted(cold)
    assert (rows(split.train), rows(split.valid), rows(split.test)) == (train, valid, test)


def seconds(number: float) -> float:
    return number / 86_400


def at(second: int) -> datetime:
    return datetime.fromtimestamp(second, UTC)


def clocked(users: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Each user's events as (item, time)."""
    return [
        [(item, sum(w for _, w in events[: at + 1])) for at, (item, _) in enumerate(events)]
        for events in users
    ]


@settings(max_examples=200, deadline=None)
@given(
    USERS,
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.none() | st.integers(3, 16),
    st.sampled_from(["none", "latest", "newcomers"]),
    st.booleans(),
)
def test_by_time_is_the_naive_split(
    users, cap: int, test_s: int, valid_s: int, until: int | None, colds: str, filled: bool
) -> None:
    """Row by row: first events in two windows, and nothing after the end; with and without cold items."""
    if filled:  # every window has a target
        users = [*users, [(0, 1)] * 16]
    log, catalog = logged(users)
    walks = clocked(users)
    end = max(time for walk in walks for _, time in walk) + 1 if until is None else until
    walks = [[event for event in walk if event[1] < end] for walk in walks]
    test_at, valid_at = end - test_s, end - test_s - valid_s
    first = {
        item: min(t for w in walks for i, t in w if i == item) for item in {i for w in walks for i, _ in w}
    }
    latest = sorted(first, key=lambda item: (first[item], item))[-1:]
    cold = {"none": [], "latest": latest, "newcomers": [4, 5]}[colds]
    train, valid, test, targets = {}, {}, {}, 0
    for user, walk in enumerate(walks):
        before = [item for item, time in walk if time < valid_at]
        inside = [item for item, time in walk if valid_at <= time < test_at]
        late = [item for item, time in walk if test_at <= time]
        warm = [item for item in before if item not in cold]
        if warm:
            train[user] = (warm,)
        targets += bool(before and inside)
        if warm and inside and inside[0] not in cold:
            valid[user] = (warm[-cap:], inside[0])
        if before + inside and late:
            test[user] = ((before + inside)[-cap:], late[0])
    config = SplitConfig(
        protocol="by_time",
        max_history=cap,
        cold_share=0.1 if colds == "latest" else 0,
        until=None if until is None else at(until),
        test_days=seconds(test_s),
        valid_days=seconds(valid_s),
    )
    known = ItemCatalog(items=catalog.items.head(4)) if colds == "newcomers" else None
    if not (valid and test):
        which = (
            "in the valid window"
            if not targets
            else "in the test window"
            if not test
            else f"with {colds}|cold_share"
        )
        with pytest.raises(DataError, match=which):
            hold_out(log, catalog, config, known)
        return
    split = hold_out(log, catalog, config, known)
    assert split.cold["item_id"].to_list() == sorted(cold)
    assert (rows(split.train), rows(split.valid), rows(split.test)) == (train, valid, test)


@LAW
@given(USERS, st.sampled_from(["leave_one_out", "last_basket"]), st.data())
def test_a_history_that_knows_its_target_is_refused(users, protocol: str, data) -> None:
    # Distinct items inside a user, so that the target stands at one place only.
    users = [[(place, wait) for place, (_, wait) in enumerate(events[:6])] for events in users]
    users = [*users, [(0, 1), (1, 1), (2, 1)]]
    log, catalog = logged(users)
    split = hold_out(log, catalog, SplitConfig(protocol=protocol))
    name = data.draw(st.sampled_from(["valid", "test"]))
    frame: pl.DataFrame = getattr(split, name)
    user = data.draw(st.sampled_from(frame["user_id"].to_list()))
    leaked = pl.when(pl.col("user_id") == user).then(pl.concat_list("history", "target")).otherwise("history")
    with pytest.raises(DataError, match=f"leak in {name}: .* user {user} "):
        check_no_leak(log, dataclasses.replace(split, **{name: frame.with_columns(history=leaked)}))


@pytest.fixture
def walked() -> Ingested:
    return logged([[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)], [(5, 1), (4, 1)]])


def changed(split: SequenceSplit, name: str, column: str, values: list) -> SequenceSplit:
    frame: pl.DataFrame = getattr(split, name)
    return dataclasses.replace(
        split, **{name: frame.with_columns(pl.Series(column, values, frame.schema[column]))}
    )


def test_other_leaks_are_refused(walked: Ingested) -> None:
    log, catalog = walked
    split = hold_out(log, catalog, SplitConfig())
    faults = [
        ("train", "sequence", [[0, 1, 2, 3], [5, 4]], "valid: does not follow on the training events"),
        ("train", "sequence", [[0, 2, 1], [5, 4]], "train: is no beginning of the log of user 0"),
        ("train", "sequence", [[0, 1, 2], [4, 5]], "train: is no beginning of the log of user 1"),
        ("train", "user_id", [0, 7], "train: is no beginning of the log of user 7"),
        ("test", "history", [[0, 1, 2, 4]], "test: history and target"),
        ("test", "target", [2], "test: history and target"),
    ]
    for name, column, values, message in faults:
        with pytest.raises(DataError, match=message):
            check_no_leak(log, changed(split, name, column, values))
    with pytest.raises(DataError, match="the split is of log"):
        check_no_leak(logged([[(0, 1), (1, 1), (2, 1)]]).log, split)


@pytest.fixture
def met_late() -> Ingested:
    """Item 5 is the last to appear, in the middle of user 1's events; user 2 begins with it."""
    early = [(item, 1) for item in range(5)]
    return logged([early, [(0, 10), (1, 1), (5, 1), (2, 1), (3, 1), (4, 1)], [(5, 20), (0, 1), (1, 1)]])


def test_leaks_around_cold_items_are_refused(met_late: Ingested) -> None:
    log, catalog = met_late
    split = hold_out(log, catalog, SplitConfig(cold_share=0.1))
    assert split.cold["item_id"].to_list() == [5]
    assert rows(split.train) == {0: ([0, 1, 2],), 1: ([0, 1, 2],)}
    assert rows(split.valid) == {0: ([0, 1, 2], 3), 1: ([0, 1, 2], 3)}
    assert rows(split.test) == {0: ([0, 1, 2, 3], 4), 1: ([0, 1, 5, 2, 3], 4), 2: ([5, 0], 1)}
    faults = [
        ("train", "sequence", [[0, 1, 2], [0, 1, 2, 3]], "valid: does not follow on the training events"),
        ("train", "sequence", [[0, 1, 2], [0, 2]], "train: is no beginning of the log of user 1"),
        ("valid", "history", [[0, 1, 2], [0, 1]], "valid: does not follow"),
        ("test", "history", [[0, 1, 2, 3], [0, 1, 2, 3], [5, 0]], "test: history and target"),
    ]
    for name, column, values, message in faults:
        with pytest.raises(DataError, match=message):
            check_no_leak(log, changed(split, name, column, values))
    # A test target that training or validation knows, with what stands right before it.
    for history, target in (([0, 1, 5], 2), ([0, 1, 5, 2], 3)):
        known = changed(split, "test", "history", [[0, 1, 2, 3], history, [5, 0]])
        known = changed(known, "test", "target", [4, target, 1])
        with pytest.raises(DataError, match="test: history and target .* user 1 "):
            check_no_leak(log, known)


def test_a_small_share_is_one_item_and_half_of_the_catalogue_is_refused(met_late: Ingested) -> None:
    assert len(hold_out(*met_late, SplitConfig(cold_share=0.001)).cold) == 1
    for share in (-0.1, 0.5):
        with pytest.raises(ValueError, match="cold_share"):
            SplitConfig(cold_share=share)


def test_cold_items_need_times() -> None:
    log, catalog = logged([[(0, 1), (1, 1), (2, 1)]], timed=False)
    with pytest.raises(
        DataError, match="cold_share 0.2 needs times, 3 of 3 events have none; set cold_share to 0"
    ):
        hold_out(log, catalog, SplitConfig(cold_share=0.2))


@pytest.fixture
def crossing() -> Ingested:
    """Training ends before 10, validation before 20: users 0 and 1 cross both, user 2 comes back in test only."""
    return logged(
        [
            [(0, 1), (1, 2), (2, 9), (3, 9)],
            [(1, 5), (2, 6), (3, 4), (4, 8)],
            [(3, 4), (0, 4), (5, 14), (4, 0)],
        ]
    )


WINDOWS = SplitConfig(protocol="by_time", until=at(30), test_days=seconds(10), valid_days=seconds(10))


def test_leaks_between_users_are_refused(crossing: Ingested) -> None:
    log, catalog = crossing
    split = hold_out(log, catalog, WINDOWS)
    assert rows(split.train) == {0: ([0, 1],), 1: ([1],), 2: ([3, 0],)}
    assert rows(split.valid) == {0: ([0, 1], 2), 1: ([1], 2)}
    assert rows(split.test) == {0: ([0, 1, 2], 3), 1: ([1, 2, 3], 4), 2: ([3, 0], 5)}
    check_no_leak(log, split)
    # What user 2 did in the test window, after the others' targets.
    with pytest.raises(
        DataError, match="train: is not all before the first valid target, in the log of user 2 "
    ):
        check_no_leak(log, changed(split, "train", "sequence", [[0, 1], [1], [3, 0, 5]]))
    # A test target out of the validation window, before another user's validation target.
    only = dataclasses.replace(split, valid=split.valid.filter(pl.col("user_id") == 0))
    early = changed(changed(only, "test", "history", [[0, 1, 2], [1], [3, 0]]), "test", "target", [3, 2, 5])
    with pytest.raises(DataError, match="test: history and target do not follow .* user 1 "):
        check_no_leak(log, early)
    # A history from the moment of its target.
    basket = changed(
        changed(split, "test", "history", [[0, 1, 2], [1, 2, 3], [0, 5]]), "test", "target", [3, 4, 4]
    )
    with pytest.raises(DataError, match="test: history and target do not follow .* user 2 "):
        check_no_leak(log, basket)
    # The last events of every user, as if they were split by time.
    with pytest.raises(DataError, match="test: history and target do not follow"):
        check_no_leak(log, dataclasses.replace(hold_out(log, catalog, SplitConfig()), protocol="by_time"))


def test_an_empty_window_says_where_the_log_lies(crossing: Ingested) -> None:
    late = WINDOWS.model_copy(update={"until": at(300)})
    wanted = (
        r"in the valid window, from 1970-01-01 00:04:40\+00:00 until before 1970-01-01 00:04:50\+00:00, .*"
        r"the log runs from 1970-01-01 00:00:01\+00:00 to 1970-01-01 00:00:23\+00:00: change until, test_days or"
    )
    with pytest.raises(DataError, match=wanted):
        hold_out(*crossing, late)


@pytest.mark.parametrize("setting", [{"until": "2011-10-01"}, {"test_days": 3}, {"valid_days": 3}])
def test_windows_of_another_protocol_are_refused(setting: dict) -> None:
    for protocol in ("leave_one_out", "last_basket"):
        with pytest.raises(
            ValueError, match=f"by_time lies, and protocol is {protocol}: set protocol to by_time, or"
        ):
            SplitConfig(protocol=protocol, **setting)
    config = SplitConfig(protocol="by_time", **setting)
    assert SplitConfig.model_validate_json(config.model_dump_json()) == config
    assert SplitConfig.model_validate(SplitConfig().model_dump()) == SplitConfig()


def test_windows_need_times() -> None:
    log, catalog = logged([[(0, 1), (1, 1), (2, 1)]], timed=False)
    with pytest.raises(DataError, match="by_time needs times, 3 of 3 events have none; use leave_one_out"):
        hold_out(log, catalog, SplitConfig(protocol="by_time"))


def test_newcomers_and_a_share_are_not_cold_at_once(met_late: Ingested) -> None:
    log, catalog = met_late
    known = ItemCatalog(items=catalog.items.head(5))
    split = hold_out(log, catalog, SplitConfig(), known)
    assert split.cold["item_id"].to_list() == [5]
    assert split.provenance.parents["known ItemCatalog"] == known.fingerprint
    with pytest.raises(ValueError, match="newer than the known catalogue, or the latest 0.1 of all"):
        hold_out(log, catalog, SplitConfig(cold_share=0.1), known)
    with pytest.raises(ArtifactError, match="did not grow from"):
        hold_out(
            log,
            catalog,
            SplitConfig(),
            ItemCatalog(items=catalog.items.head(5).with_columns(text=pl.lit("y"))),
        )


def test_no_target_shares_its_time_with_a_history_of_baskets() -> None:
    log, catalog = logged([[(0, 1), (1, 1), (2, 1), (3, 0)]])
    split = hold_out(log, catalog, SplitConfig(protocol="last_basket"))
    inside = changed(changed(split, "test", "history", [[0, 1, 2]]), "test", "target", [3])
    with pytest.raises(DataError, match="test: history and target do not follow"):
        check_no_leak(log, inside)
    check_no_leak(log, dataclasses.replace(inside, protocol="leave_one_out"))


def test_a_split_names_its_origins_and_keeps_training_whole() -> None:
    log, catalog = logged([[(i % 6, 1) for i in range(200)]])
    split = hold_out(log, catalog, SplitConfig())
    assert (split.log, split.catalog) == (log.fingerprint, catalog.fingerprint)
    assert split.train["sequence"].list.len().to_list() == [198]
    assert split.test["history"].list.len().to_list() == [50]


def test_baskets_need_times(walked: Ingested) -> None:
    log, catalog = logged([[(0, 1), (1, 1), (2, 1)]], timed=False)
    with pytest.raises(
        DataError, match="last_basket needs times, 3 of 3 events have none; use leave_one_out"
    ):
        hold_out(log, catalog, SplitConfig(protocol="last_basket"))


def test_nothing_to_hold_out() -> None:
    log, catalog = logged([[(0, 0), (1, 0), (2, 0)], [(0, 1)]])
    with pytest.raises(DataError, match="none of 2 users has 3 baskets"):
        hold_out(log, catalog, SplitConfig(protocol="last_basket"))


def test_foreign_catalogue_is_refused(walked: Ingested) -> None:
    small = ItemCatalog(items=walked.catalog.items.head(4))
    with pytest.raises(ValueError, match="the log has item 5, the catalogue 4 items"):
        hold_out(walked.log, small, SplitConfig())


def test_last_two_events_of_the_shop_share_a_basket_as_its_notice_says() -> None:
    log, catalog = ingest(IngestConfig())
    split = hold_out(log, catalog, SplitConfig())
    assert split.num_training_targets == 138_070 - 3 * 4072
    last = log.events.group_by("user_id").agg(same=pl.col("timestamp").get(-1) == pl.col("timestamp").get(-2))
    assert round(last["same"].mean(), 2) == 0.93
    baskets = hold_out(log, catalog, SplitConfig(protocol="last_basket"))
    assert (len(baskets.valid), len(baskets.test)) == (1562, 2588)


def test_the_last_twentieth_of_the_shop_is_a_fifteenth_of_its_test_targets() -> None:
    log, catalog = ingest(IngestConfig())
    plain, split = (hold_out(log, catalog, SplitConfig(cold_share=share)) for share in (0, 0.05))
    cold = split.cold["item_id"]
    assert split.test.equals(plain.test)
    assert (len(cold), split.test["target"].is_in(cold.implode()).sum()) == (136, 266)
    first = log.events.group_by("item_id").agg(pl.col("timestamp").min())
    is_cold = first["item_id"].is_in(cold.implode())
    assert first.filter(is_cold)["timestamp"].min() >= first.filter(~is_cold)["timestamp"].max()


def test_the_shop_by_time_keeps_training_in_the_past_and_newcomers_for_test() -> None:
    old = ingest(IngestConfig(until="2011-10-01"))
    log, catalog = ingest(IngestConfig(), old.catalog)
    last = log.events["timestamp"].max()
    split = hold_out(log, catalog, SplitConfig(protocol="by_time"))
    early = log.events.filter(pl.col("timestamp") < last + 1 - 14 * 86_400)
    assert split.train["sequence"].list.len().sum() == len(early)
    assert (len(split.train), len(split.valid), len(split.test)) == (3965, 359, 385)
    new = hold_out(log, catalog, SplitConfig(protocol="by_time"), old.catalog)
    assert new.test.equals(split.test)
    assert (len(new.cold), (new.test["target"] >= old.catalog.num_items).sum()) == (385, 88)


@pytest.mark.slow
@pytest.mark.skipif("SIDFLOW_DATA" not in os.environ, reason="SIDFLOW_DATA names no folder of data sets")
@pytest.mark.parametrize(
    ("preset", "folder", "rows", "repeated"),
    [
        ("beauty", "amazon2014-beauty", (131_413, 22_363, 22_363), 0),
        ("beauty-cpu", "amazon2014-beauty", (131_413, 22_363, 22_363), 0),
        ("instruments", "amazon2018-instruments", (131_837, 24_772, 24_772), 0),
        ("yelp", "yelp-s3rec", (225_061, 30_431, 30_431), 11_830),
    ],
)
def test_presets_of_published_sets_give_the_published_numbers_of_rows(
    preset: str, folder: str, rows: tuple[int, int, int], repeated: int
) -> None:
    place = Path(os.environ["SIDFLOW_DATA"]) / folder
    paths = [f"ingest.source.interactions.path={place}/interactions.parquet"]
    if load_preset(AblationConfig, preset).ingest.source.items is not None:
        paths.append(f"ingest.source.items.path={place}/items.parquet")
    config = load_preset(AblationConfig, preset, paths)
    log, catalog = ingest(config.ingest)
    split = hold_out(log, catalog, config.split)
    assert (split.num_training_targets, len(split.valid), len(split.test)) == rows
    assert (log.statistics["dropped_by_k_core"], log.statistics["repeated_events"]) == (0, repeated)
    # The published order, and item ids as the file has them: vectors made elsewhere are stored in that order.
    given = pl.read_parquet(place / "interactions.parquet").sort("user_id", "position")
    assert log.events["item_id"].to_list() == given["item_id"].to_list()
    assert catalog.items["raw_id"].to_list() == [str(item) for item in range(catalog.num_items)]
