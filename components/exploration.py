"""How much a code assignment explores, and how much gradient it passes on.

One assignment function serves every kind (``tokenizers.sources.explore``); a kind only says how much
Gumbel noise the logits of a level get. A code is the best of ``logits + noise * gumbel``, so noise 1 draws from
``softmax(logits)``; tau leaves the code as it is and only flattens the soft assignment that gradient uses.

References
----------
DIGER: Differentiable Semantic ID for Generative Recommendation (arXiv 2601.19711), section 3.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.config import Config
from components.seams import Exploration


class HardConfig(Config):
    """Hard codes: the recommendation loss does not reach the tokenizer."""

    kind: Literal["none"] = "none"


class SteConfig(Config):
    """Soft assignment without noise: straight-through gradient, greedy codes."""

    kind: Literal["ste"] = "ste"
    tau: float = Field(1.0, gt=0)
    """Temperature of the soft assignment; larger spreads the gradient over more codes."""


class GumbelConfig(Config):
    """Gumbel noise of one constant scale on every item and level (DIGER without decay)."""

    kind: Literal["gumbel"] = "gumbel"
    tau: float = Field(1.0, gt=0)
    """Temperature of the soft assignment; larger spreads the gradient over more codes."""
    noise: float = Field(1.0, ge=0)
    """Scale of the noise against logits whose own scale is set per level (see ``top_probability``)."""


ExplorationConfig = Annotated[HardConfig | SteConfig | GumbelConfig, Field(discriminator="kind")]


class ConstantNoise:
    """Noise of one scale for every item."""

    def __init__(self, *, surrogate: bool, tau: float, scale: float) -> None:
        self.surrogate = surrogate
        self.tau = tau
        self._scale = scale

    def noise(self, greedy: Tensor, level: int) -> Tensor:
        """Return the scale, (U, 1)."""
        return torch.full((len(greedy), 1), self._scale, device=greedy.device)


def build_exploration(config: ExplorationConfig) -> Exploration:
    """Build the exploration that a configuration names."""
    match config:
        case HardConfig():
            return ConstantNoise(surrogate=False, tau=1.0, scale=0.0)
        case SteConfig():
            return ConstantNoise(surrogate=True, tau=config.tau, scale=0.0)
        case GumbelConfig():
            return ConstantNoise(surrogate=True, tau=config.tau, scale=config.noise)


def gumbel(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw standard Gumbel noise, finite for every draw; drawn on the CPU so that devices agree."""
    tiny = torch.finfo(torch.float32).tiny
    uniform = torch.rand(shape, generator=generator).clamp(min=tiny, max=1 - 2**-24)
    return -torch.log(-torch.log(uniform)).to(device)


def pick(
    logits: Tensor, noise: Tensor, tau: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw a code for every row of a level.

    Parameters
    ----------
    logits : Tensor
        (U, K), higher is nearer, already on the scale that the noise is measured against.
    noise : Tensor
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
        (U, K), the soft assignment, with gradient to the logits.

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
    lowest = float(noise.min()) if noise.numel() else 0.0
    if lowest < 0:
        raise ValueError(f"noise must be >= 0, got {lowest}")
    if generator is not None and bool((noise > 0).any()):
        logits = logits + noise * gumbel(logits.shape, generator, logits.device)
    return logits.argmax(dim=-1), torch.softmax(logits / tau, dim=-1)
