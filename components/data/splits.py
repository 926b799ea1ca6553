"""Hold out the last events of each user for validation and test, and the latest items from training."""

from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from components.artifacts import COLD, InteractionLog, ItemCatalog, SequenceSplit
from components.config import Config, require
from components.data.raw import DataError
from components.folders import ArtifactError, Provenance


class SplitConfig(Config):
    """What is held out."""

    protocol: Literal["leave_one_out", "last_basket"] = "leave_one_out"
    """Hold out the last event (test) and the last but one (valid), or the first events of the last two
    baskets, where a basket is all events of a user at one time."""
    max_history: int = Field(default=50, ge=1)
    """Most recent events kept of a history in valid and test; training sequences are cut in batches only."""
    cold_share: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the catalogue, the items that appear last in the log (one at least), that training and validation never
    meet and test does. Needs times; 0: none."""


def hold_out(log: InteractionLog, catalog: ItemCatalog, config: SplitConfig) -> SequenceSplit:
    """Split a log into training sequences and held-out targets.

    Of a user's sequence v with n events, ``leave_one_out`` gives v[:n-2] for training, (v[:n-2], v[n-2]) for
    validation and (v[:n-1], v[n-1]) for test, as SASRec, TIGER and their followers do. ``last_basket``
    predicts the first event of a basket from all earlier baskets: training ends before the last basket but
    one; a user of two baskets is tested on the second and has no validation row. Other users with fewer than
    three events, or two baskets, are in training only, with their whole sequence.

    With ``cold_share`` the items whose first event in the log is latest, ties by item id, are cold; items of the
    catalogue without any event are not among them. Training sequences
    and validation histories leave their events out; a row of which nothing is left, and a validation row with a cold
    target, is dropped. Test rows stay as they are: in production a new item stands in histories too.

    What is learned from interactions has not met a cold item. It is still not what was known on the day such an item
    appeared: a warm event stays in training if it is later than cold ones, even of the same user, and the content
    encoder may have been fitted to the texts of all items.

    Parameters
    ----------
    log : InteractionLog
        The events.
    catalog : ItemCatalog
        The items they point to.
    config : SplitConfig
        Protocol, history cap and share of cold items.

    Returns
    -------
    SequenceSplit
        Rows in the order of user ids.

    Raises
    ------
    ValueError
        The log has an item that the catalogue lacks.
    DataError
        No user has three events (or baskets), none of them is left for validation without the cold items, or baskets
        or cold items are asked of a log without times.

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
    cold = _latest_items(log, config.cold_share, catalog.num_items)
    cuts = _last_baskets(log) if config.protocol == "last_basket" else _last_events(log)
    if not cuts["valid_at"].count():
        unit = "baskets" if config.protocol == "last_basket" else "events"
        raise DataError(f"hold_out: none of {len(cuts)} users has 3 {unit}; there is nothing to hold out")
    items, warm = pl.col("items"), ~pl.col("item_id").is_in(cold["item_id"].implode())
    end = pl.coalesce("valid_at", "test_at", items.list.len())
    train = (
        cuts.select("user_id", item_id=items.list.head(end))
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
        raise DataError(
            f"hold_out: with cold_share {config.cold_share:g} no user has both a warm event to train on and a warm one "
            "to validate on; lower cold_share"
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
            config=config.model_dump(),
            parents={"InteractionLog": log.fingerprint, "ItemCatalog": catalog.fingerprint},
        ),
    )
    check_no_leak(log, split)
    return split


def _latest_items(log: InteractionLog, share: float, num_items: int) -> pl.DataFrame:
    """Return the items that appear last, ascending."""
    if not share:
        return COLD.to_frame()
    _need_times(log, f"cold_share {share:g}", "set cold_share to 0")
    first = log.events.group_by("item_id").agg(pl.col("timestamp").min()).sort("timestamp", "item_id")
    return first.tail(max(1, round(share * num_items))).select("item_id").sort("item_id")


def _need_times(log: InteractionLog, setting: str, remedy: str) -> None:
    unknown = log.events["timestamp"].null_count()
    if unknown:
        raise DataError(
            f"hold_out: {setting} needs times, {unknown} of {len(log.events)} events have none; {remedy}"
        )


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


def check_no_leak(log: InteractionLog, split: SequenceSplit) -> None:
    """Check against the log that no history and no training sequence knows its target or anything after it.

    A training sequence must be the beginning of a user's warm events, which are all where the split has no cold items;
    among these the valid target stands right after it. The test target stands later, among all events. A history is
    what stands right before its target. With ``last_basket`` the target's time is later than its history's.

    Raises
    ------
    DataError
        The split was made of another log, or an event leaks; the message names the split and the user.
    """
    if split.log != log.fingerprint:
        raise DataError(
            f"check_no_leak: the split is of log {split.log[:12]}, got log {log.fingerprint[:12]}"
        )
    is_warm = ~pl.col("item_id").is_in(split.cold["item_id"].implode())
    # ``known``: how many warm events of the user stand before an event.
    events = log.events.with_columns(known=is_warm.cast(pl.Int64).cum_sum().over("user_id") - is_warm)
    warm = events.filter(is_warm).with_columns(position="known")
    ends = split.train.select("user_id", train_end=pl.col("sequence").list.len())
    train = split.train.join(_walks(warm), on="user_id", how="left", maintain_order="left")
    beginning = pl.col("items").list.head(pl.col("sequence").list.len())
    _refuse(train.filter(pl.col("sequence").ne_missing(beginning)), "train: is no beginning of")
    valid = _target_places(warm, ends, split.valid, split.protocol).filter(
        pl.col("known") == pl.col("train_end")
    )
    _refuse(
        split.valid.join(valid, on="user_id", how="anti"), "valid: does not follow on the training events in"
    )
    # With a validation row its target lies between the training events and the test target.
    validated = pl.col("user_id").is_in(split.valid["user_id"].implode())
    test = _target_places(events, ends, split.test, split.protocol).filter(
        pl.col("known") >= pl.col("train_end") + validated.cast(pl.Int64)
    )
    _refuse(
        split.test.join(test, on="user_id", how="anti"),
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
    return met.filter(pl.col("waited") > 0) if protocol == "last_basket" else met


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
