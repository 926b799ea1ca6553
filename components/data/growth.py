"""A catalogue that grows: known items keep their rows and what is known of them, newcomers follow."""

import polars as pl

from components.artifacts import COLD, ItemCatalog
from components.data.raw import ITEMS, DataError, RawData
from components.folders import ArtifactError


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
