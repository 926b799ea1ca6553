"""What is no HTML becomes text, wherever it is put in; names of items are short and never empty."""

from dataclasses import replace
from math import isfinite
from xml.etree import ElementTree

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.pages.html import LONGEST, Html, item_names, join, number, percent, tag, text
from components.pages.page import Section, cards, document, facts, page, paragraph, table

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)


@given(WORDS, WORDS)
def test_text_and_attributes_come_out_of_a_parser_as_they_went_in(child: str, attribute: str) -> None:
    found = ElementTree.fromstring(tag("p.kind", child, aria_label=attribute))
    assert (found.text or "", found.get("aria-label"), found.get("class")) == (child, attribute, "kind")


@given(WORDS)
def test_every_block_of_a_page_escapes_what_it_is_given(word: str) -> None:
    blocks = [table([word], [[word]]), facts([(word, word)]), paragraph(word), cards([word])]
    whole = page(word, [Section(word, [*blocks, word], word)], word)
    body = ElementTree.fromstring(whole)[1]
    told = [*body.itertext()]
    assert told == [word] * len(told) and len(told) == (11 if word else 0)
    assert document(word, whole).count(text(word)) >= 12 * bool(word)


def test_what_is_html_already_is_left_alone_and_plus_does_not_keep_it_so() -> None:
    part = tag("b", "&")
    assert part == "<b>&amp;</b>" and text(part) == part and join([part, "<"]) == "<b>&amp;</b>&lt;"
    assert not isinstance(part + "", Html)


def test_items_are_called_by_title_or_else_by_text_or_raw_id_and_cut(tiny) -> None:
    titles = ["<&>", "", None, "  ", "x" * 500] + ["t"] * (tiny.catalog.num_items - 5)
    texts = ["text", "from text", "", None, "text"] + ["t"] * (tiny.catalog.num_items - 5)
    items = tiny.catalog.items.with_columns(title=pl.Series(titles), text=pl.Series(texts))
    names = item_names(replace(tiny.catalog, items=items), [4, 0, 1, 2, 3, 0])
    raw = items["raw_id"]
    shown = [ElementTree.fromstring(name).text for name in names]
    assert shown == ["x" * (LONGEST - 1) + "…", "<&>", "from text", raw[2], raw[3], "<&>"]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (-3.0, "−3"),
        (0.123456, "0.1235"),
        (1234.56, "1,234.6"),
        (-0.5, "−0.5"),
        (float("nan"), "not a number"),
        (float("inf"), "infinite"),
        (float("-inf"), "infinitely negative"),
    ],
)
def test_figures_are_written_for_people(value: float, written: str) -> None:
    assert number(value) == written
    if not isfinite(value):
        assert percent(value) == written
