"""How much a code assignment explores (DIGER): noise on logits, and how it fades.

One assignment function serves every kind (``tokenizers.sources.explore``); a kind only says how much
Gumbel noise the logits of an item get on a level. A code is the best of ``logits + noise * gumbel``, so noise 1
draws from ``softmax(logits)``; tau leaves the code as it is and only flattens the soft assignment that gradient uses.

Shapes: U unique items of a batch, K codes of a level.

References
----------
DIGER: Differentiable Semantic ID for Generative Recommendation (arXiv 2601.19711), section 3, and the authors'
gradient-fix release for what the paper leaves open.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from components.config import Config

LARGEST_SIGMA = 100.0
"""Bound of a learned noise scale, as in the authors' release."""


class _Assignment(Config):
    tau: float = Field(1.0, gt=0)
    """Temperature of the soft assignment; larger spreads the gradient over more codes, codes stay the same."""
    forward: Literal["table", "sample"] = "table"
    """What the recommender reads and writes in training: the codes of the table, or those drawn now. A drawn
    string keeps its item's suffix, which may then belong to another item of that string. A dvae takes table alone."""


class NoNoiseConfig(_Assignment):
    """Soft assignment without noise."""

    kind: Literal["none"] = "none"


class SteConfig(_Assignment):
    """Naive straight-through: no noise, and the recommender reads today's nearest codes instead of the table's."""

    kind: Literal["ste"] = "ste"
    forward: Literal["sample"] = "sample"
    """Fixed: with the table's codes this kind would be ``none``."""


class GumbelConfig(_Assignment):
    """Gumbel noise of one constant scale on every item and level (DIGER without decay)."""

    kind: Literal["gumbel"] = "gumbel"
    noise: float = Field(1.0, ge=0)
    """Scale of the noise against logits whose own scale is set per level (see ``top_probability``)."""


class _Deviation(_Assignment):
    sigma: float = Field(1.0, gt=0)
    """First noise scale of every level (sigma_0)."""
    lam: float = Field(1.3, ge=0)
    """Offset lambda: the noise is gone once the recommendation loss, in nats a symbol, is below its square. Not read
    with scaling raw."""
    scaling: Literal["raw", "scaled", "detached"] = "raw"
    """raw: the recommendation loss stays as it is and sigma learns through the assignments only. scaled: it is
    replaced by L / (2 (sigma + lambda)^2) + log(sigma + lambda), which also shrinks the recommender's gradient.
    detached: as raw, and sigma alone follows that term."""
    sigma_lr: float = Field(1e-3, gt=0)
    """Learning rate of sigma."""


class SdudConfig(_Deviation):
    """Standard-deviation uncertainty decay: a learned noise scale for each level."""

    kind: Literal["sdud"] = "sdud"


class _Frequency(_Assignment):
    ratio: float = Field(1.5, gt=0)
    """A code is hot, and its items explore, while its share is above ratio / K (rho)."""
    momentum: float = Field(0.99, ge=0, le=1)
    """Weight of the past in the running shares; one update a training step."""
    scope: Literal["level", "item"] = "level"
    """level: every level tests its own code, counting this batch. item: the first level decides for all levels,
    from the shares before this batch."""


class FrqudConfig(_Frequency):
    """Frequency uncertainty decay: constant noise, but only for items in codes that are used too much."""

    kind: Literal["frqud"] = "frqud"
    noise: float = Field(1.0, ge=0)
    """Scale of the noise of items in hot codes."""


class SdudFrqudConfig(_Deviation, _Frequency):
    """Both decays: a learned noise scale, for items in hot codes."""

    kind: Literal["sdud_frqud"] = "sdud_frqud"


ExplorationConfig = Annotated[
    NoNoiseConfig | SteConfig | GumbelConfig | SdudConfig | FrqudConfig | SdudFrqudConfig,
    Field(discriminator="kind"),
]


class ConstantNoise(nn.Module):
    """Noise of one scale for every item, of 0 for none."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def noise(self, greedy_U: Tensor, level: int) -> Tensor:
        """Return the scale, (U, 1)."""
        return torch.full((len(greedy_U), 1), self.scale, device=greedy_U.device)

    def weigh(self, loss: Tensor) -> Tensor:
        """Return the loss as it is."""
        return loss


class DeviationDecay(nn.Module):
    """SDUD: the noise of a level is a learned |sigma|.

    References
    ----------
    DIGER, section 3.3: ``L / (2 (|sigma| + lambda)^2) + log(|sigma| + lambda)``, with the mean of |sigma| over levels;
    at rest ``|sigma| = max(0, sqrt(L) - lambda)``.
    """

    def __init__(self, config: _Deviation, levels: int) -> None:
        super().__init__()
        self.lam, self.scaling = config.lam, config.scaling
        self.sigma = nn.Parameter(torch.full((levels,), config.sigma))

    def scales(self) -> Tensor:
        """Return the noise of every level (L,), with gradient to sigma."""
        return self.sigma.abs().clamp(max=LARGEST_SIGMA)

    def noise(self, greedy_U: Tensor, level: int) -> Tensor:
        """Return the level's scale, (U, 1)."""
        return self.scales()[level].expand(len(greedy_U), 1)

    def weigh(self, loss: Tensor) -> Tensor:
        """Return the recommendation loss as the configured scaling wants it."""
        if self.scaling == "raw":
            return loss
        spread = self.scales().mean() + self.lam
        if self.scaling == "scaled":
            return loss / (2 * spread.square()) + spread.log()
        return loss + loss.detach() / (2 * spread.square()) + spread.log()


class FrequencyDecay(nn.Module):
    """FrqUD: items in a code that is used more than its share get noise, all others none.

    References
    ----------
    DIGER, section 3.3: hot where the running share of the item's noise-free code exceeds rho / K.
    """

    def __init__(self, config: _Frequency, codebook_sizes: Sequence[int], scale: float) -> None:
        super().__init__()
        self.ratio, self.momentum, self.scope, self.scale = config.ratio, config.momentum, config.scope, scale
        for level, size in enumerate(codebook_sizes):
            self.register_buffer(f"share{level}", torch.full((size,), 1 / size))
        self._hot_U = torch.zeros(0, dtype=torch.bool)

    def share(self, level: int) -> Tensor:
        """Return the running share of each code of a level, (K,)."""
        return self.get_buffer(f"share{level}")

    def hot(self, greedy_U: Tensor, level: int) -> Tensor:
        """Return who explores, (U,) bool, and count this batch (in training mode only).

        Items whose SID has no code on the level are -1: they are not counted, and what is returned for them means
        nothing.
        """
        if self.scope == "level":
            self._count(greedy_U, level)
            return self._test(greedy_U, level)
        if level == 0:
            self._hot_U = self._test(greedy_U, level)
            self._count(greedy_U, level)
        return self._hot_U

    def noise(self, greedy_U: Tensor, level: int) -> Tensor:
        """Return the scale for items in hot codes and 0 for the others, (U, 1)."""
        return self.scale * self.hot(greedy_U, level)[:, None].float()

    def weigh(self, loss: Tensor) -> Tensor:
        """Return the loss as it is."""
        return loss

    def _test(self, greedy_U: Tensor, level: int) -> Tensor:
        share_K = self.share(level)
        return share_K[greedy_U] > self.ratio / len(share_K)

    @torch.no_grad()
    def _count(self, greedy_U: Tensor, level: int) -> None:
        if self.training:
            share_K, present = self.share(level), greedy_U[greedy_U >= 0]
            if len(present):
                batch_K = torch.bincount(present, minlength=len(share_K)) / len(present)
                share_K.lerp_(batch_K, 1 - self.momentum)


class DeviationFrequencyDecay(nn.Module):
    """SDUD and FrqUD: a learned noise scale, for items in hot codes only."""

    def __init__(self, config: SdudFrqudConfig, codebook_sizes: Sequence[int]) -> None:
        super().__init__()
        self.deviation = DeviationDecay(config, len(codebook_sizes))
        self.frequency = FrequencyDecay(config, codebook_sizes, scale=1.0)

    def noise(self, greedy_U: Tensor, level: int) -> Tensor:
        """Return the level's scale for items in hot codes and 0 for the others, (U, 1)."""
        return self.deviation.noise(greedy_U, level) * self.frequency.noise(greedy_U, level)

    def weigh(self, loss: Tensor) -> Tensor:
        """Return the recommendation loss as the configured scaling wants it."""
        return self.deviation.weigh(loss)


Noise = ConstantNoise | DeviationDecay | FrequencyDecay | DeviationFrequencyDecay


def build_exploration(config: ExplorationConfig, codebook_sizes: Sequence[int]) -> Noise:
    """Build the noise that a configuration names, for codebooks of given sizes."""
    match config:
        case NoNoiseConfig() | SteConfig():
            return ConstantNoise(0.0)
        case GumbelConfig():
            return ConstantNoise(config.noise)
        case SdudConfig():
            return DeviationDecay(config, len(codebook_sizes))
        case FrqudConfig():
            return FrequencyDecay(config, codebook_sizes, config.noise)
        case SdudFrqudConfig():
            return DeviationFrequencyDecay(config, codebook_sizes)


def gumbel(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw standard Gumbel noise, finite for every draw; from the CPU's stream, so that devices agree."""
    tiny = torch.finfo(torch.float32).tiny
    uniform = torch.rand(shape, generator=generator).to(device).clamp_(min=tiny, max=1 - 2**-24)
    return -torch.log(-torch.log(uniform))


def pick(
    logits_UK: Tensor, noise_U1: Tensor, tau: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw a code for every row of a level.

    Parameters
    ----------
    logits_UK : Tensor
        (U, K), higher is nearer, already on the scale that the noise is measured against.
    noise_U1 : Tensor
        (U, 1), >= 0; rows of 0 take their best code. No noise is drawn if all rows are 0.
    tau : float
        Temperature, > 0.
    generator : torch.Generator, optional
        The CPU stream that noise is drawn from; None, as in evaluation: no noise.

    Returns
    -------
    codes : Tensor
        (U,) long.
    probabilities : Tensor
        (U, K), the soft assignment, with gradient to the logits and to a learned noise scale.

    Raises
    ------
    ValueError
        ``tau`` is not positive or a noise scale is negative.

    References
    ----------
    DIGER, equations of section 3.2: ``P = softmax((l + n g) / tau)``, code = ``argmax(l + n g)``.
    """
    if tau <= 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    least, most = (float(bound) for bound in torch.aminmax(noise_U1.detach()))
    if least < 0:
        raise ValueError(f"noise must be >= 0, got {least}")
    if generator is not None and most > 0:
        logits_UK = logits_UK + noise_U1 * gumbel(logits_UK.shape, generator, logits_UK.device)
    return logits_UK.argmax(dim=-1), torch.softmax(logits_UK / tau, dim=-1)
