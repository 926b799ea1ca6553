"""Raw files to InteractionLog and ItemCatalog: the first stage."""

from typing import Annotated, Any, Literal, NamedTuple

import polars as pl
from pydantic import Field

from components.artifacts import InteractionLog, ItemCatalog
from components.config import Config
from components.data.amazon import AmazonSource, read_amazon
from components.data.interactions import (
    TextField,
    check_core,
    describe_items,
    first_of_repeats,
    k_core,
    number,
    order_events,
    settle_unknown,
    unique_items,
)
from components.data.letter import LetterSource, read_letter
from components.data.raw import Malformed, RawData
from components.data.samples import SampleSource, read_sample
from components.data.tabular import TabularSource, read_tabular
from components.folders import Provenance

Source = Annotated[SampleSource | AmazonSource | TabularSource | LetterSource, Field(discriminator="kind")]


class IngestConfig(Config):
    """Where the data comes from and what is kept of it."""

    source: Source = SampleSource()
    """The files, by kind: sample, amazon, tabular or letter."""
    malformed: Malformed = "fail"
    """Stop at a malformed record and name its line, or skip such records and count them in the statistics."""
    unknown_items: Literal["fail", "drop", "keep"] = "fail"
    """An event whose item the metadata lack: stop, leave it out, or keep it with an item without text."""
    duplicate_items: Literal["fail", "first"] = "fail"
    """Metadata that describe an item twice: stop, or keep the first description."""
    repeats: Literal["keep", "drop"] = "keep"
    """Later events of the same user and item: keep them, or drop all but the first."""
    k_core: int = Field(default=5, ge=0)
    """Every user and item has at least this many events; 0 keeps all. Counted after repeats were settled."""
    keep_cold_items: bool = False
    """Keep items without any event in the catalogue, where they can be recommended but never learned from."""
    text_fields: list[TextField] = Field(
        default=["title", "brand", "categories", "description"], min_length=1
    )
    """What the text of an item is made of, in this order."""
    empty_text: Literal["fail", "keep"] = "fail"
    """An item without any text: stop, or keep it with an empty text."""


class Ingested(NamedTuple):
    """A log and the catalogue that its item ids point into."""

    log: InteractionLog
    catalog: ItemCatalog


def ingest(config: IngestConfig) -> Ingested:
    """Read a source and settle it.

    Raises
    ------
    FileNotFoundError
        A file of the source is missing.
    DataError
        A file or a record does not fit; the message names file, place, rule and remedy.
    """
    return settle(read(config.source, config.malformed), config)


def read(source: SampleSource | AmazonSource | TabularSource | LetterSource, malformed: Malformed) -> RawData:
    """Read events and items as the source has them."""
    match source:
        case SampleSource():
            return read_sample(source)
        case AmazonSource():
            return read_amazon(source, malformed)
        case TabularSource():
            return read_tabular(source, malformed)
        case LetterSource():
            return read_letter(source, malformed)


def settle(raw: RawData, config: IngestConfig) -> Ingested:
    """Apply the rules: duplicates, unknown items, repeats, k-core, ids, order, text.

    Users are numbered by their raw id, shorter ids first; items in the order of ``raw.items``, which readers
    of unordered sources sort in the same way. Equal data in another row order therefore get equal ids.
    """
    log_name, catalog_name = raw.sources[0]["name"], raw.sources[-1]["name"]
    items = unique_items(raw.items, catalog_name, config.duplicate_items)
    events, items, num_unknown = settle_unknown(raw.events, items, log_name, config.unknown_items)
    once = first_of_repeats(events) if config.repeats == "drop" else events
    core = k_core(once, config.k_core)
    check_core(core, once, config.k_core, log_name)
    if not config.keep_cold_items:
        items = items.join(core, left_on="raw_id", right_on="item", how="semi", maintain_order="left")
    described = describe_items(items, config.text_fields, catalog_name, config.empty_text)
    users = number(core["user"])
    provenance = Provenance(config=config.model_dump())
    log = InteractionLog(
        events=order_events(core, users, described.select("raw_id", number="item_id")),
        users=users.select(user_id="number", raw_id="raw_id"),
        sources=raw.sources,
        statistics={
            "events_read": len(raw.events),
            "items_read": len(raw.items),
            "malformed_records": dict(raw.skipped),
            "events_of_unknown_items": num_unknown,
            "duplicate_items_dropped": raw.items["raw_id"].len() - raw.items["raw_id"].n_unique(),
            "repeats_dropped": len(events) - len(once),
            "dropped_by_k_core": len(once) - len(core),
        }
        | _figures(core),
        provenance=provenance,
    )
    return Ingested(log, ItemCatalog(items=described, provenance=provenance))


def _figures(core: pl.DataFrame) -> dict[str, Any]:
    """Count what was kept."""
    lengths = core.group_by("user").len()["len"]
    num_items = core["item"].n_unique()
    return {
        "events": len(core),
        "users": len(lengths),
        "items_with_events": num_items,
        "mean_length": len(core) / len(lengths),
        "longest": lengths.max(),
        "density": len(core) / (len(lengths) * num_items),
        "repeated_events": len(core) - len(core.select("user", "item").unique()),
    }
