"""What an item's suffix costs, as a differentiable function of the soft assignment of its codes.

The entropy of the items splits into that of their codes and that of the items given their codes,
H(item) = H(codes) + H(item | codes), and no table changes the left side: what merging codes saves in
predicting them, the suffix pays. But the suffix is looked up, so a loss on symbols sends the codes the gradient
of the first term alone, which merges items. This module gives the second term.

Item i has mass pi_i (its share of the training events), a bucket of equal codes c the mass m_c of its items.
Without regard to the history, the best predictor of the suffix pays log(m_c / pi_i) for item i in bucket c; the
mean over events is H(item | codes). A suffix head that reads the history can only pay less. Let item i draw its
codes, level by level on the residuals at hand, from the probabilities P_l (taken as independent: a mean field),
while all others keep those of the table. With m_c' the mass of the *others* in c,

    cost_i = E_c log(1 + m_c' / pi_i) = sum over occupied c of prod_l P_l(c_l) log(1 + m_c' / pi_i).

An empty bucket costs nothing. Three choices:

- The mean of the logarithms, not the logarithm of the mean occupancy, log(1 + E_c m_c' / pi_i), which bounds it
  from above (Jensen). The bound weighs a bucket by its mass where the cost grows with the log of the mass: one
  popular bucket, however improbable, drowns the differences between all others. The mean is exact, and for a
  predictor of the codes that has seen the move it cancels the gain: -log(m_c' + pi_i) + log(1 + m_c' / pi_i)
  is -log pi_i in every bucket, for masses that sum to 1.
- The suffix predictor is that after the move: a suffix that its bucket has not seen has no price before it.
- What i's move does to the *other* items of a bucket is left out of both terms or of none: their suffixes cost
  m_c' log(1 + pi_i / m_c') more, their codes as much less. The gradient of the recommendation loss, taken at a
  given predictor, does not see the second, so the first stays out here.

Where SIDs differ in length, an item keeps its own: the end of its codes is one more code of every level behind them,
which it takes for certain, so only buckets of its length count.

The cost is linear in the probabilities of each level. So straight-through weights serve as well: in value they
give the table's cost log(m_c / pi_i), in gradient every level is compared while the others keep the table's codes.

Shapes: N items of the catalogue, U items of a batch, L levels, K codes, M_l distinct prefixes of l codes, M = M_L.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from components.config import require


class Occupancy(NamedTuple):
    """The mass in every bucket of a table, and the tree of code prefixes above the buckets."""

    parents: tuple[Tensor, ...]
    """For each level (M_l,) long, ascending: the prefix that is one code shorter."""
    codes: tuple[Tensor, ...]
    """For each level (M_l,) long, the last code of a prefix; K where the codes ended before."""
    codebook_sizes: tuple[int, ...]
    """K of each level."""
    length: Tensor
    """(N,) long, codes of each item."""
    bucket: Tensor
    """(N,) long, the bucket of each item."""
    bucket_mass: Tensor
    """(M,) float64, > 0."""
    item_mass: Tensor
    """(N,) float64, > 0."""


def occupancy(codes_NL: Tensor, mass_N: Tensor, codebook_sizes: Sequence[int]) -> Occupancy:
    """Add up the mass in every bucket of a table; once per table, on its device.

    Parameters
    ----------
    codes_NL : Tensor
        Codes of the table, integers; row = item id, -1 behind the last code of a shorter SID.
    mass_N : Tensor
        How often an item is met, in any unit. Count every item a little, so that those without events have mass.
    codebook_sizes : sequence of int
        K of each level.

    Returns
    -------
    Occupancy

    Raises
    ------
    ValueError
        Shapes do not fit, a code is outside its codebook or behind the end, or a mass is not positive and finite.
    """
    require(
        codes_NL.ndim == 2 and codes_NL.numel() > 0 and not codes_NL.is_floating_point(),
        f"codes must be integers of shape (items, levels), got {codes_NL.dtype} {tuple(codes_NL.shape)}",
    )
    num_items, num_levels = codes_NL.shape
    require(
        len(codebook_sizes) == num_levels,
        f"codes of {num_levels} levels need as many codebook sizes, got {list(codebook_sizes)}",
    )
    require(
        mass_N.shape == (num_items,),
        f"{num_items} items need a mass each, got masses of shape {tuple(mass_N.shape)}",
    )
    wrong = ~(torch.isfinite(mass_N) & (mass_N > 0))
    if bool(wrong.any()):
        item = int(wrong.nonzero()[0])
        raise ValueError(
            f"item {item} has mass {float(mass_N[item]):g}: a mass must be positive and finite; "
            "add a smoothing count to the events of every item"
        )
    prefix_N = torch.zeros(num_items, dtype=torch.long, device=codes_NL.device)
    ended_N = torch.zeros_like(prefix_N, dtype=torch.bool)
    parents, codes = [], []
    for level, size in enumerate(codebook_sizes):
        code_N = codes_NL[:, level].long()
        outside = (code_N < (-1 if level else 0)) | (code_N >= size) | (ended_N & (code_N >= 0))
        if bool(outside.any()):
            item = int(outside.nonzero()[0])
            raise ValueError(
                f"item {item} has code {int(code_N[item])} on level {level + 1}, whose codebook has {size} codes; "
                "-1 stands behind the last code, and nothing else does"
            )
        ended_N = code_N < 0
        code_N = code_N.masked_fill(ended_N, size)
        distinct, prefix_N = torch.unique(prefix_N * (size + 1) + code_N, return_inverse=True)
        parents.append(distinct // (size + 1))
        codes.append(distinct % (size + 1))
    mass_N = mass_N.double()
    bucket_mass = mass_N.new_zeros(len(codes[-1])).index_add(0, prefix_N, mass_N)
    length_N = (codes_NL >= 0).sum(dim=1)
    return Occupancy(
        tuple(parents), tuple(codes), tuple(codebook_sizes), length_N, prefix_N, bucket_mass, mass_N
    )


def suffix_cost(probabilities: Sequence[Tensor], item_ids_U: Tensor, occupancy: Occupancy) -> Tensor:
    """Return the expected cost of the suffixes of items, differentiable in every level's probabilities.

    Weigh items by how often they are targets: the mean over events estimates H(item | codes).

    Parameters
    ----------
    probabilities : sequence of Tensor
        One (U, K) a level: the soft assignment, or straight-through weights. Rows of items whose SID has no code on
        the level are not read.
    item_ids_U : Tensor
        Long, the item of each row.
    occupancy : Occupancy
        The table as it stands, these items included.

    Returns
    -------
    Tensor
        (U,) nats, >= 0.

    Raises
    ------
    ValueError
        Shapes do not fit one another or the table.
    """
    require(
        item_ids_U.ndim == 1 and not item_ids_U.is_floating_point(),
        f"item ids must be integers of shape (items,), got {item_ids_U.dtype} {tuple(item_ids_U.shape)}",
    )
    wanted = [(len(item_ids_U), size) for size in occupancy.codebook_sizes]
    got = [tuple(p_UK.shape) for p_UK in probabilities]
    require(
        got == wanted,
        f"{len(item_ids_U)} items on this table need probabilities of shapes {wanted}, got {got}",
    )
    cost_MU = _bucket_costs(item_ids_U, occupancy, probabilities[0].dtype)
    # Leaves first, so that only the last level works on all buckets. Items are columns: picking the row of a code
    # and adding up the rows of a prefix then move contiguous memory, about three times as fast.
    for level in reversed(range(len(wanted))):
        ended_U1 = (occupancy.length[item_ids_U] <= level)[:, None]
        p_UK = probabilities[level].masked_fill(ended_U1, 0)
        p_KU = torch.cat([p_UK, ended_U1.to(p_UK)], dim=1).T.contiguous()
        weighted_MU = cost_MU * p_KU.index_select(0, occupancy.codes[level])
        prefixes = len(occupancy.codes[level - 1]) if level else 1
        cost_MU = weighted_MU.new_zeros(prefixes, len(item_ids_U)).index_add(
            0, occupancy.parents[level], weighted_MU
        )
    return cost_MU[0]


@torch.no_grad()
def _bucket_costs(item_ids_U: Tensor, occupancy: Occupancy, dtype: torch.dtype) -> Tensor:
    """Return (M, U), what the suffix of each item would cost in each bucket; constant in the probabilities."""
    mass_U, own_U = occupancy.item_mass[item_ids_U], occupancy.bucket[item_ids_U]
    cost_MU = torch.outer(occupancy.bucket_mass.to(dtype), (1 / mass_U).to(dtype)).log1p_()
    # The item's own bucket counts it already; subtracting its mass could leave a rest where it is alone.
    own_cost_U = torch.log(occupancy.bucket_mass[own_U] / mass_U)
    cost_MU[own_U, torch.arange(len(item_ids_U), device=cost_MU.device)] = own_cost_U.to(dtype)
    return cost_MU
