"""Amazon reviews and product metadata: the releases of 2014, 2018 (json.gz) and 2023 (jsonl.gz).

All three are one JSON object a line; they differ in the names of the keys, and 2023 counts milliseconds.

References
----------
McAuley et al., Image-based recommendations on styles and substitutes, SIGIR 2015 (2014 release).
Ni et al., Justifying recommendations using distantly-labeled reviews, EMNLP 2019 (2018 release).
Hou et al., Bridging language and items for retrieval and recommendation, 2024 (2023 release).
"""

import ast
import html
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from components.config import Config
from components.data.files import Fetched, SourceFile, fetch, gather, numbered_lines
from components.data.raw import EVENTS, ITEMS, Malformed, RawData, check_raw, encodable, natural_order


class AmazonSource(Config):
    """Amazon reviews with their product metadata."""

    kind: Literal["amazon"] = "amazon"
    """Which reader."""
    release: Literal[2014, 2018, 2023]
    """Year of the release, which settles the names of the keys and the unit of time."""
    reviews: SourceFile
    """Reviews, one object a line; 5-core and full files alike."""
    metadata: SourceFile
    """Products, one object a line."""
    dialect: Literal["json", "python"] = "json"
    """Python for early 2014 files, whose lines are Python dictionaries in single quotes."""


class Keys(NamedTuple):
    """What a release calls its fields."""

    user: str
    item: str
    time: str
    rating: str
    brand: str
    categories: str
    ms: int
    """Milliseconds in a unit of time."""


KEYS = {
    2014: Keys("reviewerID", "asin", "unixReviewTime", "overall", "brand", "categories", 1000),
    2018: Keys("reviewerID", "asin", "unixReviewTime", "overall", "brand", "category", 1000),
    2023: Keys("user_id", "parent_asin", "timestamp", "rating", "store", "categories", 1),
}
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def read_amazon(source: AmazonSource, malformed: Malformed) -> RawData:
    """Read reviews and metadata of one category.

    Items are sorted by raw id. In texts HTML entities are resolved, tags dropped and white space made single.
    Blank lines are no records.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    DataError
        A gzip is cut off, a digest differs from its pin, or a line is malformed and ``malformed`` is "fail".
    """
    keys, load = KEYS[source.release], DIALECTS[source.dialect]

    def review(number: int, line: bytes) -> tuple[Any, ...]:
        record = load(line)
        time_ms = int(_number(record, keys.time) * keys.ms)
        rating = None if record.get(keys.rating) is None else _number(record, keys.rating)
        return _id(record, keys.user), _id(record, keys.item), time_ms, rating, number

    def product(number: int, line: bytes) -> tuple[Any, ...]:
        record = load(line)
        title, brand = _words(record, "title"), _words(record, keys.brand)
        return (
            _id(record, keys.item),
            title,
            brand,
            _labels(record, keys.categories),
            _words(record, "description"),
        )

    with fetch(source.reviews) as file:
        reviews = file.record
        events, bad_reviews = gather(_filled_lines(file), review, EVENTS, file.name, malformed)
    with fetch(source.metadata) as file:
        metadata = file.record
        items, bad_products = gather(_filled_lines(file), product, ITEMS, file.name, malformed)
    skipped = {"events": bad_reviews, "items": bad_products}
    return check_raw(RawData(events, natural_order(items, "raw_id"), [reviews, metadata], skipped))


def _filled_lines(file: Fetched) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in numbered_lines(file) if not line.isspace())


def _load_json(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError(f"a line holds one object, got {type(record).__name__}")
    return record


def _load_python(line: bytes) -> dict[str, Any]:
    try:
        record = ast.literal_eval(line.decode("utf-8").strip())
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a Python literal ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a line holds one dictionary, got {type(record).__name__}")
    return record


DIALECTS: dict[str, Callable[[bytes], dict[str, Any]]] = {"json": _load_json, "python": _load_python}


def _id(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} must be a text, got {value!r}")
    return encodable(value)


def _number(record: dict[str, Any], key: str) -> float:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key!r} must be a number, got {value!r}")
    if not abs(value) < 1e15:
        raise ValueError(f"{key!r} must be finite and below 1e15, got {value!r}")
    return value


def _words(record: dict[str, Any], key: str) -> str | None:
    """Read a text or a list of texts; null if nothing is left of it."""
    value = record.get(key)
    parts = value if isinstance(value, list) else [value]
    wrong = [part for part in parts if not isinstance(part, str | None)]
    if wrong:
        raise ValueError(f"{key!r} must be a text or a list of texts, got {wrong[0]!r}")
    text = TAG.sub(" ", html.unescape(" ".join(part for part in parts if part)))
    return encodable(" ".join(text.split())) or None


def _labels(record: dict[str, Any], key: str) -> list[str] | None:
    """Read a list of labels, or a list of paths (2014) laid end to end; each label once."""
    value = record.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{key!r} must be a list, got {value!r}")
    labels = [label for part in value for label in (part if isinstance(part, list) else [part])]
    wrong = [label for label in labels if not isinstance(label, str)]
    if wrong:
        raise ValueError(f"{key!r} must hold texts, got {wrong[0]!r}")
    cleaned = (encodable(" ".join(html.unescape(label).split())) for label in labels)
    return list(dict.fromkeys(label for label in cleaned if label)) or None
