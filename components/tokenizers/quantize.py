"""Residual quantisation as pure functions of tensors.

Shapes: N rows, L levels, K codes of a codebook, Z latent width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ENTRIES = 1 << 24
"""Most entries of a distance matrix held at once: 64 MiB in float32."""


def squared_distances(x_NZ: Tensor, codebook_KZ: Tensor) -> Tensor:
    """Return the squared Euclidean distances (N, K) between rows and codewords, differentiable in both."""
    cross_NK = x_NZ @ codebook_KZ.T
    return x_NZ.square().sum(1, keepdim=True) - 2 * cross_NK + codebook_KZ.square().sum(1)


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


@torch.no_grad()
def balance(distances_NK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return the log of the Sinkhorn plan (N, K), float64, scaled so that the columns of the plan sum to N/K.

    Distances are centred and divided by half their range, over the whole matrix, so that ``epsilon`` means
    the same at every scale; the rows of the plan sum to 1 approximately, since the loop ends on columns.
    The sums run in log space, because exp(1 / epsilon) leaves float32 at the published epsilon of .003.

    References
    ----------
    Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport", 2013, algorithm 1.
    """
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"Sinkhorn wants epsilon > 0 and iterations >= 1, got {epsilon} and {iterations}")
    d_NK = distances_NK.double()
    rows, columns = d_NK.shape
    high, low = d_NK.max(), d_NK.min()
    plan_NK = -(d_NK - (high + low) / 2) / ((high - low) / 2 + 1e-5) / epsilon
    row_N1 = torch.zeros_like(plan_NK[:, :1])
    column_K = torch.zeros_like(plan_NK[0])
    for _ in range(iterations):
        row_N1 = -torch.logsumexp(plan_NK + column_K, dim=1, keepdim=True)
        column_K = math.log(rows / columns) - torch.logsumexp(plan_NK + row_N1, dim=0)
    return plan_NK + row_N1 + column_K


def sinkhorn(distances_NK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign rows to codes so that every code gets about the same share of rows.

    Parameters
    ----------
    distances_NK : Tensor
        Squared distances (N, K); the plan takes three float64 matrices of this shape.
    epsilon : float
        Weight of the entropy, relative to half the range of the distances; smaller follows the distances
        more closely.
    iterations : int
        Rounds of scaling rows, then columns.

    Returns
    -------
    Tensor
        Codes (N,) long.
    """
    return balance(distances_NK, epsilon, iterations).argmax(1)


def sinkhorn_codes(z_NZ: Tensor, codebooks: Sequence[Tensor], epsilon: float, iterations: int) -> Tensor:
    """Quantise all rows together, each level balanced on the residual of the balanced level before it.

    Returns
    -------
    Tensor
        Codes (N, L) long. A row's codes depend on all other rows.
    """
    residual_NZ, codes = z_NZ.detach(), []
    for codebook_KZ in codebooks:
        code_N = sinkhorn(squared_distances(residual_NZ, codebook_KZ.detach()), epsilon, iterations)
        residual_NZ = residual_NZ - codebook_KZ.detach()[code_N]
        codes.append(code_N)
    return torch.stack(codes, dim=1)
