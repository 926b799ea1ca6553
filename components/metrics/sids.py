"""Health of a SID table: who shares codes, how evenly they are used, what they keep, and when to stop the run.

Usage diagnoses collapse and does not rank tokenizers: among healthy tables it says little about
recommendation quality. Levels count from 1; entropies are in nats. How long SIDs are is described in ``lengths.py``.

Shapes: N items, L levels.
"""

from typing import Literal

import polars as pl
import torch
from pydantic import Field
from torch import Tensor

from components.artifacts import CollisionReport, ContentEmbeddings, ItemCatalog, SidTable
from components.config import Config, require
from components.folders import Provenance
from components.metrics.lengths import (
    DECILES,
    count_lengths,
    describe_lengths,
    history_figures,
    mean_lengths,
    popularity_deciles,
)
from components.metrics.reconstruction import (
    add_to_levels,
    check_errors,
    describe_reconstruction,
    mean_reconstruction,
)

GROUPS = CollisionReport.SCHEMAS["groups"]
LEVELS = CollisionReport.SCHEMAS["levels"]
TEXTS_SHOWN = 20
"""Largest groups whose item texts a report carries."""
COLLAPSED_AT = "collapsed_at_epoch"
"""Figure of a checkpoint whose training a collapse ended: the epoch of the collapse."""
SMALL_GROUP = 4
"""Items that may share their codes in a catalogue of any size."""

COLLISION_BANDS = (
    (0.1, "few items share their codes"),
    (0.65, "usual for text embeddings: the suffix tells these items apart"),
    (0.8, "high: the recommender must guess many items by their suffix, which carries no content"),
    (1.01, "very high: codes say little about the item; use more or larger codebooks, or balance them"),
)
EVENNESS_BANDS = (
    (0.05, "next to all items share a few codes"),
    (0.2, "a small part of the codebook does most of the work"),
    (0.5, "uneven, usual for deeper levels"),
    (1.01, "well spread"),
)


class CollapseError(RuntimeError):
    """A SID table whose codes no longer tell items apart."""


class CollisionConfig(Config):
    """What counts as collapse (the run fails) and as worth a look (the verdict says watch)."""

    on_collapse: Literal["fail", "report"] = "fail"
    """fail: a collapsed table ends the run. report: the verdict says collapsed and the run goes on, for experiments
    in which collapse is a result."""

    min_evenness: float = Field(0.05, ge=0, le=1)
    """Collapse below this, on any level that enough items reach: (perplexity - 1) / (reachable codes - 1), 1 when all
    are used alike."""
    min_level_share: float = Field(0.05, ge=0, le=1)
    """Where SIDs differ in length, a level that fewer than this share of the items reach, or four items at most, is no
    collapse: the SIDs of nearly all items end above it. With more than four items it can still be worth a look."""
    max_collision_rate: float = Field(0.95, gt=0, le=1)
    """Collapse above this share of items that share their codes."""
    max_group_share: float = Field(0.25, gt=0, le=1)
    """Collapse when one group of equal codes holds more than this share of the catalogue, and over four items:
    in a catalogue of a few items a pair is a large share and no collapse."""
    watch_evenness: float = Field(0.2, ge=0, le=1)
    """Watch below this evenness of a level."""
    watch_collision_rate: float = Field(0.8, gt=0, le=1)
    """Watch above this share of items that share their codes."""
    token_budget: int = Field(80, ge=1)
    """Symbols, suffixes included, of which the report says how many of a user's latest events they hold."""


def analyze(
    table: SidTable,
    catalog: ItemCatalog | None,
    config: CollisionConfig,
    *,
    events: Tensor | None = None,
    embeddings: ContentEmbeddings | None = None,
    errors: Tensor | None = None,
    sequences: pl.Series | None = None,
) -> CollisionReport:
    """Describe a SID table: collisions of content codes, usage of every level, lengths, and a verdict.

    Codes may differ in length; a level describes the items that reach it.

    Parameters
    ----------
    table : SidTable
        The table. Its suffixes do not count: two items collide when their content codes are equal.
    catalog : ItemCatalog, optional
        Gives the largest groups their texts.
    config : CollisionConfig
        Thresholds of the verdict.
    events : Tensor, optional
        (N,) interactions of each item; adds how much of the traffic goes to colliding items, and means by
        interaction. All 0 is as good as not given.
    embeddings : ContentEmbeddings, optional
        Adds the mean cosine of items that share codes, beside that of all pairs.
    errors : Tensor, optional
        (N, L) squared distance, in [0, 4], between each item's unit vector and what its first l codes decode to; NaN
        where it has fewer. Adds how well the codes reconstruct.
    sequences : Series, optional
        List[UInt32], each user's item ids in time order; adds how long histories are in symbols.

    Raises
    ------
    ValueError
        Catalogue, events, embeddings, errors or sequences are of other items than the table; an error is missing,
        is there beyond an item's last code, or is no squared distance of unit vectors.
    """
    for name, count in (
        ("catalogue", catalog and catalog.num_items),
        ("events", None if events is None else len(events)),
        ("embeddings", embeddings and len(embeddings.matrix)),
        ("errors", None if errors is None else len(errors)),
    ):
        require(
            count is None or count == table.num_items,
            f"SidTable has {table.num_items} items, {name} {count}: they are of different catalogues",
        )
    if events is not None and int(events.sum()) == 0:
        events = None
    groups = group_items(table)
    usage = count_usage(table)
    levels = describe_levels(table, usage)
    lengths = count_lengths(table, events)
    shared = groups.filter(pl.col("size") > 1)
    colliding_items = int(shared["size"].sum())
    figures = {
        "items": float(table.num_items),
        "distinct_sids": float(len(groups)),
        "colliding_items": float(colliding_items),
        "collision_rate": colliding_items / table.num_items,
        "colliding_groups": float(len(shared)),
        "largest_group": float(groups["size"][0]),
    }
    figures |= mean_lengths(table, events)
    if sequences is not None:
        figures |= history_figures(table, sequences, config.token_budget)
    if errors is not None:
        check_errors(table, errors)
        levels = add_to_levels(levels, errors, events)
        figures |= mean_reconstruction(table, errors, events)
    if events is not None:
        colliding = torch.from_numpy(shared["item_ids"].explode().to_numpy().astype("int64"))
        figures["collision_share_of_events"] = int(events[colliding].sum()) / int(events.sum())
    if embeddings is not None and len(shared):
        figures["cosine_in_groups"], figures["cosine_of_all_pairs"] = _cosines(shared, embeddings.matrix)
    collapse = _collapse(levels, figures, config)
    return CollisionReport(
        groups=_with_texts(shared, catalog),
        usage=usage,
        levels=levels,
        lengths=lengths,
        deciles=DECILES.to_frame() if events is None else popularity_deciles(table, events),
        figures=figures,
        bands=describe(levels, figures) | describe_lengths(lengths, figures, config.token_budget),
        verdict="collapsed" if collapse else "watch" if _watch(levels, figures, config) else "healthy",
        sids=table.fingerprint,
        provenance=Provenance(config=config.model_dump(mode="json"), parents={"SidTable": table.fingerprint}),
    )


def gate(report: CollisionReport, config: CollisionConfig) -> None:
    """Let a healthy table pass, and any table where collapse is only reported.

    Raises
    ------
    CollapseError
        The table has collapsed; the message names every level and figure beyond its threshold.
    """
    found = _collapse(report.levels, report.figures, config)
    if found and config.on_collapse == "fail":
        raise CollapseError(
            "the semantic IDs have collapsed: "
            + "; ".join(found)
            + ". Lower the tokenizer's learning rate, revive dead codes, balance assignments, or lower the price "
            "of a dvae's codes; "
            "thresholds are settings of the collision stage"
        )


def group_items(table: SidTable) -> pl.DataFrame:
    """Group items by their content codes: codes, size, item_ids; largest first, then by first item."""
    return (
        table.codes.group_by("codes")
        .agg(size=pl.len().cast(pl.UInt32), item_ids=pl.col("item_id").sort())
        .sort(pl.col("size"), pl.col("item_ids").list.first(), descending=[True, False])
    )


def group_sizes(report: CollisionReport) -> pl.DataFrame:
    """Count groups and items by group size, 1 for items that share with nobody: size, groups, items."""
    alone = report.figures["items"] - report.figures["colliding_items"]
    sizes = report.groups.group_by("size").agg(groups=pl.len().cast(pl.UInt32)).sort("size")
    single = pl.DataFrame({"size": [1], "groups": [int(alone)]}, schema=sizes.schema)
    return pl.concat([single, sizes]).with_columns(items=pl.col("size") * pl.col("groups"))


def count_usage(table: SidTable) -> pl.DataFrame:
    """Count the items of every code of every level, codes that nobody uses included: level, code, count."""
    every = pl.concat(
        pl.select(level=pl.lit(level, pl.UInt8), code=pl.int_range(size, dtype=pl.UInt16))
        for level, size in enumerate(table.codebook_sizes, start=1)
    )
    counts = _symbols(table).group_by("level", "code").agg(count=pl.len().cast(pl.UInt32))
    joined = every.join(counts, on=["level", "code"], how="left", maintain_order="left")
    return joined.with_columns(pl.col("count").fill_null(0))


def describe_levels(table: SidTable, usage: pl.DataFrame) -> pl.DataFrame:
    """Describe the use of each level, over the items that reach it.

    ``perplexity`` is exp(entropy), the number of codes that would spread the items as evenly.
    ``prefixes`` counts the distinct code strings above the level, and ``perplexity_in_prefix`` is the
    perplexity among the items below one of them, averaged over items. 0 where no item reaches the level.
    ``reconstruction`` is not known from a table, and null.
    """
    share = pl.col("count") / pl.col("count").sum().over("level")
    used = usage.filter(pl.col("count") > 0).with_columns(share=share)
    overall = used.group_by("level", maintain_order=True).agg(
        codes_in_use=pl.len().cast(pl.UInt32), entropy=_entropy("share"), largest_share=pl.col("share").max()
    )
    inside = (
        _symbols(table)
        .group_by("level", "prefix", "code")
        .agg(count=pl.len(), first=pl.col("item_id").min())
        .sort("level", "first")  # sums of floats depend on the order; equal tables must give equal bytes
        .with_columns(share=pl.col("count") / pl.col("count").sum().over("level", "prefix"))
        .group_by("level", "prefix", maintain_order=True)
        .agg(items=pl.col("count").sum(), perplexity=_entropy("share").exp())
        .group_by("level", maintain_order=True)
        .agg(
            prefixes=pl.len().cast(pl.UInt32),
            perplexity_in_prefix=(pl.col("items") * pl.col("perplexity")).sum() / pl.col("items").sum(),
        )
    )
    levels = usage.group_by("level", maintain_order=True).agg(
        items=pl.col("count").sum(),
        codebook_size=pl.len().cast(pl.UInt32),
        reconstruction=pl.lit(None, pl.Float64),
        reconstruction_draw=pl.lit(None, pl.Float64),
    )
    known = pl.exclude("reconstruction", "reconstruction_draw")
    return (
        levels.join(overall, on="level", how="left", maintain_order="left")
        .join(inside, on="level", how="left", maintain_order="left")
        .with_columns(perplexity=pl.col("entropy").exp())
        .with_columns(known.fill_null(0))
        .select(LEVELS.names())
    )


def evenness(levels: pl.DataFrame) -> pl.Series:
    """Say how evenly each level uses the codes it can reach: 0 for one code only, 1 for all alike.

    A level that fewer items than codes reach can use no more codes than items. Null where fewer than two items
    arrive: there is nothing to spread.
    """
    reachable = pl.min_horizontal("codebook_size", "items").cast(pl.Float64)
    return levels.select(
        evenness=pl.when(reachable > 1).then((pl.col("perplexity") - 1) / (reachable - 1))
    ).to_series()


def describe(levels: pl.DataFrame, figures: dict[str, float]) -> dict[str, str]:
    """Say in words what each figure means."""
    rate, largest = figures["collision_rate"], int(figures["largest_group"])
    words = {
        "collision_rate": f"{rate:.1%} of {figures['items']:,.0f} items share their codes: "
        + _band(rate, COLLISION_BANDS),
        "largest_group": f"{largest} items share one string of codes: their suffix must tell {largest} apart"
        if largest > 1
        else "no two items share a string of codes",
    }
    for row, even in zip(levels.iter_rows(named=True), evenness(levels), strict=True):
        part = "" if row["items"] == figures["items"] else f" by the {row['items']:,} items that reach it"
        use = (
            f"level {row['level']}: {row['codes_in_use']} of {row['codebook_size']} codes in use{part}, "
            f"perplexity {row['perplexity']:.1f}"
        )
        meaning = "fewer than two items reach it" if even is None else _band(even, EVENNESS_BANDS)
        words[f"level_{row['level']}"] = f"{use}: {meaning}"
    if "collision_share_of_events" in figures:
        share = figures["collision_share_of_events"]
        than = "about as often as"
        if share > 1.1 * rate or share < 0.9 * rate:
            than = "more often than" if share > rate else "less often than"
        words["collision_share_of_events"] = (
            f"{share:.1%} of interactions go to items that share their codes: "
            f"popular items collide {than} others"
        )
    if "cosine_in_groups" in figures:
        near, far = figures["cosine_in_groups"], figures["cosine_of_all_pairs"]
        alike = (near - far) / max(1 - far, 1e-9)
        words["cosine_in_groups"] = (
            f"items of equal codes have mean cosine {near:.2f}, any two items {far:.2f}: "
            f"collisions join {'near-equal' if alike > 0.75 else 'alike' if alike > 0.4 else 'unlike'} items"
        )
    if "reconstruction" in figures:
        words["reconstruction"] = describe_reconstruction(figures)
    return words


def _symbols(table: SidTable) -> pl.DataFrame:
    """One row a code of an item: item_id, level, prefix (the codes above), code."""
    return (
        table.codes.select("item_id", "codes", level=pl.int_ranges(pl.col("codes").list.len()))
        .explode("level")
        .select(
            "item_id",
            level=(pl.col("level") + 1).cast(pl.UInt8),
            prefix=pl.col("codes").list.head(pl.col("level")),
            code=pl.col("codes").list.get(pl.col("level")),
        )
    )


def _entropy(share: str) -> pl.Expr:
    """Nats of shares that are all above 0."""
    return -(pl.col(share) * pl.col(share).log()).sum()


def _cosines(shared: pl.DataFrame, x_ND: Tensor) -> tuple[float, float]:
    """Mean cosine of pairs that share codes, and of all pairs, from sums of vectors instead of pairs."""
    x_ND = torch.nn.functional.normalize(x_ND.double(), dim=1)
    owner = shared.with_row_index("group").select("group", "item_ids").explode("item_ids")
    members = torch.from_numpy(owner["item_ids"].to_numpy().astype("int64"))
    group = torch.from_numpy(owner["group"].to_numpy().astype("int64"))

    def mean_over_pairs(x_MD: Tensor, group_M: Tensor, count: int) -> float:
        sums_GD = torch.zeros(count, x_MD.shape[1], dtype=x_MD.dtype).index_add_(0, group_M, x_MD)
        sizes_G = torch.bincount(group_M, minlength=count)
        pairs = int((sizes_G * (sizes_G - 1)).sum())
        return float((sums_GD.square().sum() - x_MD.square().sum()) / pairs)

    everybody = torch.zeros(len(x_ND), dtype=torch.long)
    return mean_over_pairs(x_ND[members], group, len(shared)), mean_over_pairs(x_ND, everybody, 1)


def _with_texts(shared: pl.DataFrame, catalog: ItemCatalog | None) -> pl.DataFrame:
    """Add the item texts of the largest groups; other groups have none."""
    if catalog is None:
        texts = pl.Series("texts", [[]] * len(shared), dtype=GROUPS["texts"])
        return shared.with_columns(texts).select(GROUPS.names())
    shown = (
        shared.head(TEXTS_SHOWN)
        .explode("item_ids")
        .join(catalog.items, left_on="item_ids", right_on="item_id", how="left", maintain_order="left")
        .group_by("codes", maintain_order=True)
        .agg(texts="text")
    )
    joined = shared.join(shown, on="codes", how="left", maintain_order="left")
    return joined.with_columns(pl.col("texts").fill_null([])).select(GROUPS.names())


def _band(value: float, bands: tuple[tuple[float, str], ...]) -> str:
    return next(words for below, words in bands if value < below)


def _uneven(levels: pl.DataFrame, least: float, share: float) -> pl.DataFrame:
    """Return the levels that are used less evenly than ``least``, if enough items reach them.

    Enough is everybody, or more than a small group and this share of the items. Of few items no evenness can be told:
    three may agree by chance. And whatever codes they have there, the other items are as well told apart as before.
    """
    everybody = levels["items"].max()
    enough = (pl.col("items") > SMALL_GROUP) & (pl.col("items") >= share * everybody)  # type: ignore[operator]
    return levels.with_columns(evenness=evenness(levels)).filter(
        (pl.col("items") == everybody) | enough, pl.col("evenness") < least
    )


def _collapse(levels: pl.DataFrame, figures: dict[str, float], config: CollisionConfig) -> list[str]:
    """Name every figure beyond its threshold."""
    uneven = _uneven(levels, config.min_evenness, config.min_level_share)
    found = [
        f"level {row['level']}: perplexity {row['perplexity']:.2f} of {row['codebook_size']} codes "
        f"(evenness {row['evenness']:.3f}, wanted at least {config.min_evenness}); "
        f"{row['largest_share']:.0%} of its {row['items']:,} items have one code"
        for row in uneven.iter_rows(named=True)
    ]
    if figures["collision_rate"] > config.max_collision_rate:
        found.append(
            f"collision rate {figures['collision_rate']:.3f}, wanted at most {config.max_collision_rate}"
        )
    group_share = figures["largest_group"] / figures["items"]
    if figures["largest_group"] > SMALL_GROUP and group_share > config.max_group_share:
        found.append(
            f"largest group {figures['largest_group']:.0f} of {figures['items']:.0f} items "
            f"({group_share:.3f}), wanted at most {config.max_group_share}"
        )
    return found


def _watch(levels: pl.DataFrame, figures: dict[str, float], config: CollisionConfig) -> bool:
    low = len(_uneven(levels, config.watch_evenness, share=0)) > 0
    return low or figures["collision_rate"] > config.watch_collision_rate
