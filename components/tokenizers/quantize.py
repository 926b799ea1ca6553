"""Residual quantisation as pure functions of tensors.

Shapes: N rows, B rows of a block, L levels, K codes of a codebook, Z latent width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ENTRIES = 1 << 24
"""Most entries of a distance matrix worked on at once: 64 MiB in float32."""

BLOCK_ENTRIES = 1 << 16
"""The same for Sinkhorn on a processor: 512 KiB in float64, so that a block stays in the cache."""


def squared_distances(x_NZ: Tensor, codebook_KZ: Tensor) -> Tensor:
    """Return the squared Euclidean distances (N, K) between rows and codewords, differentiable in both."""
    # In place on the product: over a whole catalogue each further (N, K) matrix is as large as the latents.
    d_NK = (x_NZ @ codebook_KZ.T).mul_(-2)
    return d_NK.add_(x_NZ.square().sum(1, keepdim=True)).add_(codebook_KZ.square().sum(1))


@torch.no_grad()
def residual_codes(z_NZ: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """Quantise greedily: on every level the nearest codeword of what the levels before left over.

    Parameters
    ----------
    z_NZ : Tensor
        Latents (N, Z); done in chunks of rows, so a million of them fit.
    codebooks : sequence of Tensor
        One (K, Z) a level; the sizes may differ.

    Returns
    -------
    Tensor
        Codes (N, L) long.
    """
    rows = max(1, CHUNK_ENTRIES // max(len(codebook) for codebook in codebooks))
    parts = []
    for residual_CZ in torch.split(z_NZ, rows):
        codes = []
        for codebook_KZ in codebooks:
            code_C = squared_distances(residual_CZ, codebook_KZ).argmin(1)
            residual_CZ = residual_CZ - codebook_KZ[code_C]
            codes.append(code_C)
        parts.append(torch.stack(codes, dim=1))
    return torch.cat(parts)


def reconstruct(codes_NL: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """Return the sum (N, Z) of each row's codewords."""
    chosen = [codebook_KZ[codes_NL[:, level]] for level, codebook_KZ in enumerate(codebooks)]
    return torch.stack(chosen).sum(0)


def straight_through(codes_N: Tensor, probabilities_NK: Tensor) -> Tensor:
    """Return S (N, K): in value exactly the one-hot codes, in gradient exactly the probabilities.

    The order of the sum matters: ``(onehot - P) + P`` can be one ulp off, ``onehot + (P - P)`` cannot.
    """
    onehot_NK = F.one_hot(codes_N, probabilities_NK.shape[1]).to(probabilities_NK.dtype)
    return onehot_NK + (probabilities_NK - probabilities_NK.detach())


class Potentials(NamedTuple):
    """A Sinkhorn plan: the log of entry (n, k) is ``row_N[n] + column_K[k] - sharpness * distances_NK[n, k]``."""

    row_N: Tensor
    """(N,) float64."""
    column_K: Tensor
    """(K,) float64."""
    sharpness: float
    """1 / (epsilon * half the range of the distances)."""


@torch.no_grad()
def balance(distances_NK: Tensor, epsilon: float, iterations: int) -> Potentials:
    """Scale rows to 1, then columns to N/K, again and again, over blocks of rows.

    Distances are divided by half their range, over the whole matrix, so that ``epsilon`` means the same at
    every scale. The columns of the plan sum to N/K exactly and its rows to 1 approximately, since the loop
    ends on columns. Sums are in float64 and in log space, because exp(1 / epsilon) leaves float32 at the
    published epsilon of .003.

    Parameters
    ----------
    distances_NK : Tensor
        Squared distances (N, K) of any floating type.
    epsilon : float
        Weight of the entropy, above 0.
    iterations : int
        Rounds, at least 1.

    Returns
    -------
    Potentials
        Of the last round; the same whatever the size of the blocks, but for rounding.

    Raises
    ------
    ValueError
        ``epsilon`` is not positive, or there are no iterations.

    References
    ----------
    Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport", 2013, algorithm 1.
    """
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"Sinkhorn wants epsilon > 0 and iterations >= 1, got {epsilon} and {iterations}")
    rows, columns = distances_NK.shape
    low, high = (float(end) for end in torch.aminmax(distances_NK))
    sharpness = 1 / (epsilon * ((high - low) / 2 + 1e-5))
    share = math.log(rows / columns)
    blocks = _blocks(distances_NK)

    # Where columns are still 0, every row may underflow on a code far from all: round 1 keeps to logs.
    before_K = distances_NK.new_zeros(columns, dtype=torch.float64)
    log_mass_K = torch.full_like(before_K, -math.inf)
    for d_BK in blocks:
        row_BK = torch.log_softmax(torch.sub(before_K, d_BK, alpha=sharpness), dim=1)
        log_mass_K = torch.logaddexp(log_mass_K, torch.logsumexp(row_BK, dim=0))
    column_K = share - log_mass_K
    # From then on a column of the plan sums to N/K and no row to more than N. So each column keeps an entry of
    # at least 1/(K N) once rows are scaled: its sum can leave log space, and one exp an entry does for both.
    for _ in range(iterations - 1):
        mass_K = torch.zeros_like(column_K)
        for d_BK in blocks:
            mass_K += torch.softmax(torch.sub(column_K, d_BK, alpha=sharpness), dim=1).sum(0)
        before_K, column_K = column_K, column_K + share - mass_K.log()
    # Written in place: small results kept between freed blocks would leave the heap full of holes.
    row_N = distances_NK.new_empty(rows, dtype=torch.float64)
    for row_B, d_BK in zip(torch.split(row_N, len(blocks[0])), blocks, strict=True):
        row_B.copy_(-torch.logsumexp(torch.sub(before_K, d_BK, alpha=sharpness), dim=1))
    return Potentials(row_N, column_K, sharpness)


def _blocks(distances_NK: Tensor) -> tuple[Tensor, ...]:
    """Return views (B, K) of the rows: small ones for a cache, large ones for a GPU, where each launch costs."""
    entries = BLOCK_ENTRIES if distances_NK.device.type == "cpu" else CHUNK_ENTRIES
    return torch.split(distances_NK, max(1, entries // distances_NK.shape[1]))


@torch.no_grad()
def sinkhorn(distances_NK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign rows to codes so that every code gets about the same share of rows.

    Parameters
    ----------
    distances_NK : Tensor
        Squared distances (N, K); no second matrix of this shape is made.
    epsilon : float
        Weight of the entropy, relative to half the range of the distances; smaller follows the distances
        more closely.
    iterations : int
        Rounds of scaling rows, then columns.

    Returns
    -------
    Tensor
        Codes (N,) long.

    Raises
    ------
    ValueError
        ``epsilon`` is not positive, or there are no iterations.
    """
    plan = balance(distances_NK, epsilon, iterations)
    blocks = _blocks(distances_NK)
    codes_N = distances_NK.new_empty(len(distances_NK), dtype=torch.long)
    for code_B, d_BK in zip(torch.split(codes_N, len(blocks[0])), blocks, strict=True):
        # A row's potential is the same for all its codes.
        code_B.copy_(torch.sub(plan.column_K, d_BK, alpha=plan.sharpness).argmax(1))
    return codes_N


@torch.no_grad()
def sinkhorn_codes(z_NZ: Tensor, codebooks: Sequence[Tensor], epsilon: float, iterations: int) -> Tensor:
    """Quantise all rows together, each level balanced on the residual of the balanced level before it.

    Holds one (N, K) matrix of distances and at most four (N, Z) ones, the latents among them, in the type of
    the latents.

    Returns
    -------
    Tensor
        Codes (N, L) long. A row's codes depend on all other rows.
    """
    residual_NZ, codes = z_NZ, []
    for codebook_KZ in codebooks:
        code_N = sinkhorn(squared_distances(residual_NZ, codebook_KZ), epsilon, iterations)
        residual_NZ = residual_NZ - codebook_KZ[code_N]
        codes.append(code_N)
    return torch.stack(codes, dim=1)
