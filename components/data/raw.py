"""What every reader hands over: events and items under the ids of their source, nothing filtered yet."""

from typing import Any, Literal, NamedTuple

import polars as pl

Malformed = Literal["fail", "skip"]

EVENTS = pl.Schema(
    {
        "user": pl.String(),
        "item": pl.String(),
        "time_ms": pl.Int64(),
        "rating": pl.Float32(),
        "order": pl.UInt64(),
    }
)
ITEMS = pl.Schema(
    {
        "raw_id": pl.String(),
        "title": pl.String(),
        "brand": pl.String(),
        "categories": pl.List(pl.String()),
        "description": pl.String(),
    }
)
YEAR_2200_MS = 7_258_118_400_000


class DataError(ValueError):
    """A source cannot be read as asked; the message names the file, the place, the rule and the remedy."""


class RawData(NamedTuple):
    """Events and items as the source has them."""

    events: pl.DataFrame
    """``EVENTS``: ids of the source, time in milliseconds since 1970 UTC (null in all rows if the source
    knows order only), and ``order``, the line or row in the source, which settles equal times."""
    items: pl.DataFrame
    """``ITEMS``, in the order in which items are to be numbered."""
    sources: list[dict[str, Any]]
    """``{"name", "sha256", "bytes"}`` of each file as stored, the events' file first."""
    skipped: dict[str, int]
    """"events" and "items" to the number of malformed records left out."""


def check_raw(raw: RawData) -> RawData:
    """Return ``raw`` if a reader kept its promises.

    Raises
    ------
    DataError
        A time lies after the year 2200 (milliseconds taken for seconds), or only some rows have a time.
    """
    name, events = raw.sources[0]["name"], raw.events
    if events.schema != EVENTS or raw.items.schema != ITEMS:
        raise DataError(f"{name}: a reader returned columns {events.columns} and {raw.items.columns}")
    late = events.filter(pl.col("time_ms") > YEAR_2200_MS)
    if len(late):
        raise DataError(
            f"{name} row {late['order'][0]}: a time after the year 2200 ({len(late)} rows); "
            "if the source counts milliseconds, say so in its configuration"
        )
    unknown = events["time_ms"].null_count()
    if 0 < unknown < len(events):
        row = events.filter(pl.col("time_ms").is_null())["order"][0]
        raise DataError(
            f"{name} row {row}: no time ({unknown} of {len(events)} rows); all rows have one, or none has"
        )
    return raw


def items_of_events(events: pl.DataFrame) -> pl.DataFrame:
    """Make the items of a source that describes none: every id that has an event, without any text."""
    ids = events.select(raw_id="item").unique()
    blank = [pl.lit(None, ITEMS[name]).alias(name) for name in ITEMS if name != "raw_id"]
    return natural_order(ids, "raw_id").with_columns(blank)


def natural_order(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """Sort stably by a column of ids, shorter ones first, then by letter, so that "9" stands before "10"."""
    return frame.sort(pl.col(column).str.len_bytes(), pl.col(column), maintain_order=True)


def encodable(text: str) -> str:
    """Replace what UTF-8 cannot hold: half of a surrogate pair, which a JSON escape may spell."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
