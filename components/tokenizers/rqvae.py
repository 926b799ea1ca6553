"""RQ-VAE: an autoencoder whose latent is written as a sum of codewords, one a level.

Shapes: N rows, D content width, L levels, K codes of a codebook, Z latent width.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from components.config import Config
from components.tokenizers.quantize import residual_codes, sinkhorn, squared_distances
from components.tokenizers.rkmeans import residual_kmeans, root_mean_square

COLLAPSED = 0.999
"""Mean cosine of latents above which their codes would tell nothing."""


class SinkhornConfig(Config):
    """Balanced assignment during training."""

    epsilon: float = Field(0.003, gt=0)
    """Entropy weight, relative to half the range of the distances; smaller follows them more closely."""
    iterations: int = Field(50, ge=1)
    """Rounds of scaling a batch."""
    levels: list[int] = []
    """Levels to balance, from 1; empty: all."""


class RqVaeConfig(Config):
    """Residual-quantised VAE."""

    kind: Literal["rqvae"] = "rqvae"
    codebook_sizes: list[int] = Field([64, 64, 64], min_length=1)
    """Codes of each level, first level first."""
    hidden: list[int] = [256]
    """Widths of the encoder's hidden layers; the decoder has them in reverse."""
    latent_dim: int = Field(64, ge=1)
    """Width of the latent that is quantised."""
    commitment: float = Field(0.25, ge=0)
    """Weight of the term that pulls latents to their codewords."""
    kmeans_iterations: int = Field(25, ge=1)
    """Rounds of Lloyd's algorithm for the first codebooks."""
    sinkhorn: SinkhornConfig | None = None
    """Balance the assignments of each batch; null: nearest codes."""
    revive_every: int | None = Field(1, ge=1)
    """Epochs after which codes that no item uses move to the residuals of random items; null: never."""

    @property
    def by_interactions(self) -> bool:
        """Whether training needs to know how often items were interacted with: no."""
        return False


class RqVae(nn.Module):
    """Encoder, codebooks and decoder.

    Parameters
    ----------
    config : RqVaeConfig
        Widths, sizes and weights.
    input_dim : int
        Width D of the content vectors.

    References
    ----------
    Lee et al., "Autoregressive image generation using residual quantization", CVPR 2022, section 3.1.
    Rajput et al., "Recommender systems with generative retrieval", NeurIPS 2023, section 3.1.
    """

    input_scale: Tensor

    def __init__(self, config: RqVaeConfig, input_dim: int) -> None:
        super().__init__()
        self.config = config
        self.input_dim = input_dim
        self.codebook_sizes = list(config.codebook_sizes)
        self.register_buffer("input_scale", torch.ones(()))
        widths = [input_dim, *config.hidden, config.latent_dim]
        self.encoder = _stack(widths)
        self.decoder = _stack(widths[::-1])
        self.codebooks = nn.ParameterList(
            torch.zeros(size, config.latent_dim) for size in self.codebook_sizes
        )

    @torch.no_grad()
    def draw_weights(self, generator: torch.Generator) -> None:
        """Draw encoder and decoder anew from the generator: Xavier-normal weights, biases 0."""
        for stack in (self.encoder, self.decoder):
            for layer in stack:
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_normal_(layer.weight, generator=generator)
                    nn.init.zeros_(layer.bias)

    def standardise(self, x_ND: Tensor) -> None:
        """Set the input scale so that the encoder reads these rows at root mean square 1."""
        self.input_scale.copy_(1 / root_mean_square(x_ND))

    def latents(self, x_ND: Tensor) -> Tensor:
        """Return the latents (N, Z)."""
        z_NZ: Tensor = self.encoder(x_ND * self.input_scale)
        return z_NZ

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Tensor:
        """Return the nearest codes (N, L) long, level by level on the residual."""
        return residual_codes(self.latents(x_ND), list(self.codebooks))

    def losses(self, x_ND: Tensor) -> dict[str, Tensor]:
        """Return the unweighted terms of the training loss.

        Returns
        -------
        dict of str to Tensor
            ``reconstruction`` of the scaled input through straight-through codewords; ``codebook`` and
            ``commitment``, the mean squared distance of residuals to their codewords, averaged over levels,
            with gradient to the codewords and to the latents.
        """
        z_NZ = self.latents(x_ND)
        residual_NZ, levels = z_NZ, []
        for level, codebook_KZ in enumerate(self.codebooks):
            chosen_NZ = codebook_KZ[self._training_codes(residual_NZ, level)]
            levels.append(
                (F.mse_loss(chosen_NZ, residual_NZ.detach()), F.mse_loss(residual_NZ, chosen_NZ.detach()))
            )
            residual_NZ = residual_NZ - chosen_NZ.detach()
        quantised_NZ = z_NZ - residual_NZ.detach()
        codebook, commitment = (torch.stack(terms).mean() for terms in zip(*levels, strict=True))
        reconstruction = F.mse_loss(self.decoder(quantised_NZ), x_ND * self.input_scale)
        return {"reconstruction": reconstruction, "codebook": codebook, "commitment": commitment}

    def _training_codes(self, residual_NZ: Tensor, level: int) -> Tensor:
        distances_NK = squared_distances(residual_NZ.detach(), self.codebooks[level].detach())
        balanced = self.config.sinkhorn
        if balanced is not None and (not balanced.levels or level + 1 in balanced.levels):
            return sinkhorn(distances_NK, balanced.epsilon, balanced.iterations)
        return distances_NK.argmin(1)

    @torch.no_grad()
    def fit_codebooks(self, x_ND: Tensor, seed: int) -> None:
        """Start the codebooks by residual k-means on the latents of these rows.

        Raises
        ------
        ValueError
            The latents point all one way: their codes would tell nothing.
        """
        z_NZ = self.latents(x_ND)
        cosine = mean_cosine(z_NZ)
        if cosine > COLLAPSED:
            raise ValueError(
                f"collapsed latents: their mean cosine is {cosine:.5f}, above {COLLAPSED}, so all items "
                "would share codes; use embeddings that differ between items, or fewer hidden layers"
            )
        starts = residual_kmeans(z_NZ, self.codebook_sizes, self.config.kmeans_iterations, 1, seed)
        for codebook_KZ, start_KZ in zip(self.codebooks, starts, strict=True):
            codebook_KZ.copy_(start_KZ)

    @torch.no_grad()
    def revive(self, x_ND: Tensor, generator: torch.Generator) -> int:
        """Move codes that none of these rows uses to residuals of random rows; return how many moved."""
        residual_NZ, moved = self.latents(x_ND), 0
        for codebook_KZ in self.codebooks:
            code_N = residual_codes(residual_NZ, [codebook_KZ])[:, 0]
            unused = (torch.bincount(code_N, minlength=len(codebook_KZ)) == 0).nonzero()[:, 0]
            rows = torch.randint(len(residual_NZ), (len(unused),), generator=generator)
            residual_NZ, before_NZ = residual_NZ - codebook_KZ[code_N], residual_NZ
            codebook_KZ[unused] = before_NZ[rows]
            moved += len(unused)
        return moved

    @torch.no_grad()
    def fold_scale(self, x_ND: Tensor) -> None:
        """Bring the latents of these rows to root mean square 1; codes and reconstructions stay as they are.

        The factor moves into the encoder's last layer, its inverse into the decoder's first.
        """
        factor = 1 / root_mean_square(self.latents(x_ND))
        last, first = self.encoder[-1], self.decoder[0]
        assert isinstance(last, nn.Linear) and isinstance(first, nn.Linear)
        last.weight.mul_(factor)
        last.bias.mul_(factor)
        first.weight.div_(factor)
        for codebook_KZ in self.codebooks:
            codebook_KZ.mul_(factor)


def mean_cosine(z_NZ: Tensor) -> float:
    """Return the mean cosine between two different rows; 1 where all point one way."""
    unit_NZ = F.normalize(z_NZ.double(), dim=1)
    n = len(unit_NZ)
    return float((unit_NZ.sum(0).square().sum() - unit_NZ.square().sum()) / max(1, n * (n - 1)))


def _stack(widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them and none after the last."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
