"""Lengths of SIDs: who has short ones, and how many events of a user's history a budget of symbols then holds.

Shapes: N items, L levels. A SID of l codes is written in l + 1 symbols, its suffix among them.
"""

import polars as pl
import torch
from torch import Tensor

from components.artifacts import CollisionReport, SidTable
from components.config import require

LENGTHS = CollisionReport.SCHEMAS["lengths"]
DECILES = CollisionReport.SCHEMAS["deciles"]
TENTHS = 10
EQUAL = 0.1
"""Codes by which mean lengths by item and by interaction may differ and still count as equal. Where items are sampled
uniformly, so that popularity cannot matter, they differ by up to .06; the smallest published effect is .2."""
ONE_LENGTH = 0.95
"""Share of items above which one length is that of next to all items."""


def code_counts(table: SidTable) -> pl.Series:
    """Return the number of codes of every item."""
    return table.codes["codes"].list.len().cast(pl.Int64).alias("codes")


def count_lengths(table: SidTable, events: Tensor | None) -> pl.DataFrame:
    """Count items and interactions by number of codes, from 1 to L: codes, items, events.

    Parameters
    ----------
    table : SidTable
        The table.
    events : Tensor or None
        (N,) interactions of each item; None: ``events`` is null.
    """
    every = pl.select(codes=pl.int_range(1, len(table.codebook_sizes) + 1))
    counts = _by_item(table, events).group_by("codes").agg(items=pl.len(), events=pl.col("events").sum())
    known = pl.lit(events is not None)
    return every.join(counts, on="codes", how="left", maintain_order="left").select(
        pl.col("codes").cast(LENGTHS["codes"]),
        pl.col("items").fill_null(0).cast(LENGTHS["items"]),
        pl.when(known).then(pl.col("events").fill_null(0)).cast(LENGTHS["events"]).alias("events"),
    )


def popularity_deciles(table: SidTable, events: Tensor) -> pl.DataFrame:
    """Cut the items into tenths by their interactions, the most popular first: decile, items, events, mean codes.

    Items of equal interactions stand in item-id order. A catalogue of fewer than ten items has fewer tenths.

    Parameters
    ----------
    table : SidTable
        The table.
    events : Tensor
        (N,) interactions of each item.
    """
    ranked = _by_item(table, events).sort("events", descending=True, maintain_order=True)
    return (
        ranked.with_columns(decile=pl.int_range(pl.len()) * TENTHS // pl.len() + 1)
        .group_by("decile", maintain_order=True)
        .agg(items=pl.len(), events=pl.col("events").sum(), codes=pl.col("codes").mean())
        .select(pl.col(name).cast(dtype) for name, dtype in DECILES.items())
    )


def lengths_differ(report: CollisionReport) -> bool:
    """Say whether SIDs of this report have more than one length."""
    return len(report.lengths.filter(pl.col("items") > 0)) > 1


def mean_lengths(table: SidTable, events: Tensor | None) -> dict[str, float]:
    """Return mean codes by item, and by interaction where interactions are given.

    Parameters
    ----------
    table : SidTable
        The table.
    events : Tensor or None
        (N,) interactions of each item, not all 0.
    """
    lengths_N = torch.from_numpy(code_counts(table).to_numpy(writable=True))
    figures = {"codes_per_item": int(lengths_N.sum()) / len(lengths_N)}
    if events is not None:
        figures["codes_per_interaction"] = int((lengths_N * events).sum()) / int(events.sum())
    return figures


def history_figures(table: SidTable, sequences: pl.Series, token_budget: int) -> dict[str, float]:
    """Say how many symbols histories have, and how many whole events a budget of symbols holds.

    Parameters
    ----------
    table : SidTable
        The table.
    sequences : Series
        List[UInt32], each user's item ids in time order.
    token_budget : int
        Symbols, suffixes included.

    Returns
    -------
    dict
        Means over users: ``tokens_per_history``, symbols of all events of a user; ``events_in_budget``, the latest
        events whose symbols fit together, and ``events_in_budget_full_length``, the same if every SID had L codes;
        ``histories_cut``, the share of users of whom not all events fit.

    Raises
    ------
    ValueError
        There is no user, or a sequence has an item that the table lacks.
    """
    require(len(sequences) > 0, "no sequences: give one a user, or None")
    # A user without events is explode's null.
    events = pl.DataFrame({"item": sequences}).with_row_index("user").explode("item").drop_nulls()
    highest = int(events["item"].to_numpy().max(initial=0))
    require(
        highest < table.num_items,
        f"a sequence has item {highest}, the SidTable {table.num_items} items: they are of different catalogues",
    )
    longest = len(table.codebook_sizes)
    users = (
        events.select("user", symbols=(code_counts(table) + 1).gather(events["item"]))
        .with_columns(since=pl.col("symbols").cum_sum(reverse=True).over("user"))
        .group_by("user")
        .agg(
            pl.col("symbols").sum(),
            fit=(pl.col("since") <= token_budget).sum(),
            at_full_length=pl.min_horizontal(pl.len(), pl.lit(token_budget // (longest + 1))),
        )
    )
    sums = {
        "tokens_per_history": users["symbols"].sum(),
        "events_in_budget": users["fit"].sum(),
        "events_in_budget_full_length": users["at_full_length"].sum(),
        "histories_cut": (users["symbols"] > token_budget).sum(),
    }
    return {name: int(value) / len(sequences) for name, value in sums.items()}


def describe_lengths(lengths: pl.DataFrame, figures: dict[str, float], token_budget: int) -> dict[str, str]:
    """Say in words what the figures mean, where lengths differ.

    Parameters
    ----------
    lengths : DataFrame
        As ``count_lengths`` returns it.
    figures : dict
        Of ``mean_lengths`` and ``history_figures``.
    token_budget : int
        Symbols that ``events_in_budget`` is about.
    """
    used = lengths.filter(pl.col("items") > 0)
    if len(used) < 2:
        return {}
    by_item, by_interaction = figures["codes_per_item"], figures.get("codes_per_interaction")
    words = f"items have {used['codes'][0]} to {used['codes'][-1]} codes, {by_item:.2f} on average"
    if by_interaction is not None:
        gap = by_interaction - by_item
        than = "as long as" if abs(gap) < EQUAL else "shorter than" if gap < 0 else "longer than"
        words += f" and {by_interaction:.2f} by interaction: SIDs of popular items are {than} those of others"
    frequent = used.sort("items", descending=True).row(0, named=True)
    share = frequent["items"] / used["items"].sum()
    if share > ONE_LENGTH:
        words += (
            f"; but {share:.1%} of the items have length {frequent['codes']}, so that lengths tell little"
        )
    found = {"codes_per_item": words}
    if "events_in_budget" in figures:
        fit, full = figures["events_in_budget"], figures["events_in_budget_full_length"]
        found["events_in_budget"] = (
            f"{token_budget} symbols hold the latest {fit:.1f} events of a user, and {full:.1f} if every SID had "
            f"{len(lengths)} codes; {figures['histories_cut']:.1%} of the users have more than fits: "
            + _gain(fit, full)
        )
    return found


def _gain(fit: float, full: float) -> str:
    if full == 0:
        return "a SID of full length does not fit at all"
    more = fit / full - 1
    if more < 0.01:
        return "short SIDs hardly let a recommender see more of the past"
    return f"short SIDs let a recommender see {more:.0%} more events"


def _by_item(table: SidTable, events: Tensor | None) -> pl.DataFrame:
    """One row an item: codes, events."""
    counts = torch.zeros(table.num_items, dtype=torch.long) if events is None else events
    return pl.DataFrame({"codes": code_counts(table), "events": counts.numpy()})
