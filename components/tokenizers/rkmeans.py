"""Residual k-means: codebooks fitted level by level, each on what the levels before left over."""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from components.config import Config
from components.tokenizers.quantize import residual_codes

POINTS_PER_CODE = 256
"""k-means sees at most this many rows a code: more do not move a centroid."""


class RkMeansConfig(Config):
    """Residual k-means on the content vectors themselves."""

    kind: Literal["rkmeans"] = "rkmeans"
    codebook_sizes: list[int] = Field([64, 64, 64], min_length=1)
    """Codes of each level, first level first."""
    iterations: int = Field(25, ge=1)
    """Rounds of Lloyd's algorithm a level."""
    redos: int = Field(1, ge=1)
    """Starts a level; the one with the smallest error stays."""
    weights: Literal["items", "interactions"] = "items"
    """Whose squared errors count: each item alike, or each by its training interactions, so that codewords are denser
    where popular items are."""

    @property
    def by_interactions(self) -> bool:
        """Whether training needs to know how often items were interacted with."""
        return self.weights == "interactions"


class RkMeans(nn.Module):
    """Codebooks over scaled content vectors.

    Parameters
    ----------
    config : RkMeansConfig
        Sizes of the codebooks.
    input_dim : int
        Width D of the content vectors, and of the latents.
    """

    input_scale: Tensor

    def __init__(self, config: RkMeansConfig, input_dim: int) -> None:
        super().__init__()
        self.config = config
        self.input_dim = input_dim
        self.codebook_sizes = list(config.codebook_sizes)
        self.register_buffer("input_scale", torch.ones(()))
        self.codebooks = nn.ParameterList(torch.zeros(size, input_dim) for size in self.codebook_sizes)

    def standardise(self, x_ND: Tensor) -> None:
        """Set the input scale so that the latents of these rows have root mean square 1."""
        self.input_scale.copy_(1 / root_mean_square(x_ND))

    def latents(self, x_ND: Tensor) -> Tensor:
        """Return the scaled content vectors (N, D)."""
        return x_ND * self.input_scale

    def encode(self, x_ND: Tensor) -> Tensor:
        """Return the nearest codes (N, L) long, level by level on the residual."""
        return residual_codes(self.latents(x_ND), list(self.codebooks))

    def losses(self, x_ND: Tensor) -> dict[str, Tensor]:
        """Return ``codebook``: the mean squared distance of residuals to their codewords."""
        residual_NZ, total = self.latents(x_ND), x_ND.new_zeros(())
        codes_NL = residual_codes(residual_NZ, list(self.codebooks))
        for level, codebook_KZ in enumerate(self.codebooks):
            chosen_NZ = codebook_KZ[codes_NL[:, level]]
            total = total + F.mse_loss(chosen_NZ, residual_NZ)
            residual_NZ = residual_NZ - chosen_NZ.detach()
        return {"codebook": total / len(self.codebooks)}

    @torch.no_grad()
    def fit(self, x_ND: Tensor, seed: int, weights_N: Tensor | None = None) -> None:
        """Set scale and codebooks from these rows, weighted if asked. Equal seeds give equal bytes on one machine."""
        self.standardise(x_ND)
        centroids = residual_kmeans(
            self.latents(x_ND),
            self.codebook_sizes,
            self.config.iterations,
            self.config.redos,
            seed,
            weights_N,
        )
        for codebook_KZ, centroids_KZ in zip(self.codebooks, centroids, strict=True):
            codebook_KZ.copy_(centroids_KZ)


def root_mean_square(x_ND: Tensor) -> Tensor:
    """Return the root mean square over all entries.

    Raises
    ------
    ValueError
        All entries are zero.
    """
    rms = x_ND.double().square().mean().sqrt()
    if float(rms) == 0:
        raise ValueError("all content vectors are zero: nothing can be quantised; embed the items again")
    return rms.to(x_ND.dtype)


@torch.no_grad()
def residual_kmeans(
    z_NZ: Tensor,
    sizes: list[int],
    iterations: int,
    redos: int,
    seed: int,
    weights_N: Tensor | None = None,
) -> list[Tensor]:
    """Fit one codebook (K, Z) a level, each on the residuals of the levels before it."""
    residual_NZ, codebooks = z_NZ, []
    for level, size in enumerate(sizes):
        codebook_KZ = kmeans(residual_NZ, size, iterations, redos, seed + level, weights_N)
        codes_N1 = residual_codes(residual_NZ, [codebook_KZ])
        residual_NZ = residual_NZ - codebook_KZ[codes_N1[:, 0]]
        codebooks.append(codebook_KZ)
    return codebooks


def kmeans(
    x_NZ: Tensor, size: int, iterations: int, redos: int, seed: int, weights_N: Tensor | None = None
) -> Tensor:
    """Cluster rows with Lloyd's algorithm on faiss, started by greedy k-means++.

    Parameters
    ----------
    x_NZ : Tensor
        Rows (N, Z).
    size : int
        Number of clusters K, at most N.
    iterations, redos : int
        Rounds of Lloyd a start, and starts.
    seed : int
        Seeds the sample of rows and the starts.
    weights_N : Tensor, optional
        How much the squared error of each row counts; rows of weight 0 are left out.

    Returns
    -------
    Tensor
        Centroids (K, Z) float32.

    Raises
    ------
    ValueError
        Fewer rows than clusters, of those that have weight.

    References
    ----------
    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007; the greedy variant of
    its section 4.
    """
    from sklearn.cluster import kmeans_plusplus

    weights = None
    if weights_N is not None:
        x_NZ, weights_N = x_NZ[weights_N > 0], weights_N[weights_N > 0]
        weights = weights_N.cpu().numpy().astype(np.float32)
    if len(x_NZ) < size:
        raise ValueError(
            f"a codebook of {size} codes needs at least as many items, got {len(x_NZ)}: lower codebook_sizes"
        )
    faiss = _faiss()
    rng = np.random.default_rng(seed)
    x = np.ascontiguousarray(x_NZ.detach().cpu().numpy(), dtype=np.float32)
    if len(x) > size * POINTS_PER_CODE:
        rows = np.sort(rng.choice(len(x), size * POINTS_PER_CODE, replace=False))
        x, weights = x[rows], None if weights is None else weights[rows]
    best: tuple[float, np.ndarray[Any, Any]] | None = None
    for _ in range(redos):
        start, _ = kmeans_plusplus(x, size, sample_weight=weights, random_state=int(rng.integers(2**31)))
        run = faiss.Kmeans(
            x.shape[1],
            size,
            niter=iterations,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=len(x),
        )
        error = float(run.train(x, weights=weights, init_centroids=start))
        if best is None or error < best[0]:
            best = error, run.centroids.copy()
    assert best is not None
    return torch.from_numpy(best[1]).to(x_NZ.device)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "k-means needs faiss: install exactly one of the extras, sidflow[cpu] or sidflow[gpu]"
        ) from error
    return faiss
