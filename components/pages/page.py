"""A page: what frames sections, and how everything on it looks in light and dark.

All rules stand under one class, so that a page can be put into another's frame, such as that of a Flyte deck.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from components.pages.html import Html, join, tag, text

STYLE = """
.sidflow{--ground:#fff;--ink:#1b1f23;--soft:#59626b;--line:#dfe3e7;--wash:#f3f5f7;
--accent:#0069a6;--bar:#1f7ab3;--warn:#a8430b;--good:#00684a;
color-scheme:light;background:var(--ground);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
font-variant-numeric:tabular-nums;text-align:left;overflow-wrap:anywhere}
@media (prefers-color-scheme:dark){.sidflow{--ground:#15181b;--ink:#e4e7ea;--soft:#9aa4ad;--line:#2c3237;
--wash:#1e2327;--accent:#5db4ea;--bar:#4195cb;--warn:#f0955f;--good:#57c79f;color-scheme:dark}
.sidflow img{filter:invert(1) hue-rotate(180deg)}}
.sidflow img{max-width:100%}
#flyte-frame-container>div>.sidflow{margin:-2rem}
.sidflow *{box-sizing:border-box}
.sidflow>div{max-width:1120px;margin:0 auto;padding:48px 32px 72px}
.sidflow h1{font-size:28px;line-height:1.2;font-weight:650;letter-spacing:-.012em;margin:0}
.sidflow .lead{color:var(--soft);font-size:16px;max-width:46em;margin:10px 0 0}
.sidflow section{margin-top:52px}
.sidflow h2{font-size:18px;line-height:1.3;font-weight:650;margin:0}
.sidflow h3{font-size:14px;line-height:1.4;font-weight:600;margin:0 0 6px}
.sidflow p{margin:12px 0 0;max-width:56em}
.sidflow .note{color:var(--soft);font-size:13.5px;margin:4px 0 0}
.sidflow .body{margin-top:18px}
.sidflow .body>*+*{margin-top:18px}
.sidflow .soft{color:var(--soft)}
.sidflow .warn{color:var(--warn)}
.sidflow .best{color:var(--good)!important}
.sidflow .accent{color:var(--accent);font-weight:600}
.sidflow code{font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
.sidflow .badge{display:inline-block;font-size:13px;font-weight:600;padding:2px 10px;border:1px solid currentColor;
border-radius:99px}
.sidflow dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:22px 24px;margin:30px 0 0}
.sidflow .body dl{margin-top:0}
.sidflow dl div{border-top:2px solid var(--line);padding-top:8px;display:flex;flex-direction:column-reverse;
justify-content:flex-end}
.sidflow dt{color:var(--soft);font-size:13px}
.sidflow dd{margin:0;font-size:23px;line-height:1.3;font-weight:600;letter-spacing:-.01em}
.sidflow .charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:30px 36px}
.sidflow .charts.two{grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr))}
.sidflow figure{margin:0;min-width:0}
.sidflow figcaption{font-size:14px;font-weight:600;line-height:1.4;margin-bottom:8px}
.sidflow figcaption .soft{font-weight:400;font-size:13px;display:block}
.sidflow svg{display:block;width:100%;height:auto;overflow:visible}
.sidflow svg text{font-size:11px;fill:var(--soft)}
.sidflow svg .strong{fill:var(--ink)}
.sidflow svg .fill{fill:var(--bar)}
.sidflow svg .none{fill:var(--line)}
.sidflow svg .axis{stroke:var(--line);stroke-width:1}
.sidflow svg .line{stroke:var(--accent);stroke-width:1.75;fill:none;stroke-linejoin:round;stroke-linecap:round}
.sidflow svg .kept{stroke:var(--ink);stroke-width:1;stroke-dasharray:3 3}
.sidflow svg .whisker{stroke:var(--accent);stroke-width:2;stroke-opacity:.45;stroke-linecap:round}
.sidflow .scroll{overflow-x:auto}
.sidflow table{border-collapse:collapse;font-size:14px;line-height:1.45;min-width:min(100%,620px);color:inherit}
.sidflow th{font-weight:500;font-size:12.5px;color:var(--soft);text-align:left;vertical-align:bottom;
padding:0 16px 7px 0;border-bottom:1px solid var(--line);overflow-wrap:normal}
.sidflow td{padding:7px 16px 7px 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:break-word}
.sidflow td code{white-space:nowrap}
.sidflow td bdi,.sidflow td .long{overflow-wrap:anywhere;white-space:normal}
.sidflow .number{text-align:right;white-space:nowrap}
.sidflow th:last-child,.sidflow td:last-child{padding-right:0}
.sidflow .cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:20px}
.sidflow .card{background:var(--wash);border-radius:10px;padding:16px 18px;font-size:14px;min-width:0}
.sidflow .card ol{margin:6px 0 0;padding:0;list-style:none}
.sidflow .card .note{margin-top:12px}
.sidflow .card li{display:flex;gap:10px;padding:2px 0;line-height:1.4}
.sidflow .card li>span:first-child{flex:none;color:var(--soft);min-width:1.6em}
.sidflow .card li.accent>span:first-child{color:inherit}
.sidflow .card li bdi{min-width:0}
.sidflow .card li .number{margin-left:auto;padding-left:8px;color:var(--soft)}
.sidflow details{margin:0}
.sidflow summary{cursor:pointer;padding:5px 8px;border-radius:6px;list-style:none;display:flex;gap:10px;
align-items:baseline}
.sidflow summary::-webkit-details-marker{display:none}
.sidflow summary::before{content:"";flex:none;width:6px;height:6px;border:solid var(--soft);
border-width:0 1.5px 1.5px 0;transform:translateY(-2px) rotate(-45deg)}
.sidflow details[open]>summary::before{transform:translateY(-3px) rotate(45deg)}
.sidflow summary:hover{background:var(--wash)}
.sidflow summary:focus-visible{outline:2px solid var(--accent)}
.sidflow .tree{font-size:14px}
.sidflow .tree .inside{margin-left:11px;padding-left:14px;border-left:1px solid var(--line)}
.sidflow .tree .code{flex:none;font-weight:600;min-width:2.4em}
.sidflow .tree .count{flex:none;color:var(--soft);min-width:6.2em;white-space:nowrap}
.sidflow .tree .examples{color:var(--soft);white-space:nowrap;overflow:hidden;text-overflow:ellipsis;min-width:0}
.sidflow .tree .leaf{display:flex;gap:14px;padding:3px 8px;align-items:baseline}
.sidflow .tree .leaf code{flex:none;color:var(--soft)}
.sidflow .tree .more{padding:3px 8px;color:var(--soft);font-size:13px}
@media (max-width:600px){.sidflow>div{padding:28px 18px 48px}.sidflow .tree .inside{margin-left:5px;padding-left:8px}}
"""
"""One accent colour, which readers with any kind of colour vision tell from grey, in two shades for the two grounds."""


class Section(NamedTuple):
    """A part of a page under a heading of its own."""

    title: str
    body: Iterable[str]
    """Html, or text that becomes escaped."""
    note: str = ""
    """What one must know to read it, below the heading."""


def page(title: str, sections: Sequence[Section], lead: str = "", top: Iterable[str] = ()) -> Html:
    """Lay out a page as a fragment that needs nothing beside it: no script, no font, no file.

    Parameters
    ----------
    title : str
        Heading.
    sections : sequence of Section
        What it holds, in order.
    lead : str
        One or two sentences below the heading.
    top : iterable of str
        What stands before the first section, usually ``facts``.
    """
    return tag(
        "div.sidflow",
        tag("style", Html(STYLE)),
        tag(
            "div",
            tag("h1", title),
            tag("p.lead", lead) if lead else "",
            *top,
            *map(_section, sections),
        ),
    )


def _section(section: Section) -> Html:
    note = tag("p.note", section.note) if section.note else ""
    return tag("section", tag("h2", section.title), note, tag("div.body", *section.body))


def document(title: str, fragment: Html) -> str:
    """Return a page as a whole document, to be opened as a file."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title>"
        "<style>body{margin:0}.sidflow{min-height:100vh}</style></head>"
        f"<body>{fragment}</body></html>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Set out figures large, each above what it is: (what, figure)."""
    return tag("dl", *(tag("div", tag("dt", what), tag("dd", figure)) for what, figure in pairs))


def paragraph(sentence: str) -> Html:
    """Return a paragraph."""
    return tag("p", sentence)


def badge(word: str, *, warn: bool = False) -> Html:
    """Set one word apart, in the colour of warnings if it is one."""
    return tag("p", tag("span.badge warn" if warn else "span.badge accent", word))


def beside(charts: Iterable[str], *, two: bool = False) -> Html:
    """Set charts side by side, three a row where there is room, or two."""
    return tag("div.charts two" if two else "div.charts", *charts)


def cards(each: Iterable[str]) -> Html:
    """Set small texts side by side, each on a ground of its own."""
    return tag("div.cards", *(tag("div.card", one) for one in each))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> Html:
    """Return a table.

    Parameters
    ----------
    titles : sequence of str
        Heads of the columns.
    rows : iterable of sequence of str
        Html, or text that is escaped.
    numbers : iterable of int
        Columns that are aligned right.
    """
    right = set(numbers)

    def line(kind: str, cells: Sequence[str]) -> Html:
        return tag(
            "tr", *(tag(f"{kind}.number" if i in right else kind, cell) for i, cell in enumerate(cells))
        )

    body = join(line("td", row) for row in rows)
    return tag("div.scroll", tag("table", tag("thead", line("th", titles)), tag("tbody", body)))
