"""Semantic IDs to look at: a tree of prefixes, how codes are used, and who shares them.

Shapes: N items, L levels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import polars as pl

from components.artifacts import CollisionReport, ItemCatalog, SequenceSplit, SidTable
from components.config import require
from components.data.splits import training_counts
from components.metrics.lengths import lengths_differ
from components.metrics.sids import count_usage, describe_levels, group_items, group_sizes
from components.pages.figures import Curve, Strip, bars, heat_strips, lines
from components.pages.html import Html, check_catalog, item_names, number, percent, tag, words
from components.pages.page import Section, badge, beside, facts, page, table

PREFIXES = 800
"""Prefixes that a tree shows, over all levels."""
LEAVES = 4
"""Items shown below a prefix that are below none of the shown longer ones."""
EXAMPLES = 3
"""Items named beside a prefix."""
TREE_NAME = 44
"""Characters of a name in the tree."""
GROUPS = 30
"""Groups of colliding items that are shown, and below how many of their items."""
MEMBERS = 5


class _Prefix(NamedTuple):
    """A prefix that is shown."""

    codes: tuple[int, ...]
    items: int
    examples: list[int]
    """Ids of its most popular items."""
    leaves: list[int]
    """Ids of the most popular items that are below no longer prefix that is shown."""
    num_leaves: int
    """How many of these there are."""


def sids_page(table_: SidTable, catalog: ItemCatalog, split: SequenceSplit) -> Html:
    """Show a table as a tree of prefixes with examples, and how its codes are used.

    Of large tables the largest prefixes are shown, with what was left out said: a page is about a megabyte at most.

    Raises
    ------
    ValueError
        Table, catalogue and split are of different items.
    """
    check_catalog(catalog, split.catalog, "sids_page")
    require(
        table_.num_items == catalog.num_items == split.num_items,
        f"sids_page: {table_.num_items} SIDs, {catalog.num_items} items, a split of {split.num_items}: "
        "take them from one run",
    )
    groups = group_items(table_)
    alone = int((groups["size"] == 1).sum())
    figures = [
        ("items", number(table_.num_items)),
        ("different strings of codes", number(len(groups))),
        ("items with codes of their own", percent(alone / table_.num_items)),
        ("most items of one string", number(int(groups["size"][0]))),
        ("highest suffix", f"{table_.codes['suffix'].to_numpy().max()} of {table_.suffix_size - 1}"),
    ]
    sizes = " × ".join(map(str, table_.codebook_sizes))
    return page(
        "Semantic IDs",
        [
            Section("Use of the codes", [_usage_map(table_)]),
            Section(
                "Tree of prefixes",
                [tag("div.tree", *_tree(table_, catalog, split))],
                "The largest prefix first. Beside each code: its items, and the most popular of them. Open one to see "
                "what follows; at the end of a branch stand whole SIDs, codes and suffix.",
            ),
        ],
        f"Codebooks of {sizes}{', one shared by all levels' if table_.shared else ''}; the suffix tells items of equal "
        "codes apart.",
        [facts(figures)],
    )


def _usage_map(table_: SidTable) -> Html:
    usage = count_usage(table_)
    levels = describe_levels(table_, usage)
    return heat_strips(
        "Items by code, in the order of the codebook",
        [
            Strip(
                f"level {row['level']}",
                usage.filter(level=row["level"])["count"].to_numpy().astype(float),
                f"{row['codes_in_use']} of {row['codebook_size']} in use, perplexity {row['perplexity']:.1f}",
            )
            for row in levels.iter_rows(named=True)
        ],
        "Shades are loads relative to an even spread over the level's codes.",
    )


def _tree(table_: SidTable, catalog: ItemCatalog, split: SequenceSplit) -> list[Html]:
    """Write the prefixes that are shown, one in the other; the root is no prefix and stands open."""
    prefixes = _prefixes(table_, split)
    ids = sorted({item for prefix in prefixes for item in prefix.examples + prefix.leaves})
    names = dict(zip(ids, item_names(catalog, ids, TREE_NAME), strict=True))
    rows = table_.codes[ids]
    sids = {
        item: "-".join(map(str, [*codes, suffix]))
        for item, codes, suffix in zip(ids, rows["codes"], rows["suffix"], strict=True)
    }
    children: dict[tuple[int, ...], list[_Prefix]] = {}
    for prefix in prefixes[1:]:
        children.setdefault(prefix.codes[:-1], []).append(prefix)

    def inside(prefix: _Prefix) -> list[Html]:
        longer = [branch(child) for child in children.get(prefix.codes, [])]
        leaves = [tag("div.leaf", tag("code", sids[item]), names[item]) for item in prefix.leaves]
        more = prefix.num_leaves - len(leaves)
        return [*longer, *leaves, *([tag("div.more", f"and {more:,} more")] if more else [])]

    def branch(prefix: _Prefix) -> Html:
        told = ", ".join(names[item] for item in prefix.examples)
        line = tag(
            "summary",
            tag("span.code", str(prefix.codes[-1])),
            tag("span.count", f"{prefix.items:,} items"),
            tag("span.examples", Html(told)),
        )
        return tag("details", line, tag("div.inside", *inside(prefix)))

    return inside(prefixes[0])


def _prefixes(table_: SidTable, split: SequenceSplit) -> list[_Prefix]:
    """Find the prefixes that are shown: the empty one, then those that most items share, two at least, largest first.

    No prefix has more items than a shorter one of its own, so all of these are among them.
    """
    events_N = training_counts(split, table_.num_items, "the order of examples")
    codes = [f"code{level}" for level in range(len(table_.codebook_sizes))]
    code = [pl.col("codes").list.get(level, null_on_oob=True).alias(name) for level, name in enumerate(codes)]
    items = (
        table_.codes.select("item_id", *code, events=pl.Series(events_N))
        .sort("events", "item_id", descending=[True, False])
        .select("item_id", *codes)
    )
    rows, found = items, []
    for level in range(len(codes)):
        prefix = codes[: level + 1]
        found.append(_count(rows.drop_nulls(codes[level]), prefix).filter(pl.col("items") > 1))
        rows = rows.join(found[-1].select(prefix), on=prefix, how="semi", maintain_order="left")
    shown = (
        pl.concat(found, how="diagonal")
        .sort("items", "level", descending=[True, False], maintain_order=True)
        .head(PREFIXES)
        .with_row_index("place", offset=1)
    )
    items = items.with_columns(place=pl.lit(0, pl.UInt32))
    for level in range(len(codes)):
        prefix = codes[: level + 1]
        longer = shown.filter(level=level + 1).select(*prefix, longer="place")
        items = items.join(longer, on=prefix, how="left", maintain_order="left").select(
            pl.exclude("place", "longer"), place=pl.coalesce("longer", "place")
        )
    leaves = {
        place: (first, count)
        for place, first, count in items.group_by("place")
        .agg(pl.col("item_id").head(LEAVES), count=pl.len())
        .iter_rows()
    }
    return [_Prefix((), len(items), [], *leaves.get(0, ([], 0)))] + [
        _Prefix(
            tuple(row[name] for name in codes if row[name] is not None),
            row["items"],
            row["examples"],
            *leaves.get(row["place"], ([], 0)),
        )
        for row in shown.iter_rows(named=True)
    ]


def _count(rows: pl.DataFrame, prefix: Sequence[str]) -> pl.DataFrame:
    """Count the items of each prefix, and name the first: the largest, as many as a tree shows."""
    return (
        rows.group_by(prefix)
        .agg(items=pl.len(), examples=pl.col("item_id").head(EXAMPLES))
        .sort("items", *prefix, descending=[True, *(False for _ in prefix)])
        .head(PREFIXES)
        .with_columns(level=pl.lit(len(prefix)))
    )


def collisions_page(report: CollisionReport, catalog: ItemCatalog) -> Html:
    """Show who shares codes with whom, what the figures mean, and the verdict."""
    figures = report.figures
    top = [
        ("items", number(figures["items"])),
        ("share their codes", percent(figures["collision_rate"])),
        ("strings of codes in use", number(figures["distinct_sids"])),
        ("items of the largest group", number(figures["largest_group"])),
        ("codes an item", number(round(figures["codes_per_item"], 2))),
    ]
    charts = [_group_sizes(report), *_reconstruction(report), *_lengths(report)]
    verdict = badge(report.verdict, warn=report.verdict != "healthy")
    return page(
        "Collisions",
        [
            Section("What the figures mean", [_bands(report)]),
            Section(
                "Levels",
                [_levels(report)],
                "Over the items that reach the level; perplexity counts codes in even use.",
            ),
            Section("Pictures", [beside(charts)]),
            Section("Who shares codes", [_groups(report, catalog)], _groups_note(report)),
        ],
        "Items collide when all their codes are equal; only their suffix then tells them apart.",
        [verdict, facts(top)],
    )


def _bands(report: CollisionReport) -> Html:
    """Put each sentence beside its figure; figures of which nothing is said follow."""
    silent = dict.fromkeys(name for name in report.figures if name not in report.bands)
    return table(
        ["figure", "value", "meaning"],
        [
            [
                words(name),
                number(report.figures[name]) if name in report.figures else "",
                (sentence or "").removeprefix(f"{words(name)}: "),
            ]
            for name, sentence in (report.bands | silent).items()
        ],
        [1],
    )


def _levels(report: CollisionReport) -> Html:
    return table(
        ["level", "items", "codes in use", "perplexity", "perplexity below a prefix", "largest share"],
        [
            [
                str(row["level"]),
                number(row["items"]),
                f"{row['codes_in_use']:,} of {row['codebook_size']:,}",
                f"{row['perplexity']:.1f}",
                f"{row['perplexity_in_prefix']:.1f}",
                percent(row["largest_share"]),
            ]
            for row in report.levels.iter_rows(named=True)
        ],
        range(1, 6),
    )


def _group_sizes(report: CollisionReport) -> Html:
    sizes = group_sizes(report)
    last = int(sizes["size"].max())  # type: ignore[arg-type]
    starts = [1, 2, 3, *(2**power for power in range(2, last.bit_length()))]
    starts = [start for start in starts if start <= last]
    ends = [*(start - 1 for start in starts[1:]), last]
    counts = [
        int(sizes.filter(pl.col("size").is_between(low, high))["items"].sum())
        for low, high in zip(starts, ends, strict=True)
    ]
    labels = [f"{low}" if low == high else f"{low}–{high}" for low, high in zip(starts, ends, strict=True)]
    return bars(
        "Items by size of their group", counts, labels, "1: codes of their own", ticks=8, unit="items"
    )


def _reconstruction(report: CollisionReport) -> Iterator[Html]:
    known = report.levels.drop_nulls("reconstruction")
    if len(known):
        yield lines(
            "Reconstruction",
            [
                Curve(label, known["level"].to_list(), known[name].to_list())
                for label, name in (("by item", "reconstruction"), ("by event", "reconstruction_draw"))
                if not known[name].null_count()
            ],
            "squared distance, 0 to 4, after so many codes",
            from_zero=True,
        )


def _lengths(report: CollisionReport) -> Iterator[Html]:
    if lengths_differ(report):
        labels = list(map(str, report.lengths["codes"]))
        yield bars("Items by number of codes", report.lengths["items"].to_list(), labels, unit="items")
        if len(report.deciles):
            yield lines(
                "Codes by popularity",
                [Curve("", report.deciles["decile"].to_list(), report.deciles["codes"].to_list())],
                "mean codes of each tenth of the items, the most popular first",
            )


def _groups_note(report: CollisionReport) -> str:
    groups = len(report.groups)
    return (
        f"The {min(groups, GROUPS)} largest of {groups:,} groups."
        if groups
        else "No two items share their codes."
    )


def _groups(report: CollisionReport, catalog: ItemCatalog) -> Html:
    """List the largest groups with the names of their items."""
    shown = report.groups.head(GROUPS).with_columns(pl.col("item_ids").list.head(MEMBERS))
    ids = shown["item_ids"].explode().drop_nulls().to_list()
    names = dict(zip(ids, item_names(catalog, ids), strict=True))

    def members(row: Sequence[int], size: int) -> Html:
        more = [tag("span.soft", f"and {size - len(row):,} more")] if size > len(row) else []
        return Html(" · ".join([*(names[item] for item in row), *more]))

    return table(
        ["codes", "items", "who"],
        [
            [
                tag("code", "-".join(map(str, row["codes"]))),
                number(row["size"]),
                members(row["item_ids"], row["size"]),
            ]
            for row in shown.iter_rows(named=True)
        ],
        [1],
    )
