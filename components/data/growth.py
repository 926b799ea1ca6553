"""A catalogue that grows: known items keep their rows and what is known of them, newcomers follow."""

import polars as pl

from components.artifacts import COLD, InteractionLog, ItemCatalog
from components.config import require
from components.data.interactions import kept_figures
from components.data.raw import ITEMS, DataError, RawData
from components.folders import ArtifactError, Provenance


def known_first(known: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """List the known items, whether the source still describes them or not, and behind them the newcomers.

    Parameters
    ----------
    known : pl.DataFrame
        Columns as ``ItemCatalog.items``.
    items : pl.DataFrame
        Columns of ``ITEMS``, one row an item.

    Returns
    -------
    pl.DataFrame
        Columns of ``ITEMS``; newcomers in their order.
    """
    absent = [pl.lit(None, ITEMS[name]).alias(name) for name in ITEMS if name not in known.columns]
    rows = known.with_columns(absent).select(list(ITEMS))
    return pl.concat([rows, items.join(rows, on="raw_id", how="anti", maintain_order="left")])


def check_overlap(known: ItemCatalog, raw: RawData) -> None:
    """Refuse a source that spells ids in another way than the catalogue.

    Raises
    ------
    DataError
        It neither describes nor meets a single known item.
    """
    ids = pl.concat([raw.items["raw_id"], raw.events["item"]]).unique(maintain_order=True)
    if len(ids) and ids.is_in(known.items["raw_id"].implode()).not_().all():
        raise DataError(
            f"{raw.sources[0]['name']}: none of its {len(ids)} items is among the {known.num_items} of the known "
            f"catalogue (for instance {ids[0]!r} here, {known.items['raw_id'][0]!r} there): these are other ids; "
            "name the columns that hold the ids the catalogue was made with, or ingest without a known catalogue"
        )


def newcomers(catalog: ItemCatalog, known: ItemCatalog) -> pl.DataFrame:
    """Return the items that a catalogue has beyond the one that it grew from.

    Parameters
    ----------
    catalog : ItemCatalog
        The grown catalogue.
    known : ItemCatalog
        The catalogue before; its rows are the first rows of ``catalog``.

    Returns
    -------
    pl.DataFrame
        ``item_id`` (u32), ascending; no rows if nothing was new.

    Raises
    ------
    ArtifactError
        ``catalog`` did not grow from ``known``.
    """
    first = catalog.items.head(known.num_items)
    if not first.equals(known.items):
        raise ArtifactError(
            f"ItemCatalog {catalog.fingerprint[:12]} ({catalog.num_items} items) did not grow from "
            f"{known.fingerprint[:12]} ({known.num_items} items): its first rows are others, so ids mean other items; "
            "read the newer data onto that catalogue (ingest_onto)"
        )
    return catalog.items.slice(known.num_items).select(list(COLD))


def leave_out(
    log: InteractionLog, catalog: ItemCatalog, known: ItemCatalog, items: pl.Series
) -> tuple[InteractionLog, ItemCatalog]:
    """Take newcomers out of a grown catalogue again, with their events, as if the source had not had them yet.

    Later newcomers move up. A user whose events are all of such items is left out too, the others keep their order; who
    thereby has fewer events than the k-core asks for stays.

    Parameters
    ----------
    log : InteractionLog
        What was ingested.
    catalog : ItemCatalog
        The grown catalogue that its ids point into.
    known : ItemCatalog
        The catalogue that it grew from, whose items cannot be left out.
    items : series of int
        Ids of newcomers.

    Returns
    -------
    log : InteractionLog
        Its statistics count what was left out: ``items_set_aside``, ``events_of_items_set_aside`` and
        ``users_set_aside``.
    catalog : ItemCatalog
        ``known`` itself where no newcomer is left. Without ``items`` both are what was given.

    Raises
    ------
    ArtifactError
        ``catalog`` did not grow from ``known``.
    ValueError
        An item is none of the newcomers.
    DataError
        No event is left.
    """
    new = newcomers(catalog, known)["item_id"]
    strange = items.filter(~items.is_in(new.implode()))
    require(
        not len(strange),
        f"leave_out: items {strange.head(5).to_list()} are no newcomers to a catalogue of {known.num_items} items; "
        "known items keep their place",
    )
    if not len(items):
        return log, catalog
    rows = catalog.items.filter(~pl.col("item_id").is_in(items.implode()))
    number = rows.select("item_id").with_row_index("new_id")
    events = log.events.join(number, on="item_id", maintain_order="left")
    if not len(events):
        raise DataError(
            f"leave_out: all {len(log.events)} events are of the {len(items)} items; nothing is left"
        )
    users = log.users.join(events, on="user_id", how="semi", maintain_order="left").with_row_index("new_user")
    events = events.join(users.select("user_id", "new_user"), on="user_id", maintain_order="left").select(
        user_id="new_user",
        item_id="new_id",
        position=pl.int_range(pl.len(), dtype=pl.UInt32).over("new_user"),
        timestamp="timestamp",
        rating="rating",
    )
    counts = {
        "new_items": len(new) - len(items),
        "items_set_aside": len(items),
        "events_of_items_set_aside": len(log.events) - len(events),
        "users_set_aside": log.num_users - len(users),
    }
    parents = {
        "InteractionLog": log.fingerprint,
        "ItemCatalog": catalog.fingerprint,
        "known ItemCatalog": known.fingerprint,
    }
    provenance = Provenance(config=log.provenance.config, parents=parents)
    kept = rows.with_columns(item_id=pl.int_range(pl.len(), dtype=pl.UInt32))
    return (
        InteractionLog(
            events=events,
            users=users.select(user_id="new_user", raw_id="raw_id"),
            sources=log.sources,
            statistics=log.statistics | counts | kept_figures(events.select(user="user_id", item="item_id")),
            provenance=provenance,
        ),
        known if len(kept) == known.num_items else ItemCatalog(items=kept, provenance=provenance),
    )
