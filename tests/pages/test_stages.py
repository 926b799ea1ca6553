"""What pages state is what the artefacts hold."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
import torch

from components.artifacts import SidTable
from components.data.growth import leave_out
from components.data.splits import SplitConfig, count_events, hold_out
from components.metrics.sids import CollisionConfig, analyze
from components.pages.data import _part_times, data_page, split_page
from components.pages.embeddings import NEIGHBOURS, embeddings_page
from components.pages.html import Html
from components.pages.results import LISTED, results_page
from components.pages.sids import LEAVES, PREFIXES, collisions_page, sids_page
from components.pages.training import training_page

Element = ElementTree.Element


def parse(page: Html) -> Element:
    return ElementTree.fromstring(page)


def told(element: Element) -> str:
    return "".join(element.itertext())


def section(page: Html, title: str) -> Element:
    return next(part for part in parse(page).iter("section") if part[0].text == title)


def figures(page: Html) -> dict[str, str]:
    return {told(pair.find("dt")): told(pair.find("dd")) for pair in parse(page).find("*/dl")}  # type: ignore[union-attr, arg-type]


def rows(element: Element) -> list[list[str]]:
    return [[told(cell) for cell in row] for row in element.findall(".//tbody/tr")]


def counts(element: Element) -> list[int]:
    """What the columns of a chart say when they are pointed at."""
    titles = [title.text or "" for title in element.iter("title")]
    return [int(re.search(r": ([\d,]+)", title)[1].replace(",", "")) for title in titles]  # type: ignore[index]


def test_the_data_page_counts_each_event_user_and_item_once(tiny, pages) -> None:
    page = pages["data"]
    sizes = {"events": len(tiny.log.events), "users": tiny.log.num_users, "items": tiny.catalog.num_items}
    assert {name: int(figures(page)[name].replace(",", "")) for name in sizes} == sizes
    users, items, _ = section(page, "Who has how much").iter("figure")
    assert (sum(counts(users)), sum(counts(items))) == (sizes["users"], sizes["items"])
    assert sum(counts(section(page, "When"))) == sizes["events"]
    kept = dict(rows(section(page, "From what was read to what is kept")))
    assert kept["events kept"] == f"{sizes['events']:,}"


def test_a_statistic_that_the_page_does_not_know_is_shown_by_its_name(tiny) -> None:
    log = replace(tiny.log, statistics=tiny.log.statistics | {"blue_moons": 7, "by_kind": {"a_b": 2}})
    found = dict(rows(section(data_page(log, tiny.catalog), "From what was read to what is kept")))
    assert found["blue moons"] == "7" and found["by kind: a b"] == "2"


def test_a_log_that_grew_says_what_came_and_what_was_left_out(tiny) -> None:
    """The names of figures that only such a log has are spelt out like the others."""
    known = replace(tiny.catalog, items=tiny.catalog.items.head(100))
    last = tiny.catalog.items["item_id"].tail(5)
    log, catalog = leave_out(tiny.log, tiny.catalog, known, last)
    found = dict(rows(section(data_page(log, catalog), "From what was read to what is kept")))
    assert found["new items set aside because the encoder cannot read them"] == "5"
    assert found["items in the catalogue"] == "115" and found["items that came to it"] == "15"
    assert found["events kept"] == f"{len(log.events):,}"


def test_a_log_without_times_says_so(tiny) -> None:
    log = replace(tiny.log, events=tiny.log.events.with_columns(timestamp=pl.lit(None, pl.Int64)))
    split = hold_out(log, tiny.catalog, SplitConfig())
    for page in (data_page(log, tiny.catalog), split_page(split, log, tiny.catalog)):
        assert "has no times" in told(section(page, "When"))


@pytest.mark.parametrize(
    "config",
    [
        SplitConfig(),
        SplitConfig(max_history=3),
        SplitConfig(cold_share=0.2),
        SplitConfig(protocol="last_basket"),
        SplitConfig(protocol="by_time", test_days=20, valid_days=20),
    ],
    ids=str,
)
def test_the_timeline_of_a_split_finds_every_event_and_every_target(tiny, config: SplitConfig) -> None:
    split = hold_out(tiny.log, tiny.catalog, config)
    parts = _part_times(split, tiny.log)
    assert {name: len(times) for name, times in parts.items()} == {
        "Training events": split.train["sequence"].list.len().sum(),
        "Validation targets": len(split.valid),
        "Test targets": len(split.test),
    }
    page = split_page(split, tiny.log, tiny.catalog)
    drawn = [sum(counts(figure)) for figure in section(page, "When").iter("figure")]
    assert drawn == [len(times) for times in parts.values()]
    if config.protocol == "leave_one_out":
        last = tiny.log.events.filter(pl.col("user_id").is_in(split.test["user_id"].implode()))
        last = last.group_by("user_id", maintain_order=True).agg(pl.col("timestamp").last())
        assert parts["Test targets"].sort().equals(last["timestamp"].sort())
    if config.protocol == "by_time":
        training, valid, test = parts.values()
        assert training.max() < valid.min() <= valid.max() < test.min()


def test_neighbours_are_those_of_highest_cosine_with_their_cosines(tiny) -> None:
    titles = [title or "" for title in tiny.catalog.items["title"]]
    unequal = tiny.embeddings.matrix * (1 + torch.arange(len(titles)) % 5)[:, None]
    embeddings = replace(tiny.embeddings, vectors={"vectors": unequal}, normalised=False)
    page = embeddings_page(embeddings, tiny.catalog)
    x_ND = torch.nn.functional.normalize(unequal, dim=1)
    cosine_NN = (x_ND @ x_ND.T).fill_diagonal_(-2)
    cards = [card for card in section(page, "Neighbours").iter("div") if card.get("class") == "card"]
    assert len(cards) == 12
    for card in cards:
        item = titles.index(told(card[0][0]))
        shown = [(told(line[0]), titles.index(told(line[1]))) for line in card.iter("li")]
        best = cosine_NN[item].topk(NEIGHBOURS)
        assert [float(value) for value, _ in shown] == pytest.approx(best.values.tolist(), abs=0.006)
        assert [cosine_NN[item, other].item() for _, other in shown] == pytest.approx(best.values.tolist())
    assert embeddings_page(embeddings, tiny.catalog) == page
    assert "Length of the vectors" in page


def check_node(
    node: Element, prefix: tuple[int, ...], table: SidTable, names: list[str], events: np.ndarray
) -> int:
    """Check one prefix of a tree against the table, and all below it; return the items that it speaks for."""
    codes = list(map(tuple, table.codes["codes"]))
    sids = [
        "-".join(map(str, [*own, suffix])) for own, suffix in zip(codes, table.codes["suffix"], strict=True)
    ]
    mine = [item for item, own in enumerate(codes) if own[: len(prefix)] == prefix]
    covered = 0
    for child in node:
        if child.tag == "details":
            code, count, examples = map(told, child[0])
            longer = (*prefix, int(code))
            members = sorted(
                (i for i in mine if codes[i][: len(longer)] == longer), key=lambda i: (-events[i], i)
            )
            assert int(count.split()[0].replace(",", "")) == len(members) > 1
            assert examples == ", ".join(names[item] for item in members[:3])
            covered += check_node(child[1], longer, table, names, events)
        elif child.get("class") == "leaf":
            sid, name = map(told, child)
            item = sids.index(sid)
            assert item in mine and names[item] == name
            covered += 1
        else:
            covered += int(re.fullmatch(r"and ([\d,]+) more", told(child))[1].replace(",", ""))  # type: ignore[index]
    assert covered == len(mine)
    return covered


@pytest.mark.parametrize("most", [PREFIXES, 10, 1])
@pytest.mark.parametrize("short", [False, True], ids=["equal lengths", "short names too"])
def test_the_tree_accounts_for_every_item(tiny, monkeypatch, most: int, short: bool) -> None:
    monkeypatch.setattr("components.pages.sids.PREFIXES", most)
    table = tiny.sids
    if short:
        cut = pl.when(pl.col("item_id") % 3 == 0).then(pl.col("codes").list.head(1)).otherwise("codes")
        suffix = pl.int_range(pl.len()).over("codes").cast(pl.UInt16)
        codes = table.codes.with_columns(codes=cut).with_columns(suffix=suffix)
        table = replace(table, codes=codes, suffix_size=table.num_items)
    page = sids_page(table, tiny.catalog, tiny.split)
    (tree,) = [part for part in parse(page).iter("div") if part.get("class") == "tree"]
    names = tiny.catalog.items["title"].to_list()
    events = count_events(tiny.split.train["sequence"], table.num_items)
    assert check_node(tree, (), table, names, events) == tiny.catalog.num_items
    prefixes = {codes[:n] for codes in map(tuple, table.codes["codes"]) for n in range(1, len(codes) + 1)}
    sizes = [sum(tuple(c)[: len(p)] == p for c in table.codes["codes"]) for p in prefixes]
    assert len(list(tree.iter("details"))) == min(most, sum(size > 1 for size in sizes))


def test_a_tree_of_100_000_items_is_no_larger_than_a_megabyte(tiny) -> None:
    count, rng = 100_000, np.random.default_rng(0)
    items = pl.DataFrame({"item_id": pl.Series(range(count), dtype=pl.UInt32)}).with_columns(
        raw_id=pl.col("item_id").cast(pl.String),
        title=pl.format("A title of more than forty-four letters, number {}", "item_id"),
        brand=pl.lit(None, pl.String),
        categories=pl.lit(None, pl.List(pl.String)),
        text=pl.lit("t"),
    )
    codes = pl.DataFrame({"codes": rng.integers(0, 256, (count, 4))}).select(
        pl.int_range(pl.len(), dtype=pl.UInt32).alias("item_id"),
        pl.col("codes").arr.to_list().cast(pl.List(pl.UInt16)),
    )
    codes = codes.with_columns(suffix=pl.int_range(pl.len(), dtype=pl.UInt16).over("codes"))
    table = replace(tiny.sids, codes=codes, codebook_sizes=[256] * 4)
    catalog = replace(tiny.catalog, items=items)
    split = replace(tiny.split, num_items=count, catalog=catalog.fingerprint)
    page = sids_page(table, catalog, split)
    assert 100_000 < len(page.encode()) < 1_000_000
    assert page.count("<details>") == PREFIXES and page.count('class="leaf"') <= LEAVES * (PREFIXES + 1)


def test_collisions_are_listed_with_their_items_and_every_figure_with_its_meaning(pages, tiny) -> None:
    page = pages["collisions"]
    groups = tiny.sids.codes.group_by("codes").agg("item_id").filter(pl.col("item_id").list.len() > 1)
    shown = {row[0]: (int(row[1]), row[2]) for row in rows(section(page, "Who shares codes"))}
    assert len(shown) == min(30, len(groups))
    titles = tiny.catalog.items["title"]
    for codes, members in groups.iter_rows():
        name = "-".join(map(str, codes))
        if name in shown:
            assert shown[name][0] == len(members)
            ordinary = [titles[item] for item in members[:5] if item >= 10]
            assert len(members) > 5 or all(title in shown[name][1] for title in ordinary)
    meanings = {row[0]: row[2] for row in rows(section(page, "What the figures mean"))}
    assert "share their codes" in meanings["collision rate"] and "codes in use" in meanings["level 1"]


def test_recommendations_mark_the_target_where_it_stands_and_only_there(material, pages) -> None:
    catalog, split, items_Uk = material
    by_user = {user: row for row, user in enumerate(split.test["user_id"])}
    page = pages["results"]
    seen = {}
    for title, place in (("Found", 3), ("Missed", None)):
        cards = [card for card in section(page, title).iter("div") if card.get("class") == "card"]
        assert len(cards) == 6
        for card in cards:
            row = by_user[int(told(card[0][0]).removeprefix("User "))]
            seen[row] = title
            history, recommended, target = card.iter("ol")
            assert len(recommended) == LISTED
            marked = [number for number, line in enumerate(recommended, 1) if line.get("class") == "accent"]
            assert marked == ([place] if place else [])
            assert len(history) == min(6, len(split.test["history"][row]))
            note = [told(part) for part in card[0].iter("p")][-1]
            assert note == ("Target, place 3" if place else "Target, not among 20")
    assert {row % 3 for row, title in seen.items() if title == "Found"} == {0}
    assert {row % 3 for row, title in seen.items() if title == "Missed"} == {1, 2}


def test_a_training_that_went_wrong_has_its_page_and_levels_stand_in_order() -> None:
    figures = {"loss": float("nan"), "best": float("inf")} | {f"sids/use/level{n}": n for n in (1, 2, 10)}
    history = [(step, {f"sids/use/level{n}": 1.0 * n for n in (10, 2, 1)}) for step in (1, 2)]
    page = training_page("Broken", history, figures, 1)
    shown = {row[0]: row[1:] for row in rows(section(page, "What was kept"))}
    assert (shown["loss"][0], shown["best"][0]) == ("not a number", "infinite")
    chart = next(section(page, "Semantic IDs").iter("svg"))
    strength = [
        float(line.get("stroke-opacity")) for line in chart.iter("path") if line.get("class") == "line"
    ]
    highest = [
        float(line.get("d")[1:].split("L")[0].split()[1])
        for line in chart.iter("path")
        if line.get("class") == "line"
    ]
    assert strength == sorted(strength, reverse=True) and highest == sorted(highest, reverse=True)


def test_a_page_with_the_names_of_other_items_is_refused(material, tiny) -> None:
    """Equal numbers of items are not equal items."""
    other = replace(tiny.catalog, items=tiny.catalog.items.with_columns(title=pl.lit("x")))
    for make in (
        lambda: split_page(tiny.split, tiny.log, other),
        lambda: embeddings_page(tiny.embeddings, other),
        lambda: sids_page(tiny.sids, other, tiny.split),
        lambda: results_page("x", None, material.split, other, material.items_Uk, "kept"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"_page: made of ItemCatalog .* ids mean other items"):
            make()


def test_the_page_of_names_holds_every_check_reason_and_share(pages, tiny) -> None:
    page = pages["drift"]
    checks = rows(section(page, "Limits"))
    assert [row[3] for row in checks].count("beyond") == len(
        list(section(page, "What speaks for it").iter("p"))
    )
    assert "25.0% of the catalogue is new" in told(section(page, "What speaks for it"))
    assert len(rows(section(page, "Levels"))) == 3
    shares = rows(section(pages["churn"], "Share of items whose name changed"))
    assert [row[0] for row in shares] == ["SID", "codes", "level 1", "level 2", "level 3"]
    assert shares[2][1:] == ["0.0%", "0.0%"] and shares[3][1:] == ["100.0%", "0.0%"]
    assert figures(pages["churn"])["keep their whole name"] == "100.0%"


def test_lists_of_other_users_are_refused(material, pages, tiny) -> None:
    with pytest.raises(ValueError, match="give one a user"):
        results_page("x", None, material.split, material.catalog, material.items_Uk[1:], "kept")  # type: ignore[arg-type]
    other = replace(tiny.log, sources=[*tiny.log.sources, {"name": "x", "sha256": "y", "bytes": 1}])
    with pytest.raises(ValueError, match="the split is of log"):
        split_page(tiny.split, other, tiny.catalog)
    with pytest.raises(ValueError, match="take them from one run"):
        sids_page(tiny.sids, tiny.catalog, replace(tiny.split, num_items=tiny.split.num_items + 1))


def test_every_figure_that_was_logged_has_a_chart_and_levels_share_one(pages) -> None:
    page = pages["training"]
    charts = {
        part[0].text: [told(figure[0]) for figure in part.iter("figure")]
        for part in parse(page).iter("section")
    }
    assert charts == {
        "Validation": ["losslast 0.06"],
        "Training": ["losslast 0.04", "loss of each codeby level"],
        "Semantic IDs": ["perplexityby level", "churnlast 0.02"],
        "What was kept": [],
    }
    assert "step 40" in told(parse(page)) and "why <it> stopped" in told(parse(page))


def test_a_training_without_steps_shows_what_was_kept_alone() -> None:
    page = training_page(
        "Tokenizer", [(0, {"perplexity/1": 3.0})], {"perplexity/1": 3.0, "perplexity/2": 2.5}, 0
    )
    assert [part[0].text for part in parse(page).iter("section")] == ["What was kept"]
    assert rows(section(page, "What was kept")) == [["perplexity", "", "3", "2.5"]]


def test_a_comparison_calls_above_or_below_only_what_leaves_out_0(pages) -> None:
    differences = rows(section(pages["comparison"], "Differences"))
    assert len(differences) == 2 * 2 * 2
    for row in differences:
        low, high = (float(end.replace("−", "-")) for end in row[5].split(" to "))
        assert row[6] == ("above" if low > 0 else "below" if high < 0 else "cannot be told apart")


@pytest.mark.parametrize("count", [1, 2, 30])
def test_vectors_that_tell_nothing_apart_have_a_page(tiny, count: int) -> None:
    """Of one item, or all alike and of length 0."""
    few = replace(tiny.catalog, items=tiny.catalog.items.head(count))
    vectors = {"vectors": torch.zeros(count, 4)}
    zeros = replace(tiny.embeddings, vectors=vectors, normalised=False, catalog=few.fingerprint)
    told_ = figures(embeddings_page(zeros, few))
    assert told_["vectors of length 0"] == str(count)
    assert told_["median cosine to the nearest other item"] == ("none" if count == 1 else "0.00")
    assert told_["directions with 90 % of the variance"] == "0"


def test_a_table_without_collisions_and_a_log_of_single_events_have_pages(tiny) -> None:
    codes = pl.concat_list(pl.col("item_id").cast(pl.UInt16) // 8, pl.col("item_id").cast(pl.UInt16) % 8)
    alone = tiny.sids.codes.with_columns(codes=codes, suffix=pl.lit(0, pl.UInt16))
    table = replace(tiny.sids, codes=alone, codebook_sizes=[16, 8])
    page = collisions_page(analyze(table, tiny.catalog, CollisionConfig()), tiny.catalog)
    assert "No two items share their codes" in told(section(page, "Who shares codes"))
    once = tiny.log.events.unique("user_id", keep="first", maintain_order=True).head(1)
    log = replace(tiny.log, events=once, users=tiny.log.users.head(1))
    page = data_page(log, tiny.catalog)
    assert counts(section(page, "When")) == [1] and figures(page)["events of the median item"] == "0"
