"""From raw events and items to a log and a catalogue: unknown items, repeats, k-core, ids, order, text."""

from datetime import datetime
from typing import Any, Literal

import polars as pl

from components.data.raw import ITEMS, DataError, items_of_events, natural_order
from components.data.times import microseconds, moment

TextField = Literal["title", "brand", "categories", "description"]


def unique_items(items: pl.DataFrame, name: str, duplicates: Literal["fail", "first"]) -> pl.DataFrame:
    """Keep one row an item.

    Parameters
    ----------
    items : pl.DataFrame
        Columns of ``ITEMS``.
    name : str
        Where the items stand, for messages.
    duplicates : {"fail", "first"}
        Refuse ids that occur twice, or keep the first row of each.

    Raises
    ------
    DataError
        An id occurs twice and ``duplicates`` is "fail".
    """
    twice = items.filter(pl.col("raw_id").is_duplicated())["raw_id"]
    if len(twice) and duplicates == "fail":
        raise DataError(
            f"{name}: item {twice[0]!r} is described {(twice == twice[0]).sum()} times "
            f"({twice.n_unique()} items are described more than once); "
            "mend the file, or set duplicate_items to first to keep the first of each"
        )
    return items.unique("raw_id", keep="first", maintain_order=True)


def settle_unknown(
    events: pl.DataFrame, items: pl.DataFrame, name: str, unknown: Literal["fail", "drop", "keep"]
) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """Settle events whose item is not described.

    Parameters
    ----------
    events, items : pl.DataFrame
        Columns of ``EVENTS`` and ``ITEMS``.
    name : str
        Where the events stand, for messages.
    unknown : {"fail", "drop", "keep"}
        Refuse them, leave them out, or append their items without text.

    Returns
    -------
    events, items : pl.DataFrame
        Every item of the events is among the items.
    count : int
        Number of events that had an unknown item.

    Raises
    ------
    DataError
        There is one and ``unknown`` is "fail".
    """
    strange = events.join(items, left_on="item", right_on="raw_id", how="anti", maintain_order="left")
    if not len(strange):
        return events, items, 0
    if unknown == "fail":
        raise DataError(
            f"{name} row {strange['order'][0]}: item {strange['item'][0]!r} is not in the item metadata "
            f"({len(strange)} events, {strange['item'].n_unique()} items); "
            "set unknown_items to drop or keep, or complete the metadata"
        )
    if unknown == "keep":
        return events, pl.concat([items, items_of_events(strange)]), len(strange)
    known = events.join(items, left_on="item", right_on="raw_id", how="semi", maintain_order="left")
    return known, items, len(strange)


def events_before(events: pl.DataFrame, until: datetime | None, name: str) -> pl.DataFrame:
    """Keep what had happened before a moment.

    Parameters
    ----------
    events : pl.DataFrame
        Columns of ``EVENTS``.
    until : datetime, optional
        The first moment that is left out, with a time zone; None keeps all.
    name : str
        Where the events stand, for messages.

    Raises
    ------
    DataError
        The events have no times, or none is so early.
    """
    if until is None or not len(events):
        return events
    if events["time_ms"].null_count():
        raise DataError(f"{name}: until {until} needs times, and events have none; leave until out")
    early = events.filter(pl.col("time_ms") * 1000 < microseconds(until))
    if not len(early):
        first = moment(events.select(pl.col("time_ms").min()).item() / 1000)
        raise DataError(
            f"{name}: no event before until, {until}; the first of {len(events)} is of {first}: choose a later day"
        )
    return early


def first_of_repeats(events: pl.DataFrame) -> pl.DataFrame:
    """Keep of each user and item the first event by (time, place in the source), in that order."""
    return events.sort("time_ms", "order").unique(["user", "item"], keep="first", maintain_order=True)


def k_core(events: pl.DataFrame, k: int, known: pl.Series | None = None) -> pl.DataFrame:
    """Remove users and items with fewer than k events until none is left.

    The result is the largest part of the log in which every user and every item has k events: it depends
    neither on the order of rows nor on whether users or items go first. Known items may have fewer: the result then
    is the largest part in which every user has k events and every other item has.

    Parameters
    ----------
    events : pl.DataFrame
        Columns ``user`` and ``item`` of any type, and others that are carried along.
    k : int
        Least number of events; 0 and 1 remove nothing.
    known : series, optional
        Items that few events do not remove.

    Returns
    -------
    pl.DataFrame
        The rows that stay, in their order; may be empty.
    """
    is_known = pl.lit(False) if known is None else pl.col("item").is_in(known.implode())
    marked = events.with_columns(is_known.alias("stays"))
    enough = (pl.len().over("user") >= k) & (pl.col("stays") | (pl.len().over("item") >= k))
    while len(kept := marked.filter(enough)) < len(marked):
        marked = kept
    return kept.drop("stays")


def check_core(
    core: pl.DataFrame, events: pl.DataFrame, k: int, name: str, known: pl.Series | None = None
) -> None:
    """Refuse an empty k-core, saying what the log had and which k would leave something.

    Raises
    ------
    DataError
        ``core`` has no rows.
    """
    if len(core):
        return
    if not len(events):
        raise DataError(f"{name}: no events; nothing is left to learn from")
    users, items = events["user"].n_unique(), events["item"].n_unique()
    largest = next(j for j in range(k - 1, 0, -1) if len(k_core(events, j, known)))
    raise DataError(
        f"{name}: k_core {k} leaves 0 of {len(events)} events ({users} users, {items} items); the largest k "
        f"that leaves any is {largest}, with {len(k_core(events, largest, known))} events; lower k_core"
    )


def kept_figures(events: pl.DataFrame) -> dict[str, Any]:
    """Count what was kept: figures of ``InteractionLog.statistics``, from at least one event, ``user`` and ``item``."""
    lengths = events.group_by("user").len()["len"]
    num_items = events["item"].n_unique()
    return {
        "events": len(events),
        "users": len(lengths),
        "items_with_events": num_items,
        "mean_length": len(events) / len(lengths),
        "longest": lengths.max(),
        "density": len(events) / (len(lengths) * num_items),
        "repeated_events": len(events) - len(events.select("user", "item").unique()),
    }


def number(ids: pl.Series) -> pl.DataFrame:
    """Number ids of the source from 0: shorter ones first, then by letter, so that numbers keep their order.

    Returns
    -------
    pl.DataFrame
        Columns ``raw_id`` and ``number`` (u32), one row an id.
    """
    return natural_order(pl.DataFrame({"raw_id": ids.unique()}), "raw_id").with_columns(
        number=pl.int_range(pl.len(), dtype=pl.UInt32)
    )


def order_events(events: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Give events their dense ids and their position in the user's sequence.

    Sorted by (user, time, place in the source); equal times thus keep the order of the source.

    Parameters
    ----------
    events : pl.DataFrame
        Columns of ``EVENTS``.
    users, items : pl.DataFrame
        Columns ``raw_id`` and ``number``; every id of the events is among them.

    Returns
    -------
    pl.DataFrame
        Columns as ``InteractionLog.events``; the timestamp in whole seconds.
    """
    return (
        events.join(users.select(user="raw_id", user_id="number"), on="user", maintain_order="left")
        .join(items.select(item="raw_id", item_id="number"), on="item", maintain_order="left")
        .sort("user_id", "time_ms", "order")
        .select(
            "user_id",
            "item_id",
            position=pl.int_range(pl.len(), dtype=pl.UInt32).over("user_id"),
            timestamp=pl.col("time_ms").floordiv(1000),
            rating="rating",
        )
    )


def describe_items(
    items: pl.DataFrame,
    fields: list[TextField],
    name: str,
    empty_text: Literal["fail", "keep"],
    first_id: int = 0,
) -> pl.DataFrame:
    """Number the items in their order and join their fields to one text.

    Parameters
    ----------
    items : pl.DataFrame
        Columns of ``ITEMS``, one row an item.
    fields : list of str
        What the text is made of, in this order, parted by ". "; labels of categories by ", ".
    name : str
        Where the items stand, for messages.
    empty_text : {"fail", "keep"}
        Refuse items of which nothing is known, or give them an empty text.
    first_id : int
        Number of the first item.

    Returns
    -------
    pl.DataFrame
        Columns as ``ItemCatalog.items``.

    Raises
    ------
    DataError
        An item has no text and ``empty_text`` is "fail".
    """
    parts = [pl.col(f).list.join(", ") if ITEMS[f] == pl.List(pl.String) else pl.col(f) for f in fields]
    filled = [part.str.strip_chars().replace("", None) for part in parts]
    described = items.select(
        pl.int_range(first_id, first_id + pl.len(), dtype=pl.UInt32).alias("item_id"),
        "raw_id",
        "title",
        "brand",
        "categories",
        pl.concat_str(filled, separator=". ", ignore_nulls=True).alias("text"),
    )
    empty = described.filter(pl.col("text") == "")
    if len(empty) and empty_text == "fail":
        raise DataError(
            f"{name}: item {empty['raw_id'][0]!r} has no text in {', '.join(fields)} "
            f"({len(empty)} of {len(items)} items have none); "
            "name other text_fields, complete the metadata, or set empty_text to keep"
        )
    return described
