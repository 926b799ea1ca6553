"""The two real data sets that ship with the package; ``NOTICE.md`` beside each states source and licence."""

from pathlib import Path
from typing import Literal

import polars as pl

from components.config import Config
from components.data.files import SourceFile, fetch
from components.data.raw import EVENTS, ITEMS, RawData, check_raw


class SampleSource(Config):
    """A data set that ships with the package: nothing to download."""

    kind: Literal["sample"] = "sample"
    """Which reader."""
    name: Literal["online-retail", "movietweetings"] = "online-retail"
    """Purchases in a gift shop (138,070 events), or ratings of films (68,055 events); both are 5-cores."""


def read_sample(source: SampleSource) -> RawData:
    """Read a shipped data set; items and users keep the numbers of its files."""
    folder = Path(__file__).resolve().parent / source.name
    with fetch(SourceFile(path=str(folder / "interactions.parquet"))) as file:
        interactions, record = pl.read_parquet(file.path), file.record
    with fetch(SourceFile(path=str(folder / "items.parquet"))) as file:
        products, sources = pl.read_parquet(file.path), [record, file.record]
    events = (
        interactions.join(products.select("item_id", item="raw_item_id"), on="item_id", maintain_order="left")
        .with_columns(
            user=pl.col("user_id").cast(pl.String),
            time_ms=pl.col("timestamp") * 1000,
            order=pl.int_range(1, pl.len() + 1, dtype=pl.UInt64),
        )
        .with_columns(_absent(interactions, ["rating"], EVENTS))
        .select(list(EVENTS))
    )
    items = (
        products.rename({"raw_item_id": "raw_id"})
        .with_columns(_absent(products, ["brand", "categories", "description"], ITEMS))
        .select(list(ITEMS))
    )
    return check_raw(RawData(events, items, sources, {}))


def _absent(frame: pl.DataFrame, columns: list[str], schema: pl.Schema) -> list[pl.Expr]:
    return [pl.lit(None, schema[name]).alias(name) for name in columns if name not in frame.columns]
