"""Windows of one log: what a survey says is what ingestion and split then find, and tables hold every value."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.artifacts import Comparison
from components.data.ingest import IngestConfig, ingest
from components.data.planted import plant
from components.data.raw import DataError
from components.data.splits import SplitConfig, hold_out
from components.folders import Provenance
from components.metrics.windows import (
    Window,
    markdown_table,
    moments,
    over_windows,
    rows,
    survey,
    windows_figure,
)
from components.pages.windows import windows_page

START = datetime(2020, 9, 14, tzinfo=UTC)
SPLIT = SplitConfig(protocol="by_time")


@given(st.integers(0, 10**7), st.integers(1, 400))
def test_moments_are_equally_far_apart_from_the_first_to_as_near_the_last_as_they_come(seconds, days) -> None:
    last = START + timedelta(seconds=seconds)
    found = moments(START, last, days)
    assert found[0] == START and found[-1] <= last < found[-1] + timedelta(days=days)
    assert {b - a for a, b in zip(found, found[1:], strict=False)} <= {timedelta(days=days)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> IngestConfig:
    folder: Path = tmp_path_factory.mktemp("planted")
    log, catalog = plant(num_users=120, num_items=60)
    names = log.events.join(log.users, on="user_id").join(
        catalog.items.select("item_id", item="raw_id"), on="item_id"
    )
    names.select(user_id="raw_id", item_id="item", timestamp="timestamp").write_csv(folder / "events.csv")
    catalog.items.select(item_id="raw_id", title="title").write_csv(folder / "items.csv")
    source = {
        "kind": "tabular",
        "interactions": {"path": str(folder / "events.csv")},
        "items": {"path": str(folder / "items.csv")},
    }
    return IngestConfig.model_validate({"source": source, "k_core": 2})


def test_a_survey_finds_what_each_day_alone_finds(planted) -> None:
    ends = moments(START, START + timedelta(days=100), 20)
    before: set[str] | None = None
    for window in survey(planted, SPLIT, ends):
        config = planted.model_copy(update={"until": window.until})
        try:
            log, catalog = ingest(config)
            held = hold_out(log, catalog, SPLIT.model_copy(update={"until": window.until}))
        except DataError as error:
            assert window == Window(until=window.until, skipped=str(error))
            continue
        items = set(catalog.items["raw_id"])
        new = None if before is None else len(items - before)
        found = (window.events, window.items, window.new_items, window.test_users)
        assert found == (len(log.events), len(items), new, len(held.test)) and not window.skipped
        before = items
    assert before


def test_new_items_are_counted_from_the_last_window_that_was_not_skipped(planted, tmp_path) -> None:
    ends = moments(START, START + timedelta(days=100), 20)
    quiet = [int(ends[place].timestamp()) for place in (2, 3)]
    events = pl.read_csv(planted.source.interactions.path)
    events.filter(~pl.col("timestamp").is_between(*quiet)).write_csv(tmp_path / "events.csv")
    interactions = planted.source.interactions.model_copy(update={"path": str(tmp_path / "events.csv")})
    source = planted.source.model_copy(update={"interactions": interactions})
    *_, before, skipped, window, _ = survey(planted.model_copy(update={"source": source}), SPLIT, ends)
    assert skipped.skipped and not before.skipped
    assert window.new_items == window.items - before.items > 0, "a catalogue only grows"


def test_what_is_wrong_with_the_data_themselves_is_no_want_of_data(planted, tmp_path) -> None:
    events = pl.read_csv(planted.source.interactions.path)
    latest = events.group_by("item_id").agg(pl.col("timestamp").min()).sort("timestamp")["item_id"][-1]
    listed = pl.read_csv(planted.source.items.path).filter(pl.col("item_id") != latest)
    listed.write_csv(tmp_path / "items.csv")
    items = planted.source.items.model_copy(update={"path": str(tmp_path / "items.csv")})
    broken = planted.model_copy(update={"source": planted.source.model_copy(update={"items": items})})
    with pytest.raises(DataError, match=latest):
        survey(broken, SPLIT, moments(START, START + timedelta(days=100), 20))


def test_no_window_with_data_is_an_error_that_says_what_is_missing(planted) -> None:
    with pytest.raises(DataError, match="none of 1 windows has enough data; the last: hold_out: no user"):
        survey(planted, SPLIT, [START + timedelta(days=300)])


def comparison(value: float) -> Comparison:
    values = [
        (method, seen, part, metric, value + number / 100, value / 2, value * 2)
        for number, method in enumerate(("popularity", "two-stage"))
        for seen in ("kept", "excluded")
        for part in ("all", "tail")
        for metric in ("R@5", "R@10", "N@10")
    ]
    return Comparison(
        metrics=pl.DataFrame(values, schema=Comparison.SCHEMAS["metrics"], orient="row"),
        differences=Comparison.SCHEMAS["differences"].to_frame(),
        reports=[],
        provenance=Provenance(),
    )


WINDOWS = [
    Window(until=START, events=9, items=4, test_users=3),
    Window(until=START + timedelta(days=7), skipped="hold_out: too <little>"),
    Window(until=START + timedelta(days=14), events=1999, items=1234, new_items=1230, test_users=30),
]


def test_a_comparison_for_each_window_that_ran_is_wanted() -> None:
    with pytest.raises(ValueError, match="2 windows were not skipped, and there are 1 comparisons"):
        over_windows(WINDOWS, [comparison(0.1)])


def test_every_value_stands_beside_its_window_and_a_skipped_one_among_them() -> None:
    values = over_windows(WINDOWS, [comparison(0.1), comparison(0.2)])
    table = rows(WINDOWS, values)
    assert table[0] == ["2020-09-14", "3", "4", "–", "kept", "popularity", *[".1000 .050–.200"] * 2]
    assert table[3] == ["", "", "", "", "excluded", "two-stage", *[".1100 .050–.200"] * 2]
    assert table[4] == ["2020-09-21", "–", "–", "–", "", "skipped", "–", "–"]
    assert table[5] == ["2020-09-28", "30", "1,234", "1,230", "kept", "popularity", *[".2000 .100–.400"] * 2]
    assert len(table) == 9
    assert "2020-09-21 skipped: hold_out: too <little>" in markdown_table(WINDOWS, values)
    page = windows_page(WINDOWS, values)
    assert "too &lt;little&gt;" in page and "<little>" not in page and page.count("<svg") == 8


def test_the_figure_shows_each_method_at_its_windows_and_leaves_out_what_was_skipped() -> None:
    values = over_windows(WINDOWS, [comparison(0.1), comparison(0.2)])
    panels = windows_figure(WINDOWS, values).axes
    assert [panel.get_title(loc="left")[:4] for panel in panels] == ["R@10", "N@10"] * 2
    curves = [line for line in panels[0].lines if line.get_linestyle() == "-"]
    assert [list(line.get_ydata()) for line in curves] == [
        pytest.approx([0.1, 0.2]),
        pytest.approx([0.11, 0.21]),
    ]
    assert [round(x) for x in curves[1].get_xdata()] == [0, 2]
    assert [list(line.get_xdata()) for line in panels[0].lines if line.get_linestyle() == ":"] == [[1, 1]]
