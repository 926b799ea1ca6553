"""Hold out the last events of each user, or what followed a moment, and the latest items from training."""

from datetime import datetime, timedelta
from typing import Literal, NamedTuple, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from components.artifacts import COLD, InteractionLog, ItemCatalog, SequenceSplit
from components.config import Config, require
from components.data.growth import newcomers
from components.data.raw import DataError
from components.data.times import Moment, microseconds, moment
from components.folders import ArtifactError, Provenance


class SplitConfig(Config):
    """What is held out."""

    protocol: Literal["leave_one_out", "last_basket", "by_time"] = "leave_one_out"
    """Hold out the last event (test) and the last but one (valid); or the first events of the last two
    baskets, where a basket is all events of a user at one time; or each user's first event in a test and a validation
    window, train on what was before both, and forget what came after."""
    max_history: int = Field(default=50, ge=1)
    """Most recent events kept of a history in valid and test; training sequences are cut in batches only."""
    cold_share: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the catalogue, the items that appear last in the log (one at least), that training and validation never
    meet and test does. Needs times; 0: none."""
    until: Moment | None = None
    """by_time: end of the test window; events at or after it are nowhere. A date is its midnight; without a time zone,
    UTC; null: right after the last event of the log."""
    test_days: float = Field(default=7.0, gt=0, le=36_500)
    """by_time: length of the test window, in days."""
    valid_days: float = Field(default=7.0, gt=0, le=36_500)
    """by_time: length of the validation window, which ends where the test window begins, in days."""

    @model_validator(mode="after")
    def _windows_are_read(self) -> Self:
        of_windows = [name for name in ("until", "test_days", "valid_days") if self._is_set(name)]
        if of_windows and self.protocol != "by_time":
            raise ValueError(
                f"{of_windows[0]} says where a window of by_time lies, and protocol is {self.protocol}: set protocol "
                f"to by_time, or leave {', '.join(of_windows)} out"
            )
        return self

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != SplitConfig.model_fields[name].default)


class Windows(NamedTuple):
    """Three moments: validation is from the first until before the second, test from there until before the third."""

    valid: datetime
    test: datetime
    end: datetime


def hold_out(
    log: InteractionLog, catalog: ItemCatalog, config: SplitConfig, known: ItemCatalog | None = None
) -> SequenceSplit:
    """Split a log into training sequences and held-out targets.

    Of a user's sequence v with n events, ``leave_one_out`` gives v[:n-2] for training, (v[:n-2], v[n-2]) for
    validation and (v[:n-1], v[n-1]) for test, as SASRec, TIGER and their followers do. ``last_basket``
    predicts the first event of a basket from all earlier baskets: training ends before the last basket but
    one; a user of two baskets is tested on the second and has no validation row. Other users with fewer than
    three events, or two baskets, are in training only, with their whole sequence.

    ``by_time`` trains on the events before the validation window. The target of either window is a user's first event
    inside it, its history all events of the user before, in test thus those of the validation window too. A user
    without events before the target has no row there. It holds out what the other protocols do not: what anybody did
    after validation began, and with it which items appeared and became popular then. Training with ``leave_one_out``
    knows that, as it ends for each user at another moment. What ingestion learned from the whole log it holds out as
    little: who passed the k-core, and the texts of items that appeared later.

    With ``cold_share`` the items whose first event in the log is latest, ties by item id, are cold; items of the
    catalogue without any event are not among them. Training sequences
    and validation histories leave their events out; a row of which nothing is left, and a validation row with a cold
    target, is dropped. Test rows stay as they are: in production a new item stands in histories too. With ``known`` the
    cold items are the newcomers, which ``catalog`` has and the catalogue that it grew from has not, with or without
    events: test then says how well new items are recommended, and old ones beside them.

    What is learned from interactions has not met a cold item. It is still not what was known on the day such an item
    appeared: except with ``by_time`` a warm event stays in training if it is later than cold ones, even of the same
    user, and the content encoder may have been fitted to the texts of all items.

    Parameters
    ----------
    log : InteractionLog
        The events.
    catalog : ItemCatalog
        The items they point to.
    config : SplitConfig
        Protocol, history cap and share of cold items.
    known : ItemCatalog, optional
        The catalogue that ``catalog`` grew from.

    Returns
    -------
    SequenceSplit
        Rows in the order of user ids.

    Raises
    ------
    ValueError
        The log has an item that the catalogue lacks, or both ``known`` and ``cold_share`` say which items are cold.
    ArtifactError
        ``catalog`` did not grow from ``known``.
    DataError
        No user has three events (or baskets), a window has no target, none is left for validation without the cold
        items, or baskets, windows or cold items are asked of a log without times.

    References
    ----------
    Kang and McAuley, Self-attentive sequential recommendation, ICDM 2018, section IV (leave-one-out).
    """
    highest = log.events.select(pl.col("item_id").max()).item()
    require(
        highest < catalog.num_items,
        f"hold_out: the log has item {highest}, the catalogue {catalog.num_items} items; "
        "take both from one ingestion",
    )
    require(
        known is None or not config.cold_share,
        f"hold_out: cold items are those newer than the known catalogue, or the latest {config.cold_share:g} of all; "
        "set cold_share to 0, or give no known catalogue",
    )
    cuts = _cut(log, config)
    cold = newcomers(catalog, known) if known else _latest_items(log, config, catalog.num_items)
    items, warm = pl.col("items"), ~pl.col("item_id").is_in(cold["item_id"].implode())
    train = (
        cuts.filter(pl.col("train_end") > 0)
        .select("user_id", item_id=items.list.head("train_end"))
        .explode("item_id")
        .filter(warm)
        .group_by("user_id", maintain_order=True)
        .agg(sequence="item_id")
    )
    valid = (
        cuts.drop_nulls("valid_at")
        .select("user_id", item_id=items.list.get(pl.col("valid_at")))
        .filter(warm)
        .join(train, on="user_id", maintain_order="left")
        .select("user_id", history=pl.col("sequence").list.tail(config.max_history), target="item_id")
    )
    if valid.is_empty():
        which = "newcomers" if known else f"cold_share {config.cold_share:g}"
        remedy = "let validation begin earlier" if known else "lower cold_share"
        raise DataError(
            f"hold_out: with {which} no user has both a warm event to train on and a warm one to validate on; {remedy}"
        )
    split = SequenceSplit(
        train=train,
        valid=valid,
        test=cuts.drop_nulls("test_at").select(
            "user_id",
            history=items.list.head(pl.col("test_at")).list.tail(config.max_history),
            target=items.list.get(pl.col("test_at")),
        ),
        cold=cold,
        num_items=catalog.num_items,
        protocol=config.protocol,
        log=log.fingerprint,
        catalog=catalog.fingerprint,
        provenance=Provenance(
            config=config.model_dump(mode="json"),
            parents={"InteractionLog": log.fingerprint, "ItemCatalog": catalog.fingerprint}
            | ({"known ItemCatalog": known.fingerprint} if known else {}),
        ),
    )
    check_no_leak(log, split)
    return split


def _latest_items(log: InteractionLog, config: SplitConfig, num_items: int) -> pl.DataFrame:
    """Return the items that appear last, ascending; by_time does not know those that appear after its end."""
    share = config.cold_share
    if not share:
        return COLD.to_frame()
    _need_times(log, f"cold_share {share:g}", "set cold_share to 0")
    events = log.events
    if config.protocol == "by_time":
        events = events.filter(_time() < microseconds(_windows(log, config).end))
    first = events.group_by("item_id").agg(pl.col("timestamp").min()).sort("timestamp", "item_id")
    return first.tail(max(1, round(share * num_items))).select("item_id").sort("item_id")


def _need_times(log: InteractionLog, setting: str, remedy: str) -> None:
    unknown = log.events["timestamp"].null_count()
    if unknown:
        raise DataError(
            f"hold_out: {setting} needs times, {unknown} of {len(log.events)} events have none; {remedy}"
        )


def _cut(log: InteractionLog, config: SplitConfig) -> pl.DataFrame:
    """Say of every user where training ends and where the targets stand.

    Returns
    -------
    pl.DataFrame
        ``user_id``, all ``items``, ``train_end``: number of events to train on; ``valid_at``, ``test_at``: position of
        the target, or null.

    Raises
    ------
    DataError
        Nobody has a target.
    """
    if config.protocol == "by_time":
        return _first_in_windows(log, _windows(log, config))
    cuts = _last_baskets(log) if config.protocol == "last_basket" else _last_events(log)
    if not cuts["valid_at"].count():
        unit = "baskets" if config.protocol == "last_basket" else "events"
        raise DataError(f"hold_out: none of {len(cuts)} users has 3 {unit}; there is nothing to hold out")
    return cuts.with_columns(train_end=pl.coalesce("valid_at", "test_at", pl.col("items").list.len()))


def _last_events(log: InteractionLog) -> pl.DataFrame:
    """One row a user: all items, and the positions of the two targets or null."""
    count = pl.len().cast(pl.Int64)
    return log.events.group_by("user_id", maintain_order=True).agg(
        items="item_id",
        valid_at=pl.when(count >= 3).then(count - 2),
        test_at=pl.when(count >= 3).then(count - 1),
    )


def _last_baskets(log: InteractionLog) -> pl.DataFrame:
    """As ``_last_events``; the targets are the first events of the last two baskets."""
    _need_times(log, "last_basket", "use leave_one_out")
    # A basket begins at position 0 and wherever the time changes.
    begins = pl.col("position").cast(pl.Int64).filter(pl.col("timestamp").diff().fill_null(1) != 0)
    return (
        log.events.group_by("user_id", maintain_order=True)
        .agg(items="item_id", begins=begins)
        .select(
            "user_id",
            "items",
            valid_at=pl.when(pl.col("begins").list.len() >= 3).then(
                pl.col("begins").list.get(-2, null_on_oob=True)
            ),
            test_at=pl.when(pl.col("begins").list.len() >= 2).then(pl.col("begins").list.get(-1)),
        )
    )


def _time() -> pl.Expr:
    """Read an event's time in microseconds, as whole numbers that compare exactly."""
    return pl.col("timestamp") * 1_000_000


def _windows(log: InteractionLog, config: SplitConfig) -> Windows:
    """Lay the windows one before the other, back from the end."""
    _need_times(log, "by_time", "use leave_one_out")
    end = config.until or moment(log.events.select(pl.col("timestamp").max() + 1).item())
    test = end - timedelta(days=config.test_days)
    return Windows(test - timedelta(days=config.valid_days), test, end)


def _first_in_windows(log: InteractionLog, windows: Windows) -> pl.DataFrame:
    """Cut as ``_cut`` says, without events at or after the end; a target has an event of its user before it."""
    valid, test, end = map(microseconds, windows)
    cuts = (
        log.events.filter(_time() < end)
        .group_by("user_id", maintain_order=True)
        .agg(items="item_id", train_end=(_time() < valid).sum(), before_test=(_time() < test).sum())
        .with_columns(
            valid_at=_inside("train_end", pl.col("before_test")),
            test_at=_inside("before_test", pl.col("items").list.len()),
        )
    )
    for name, begins, ends in (("valid", windows.valid, windows.test), ("test", windows.test, windows.end)):
        if not cuts[f"{name}_at"].count():
            times = log.events.select(first=pl.col("timestamp").min(), last=pl.col("timestamp").max())
            first, last = map(moment, times.row(0))
            raise DataError(
                f"hold_out: no user has an event in the {name} window, from {begins} until before {ends}, and another "
                f"before it; the log runs from {first} to {last}: change until, test_days or valid_days"
            )
    return cuts


def _inside(position: str, end: pl.Expr) -> pl.Expr:
    """Read a position that is neither the user's first nor beyond the end, else null."""
    return pl.when(pl.col(position).is_between(0, end, closed="none")).then(position)


class Parts(NamedTuple):
    """Events of a log, as a split uses them: columns of ``InteractionLog.events`` among others, in its order."""

    train: pl.DataFrame
    """What a user's training sequence has, in the log's warm events."""
    valid: pl.DataFrame
    """Events that may be a user's validation target: this item, its history right before it, where training ends."""
    test: pl.DataFrame
    """Events that may be a user's test target, behind the others; several of a walk that repeats itself."""


def find_parts(log: InteractionLog, split: SequenceSplit) -> Parts:
    """Find the events that a split trains on and holds out.

    A training sequence is the beginning of a user's warm events, and the validation target stands right behind it. The
    test target stands later, among all events. A history is what stands right before its target.
    """
    is_warm = ~pl.col("item_id").is_in(split.cold["item_id"].implode())
    # ``known``: how many warm events of the user stand before an event.
    events = log.events.with_columns(known=is_warm.cast(pl.Int64).cum_sum().over("user_id") - is_warm)
    warm = events.filter(is_warm).with_columns(position="known")
    ends = split.train.select("user_id", train_end=pl.col("sequence").list.len())
    train = warm.join(ends, on="user_id", maintain_order="left").filter(pl.col("known") < pl.col("train_end"))
    valid = _target_places(warm, ends, split.valid, split.protocol).filter(
        pl.col("known") == pl.col("train_end")
    )
    # With a validation row its target lies between the training events and the test target.
    validated = pl.col("user_id").is_in(split.valid["user_id"].implode())
    test = _target_places(events, ends, split.test, split.protocol).filter(
        pl.col("known") >= pl.col("train_end") + validated.cast(pl.Int64)
    )
    if split.protocol == "by_time":
        test = test.filter(pl.col("timestamp") > valid["timestamp"].max())
    return Parts(train, valid, test)


def check_no_leak(log: InteractionLog, split: SequenceSplit) -> None:
    """Check against the log that no history and no training sequence knows its target or anything after it.

    Every training sequence, history and target must stand in the log as ``find_parts`` says. With ``last_basket`` and
    ``by_time`` the target's time is later than its history's. With ``by_time`` this holds between users too: all of
    training is before every validation target, and these are before every test target.

    Raises
    ------
    DataError
        The split was made of another log, or an event leaks; the message names the split and the user.
    """
    if split.log != log.fingerprint:
        raise DataError(
            f"check_no_leak: the split is of log {split.log[:12]}, got log {log.fingerprint[:12]}"
        )
    parts = find_parts(log, split)
    train = split.train.join(_walks(parts.train), on="user_id", how="left", maintain_order="left")
    _refuse(train.filter(pl.col("sequence").ne_missing(pl.col("items"))), "train: is no beginning of")
    _refuse(
        split.valid.join(parts.valid, on="user_id", how="anti"),
        "valid: does not follow on the training events in",
    )
    if split.protocol == "by_time":
        late = parts.train.filter(pl.col("timestamp") >= parts.valid["timestamp"].min())
        _refuse(
            late.unique("user_id", maintain_order=True), "train: is not all before the first valid target, in"
        )
    _refuse(
        split.test.join(parts.test, on="user_id", how="anti"),
        "test: history and target do not follow on one another in",
    )


def _walks(events: pl.DataFrame) -> pl.DataFrame:
    return events.group_by("user_id", maintain_order=True).agg(items="item_id")


def _target_places(
    events: pl.DataFrame, ends: pl.DataFrame, held: pl.DataFrame, protocol: str
) -> pl.DataFrame:
    """Find each position at which a user's events have the target, and right before it the history."""
    before = pl.col("items").list.head("position").list.tail(pl.col("history").list.len())
    met = (
        events.with_columns(waited=pl.col("timestamp").diff().over("user_id"))
        .join(held, left_on=["user_id", "item_id"], right_on=["user_id", "target"], maintain_order="left")
        .join(_walks(events), on="user_id", maintain_order="left")
        .join(ends, on="user_id", how="left", maintain_order="left")
        .with_columns(pl.col("train_end").fill_null(0))  # all that could be trained on was cold
        .filter(before == pl.col("history"))
    )
    return met if protocol == "leave_one_out" else met.filter(pl.col("waited") > 0)


def _refuse(wrong: pl.DataFrame, rule: str) -> None:
    if len(wrong):
        raise DataError(f"leak in {rule} the log of user {wrong['user_id'][0]} ({len(wrong)} users)")


def count_events(sequences: pl.Series, num_items: int) -> NDArray[np.int64]:
    """Count the events of every item.

    Parameters
    ----------
    sequences : series of list
        Item ids, for instance the training sequences of a split.
    num_items : int
        Size of the catalogue.

    Returns
    -------
    array
        (N,) events, 0 for items that nobody met.
    """
    items = sequences.explode().drop_nulls().to_numpy().astype(np.int64)
    return np.bincount(items, minlength=num_items)


def training_counts(split: SequenceSplit | None, num_items: int, setting: str) -> NDArray[np.int64]:
    """Count the training events of every item of a catalogue, for a setting that goes by popularity.

    Parameters
    ----------
    split : SequenceSplit, optional
        Where the events are; None is an error.
    num_items : int
        Items of the catalogue that asks.
    setting : str
        The key and value that make counts necessary, for the message.

    Returns
    -------
    array
        (N,) events.

    Raises
    ------
    ValueError
        There is no split.
    ArtifactError
        The split is of another catalogue.
    """
    if split is None:
        raise ValueError(
            f"{setting} needs to know how often items were interacted with: give the stage the SequenceSplit whose "
            "training events count, or change the setting"
        )
    _check_catalogue(split, num_items)
    return count_events(split.train["sequence"], num_items)


def warm_items(split: SequenceSplit | None, num_items: int) -> NDArray[np.bool_]:
    """Say of every item of a catalogue whether training may know it: all but the cold ones of a split.

    Returns
    -------
    array
        (N,) bool; all True without a split.

    Raises
    ------
    ArtifactError
        The split is of another catalogue.
    """
    warm = np.ones(num_items, dtype=bool)
    if split is not None:
        _check_catalogue(split, num_items)
        warm[split.cold["item_id"].to_numpy()] = False
    return warm


def _check_catalogue(split: SequenceSplit, num_items: int) -> None:
    if split.num_items != num_items:
        raise ArtifactError(
            f"the SequenceSplit has {split.num_items} items, the ContentEmbeddings {num_items}: they come from "
            "different catalogues"
        )
