"""HTML in pieces. Whatever is no ``Html`` is text, and is escaped where it is put in: titles cannot break a page."""

import math
from collections.abc import Iterable
from html import escape
from typing import Any

import polars as pl

from components.artifacts import ItemCatalog
from components.config import require

LONGEST = 90
"""Characters of an item's name that a page shows."""


class Html(str):
    """Text that is HTML already. Joining two with ``+`` makes a plain string again: use ``join``."""


def text(value: str | float) -> Html:
    """Return HTML as it is, and everything else escaped."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(parts: Iterable[str]) -> Html:
    """Put pieces behind one another."""
    return Html("".join(map(text, parts)))


def tag(name: str, *children: str, **attributes: Any) -> Html:
    """Return an element.

    Parameters
    ----------
    name : str
        What it is called, with a class behind a dot if it has one: ``td.number``.
    *children : str
        Html, or text that is escaped.
    **attributes
        Underscores stand for hyphens; None leaves one out.
    """
    name, _, kind = name.partition(".")
    given = {"class": kind or None} | attributes
    inside = "".join(
        f' {key.replace("_", "-")}="{escape(str(value))}"'
        for key, value in given.items()
        if value is not None
    )
    return Html(f"<{name}{inside}>{join(children)}</{name}>")


def number(value: float) -> str:
    """Write a figure: whole numbers with all digits, others with three or four that count; what is none in words."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "infinitely negative"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    return (f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "−")


def percent(share: float) -> str:
    """Write a share of one."""
    return f"{share:.1%}" if math.isfinite(share) else number(share)


def words(name: str) -> str:
    """Spell the name of a figure for people: ``events_read`` becomes ``events read``."""
    return name.replace("_", " ").replace("/", ", ")


def check_catalog(catalog: ItemCatalog, wanted: str, page: str) -> None:
    """Refuse a catalogue other than the one that ids of a page mean: its names would stand beside the wrong items.

    Raises
    ------
    ValueError
        Its fingerprint is not ``wanted``.
    """
    require(
        catalog.fingerprint == wanted,
        f"{page}: made of ItemCatalog {wanted[:12]}, got {catalog.fingerprint[:12]}: ids mean other items; take both "
        "from one run",
    )


def item_names(catalog: ItemCatalog, item_ids: Iterable[int], longest: int = LONGEST) -> list[Html]:
    """Return the names of items: their titles, or for want of one their text or raw id, cut to ``longest`` characters.

    Each is isolated, so that one in a right-to-left script leaves its neighbours where they are.
    """
    rows = catalog.items[list(item_ids)]
    told = [
        pl.when(pl.col(column).str.strip_chars() != "").then(pl.col(column)) for column in ("title", "text")
    ]
    name = pl.coalesce(*told, "raw_id")
    cut = pl.when(name.str.len_chars() > longest).then(name.str.head(longest - 1) + "…").otherwise(name)
    return [tag("bdi", title) for title in rows.select(cut).to_series()]
