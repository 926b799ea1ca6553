"""What came in, and what is held out of it."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from components.artifacts import InteractionLog, ItemCatalog, SequenceSplit
from components.config import require
from components.data.splits import count_events, find_parts
from components.pages.figures import Curve, bars, lines
from components.pages.html import Html, check_catalog, item_names, number, percent, tag, words
from components.pages.page import Section, beside, cards, facts, page, paragraph, table

DAY = 86_400
SPANS = (("1h", 2 * DAY), ("1d", 60 * DAY), ("1w", 400 * DAY), ("1mo", 5 * 366 * DAY), ("1q", 15 * 366 * DAY))
"""Widths of a column of a timeline, and the longest time in seconds that each is for; beyond them years."""
SAMPLES = 10
"""Items in a table of examples."""
HISTORIES = 6
"""Users whose histories are shown, and below how many of their events."""
EVENTS_SHOWN = 9
CURVE = 120
"""Points of the curve of shares, at most."""
COLUMNS = "Columns widen from left to right, each by a root of two."
STATISTICS = {
    "events_after_until": "events at or after ingest.until",
    "malformed_records": "malformed records",
    "events_of_unknown_items": "events of items that the metadata lack",
    "duplicate_items_dropped": "items described twice",
    "repeats_dropped": "repeated events",
    "dropped_by_k_core": "events of users or items below the k-core",
    "known_items": "items of the catalogue that this one grew from",
    "new_items": "items that came to it",
    "known_items_described_anew": "known items that the source describes otherwise now; their text stays",
    "newcomers_dropped": "items left out because that catalogue lacks them",
    "events_of_newcomers_dropped": "events of these",
    "items_set_aside": "new items set aside because the encoder cannot read them",
    "events_of_items_set_aside": "events of these",
    "users_set_aside": "users of such events alone",
}
TOLD_ELSEWHERE = {
    "events",
    "users",
    "items_with_events",
    "density",
    "mean_length",
    "longest",
    "repeated_events",
}
PROTOCOLS = {
    "leave_one_out": "Each user's last event is the test target, the one before it that of validation.",
    "last_basket": "The first event of each user's last basket is the test target, that of the basket before it is for "
    "validation; a basket is all events of a user at one time.",
    "by_time": "Each user's first event in the test window is the test target, that in the window before is for "
    "validation; training ends before both.",
}


def data_page(log: InteractionLog, catalog: ItemCatalog) -> Html:
    """Show what ingestion kept: sizes, lengths, popularity, times, what was dropped, sources and examples."""
    events_N = np.bincount(log.events["item_id"].to_numpy(), minlength=catalog.num_items)
    lengths = log.events.group_by("user_id").len()["len"].to_numpy()
    met = int((events_N > 0).sum())
    figures = [
        ("events", number(len(log.events))),
        ("users", number(log.num_users)),
        ("items", number(catalog.num_items)),
        ("density, repeats counted", f"{len(log.events) / (log.num_users * met):.2%}"),
        ("events of the median user", number(float(np.median(lengths)))),
        ("events of the median item", number(float(np.median(events_N)))),
    ]
    return page(
        "Data",
        [
            Section("Who has how much", [beside(_shapes(lengths, events_N))], COLUMNS),
            Section("When", [_times(log)]),
            Section("From what was read to what is kept", [_dropped(log.statistics, catalog.num_items)]),
            Section("Where it came from", [_sources(log)]),
            Section(
                "Some items",
                [_items(catalog, events_N)],
                "Evenly spaced from the most to the least popular item.",
            ),
            Section(
                "Some histories",
                [_histories(log, catalog)],
                f"Users evenly spaced by their number, and their first {EVENTS_SHOWN} events.",
            ),
        ],
        _span(log.events["timestamp"]),
        [facts(figures)],
    )


def split_page(split: SequenceSplit, log: InteractionLog, catalog: ItemCatalog) -> Html:
    """Show what is trained on and what is held out: protocol, sizes, times and cold items.

    Raises
    ------
    ValueError
        The split is not of this log or catalogue.
    """
    require(
        split.log == log.fingerprint,
        f"split_page: the split is of log {split.log[:12]}, got log {log.fingerprint[:12]}",
    )
    check_catalog(catalog, split.catalog, "split_page")
    test = split.test
    again = test.select(pl.col("history").list.contains(pl.col("target"))).to_series()
    trained_N = count_events(split.train["sequence"], split.num_items)
    unmet = int((trained_N[test["target"].to_numpy()] == 0).sum())
    figures = [
        ("users to train on", number(len(split.train))),
        ("training targets", number(split.num_training_targets)),
        ("validation users", number(len(split.valid))),
        ("test users", number(len(test))),
        ("test targets that stand in their history", percent(float(again.mean()))),  # type: ignore[arg-type]
        ("test targets that training never met", percent(unmet / len(test))),
    ]
    lengths = beside(
        _lengths(caption, frame[column].list.len().to_numpy(), "users")
        for caption, frame, column in (
            ("Training sequences", split.train, "sequence"),
            ("Histories in validation", split.valid, "history"),
            ("Histories in test", test, "history"),
        )
    )
    cold = (
        [
            Section(
                "Cold items",
                [_cold(split, catalog)],
                "Training and validation leave them out, test does not.",
            )
        ]
        if len(split.cold)
        else []
    )
    return page(
        "Split",
        [
            Section(
                "How long", [lengths], f"Events of a user; held-out histories keep the latest. {COLUMNS}"
            ),
            Section("When", [_timeline(split, log)]),
            *cold,
        ],
        f"{words(split.protocol).capitalize()}. {PROTOCOLS.get(split.protocol, '')}".strip(),
        [facts(figures)],
    )


def _shapes(lengths: NDArray[np.int64], events_N: NDArray[np.int64]) -> Iterable[Html]:
    yield _lengths("Events of a user", lengths, "users")
    yield _lengths("Events of an item", events_N, "items")
    running = np.cumsum(np.sort(events_N)[::-1]) / events_N.sum()
    places = np.unique(np.linspace(1, len(running), CURVE).astype(int))
    fifth = running[max(0, round(len(running) / 5) - 1)]
    yield lines(
        "The long tail",
        [Curve("", np.append(0, 100 * places / len(running)), np.append(0, 100 * running[places - 1]))],
        f"% of the events that go to the most popular % of the items; the first fifth has {fifth:.0%}",
        from_zero=True,
    )


def _lengths(caption: str, values: NDArray[np.int64], unit: str) -> Html:
    """Draw a histogram whose columns grow by a root of two, as long tails want it."""
    top = int(values.max())
    edges = np.unique(np.round(2 ** np.arange(0, np.log2(max(top, 1)) + 1, 0.5)).astype(int))
    edges = (
        np.append(0, edges)
        if values.min() == 0
        else edges[np.searchsorted(edges, values.min(), "right") - 1 :]
    )
    edges = np.append(edges[edges <= top], top + 1)
    counts = np.histogram(values, edges)[0]
    labels = [
        f"{low:,}" if low + 1 == end else f"{low:,}–{end - 1:,}"
        for low, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    note = f"{unit}; median {number(float(np.median(values)))}, longest {top:,}"
    return bars(caption, counts.tolist(), labels, note, ticks=5, unit=unit)


def _span(times: pl.Series) -> str:
    if times.null_count():
        return "The source has no times; events stand in its order."
    first, last = (pl.from_epoch(pl.Series([time])).dt.date()[0] for time in (times.min(), times.max()))
    return f"From {first.day} {first:%B %Y} to {last.day} {last:%B %Y}."


def _every(times: pl.Series) -> str:
    seconds = int(times.max()) - int(times.min())  # type: ignore[arg-type]
    return next((every for every, longest in SPANS if seconds <= longest), "1y")


def _count_times(times: pl.Series, axis: pl.DataFrame, every: str) -> list[int]:
    """Count events by column of a timeline; columns without any are 0."""
    found = pl.from_epoch(times).dt.truncate(every).alias("time").to_frame().group_by("time").len()
    return axis.join(found, on="time", how="left", maintain_order="left")["len"].fill_null(0).to_list()


def _axis(times: pl.Series, every: str) -> pl.DataFrame:
    """Return the beginnings of all columns of a timeline, those without events too."""
    ends = pl.DataFrame({"time": [times.min(), times.max()]}).select(pl.from_epoch("time").dt.truncate(every))
    return ends.select(pl.datetime_range(pl.col("time").min(), pl.col("time").max(), every).alias("time"))


def _axis_labels(axis: pl.DataFrame, every: str) -> list[str]:
    form = {"1h": "%d %b %H:00", "1d": "%d %b %Y", "1w": "%d %b %Y", "1y": "%Y"}.get(every, "%b %Y")
    return axis["time"].dt.strftime(form).to_list()


UNITS = {"1h": "hour", "1d": "day", "1w": "week", "1mo": "month", "1q": "quarter", "1y": "year"}


def _times(log: InteractionLog) -> Html:
    times = log.events["timestamp"]
    if times.null_count():
        return paragraph("The source has no times.")
    every = _every(times)
    axis = _axis(times, every)
    counts = _count_times(times, axis, every)
    return bars(
        f"Events by {UNITS[every]}",
        counts,
        _axis_labels(axis, every),
        size=(1056, 190),
        ticks=9,
        unit="events",
    )


def _timeline(split: SequenceSplit, log: InteractionLog) -> Html:
    """Draw when training events, validation targets and test targets lie, one below the other on one axis."""
    times = log.events["timestamp"]
    if times.null_count():
        return paragraph("The source has no times.")
    every = _every(times)
    axis = _axis(times, every)
    labels = _axis_labels(axis, every)
    parts = _part_times(split, log)
    return tag(
        "div.body",
        *(
            bars(
                f"{part}, by {UNITS[every]}",
                _count_times(found, axis, every),
                labels,
                size=(1056, 110),
                ticks=9,
                unit="events",
            )
            for part, found in parts.items()
        ),
    )


def _part_times(split: SequenceSplit, log: InteractionLog) -> dict[str, pl.Series]:
    """Return the times of training events and of targets, one target a user."""
    parts = find_parts(log, split)
    test = parts.test.unique("user_id", keep="first", maintain_order=True)
    return {
        "Training events": parts.train["timestamp"],
        "Validation targets": parts.valid["timestamp"],
        "Test targets": test["timestamp"],
    }


def _dropped(statistics: dict[str, Any], num_items: int) -> Html:
    """Set out what was read, left out and kept; figures that this page does not know are shown by their names."""
    rows = [("events read", statistics.get("events_read")), ("items read", statistics.get("items_read"))]
    for name, value in statistics.items():
        if name in TOLD_ELSEWHERE or name.endswith("_read"):
            continue
        what = STATISTICS.get(name, words(name))
        if isinstance(value, dict):
            rows += [(f"{what}: {words(part)}", count) for part, count in value.items()] or [(what, 0)]
        else:
            rows.append((what, value))
    rows += [("events kept", statistics.get("events")), ("items in the catalogue", num_items)]
    return table(
        ["what", "count"],
        [
            [what, number(count) if isinstance(count, int | float) else str(count)]
            for what, count in rows
            if count is not None
        ],
        [1],
    )


def _sources(log: InteractionLog) -> Html:
    return table(
        ["file", "bytes", "sha256"],
        [
            [str(source["name"]), number(source["bytes"]), tag("code.long", str(source["sha256"]))]
            for source in log.sources
        ],
        [1],
    )


def _items(catalog: ItemCatalog, events_N: NDArray[np.int64]) -> Html:
    order = np.argsort(-events_N, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, SAMPLES).astype(int))].tolist()
    rows = catalog.items[chosen]
    shown = [column for column in ("brand", "categories") if rows[column].null_count() < len(rows)]
    return table(
        ["item", "events", "raw id", *shown],
        [
            [name, number(events_N[item]), row["raw_id"], *(_told(row[column]) for column in shown)]
            for item, name, row in zip(
                chosen, item_names(catalog, chosen), rows.iter_rows(named=True), strict=True
            )
        ],
        [1],
    )


def _told(value: str | list[str] | None) -> str:
    """Write a brand, or the path of a category; nothing where there is none."""
    return " › ".join(value)[:120] if isinstance(value, list) else (value or "")[:120]


def _histories(log: InteractionLog, catalog: ItemCatalog) -> Html:
    users = np.unique(np.linspace(0, log.num_users - 1, HISTORIES).astype(int)).tolist()
    rows = log.events.filter(pl.col("user_id").is_in(users))
    timed = not log.events["timestamp"].null_count()
    return cards(
        _history(events, catalog, timed) for events in rows.partition_by("user_id", maintain_order=True)
    )


def _history(events: pl.DataFrame, catalog: ItemCatalog, timed: bool) -> Html:
    first = events.head(EVENTS_SHOWN)
    when = (
        pl.from_epoch(first["timestamp"]).dt.strftime("%d %b %y").to_list()
        if timed
        else first["position"] + 1
    )
    lines_ = [
        tag("li", tag("span", str(time)), name)
        for time, name in zip(when, item_names(catalog, first["item_id"]), strict=True)
    ]
    more = len(events) - len(first)
    title = tag("h3", f"User {events['user_id'][0]}, {len(events)} events")
    return tag("div", title, tag("ol", *lines_), tag("p.note", f"and {more} more") if more else "")


def _cold(split: SequenceSplit, catalog: ItemCatalog) -> Html:
    """List cold items, those first that are most often a test target."""
    cold = split.cold["item_id"]
    targets = split.test.group_by(item_id="target").agg(users=pl.len())
    rows = (
        cold.to_frame()
        .join(targets, on="item_id", how="left", maintain_order="left")
        .with_columns(pl.col("users").fill_null(0))
        .sort("users", descending=True, maintain_order=True)
        .head(SAMPLES)
    )
    cells = [
        [name, number(users)]
        for name, users in zip(item_names(catalog, rows["item_id"]), rows["users"], strict=True)
    ]
    if len(cold) > len(rows):
        cells.append([f"and {len(cold) - len(rows):,} more", ""])
    return table(["item", "test users whose target it is"], cells, [1])
