"""LETTER-style files, ``<name>.inter.json`` and ``<name>.item.json``: they know the order, not the time.

References
----------
Wang et al., Learnable item tokenization for generative recommendation, CIKM 2024 (LETTER).
"""

import json
from collections.abc import Iterator
from typing import Any, Literal

import polars as pl

from components.config import Config
from components.data.files import Fetched, SourceFile, fetch, gather
from components.data.raw import (
    ITEMS,
    DataError,
    Malformed,
    RawData,
    check_raw,
    encodable,
    items_of_events,
)

SEQUENCES = pl.Schema({"user": pl.String(), "items": pl.List(pl.String())})


class LetterSource(Config):
    """A pair of LETTER-style files."""

    kind: Literal["letter"] = "letter"
    """Which reader."""
    interactions: SourceFile
    """``{"user": [item, ...]}``, oldest first."""
    items: SourceFile | None = None
    """``{"item": {"title": ..., "brand": ..., "categories": ..., "description": ...}}``, or null."""


def read_letter(source: LetterSource, malformed: Malformed) -> RawData:
    """Read a pair of LETTER-style files; items keep the order of the item file.

    An entry counts as a record: its number takes the place of a line number in messages.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    DataError
        A file is not one JSON object, names a key twice, or has a malformed entry while ``malformed`` is
        "fail".
    """
    with fetch(source.interactions) as file:
        sources = [file.record]
        users, bad_users = gather(_entries(file), _sequence, SEQUENCES, file.name, malformed, "entry")
    events = (
        users.filter(pl.col("items").list.len() > 0)
        .explode("items")
        .select(
            "user",
            pl.col("items").alias("item"),
            pl.lit(None, pl.Int64).alias("time_ms"),
            pl.lit(None, pl.Float32).alias("rating"),
            pl.int_range(1, pl.len() + 1, dtype=pl.UInt64).alias("order"),
        )
    )
    if source.items is None:
        return check_raw(RawData(events, items_of_events(events), sources, {"events": bad_users}))
    with fetch(source.items) as file:
        sources.append(file.record)
        items, bad_items = gather(_entries(file), _item, ITEMS, file.name, malformed, "entry")
    return check_raw(RawData(events, items, sources, {"events": bad_users, "items": bad_items}))


def _entries(file: Fetched) -> Iterator[tuple[int, tuple[str, Any]]]:
    try:
        content = json.loads(file.path.read_bytes(), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file.name} line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from error
    except ValueError as error:
        raise DataError(f"{file.name}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file.name}: holds a {type(content).__name__}, one JSON object is wanted")
    return iter(enumerate(content.items(), 1))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice; ids must be unique")
    return content


def _sequence(number: int, entry: tuple[str, Any]) -> tuple[Any, ...]:
    user, items = entry
    if not isinstance(items, list):
        raise ValueError(f"user {user!r} must have a list of items, got {items!r}")
    wrong = [item for item in items if isinstance(item, bool) or not isinstance(item, int | str)]
    if wrong:
        raise ValueError(f"user {user!r}: an item is a whole number or a text, got {wrong[0]!r}")
    return encodable(user), [encodable(str(item)) for item in items]


def _item(number: int, entry: tuple[str, Any]) -> tuple[Any, ...]:
    item, fields = entry
    if not isinstance(fields, dict):
        raise ValueError(f"item {item!r} must have an object of texts, got {fields!r}")
    texts = {
        key: _text(item, key, fields.get(key)) for key in ("title", "brand", "categories", "description")
    }
    labels = [label.strip() for label in (texts["categories"] or "").split(",")]
    categories = [label for label in labels if label] or None
    return encodable(item), texts["title"], texts["brand"], categories, texts["description"]


def _text(item: str, key: str, value: Any) -> str | None:
    """Read a text, or a list of texts as one; commas part labels in these files."""
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str | None) for part in parts):
        raise ValueError(f"item {item!r}: {key!r} must be a text or a list of texts, got {value!r}")
    return encodable(", ".join(part for part in parts if part).strip()) or None
