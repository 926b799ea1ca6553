"""Raw files to InteractionLog and ItemCatalog: the first stage, afresh or onto a catalogue that exists."""

from typing import Annotated, Literal, NamedTuple

import polars as pl
from pydantic import Field

from components.artifacts import InteractionLog, ItemCatalog
from components.config import Config, require
from components.data.amazon import AmazonSource, read_amazon
from components.data.growth import check_overlap, known_first
from components.data.interactions import (
    TextField,
    check_core,
    describe_items,
    events_before,
    first_of_repeats,
    k_core,
    kept_figures,
    number,
    order_events,
    settle_unknown,
    unique_items,
)
from components.data.letter import LetterSource, read_letter
from components.data.raw import Malformed, RawData
from components.data.samples import SampleSource, read_sample
from components.data.tabular import TabularSource, read_tabular
from components.data.times import Moment
from components.folders import Provenance

Source = Annotated[SampleSource | AmazonSource | TabularSource | LetterSource, Field(discriminator="kind")]


class IngestConfig(Config):
    """Where the data comes from and what is kept of it."""

    source: Source = SampleSource()
    """The files, by kind: sample, amazon, tabular or letter."""
    malformed: Malformed = "fail"
    """Stop at a malformed record and name its line, or skip such records and count them in the statistics."""
    until: Moment | None = None
    """Leave out events at or after this moment, before anything is counted: the log as it was known then. A date is its
    midnight; without a time zone, UTC. Item metadata bear no times and are read whole. Needs times; null: all."""
    unknown_items: Literal["fail", "drop", "keep"] = "fail"
    """An event whose item the metadata lack: stop, leave it out, or keep it with an item without text."""
    duplicate_items: Literal["fail", "first"] = "fail"
    """Metadata that describe an item twice: stop, or keep the first description."""
    repeats: Literal["keep", "drop"] = "keep"
    """Later events of the same user and item: keep them, or drop all but the first."""
    k_core: int = Field(default=5, ge=0)
    """Every user and item has at least this many events; 0 keeps all. Counted after repeats were settled. Items of a
    known catalogue may have fewer."""
    keep_cold_items: bool = False
    """Keep items without any event in the catalogue, where they can be recommended but never learned from. Items of a
    known catalogue always stay."""
    newcomers: Literal["add", "drop"] = "add"
    """Ingesting onto a known catalogue, what becomes of items that it lacks: they follow behind its own, or they and
    their events are left out, as when a model that cannot name them is evaluated on newer interactions."""
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


def ingest(config: IngestConfig, known: ItemCatalog | None = None) -> Ingested:
    """Read a source and settle it, onto a known catalogue if there is one.

    Raises
    ------
    FileNotFoundError
        A file of the source is missing.
    DataError
        A file or a record does not fit; the message names file, place, rule and remedy.
    """
    return settle(read(config.source, config.malformed), config, known)


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


def settle(raw: RawData, config: IngestConfig, known: ItemCatalog | None = None) -> Ingested:
    """Apply the rules: end, duplicates, unknown items, newcomers, repeats, k-core, ids, order, text.

    Users are numbered by their raw id, shorter ids first; items in the order of ``raw.items``, which readers
    of unordered sources sort in the same way. Equal data in another row order therefore get equal ids.

    With ``known`` the resulting catalogue begins with exactly its rows: an item keeps id, title and text, also if it
    has no events any more, if the source no longer lists it, or describes it in other words. So vectors and SIDs of
    known items stay what they are. Newcomers get the ids behind them, in the usual order. Users are numbered afresh.

    Parameters
    ----------
    raw : RawData
        Events and items.
    config : IngestConfig
        The rules.
    known : ItemCatalog, optional
        The catalogue to ingest onto.

    Returns
    -------
    Ingested
        Without newcomers the catalogue is ``known`` itself.

    Raises
    ------
    DataError
        A rule is broken, or the source has other item ids than ``known``; the message names place, rule and remedy.
    ValueError
        Newcomers are to be dropped, and no catalogue says who they are.
    """
    require(
        known is not None or config.newcomers == "add",
        "newcomers drop leaves out the items that a known catalogue lacks, and none is given: ingest onto one "
        "(ingest_onto), or set newcomers to add",
    )
    log_name, catalog_name = raw.sources[0]["name"], raw.sources[-1]["name"]
    known_items = ItemCatalog.SCHEMAS["items"].to_frame() if known is None else known.items
    if known is not None:
        check_overlap(known, raw)
    events = events_before(raw.events, config.until, log_name)
    given = unique_items(raw.items, catalog_name, config.duplicate_items)
    listed, met = known_first(known_items, given), events
    if config.newcomers == "drop":  # before anything is asked of them: nobody reads what newcomers lack
        listed = listed.head(len(known_items))
        met = events.join(listed, left_on="item", right_on="raw_id", how="semi", maintain_order="left")
    wanted, listed, num_unknown = settle_unknown(met, listed, log_name, config.unknown_items)
    once = first_of_repeats(wanted) if config.repeats == "drop" else wanted
    core = k_core(once, config.k_core, known_items["raw_id"])
    check_core(core, once, config.k_core, log_name, known_items["raw_id"])
    new = listed.slice(len(known_items))
    if not config.keep_cold_items:
        new = new.join(core, left_on="raw_id", right_on="item", how="semi", maintain_order="left")
    described = describe_items(new, config.text_fields, catalog_name, config.empty_text, len(known_items))
    items = pl.concat([known_items, described])
    users = number(core["user"])
    provenance = Provenance(
        config=config.model_dump(mode="json"),
        parents={} if known is None else {"ItemCatalog": known.fingerprint},
    )
    growth = (
        {}
        if known is None
        else {
            "known_items": len(known_items),
            "new_items": len(new),
            "known_items_described_anew": _described_anew(given, known_items, config.text_fields),
            "newcomers_dropped": events["item"].n_unique() - met["item"].n_unique(),
            "events_of_newcomers_dropped": len(events) - len(met),
        }
    )
    log = InteractionLog(
        events=order_events(core, users, items.select("raw_id", number="item_id")),
        users=users.select(user_id="number", raw_id="raw_id"),
        sources=raw.sources,
        statistics={
            "events_read": len(raw.events),
            "items_read": len(raw.items),
            "malformed_records": dict(raw.skipped),
            "events_after_until": len(raw.events) - len(events),
            "events_of_unknown_items": num_unknown,
            "duplicate_items_dropped": raw.items["raw_id"].len() - raw.items["raw_id"].n_unique(),
            "repeats_dropped": len(wanted) - len(once),
            "dropped_by_k_core": len(once) - len(core),
        }
        | growth
        | kept_figures(core),
        provenance=provenance,
    )
    catalog = known if known and not len(new) else ItemCatalog(items=items, provenance=provenance)
    return Ingested(log, catalog)


def _described_anew(items: pl.DataFrame, known: pl.DataFrame, fields: list[TextField]) -> int:
    """Count the known items that the source describes by another text."""
    texts = describe_items(items, fields, "", "keep").join(known, on="raw_id")
    return texts.select((pl.col("text") != pl.col("text_right")).sum()).item()
