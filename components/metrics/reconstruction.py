"""How far items lie from what their codes decode to, code by code; errors come from ``tokenizers.prefixes``.

Shapes: N items, L levels.
"""

import polars as pl
import torch
from torch import Tensor

from components.artifacts import SidTable
from components.config import require
from components.metrics.lengths import code_counts

FARTHEST = 4.0
"""Squared distance of two unit vectors that point away from one another."""
ROUNDING = 1e-3
"""How far beyond ``FARTHEST`` rounding may carry it."""


def check_errors(table: SidTable, errors_NL: Tensor) -> None:
    """Refuse errors that are not one squared distance of unit vectors a code."""
    wanted = (table.num_items, len(table.codebook_sizes))
    require(tuple(errors_NL.shape) == wanted, f"errors are {tuple(errors_NL.shape)}, the codes {wanted}")
    known = (errors_NL >= 0) & (errors_NL <= FARTHEST + ROUNDING)
    reached = _reached(table)
    wrong = torch.where(reached, ~known, ~errors_NL.isnan()).nonzero()
    if len(wrong):
        item, level = wrong[0].tolist()
        raise ValueError(
            f"errors: item {item} has {float(errors_NL[item, level])} at level {level + 1} and "
            f"{int(reached[item].sum())} codes: errors are squared distances of unit vectors, from 0 to 4, and NaN "
            "beyond an item's last code; compute them with the tokenizer and the codes of this table"
        )


def add_to_levels(levels: pl.DataFrame, errors_NL: Tensor, events: Tensor | None) -> pl.DataFrame:
    """Add the mean error of the items, and of the interactions, that reach each level."""
    reached_NL = ~errors_NL.isnan()
    zeroed_NL = errors_NL.double().nan_to_num()

    def means(weights_N: Tensor) -> pl.Series:
        mass_L = (reached_NL * weights_N[:, None]).sum(dim=0)
        sums_L = (zeroed_NL * weights_N[:, None]).sum(dim=0)
        # 0 / 0 where nobody gets: unknown, which a frame says as null
        return pl.Series((sums_L / mass_L).tolist(), dtype=pl.Float64).fill_nan(None)

    everybody = torch.ones(len(errors_NL), dtype=torch.long)
    drawn = pl.lit(None, pl.Float64) if events is None else means(events)
    return levels.with_columns(reconstruction=means(everybody), reconstruction_draw=drawn)


def mean_reconstruction(table: SidTable, errors_NL: Tensor, events: Tensor | None) -> dict[str, float]:
    """Mean error at each item's own last code, by item and by interaction."""
    last_N = torch.from_numpy(code_counts(table).to_numpy(writable=True)) - 1
    errors_N = errors_NL.double().gather(1, last_N[:, None]).squeeze(1)
    figures = {"reconstruction": float(errors_N.mean())}
    if events is not None:
        figures["reconstruction_draw"] = float((errors_N * events).sum() / events.sum())
    return figures


def describe_reconstruction(figures: dict[str, float]) -> str:
    """Say how far items are from what their codes decode to; of unit vectors the cosine is 1 - D / 2."""
    each, drawn = figures["reconstruction"], figures.get("reconstruction_draw")
    words = f"items lie {each:.3f} (mean cosine {1 - each / 2:.2f}) from what all their codes decode to"
    if drawn is None:
        return words + ": squared distance of unit vectors, from 0 to 4"
    than = (
        "as well as" if abs(drawn - each) <= 0.1 * each else "better than" if drawn < each else "worse than"
    )
    return (
        f"{words}, {drawn:.3f} (cosine {1 - drawn / 2:.2f}) by interaction, in squared distance of unit vectors: "
        f"codes keep popular items {than} others"
    )


def _reached(table: SidTable) -> Tensor:
    """Say which levels each item has a code on: (N, L) bool."""
    lengths_N = torch.from_numpy(code_counts(table).to_numpy(writable=True))
    return torch.arange(len(table.codebook_sizes)) < lengths_N[:, None]
