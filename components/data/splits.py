"""Hold out the last events of each user for validation and test; never a later event in a history."""

from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from components.artifacts import InteractionLog, ItemCatalog, SequenceSplit
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


def hold_out(log: InteractionLog, catalog: ItemCatalog, config: SplitConfig) -> SequenceSplit:
    """Split a log into training sequences and held-out targets.

    Of a user's sequence v with n events, ``leave_one_out`` gives v[:n-2] for training, (v[:n-2], v[n-2]) for
    validation and (v[:n-1], v[n-1]) for test, as SASRec, TIGER and their followers do. ``last_basket``
    predicts the first event of a basket from all earlier baskets: training ends before the last basket but
    one; a user of two baskets is tested on the second and has no validation row. Other users with fewer than
    three events, or two baskets, are in training only, with their whole sequence.

    Parameters
    ----------
    log : InteractionLog
        The events.
    catalog : ItemCatalog
        The items they point to.
    config : SplitConfig
        Protocol and history cap.

    Returns
    -------
    SequenceSplit
        Rows in the order of user ids.

    Raises
    ------
    ValueError
        The log has an item that the catalogue lacks.
    DataError
        No user has three events (or baskets), or baskets are asked of a log without times.

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
    cuts = _last_baskets(log) if config.protocol == "last_basket" else _last_events(log)
    if not cuts["valid_at"].count():
        unit = "baskets" if config.protocol == "last_basket" else "events"
        raise DataError(f"hold_out: none of {len(cuts)} users has 3 {unit}; there is nothing to hold out")
    split = SequenceSplit(
        train=cuts.select(
            "user_id",
            sequence=pl.col("items").list.head(
                pl.coalesce("valid_at", "test_at", pl.col("items").list.len())
            ),
        ),
        valid=_held_out(cuts, "valid_at", config.max_history),
        test=_held_out(cuts, "test_at", config.max_history),
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
    unknown = log.events["timestamp"].null_count()
    if unknown:
        raise DataError(
            f"hold_out: last_basket needs times, {unknown} of {len(log.events)} events have none; "
            "use leave_one_out"
        )
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


def _held_out(cuts: pl.DataFrame, at: str, max_history: int) -> pl.DataFrame:
    items = pl.col("items")
    return cuts.filter(pl.col(at).is_not_null()).select(
        "user_id",
        history=items.list.head(pl.col(at)).list.tail(max_history),
        target=items.list.get(pl.col(at)),
    )


def check_no_leak(log: InteractionLog, split: SequenceSplit) -> None:
    """Check against the log that no history and no training sequence knows its target or anything after it.

    Training sequences must be the beginning of a user's events; the valid target stands right after it; the
    test target stands later; a history is what stands right before its target. With ``last_basket`` the
    target's time is later than its history's.

    Raises
    ------
    DataError
        The split was made of another log, or an event leaks; the message names the split and the user.
    """
    if split.log != log.fingerprint:
        raise DataError(
            f"check_no_leak: the split is of log {split.log[:12]}, got log {log.fingerprint[:12]}"
        )
    users = log.events.group_by("user_id", maintain_order=True).agg(items="item_id")
    train = split.train.join(users, on="user_id", how="left", maintain_order="left").with_columns(
        train_end=pl.col("sequence").list.len()
    )
    beginning = pl.col("items").list.head("train_end")
    _refuse(train.filter(pl.col("sequence").ne_missing(beginning)), "train: is no beginning of")
    valid = _target_places(log, train, split.valid, split.protocol).filter(
        pl.col("position") == pl.col("train_end")
    )
    _refuse(
        split.valid.join(valid, on="user_id", how="anti"), "valid: does not follow on the training events in"
    )
    # With a validation row its target lies between the training events and the test target.
    validated = pl.col("user_id").is_in(split.valid["user_id"].implode())
    test = _target_places(log, train, split.test, split.protocol).filter(
        pl.col("position") >= pl.col("train_end") + validated.cast(pl.Int64)
    )
    _refuse(
        split.test.join(test, on="user_id", how="anti"),
        "test: history and target do not follow on one another in",
    )


def _target_places(
    log: InteractionLog, train: pl.DataFrame, held: pl.DataFrame, protocol: str
) -> pl.DataFrame:
    """Find each position at which a user's log has the target, and right before it the history."""
    before = pl.col("items").list.head("position").list.tail(pl.col("history").list.len())
    met = (
        log.events.with_columns(waited=pl.col("timestamp").diff().over("user_id"))
        .join(held, left_on=["user_id", "item_id"], right_on=["user_id", "target"], maintain_order="left")
        .join(train.select("user_id", "items", "train_end"), on="user_id", maintain_order="left")
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
    if split.num_items != num_items:
        raise ArtifactError(
            f"the SequenceSplit has {split.num_items} items, the ContentEmbeddings {num_items}: they come from "
            "different catalogues"
        )
    return count_events(split.train["sequence"], num_items)
