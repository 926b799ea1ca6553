"""Pages as a browser shows them: nothing is said, nothing is fetched, everything can be read in light and dark."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from flytekit.deck import Deck
from flytekit.deck.deck import _get_deck
from matplotlib.image import imread

from components.pages.html import Html
from components.pages.page import document

PAGES = (
    *("data", "split", "embeddings", "training", "sids", "collisions", "results", "comparison"),
    *("ablation", "windows", "drift", "churn"),
)
FONTS = "https://fonts.googleapis.com/"
"""What flytekit's own frame asks for."""
ENOUGH = 4.5
"""Contrast of text that WCAG 2.2 asks for, level AA."""
LOOK = """(() => {
  for (const part of document.querySelectorAll('.sidflow details')) part.open = true;
  const rgba = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => {
    const [r, g, b] = rgb.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll('.sidflow, .sidflow *')].filter(element =>
    element.tagName !== 'STYLE' && element.tagName !== 'title' && element.checkVisibility() &&
    [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()));
  const faint = [];
  for (const element of texts) {
    const style = getComputedStyle(element);
    const ink = rgba(element instanceof SVGElement ? style.fill : style.color);
    const [high, low] = [light(ink), light(ground(element))].sort((a, b) => b - a);
    const contrast = (high + .05) / (low + .05) * (ink.length > 3 ? ink[3] : 1);
    if (contrast < ENOUGH) faint.push([element.textContent.slice(0, 40), contrast]);
  }
  const boxes = [document.documentElement, ...document.querySelectorAll('.sidflow .card, .sidflow .leaf, summary')];
  const wide = boxes.filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.textContent.slice(0, 60));
  return {
    texts: texts.length, faint, wide,
    ground: getComputedStyle(document.querySelector('.sidflow')).backgroundColor,
  };
})()""".replace("ENOUGH", str(ENOUGH))


def as_deck(page: Html) -> str:
    """The whole document that flytekit makes of a stage's decks."""
    decks = [Deck("Mine", page, False), Deck("Input", "<p>input</p>", False), Deck("Output", "", False)]
    return _get_deck(SimpleNamespace(decks=decks), ignore_jupyter=True)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("frame", ["file", "deck"])
def test_a_page_is_silent_self_contained_and_readable(
    browser, pages, tmp_path: Path, name: str, dark: bool, frame: str
) -> None:
    file = tmp_path / f"{name}.html"
    file.write_text(document(name, pages[name]) if frame == "file" else as_deck(pages[name]))
    seen = browser.open(file, LOOK, dark=dark)
    assert seen.said == []
    assert [url for url in seen.requests if frame == "file" or not url.startswith(FONTS)] == []
    assert seen.answer["texts"] > 20
    assert seen.answer["faint"] == []
    assert seen.answer["ground"] == ("rgb(21, 24, 27)" if dark else "rgb(255, 255, 255)")


def test_every_kind_of_page_is_opened(pages) -> None:
    assert set(PAGES) == set(pages)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_glares_on_dark_ground(browser, pages, tmp_path: Path, name: str) -> None:
    """Letters and marks are light there, grounds are not; a picture that keeps its white ground is most of a page."""
    file = tmp_path / f"{name}.html"
    file.write_text(document(name, pages[name]))
    browser.open(file, dark=True, picture=str(tmp_path / "seen.png"))
    light = imread(tmp_path / "seen.png")[..., :3].mean(axis=-1)
    assert (light > 0.8).mean() < 0.05


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_its_window(browser, pages, tmp_path: Path, name: str, width: int) -> None:
    """Also with a name of 400 letters in one word, and every part of the tree open."""
    file = tmp_path / f"{name}.html"
    file.write_text(document(name, pages[name]))
    assert browser.open(file, LOOK, width=width).answer["wide"] == []


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("<script>console.error('bad')</script>", "said"),
        ("<script>throw new Error('bad')</script>", "said"),
        ('<img src="http://example.com/x.png" alt="">', "requests"),
        ("<style>.sidflow{background:url(https://example.com/x.png)}</style>", "requests"),
        ("<script>new WebSocket('wss://example.com/')</script>", "requests"),
        ('<p style="color:#999">faint</p>', "faint"),
        ('<p style="min-width:3000px">wide</p>', "wide"),
    ],
)
def test_a_fault_would_be_seen(browser, pages, tmp_path: Path, fault: str, kind: str) -> None:
    broken = pages["split"].removesuffix("</div></div>") + fault + "</div></div>"
    file = tmp_path / "broken.html"
    file.write_text(document("broken", Html(broken)))
    seen = browser.open(file, LOOK)
    assert (seen._asdict() | seen.answer)[kind]
