"""Every reader gives back what was written, under the raw ids of the source; bad files get a clear error."""

import gzip
import hashlib
import json
from pathlib import Path

import polars as pl
import pytest
from pydantic import ValidationError

from components.config import load_preset
from components.data.amazon import AmazonSource
from components.data.ingest import IngestConfig, Ingested, ingest
from components.data.letter import LetterSource
from components.data.raw import DataError
from components.data.samples import SampleSource
from components.data.tabular import TabularSource

# (user, item, seconds): written out of time order; the equal times of "u9" keep the order of the file.
EVENTS = [
    ("u10", "B2", 300),
    ("u9", "B10", 200),
    ("u9", "B2", 200),
    ("u10", "B10", 100),
    ("u9", "B3", 100),
]
WANTED = {"u9": ["B3", "B10", "B2"], "u10": ["B10", "B2"]}
TITLES = {"B10": "Oak table", "B2": "Steel lamp", "B3": "Linen cover"}


def sequences(ingested: Ingested) -> dict[str, list[str]]:
    """Raw items of each raw user, in the order of the log: the round trip through both id maps."""
    log, catalog = ingested
    frame = (
        log.events.join(log.users, on="user_id", maintain_order="left")
        .join(catalog.items.select("item_id", item="raw_id"), on="item_id", maintain_order="left")
        .group_by("raw_id", maintain_order=True)
        .agg("item")
    )
    return dict(frame.iter_rows())


def texts(ingested: Ingested) -> dict[str, str]:
    return dict(ingested.catalog.items.select("raw_id", "text").iter_rows())


def write_lines(path: Path, lines: list[str]) -> Path:
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def review(release: int, user: str, item: str, time: int) -> dict:
    if release == 2023:
        return {"user_id": user, "parent_asin": item, "timestamp": time * 1000, "rating": 4.0, "text": "fine"}
    return {"reviewerID": user, "asin": item, "unixReviewTime": time, "overall": 4.0, "reviewText": "fine"}


def product(release: int, item: str, title: str) -> dict:
    if release == 2014:
        return {"asin": item, "title": title, "brand": "Ash", "categories": [["Home", "Room"], ["Home"]]}
    if release == 2018:
        return {"asin": item, "title": title, "brand": "Ash", "category": ["Home", "Room"], "description": []}
    return {"parent_asin": item, "title": title, "store": "Ash", "categories": ["Home", "Room"]}


def amazon(folder: Path, release: int, dump=json.dumps, **settings) -> IngestConfig:
    ending = "jsonl.gz" if release == 2023 else "json.gz"
    reviews = write_lines(folder / f"reviews.{ending}", [dump(review(release, *event)) for event in EVENTS])
    meta = write_lines(folder / f"meta.{ending}", [dump(product(release, *item)) for item in TITLES.items()])
    return amazon_config(reviews, meta, release, **settings)


def amazon_config(reviews: Path, meta: Path, release: int = 2018, dialect: str = "json", **settings):
    source = {
        "kind": "amazon",
        "release": release,
        "dialect": dialect,
        "reviews": {"path": str(reviews)},
        "metadata": {"path": str(meta)},
    }
    return IngestConfig.model_validate({"source": source, "k_core": 0} | settings)


def tabular_config(
    interactions: Path | dict, items: Path | None = None, settings: dict | None = None, **source
):
    file = interactions if isinstance(interactions, dict) else {"path": str(interactions)}
    source = {"kind": "tabular", "interactions": file} | source
    if items is not None:
        source["items"] = {"path": str(items)}
    return IngestConfig.model_validate({"source": source, "k_core": 0} | (settings or {}))


def csv_lines(times=str) -> list[str]:
    return ["user_id,item_id,timestamp", *(f"{user},{item},{times(time)}" for user, item, time in EVENTS)]


def item_lines() -> list[str]:
    return ["item_id,title", *(f"{item},{title}" for item, title in TITLES.items())]


@pytest.mark.parametrize("release", [2014, 2018, 2023])
def test_amazon_round_trip(tmp_path: Path, release: int) -> None:
    ingested = ingest(amazon(tmp_path, release))
    assert sequences(ingested) == WANTED
    assert texts(ingested) == {item: f"{title}. Ash. Home, Room" for item, title in TITLES.items()}
    assert ingested.log.events["timestamp"].to_list() == [100, 200, 200, 100, 300]
    assert ingested.log.events["rating"].to_list() == [4.0] * 5
    stored = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}
    assert {s["name"]: s["sha256"] for s in ingested.log.sources} == stored


def test_amazon_python_dialect_only_if_asked(tmp_path: Path) -> None:
    assert sequences(ingest(amazon(tmp_path, 2014, dump=repr, dialect="python"))) == WANTED
    with pytest.raises(DataError, match=r"reviews.json.gz line 1: .*double quotes"):
        ingest(amazon(tmp_path, 2014, dump=repr))


def test_amazon_milliseconds_order_events_of_one_second(tmp_path: Path) -> None:
    rows = [review(2023, "u", item, 0) | {"timestamp": 5000 + ms} for item, ms in [("B2", 900), ("B10", 100)]]
    reviews = write_lines(tmp_path / "r.jsonl", [json.dumps(row) for row in rows])
    meta = write_lines(tmp_path / "m.jsonl", [json.dumps(product(2023, *item)) for item in TITLES.items()])
    ingested = ingest(amazon_config(reviews, meta, 2023))
    assert sequences(ingested) == {"u": ["B10", "B2"]}
    assert ingested.log.events["timestamp"].to_list() == [5, 5]


def test_amazon_text_is_cleaned(tmp_path: Path) -> None:
    reviews = write_lines(tmp_path / "r.json", [json.dumps(review(2018, "u", "B1", 1))])
    lamp = {"asin": "B1", "title": "Lamp &amp;\n shade", "description": ["<b>Warm</b> light", "", "\ud83d"]}
    meta = write_lines(tmp_path / "m.json", [json.dumps(lamp)])
    assert texts(ingest(amazon_config(reviews, meta))) == {"B1": "Lamp & shade. Warm light ?"}


@pytest.mark.parametrize("name", ["events.csv", "events.csv.gz", "events.tsv", "events.parquet"])
def test_tabular_round_trip(tmp_path: Path, name: str) -> None:
    lines = csv_lines()
    path = tmp_path / name
    if name.endswith(".parquet"):
        pl.DataFrame(EVENTS, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(path)
    else:
        write_lines(path, [line.replace(",", "\t") if ".tsv" in name else line for line in lines])
    items = write_lines(tmp_path / "items.csv", item_lines())
    ingested = ingest(tabular_config(path, items))
    assert sequences(ingested) == WANTED
    assert texts(ingested) == TITLES
    assert ingested.catalog.items["raw_id"].to_list() == ["B2", "B3", "B10"]
    assert ingested.log.users["raw_id"].to_list() == ["u9", "u10"]


def test_tabular_does_not_depend_on_row_order(tmp_path: Path) -> None:
    distinct = [line for line in csv_lines() if line != "u9,B2,200"]
    items = item_lines()
    one = tabular_config(write_lines(tmp_path / "a.csv", distinct), write_lines(tmp_path / "i.csv", items))
    two = tabular_config(
        write_lines(tmp_path / "b.csv", [distinct[0], *distinct[:0:-1]]),
        write_lines(tmp_path / "j.csv", [items[0], *items[:0:-1]]),
    )
    first, second = ingest(one), ingest(two)
    assert first.log.events.equals(second.log.events)
    assert first.catalog.fingerprint == second.catalog.fingerprint


def test_tabular_maps_columns(tmp_path: Path) -> None:
    events = write_lines(
        tmp_path / "e.csv",
        ["when;who;what;stars;more", '1970-01-02;7;x;"4,5";', "1970-01-01;7;y;;1", "1970-01-03;10;x;3;"],
    )
    items = pl.DataFrame(
        {"sku": ["x", "y"], "name": ["Lamp", None], "tags": [["a", " b "], []], "blurb": ["Warm", " Dark "]}
    )
    items.write_parquet(tmp_path / "i.parquet")
    config = tabular_config(
        events,
        tmp_path / "i.parquet",
        separator=";",
        timestamps="iso",
        columns={"user": "who", "item": "what", "timestamp": "when"},
        item_columns={"id": "sku", "title": "name", "categories": "tags", "description": "blurb"},
    )
    ingested = ingest(config)
    assert sequences(ingested) == {"7": ["y", "x"], "10": ["x"]}
    assert texts(ingested) == {"x": "Lamp. a, b. Warm", "y": "Dark"}
    assert ingested.log.events["timestamp"].to_list() == [0, 86_400, 172_800]


def test_quoted_csv_fields_may_span_lines(tmp_path: Path) -> None:
    events = write_lines(tmp_path / "e.csv", csv_lines())
    items = write_lines(tmp_path / "i.csv", ["item_id,title", 'B2,"Steel, bent\nlamp"', "B3,x", "B10,y"])
    assert texts(ingest(tabular_config(events, items)))["B2"] == "Steel, bent\nlamp"


@pytest.mark.parametrize(
    ("unit", "value", "seconds"),
    [
        ("seconds", "1393675205", 1393675205),
        ("seconds", " 1393675205.9 ", 1393675205),
        ("milliseconds", "1393675205999", 1393675205),
        ("iso", "2014-03-01", 1393632000),
        ("iso", "2014-03-01 12:00", 1393675200),
        ("iso", "2014-03-01T12:00:05Z", 1393675205),
        ("iso", "2014-03-01T12:00:05.250+02:00", 1393668005),
        ("iso", "2014-03-01T12:00:05-0530", 1393695005),
    ],
)
def test_times(tmp_path: Path, unit: str, value: str, seconds: int) -> None:
    path = write_lines(tmp_path / "e.csv", ["user_id,item_id,timestamp", f"u,B1,{value}"])
    ingested = ingest(tabular_config(path, settings={"empty_text": "keep"}, timestamps=unit))
    assert ingested.log.events["timestamp"].to_list() == [seconds]


def test_times_of_parquet_know_their_type(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": [1], "item_id": [2], "timestamp": ["2014-03-01"]})
    frame.with_columns(pl.col("timestamp").str.to_date()).write_parquet(tmp_path / "e.parquet")
    keep = {"empty_text": "keep"}
    config = tabular_config(tmp_path / "e.parquet", settings=keep, timestamps="iso")
    assert ingest(config).log.events["timestamp"].to_list() == [1393632000]
    with pytest.raises(DataError, match="'timestamp': holds Date, not seconds; set timestamps to iso"):
        ingest(tabular_config(tmp_path / "e.parquet", settings=keep))


def test_milliseconds_taken_for_seconds_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "e.csv", csv_lines(lambda time: f"{1_400_000_000_000 + time}"))
    with pytest.raises(DataError, match=r"e.csv row 2: a time after the year 2200 .*milliseconds"):
        ingest(tabular_config(path, settings={"empty_text": "keep"}))


def test_letter_round_trip(tmp_path: Path) -> None:
    (tmp_path / "x.inter.json").write_text(
        json.dumps({"0": [2, 0, 2], "1": [1], "10": [0, 1], "2": [], "9": [0]})
    )
    items = {
        "2": {
            "title": "Steel lamp",
            "description": ["warm", "small"],
            "brand": "",
            "categories": "Home, Light",
        },
        "0": {"title": "Oak table", "description": "", "brand": "Ash", "categories": ["Home"]},
        "1": {"title": "Linen cover"},
    }
    (tmp_path / "x.item.json").write_text(json.dumps(items))
    source = LetterSource(
        interactions={"path": str(tmp_path / "x.inter.json")}, items={"path": str(tmp_path / "x.item.json")}
    )
    ingested = ingest(IngestConfig(source=source, k_core=0))
    assert sequences(ingested) == {"0": ["2", "0", "2"], "1": ["1"], "9": ["0"], "10": ["0", "1"]}
    assert list(sequences(ingested)) == ["0", "1", "9", "10"]
    assert ingested.catalog.items["raw_id"].to_list() == ["2", "0", "1"]
    assert texts(ingested) == {
        "2": "Steel lamp. Home, Light. warm, small",
        "0": "Oak table. Ash. Home",
        "1": "Linen cover",
    }
    assert ingested.log.events["timestamp"].null_count() == len(ingested.log.events)


@pytest.mark.parametrize(
    ("name", "size"), [("online-retail", (138070, 4072, 2718)), ("movietweetings", (68055, 4333, 2414))]
)
def test_samples_round_trip(name: str, size: tuple[int, int, int]) -> None:
    ingested = ingest(IngestConfig(source=SampleSource(name=name)))
    log, catalog = ingested
    assert (len(log.events), log.num_users, catalog.num_items) == size
    assert log.statistics["dropped_by_k_core"] == 0
    folder = Path(__file__).parents[2] / "components" / "data" / "samples" / name
    shipped = pl.read_parquet(folder / "interactions.parquet")
    for column in ("user_id", "item_id", "position", "timestamp"):
        assert log.events[column].cast(pl.Int64).equals(shipped[column].cast(pl.Int64)), column
    raw_ids = pl.read_parquet(folder / "items.parquet")["raw_item_id"]
    assert catalog.items["raw_id"].equals(raw_ids, check_names=False)
    notice = (folder / "NOTICE.md").read_text()
    assert "CC BY 4.0" in notice or "Copyright (c) 2013 Simon Dooms" in notice


def test_a_uri_reads_as_the_path_does(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "e.csv.gz", csv_lines())
    local = ingest(tabular_config(path, settings={"empty_text": "keep"}))
    remote = ingest(tabular_config({"path": f"file://{path}"}, settings={"empty_text": "keep"}))
    assert local.log.fingerprint == remote.log.fingerprint


def test_missing_file(tmp_path: Path) -> None:
    for path in (str(tmp_path / "absent.csv"), f"file://{tmp_path}/absent.csv"):
        with pytest.raises(FileNotFoundError, match=r"absent.csv: no such file"):
            ingest(tabular_config({"path": path}))


@pytest.mark.parametrize("malformed", ["fail", "skip"])
def test_truncated_gzip_is_never_skipped(tmp_path: Path, malformed: str) -> None:
    lines = [json.dumps(review(2018, f"u{i}", "B2", i)) for i in range(5000)]
    reviews = write_lines(tmp_path / "r.json.gz", lines)
    reviews.write_bytes(reviews.read_bytes()[:-200])
    meta = write_lines(tmp_path / "m.json", [json.dumps(product(2018, "B2", "Lamp"))])
    with pytest.raises(
        DataError, match=r"r.json.gz: the gzip is cut off or damaged somewhere after line \d{4}"
    ):
        ingest(amazon_config(reviews, meta, malformed=malformed))


def test_gzip_in_name_only(tmp_path: Path) -> None:
    path = tmp_path / "e.csv.gz"
    path.write_text("\n".join(csv_lines()))
    with pytest.raises(DataError, match=r"e.csv.gz: .*somewhere after line 0 \(Not a gzipped file"):
        ingest(tabular_config(path))


BAD_REVIEWS = [
    '{"reviewerID": "u", ',
    '["a list"]',
    "[" * 100_000,
    '{"reviewerID": "u", "asin": "B2"}',
    '{"reviewerID": "u", "asin": "B2", "unixReviewTime": "1"}',
    '{"reviewerID": "u", "asin": "B2", "unixReviewTime": 1e300}',
    '{"reviewerID": "u", "asin": " ", "unixReviewTime": 1}',
    '{"reviewerID": 3, "asin": "B2", "unixReviewTime": 1}',
    '{"reviewerID": "u", "asin": "B2", "unixReviewTime": 1, "overall": NaN}',
]


@pytest.mark.parametrize("bad", BAD_REVIEWS)
def test_malformed_line_fails_with_its_number_or_is_counted(tmp_path: Path, bad: str) -> None:
    lines = [json.dumps(review(2018, *event)) for event in EVENTS]
    reviews = write_lines(tmp_path / "r.json.gz", [*lines[:2], "", bad, *lines[2:], bad])
    meta = write_lines(tmp_path / "m.json", [json.dumps(product(2018, *item)) for item in TITLES.items()])
    with pytest.raises(DataError, match=r"r.json.gz line 4: .*set malformed to skip"):
        ingest(amazon_config(reviews, meta))
    ingested = ingest(amazon_config(reviews, meta, malformed="skip"))
    assert sequences(ingested) == WANTED
    assert ingested.log.statistics["malformed_records"] == {"events": 2, "items": 0}


BAD_ROWS = ["u9,B2", "u9,B2,1,2", ",B2,1", "u9,,1", "u9,B2,soon", "u9,B2,", 'u9,"B"2,1']


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_malformed_row_fails_with_its_number_or_is_counted(tmp_path: Path, bad: str) -> None:
    lines = csv_lines()
    path = write_lines(tmp_path / "e.csv", [*lines[:3], bad, *lines[3:]])
    with pytest.raises(DataError, match=r"e.csv (line|row) 4: "):
        ingest(tabular_config(path, settings={"empty_text": "keep"}))
    ingested = ingest(tabular_config(path, settings={"empty_text": "keep", "malformed": "skip"}))
    assert sequences(ingested) == WANTED
    assert ingested.log.statistics["malformed_records"] == {"events": 1}


def test_row_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "e.csv", csv_lines())
    path.write_bytes("﻿".encode() + path.read_bytes() + b"u\xff,B2,1\nu9,B2,900\n")
    with pytest.raises(DataError, match=r"e.csv line 7: 'utf-8' codec"):
        ingest(tabular_config(path))
    ingested = ingest(tabular_config(path, settings={"empty_text": "keep", "malformed": "skip"}))
    assert sequences(ingested)["u9"] == [*WANTED["u9"], "B2"]


def test_bad_rating_is_malformed_and_an_empty_one_is_not(tmp_path: Path) -> None:
    rows = ["user_id,item_id,timestamp,stars", "u,B1,1,4.5", "u,B1,2,", "u,B1,3,many", "u,B1,4,inf"]
    path = write_lines(tmp_path / "e.csv", rows)
    columns = {"rating": "stars"}
    with pytest.raises(DataError, match=r"e.csv row 4: 'stars' is not a finite number \(2 such rows\)"):
        ingest(tabular_config(path, columns=columns))
    skipping = {"empty_text": "keep", "malformed": "skip"}
    assert ingest(tabular_config(path, settings=skipping, columns=columns)).log.events[
        "rating"
    ].to_list() == [4.5, None]


@pytest.mark.parametrize("name", ["e.csv", "e.parquet"])
def test_missing_column(tmp_path: Path, name: str) -> None:
    frame = pl.DataFrame({"user_id": ["u"], "article": ["B1"], "timestamp": [1]})
    frame.write_csv(tmp_path / name) if name.endswith("csv") else frame.write_parquet(tmp_path / name)
    with pytest.raises(
        DataError, match=r"no column 'item_id'; the file has \['user_id', 'article', 'timestamp'\]"
    ):
        ingest(tabular_config(tmp_path / name))


def test_doubled_column(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "e.csv", ["user_id,item_id,timestamp,item_id", "u,B1,1,B2"])
    with pytest.raises(DataError, match="the header names 'item_id' twice"):
        ingest(tabular_config(path))


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", b"PAR1"])
def test_damaged_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "e.parquet").write_bytes(content)
    with pytest.raises(DataError, match="e.parquet: not a whole parquet file"):
        ingest(tabular_config(tmp_path / "e.parquet"))


def test_empty_csv_and_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"e.csv: no column 'user_id'; the file has \[\]"):
        ingest(tabular_config(write_lines(tmp_path / "e.csv", [])))
    with pytest.raises(DataError, match=r"e.xlsx: a table ends in .parquet, .csv"):
        ingest(tabular_config(write_lines(tmp_path / "e.xlsx", csv_lines())))


def test_float_ids_are_refused(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1.0], "item_id": [2], "timestamp": [1]}).write_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match="column 'user_id': ids are text or whole numbers, got Float64"):
        ingest(tabular_config(tmp_path / "e.parquet"))


LETTER_FAULTS = [
    ('{"0": [1,\n 2}', r"x.inter.json line 2, column 3: not valid JSON"),
    ("[1, 2]", "holds a list, one JSON object is wanted"),
    ('{"0": [1], "0": [2]}', "the key '0' occurs twice"),
    ('{"0": [1], "7": 3}', "x.inter.json entry 2: user '7' must have a list of items, got 3"),
    (
        '{"0": [1], "7": [1, null]}',
        "x.inter.json entry 2: user '7': an item is a whole number or a text, got None",
    ),
]


@pytest.mark.parametrize(("content", "message"), LETTER_FAULTS)
def test_letter_faults(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.inter.json").write_text(content)
    source = LetterSource(interactions={"path": str(tmp_path / "x.inter.json")})
    with pytest.raises(DataError, match=message):
        ingest(IngestConfig(source=source, k_core=0, empty_text="keep"))


def test_digest_pin(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "e.csv", csv_lines())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = tabular_config({"path": str(path), "sha256": digest}, settings={"empty_text": "keep"})
    assert sequences(ingest(pinned)) == WANTED
    path.write_bytes(path.read_bytes() + b"u9,B3,900\n")
    with pytest.raises(DataError, match=f"pinned is {digest}"):
        ingest(pinned)


def test_unknown_config_key(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="kcore"):
        IngestConfig.model_validate({"kcore": 5})
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        "source: {kind: amazon, release: 2018, reviews: {path: r}, metadata: {path: m}, sort: yes}\n"
    )
    with pytest.raises(ValueError, match=r"preset.yaml: .*\n  source.amazon.sort: Extra inputs"):
        load_preset(IngestConfig, preset)


def test_configuration_survives_json() -> None:
    sources = [
        SampleSource(),
        AmazonSource(release=2023, reviews={"path": "r"}, metadata={"path": "m"}),
        TabularSource(interactions={"path": "e.csv"}),
        LetterSource(interactions={"path": "x.inter.json"}),
    ]
    for source in sources:
        config = IngestConfig(source=source)
        assert IngestConfig.model_validate_json(config.model_dump_json()) == config
