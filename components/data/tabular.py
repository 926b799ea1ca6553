"""Tables of one's own: csv or parquet files whose columns the configuration names."""

from typing import Literal

import polars as pl
from pydantic import Field

from components.config import Config
from components.data.files import SourceFile, fetch
from components.data.raw import (
    EVENTS,
    ITEMS,
    DataError,
    Malformed,
    RawData,
    check_raw,
    items_of_events,
    natural_order,
)
from components.data.tables import read_columns

ISO_8601 = (
    r"^(?<day>\d{4}-\d{2}-\d{2})(?:[T ](?<minute>\d{2}:\d{2})(?::(?<second>\d{2}(?:\.\d+)?))?"
    r"(?:Z|(?<sign>[+-])(?<zone_hour>\d{2}):?(?<zone_minute>\d{2}))?)?$"
)


class InteractionColumns(Config):
    """What the interaction table calls its columns."""

    user: str = "user_id"
    """Who: text or whole number."""
    item: str = "item_id"
    """What: text or whole number."""
    timestamp: str | None = "timestamp"
    """When; null if the rows stand in order and no time is known."""
    rating: str | None = None
    """Any number that goes with the event; null if there is none."""


class ItemColumns(Config):
    """What the item table calls its columns; null for what it does not have."""

    id: str = "item_id"
    """The id that interactions use; every item once."""
    title: str | None = "title"
    """Name of the item."""
    brand: str | None = None
    """Maker or shop."""
    categories: str | None = None
    """Labels: a list column in parquet, or text cut at ``category_separator``."""
    description: str | None = None
    """Any further text."""


class TabularSource(Config):
    """Tables in csv (plain or gzipped, with a header) or parquet, told apart by their ending."""

    kind: Literal["tabular"] = "tabular"
    """Which reader."""
    interactions: SourceFile
    """One row an event."""
    items: SourceFile | None = None
    """One row an item; null if nothing is known of the items but their ids."""
    columns: InteractionColumns = InteractionColumns()
    """Columns of the interactions."""
    item_columns: ItemColumns = ItemColumns()
    """Columns of the items."""
    timestamps: Literal["seconds", "milliseconds", "iso"] = "seconds"
    """Unit of the times since 1970 UTC, or ISO 8601 texts and parquet dates; without a zone they are UTC."""
    separator: str = Field(default=",", min_length=1, max_length=1)
    """Between the fields of a .csv; a .tsv has tabs."""
    category_separator: str = Field(default="|", min_length=1)
    """Between the labels of a category text."""


def read_tabular(source: TabularSource, malformed: Malformed) -> RawData:
    """Read a table of interactions and, if there is one, a table of items.

    Items are sorted by raw id, numbers in the order of numbers.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    DataError
        A column is missing, a file is damaged or has another ending, or a row is malformed and ``malformed``
        is "fail".
    """
    with fetch(source.interactions) as file:
        sources = [file.record]
        table, ragged = read_columns(file, source.columns.model_dump(), source.separator, malformed)
        events, bad = _events(table, source, file.name, malformed)
    skipped = {"events": ragged + bad}
    if source.items is None:
        return check_raw(RawData(events, items_of_events(events), sources, skipped))
    with fetch(source.items) as file:
        sources.append(file.record)
        table, ragged = read_columns(file, source.item_columns.model_dump(), source.separator, malformed)
        items, bad = _items(table, source, file.name, malformed)
    return check_raw(
        RawData(events, natural_order(items, "raw_id"), sources, skipped | {"items": ragged + bad})
    )


def _events(
    table: pl.DataFrame, source: TabularSource, name: str, malformed: Malformed
) -> tuple[pl.DataFrame, int]:
    columns = source.columns
    _check_ids(table, "user", f"{name} column {columns.user!r}")
    _check_ids(table, "item", f"{name} column {columns.item!r}")
    time = pl.lit(None, pl.Int64)
    rating = _number("rating", table.schema["rating"]).cast(pl.Float32)
    if columns.timestamp is not None:
        time = _time_ms(table.schema["timestamp"], source.timestamps, f"{name} column {columns.timestamp!r}")
    read = table.select(
        pl.col("user", "item").cast(pl.String),
        time.alias("time_ms"),
        rating.alias("rating"),
        "order",
        given=pl.col("rating").cast(pl.String).str.strip_chars().fill_null("") != "",
    )
    faults = {
        f"{columns.user!r} is empty": _blank("user"),
        f"{columns.item!r} is empty": _blank("item"),
        f"{columns.timestamp!r} does not read as {source.timestamps}": pl.col("time_ms").is_null()
        & pl.lit(columns.timestamp is not None),
        f"{columns.rating!r} is not a finite number": pl.col("given")
        & ~pl.col("rating").is_finite().fill_null(False),
    }
    sound, bad = _sift(read, faults, name, malformed)
    return sound.select(list(EVENTS)), bad


def _items(
    table: pl.DataFrame, source: TabularSource, name: str, malformed: Malformed
) -> tuple[pl.DataFrame, int]:
    columns = source.item_columns
    _check_ids(table, "id", f"{name} column {columns.id!r}")
    labels = pl.col("categories")
    if not isinstance(table.schema["categories"], pl.List):
        labels = labels.cast(pl.String).str.split(source.category_separator)
    labels = labels.cast(pl.List(pl.String)).list.eval(
        pl.element().str.strip_chars().replace("", None).drop_nulls()
    )
    sound, bad = _sift(table, {f"{columns.id!r} is empty": _blank("id")}, name, malformed)
    items = sound.select(
        pl.col("id").cast(pl.String).alias("raw_id"),
        *(
            pl.col(role).cast(pl.String).str.strip_chars().replace("", None)
            for role in ("title", "brand", "description")
        ),
        categories=pl.when(labels.list.len() > 0).then(labels),
    )
    return items.select(list(ITEMS)), bad


def _check_ids(table: pl.DataFrame, role: str, place: str) -> None:
    kind = table.schema[role]
    if not (kind.is_integer() or isinstance(kind, pl.String | pl.Categorical | pl.Enum)):
        raise DataError(f"{place}: ids are text or whole numbers, got {kind}; cast the column")


def _blank(role: str) -> pl.Expr:
    return pl.col(role).cast(pl.String).str.strip_chars().fill_null("") == ""


def _number(role: str, kind: pl.DataType) -> pl.Expr:
    column = pl.col(role) if kind.is_numeric() else pl.col(role).cast(pl.String).str.strip_chars()
    return column.cast(pl.Float64, strict=False)


def _time_ms(kind: pl.DataType, unit: str, place: str) -> pl.Expr:
    """Express the time column in milliseconds since 1970 UTC, null where it cannot be read."""
    time = pl.col("timestamp")
    if isinstance(kind, pl.Date | pl.Datetime):
        if unit != "iso":
            raise DataError(f"{place}: holds {kind}, not {unit}; set timestamps to iso")
        return time.cast(pl.Datetime("ms")).dt.epoch("ms")
    if unit != "iso":
        return (
            (_number("timestamp", kind) * (1000 if unit == "seconds" else 1))
            .round()
            .cast(pl.Int64, strict=False)
        )
    part = time.cast(pl.String).str.strip_chars().str.extract_groups(ISO_8601).struct
    text = pl.format(
        "{} {}:{}{}{}:{}",
        part.field("day"),
        part.field("minute").fill_null("00:00"),
        part.field("second").fill_null("00"),
        part.field("sign").fill_null("+"),
        part.field("zone_hour").fill_null("00"),
        part.field("zone_minute").fill_null("00"),
    )
    return text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%:z", time_unit="ms", strict=False).dt.epoch("ms")


def _sift(
    table: pl.DataFrame, faults: dict[str, pl.Expr], name: str, malformed: Malformed
) -> tuple[pl.DataFrame, int]:
    """Leave out the rows that have a fault, or stop at the first."""
    fault = pl.coalesce(pl.when(wrong).then(pl.lit(rule)) for rule, wrong in faults.items())
    told = table.with_columns(fault=fault)
    wrong = told.filter(pl.col("fault").is_not_null())
    if len(wrong) and malformed == "fail":
        raise DataError(
            f"{name} row {wrong['order'][0]}: {wrong['fault'][0]} ({len(wrong)} such rows); "
            "mend them, or set malformed to skip to count and leave out such"
        )
    return told.filter(pl.col("fault").is_null()), len(wrong)
