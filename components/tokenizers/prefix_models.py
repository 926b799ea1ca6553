"""Networks that say something of every prefix of a name in one pass: decoders, and heads that say when to stop.

Shapes: B rows, T positions, G width of the decoder, H width of the encoder, D content width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD = 64
"""Width of an attention head, or the whole width where that is smaller."""
ROPE_BASE = 1024.0
"""Slowest turn of the rotary positions."""


class PrefixTransformer(nn.Module):
    """Causal transformer over embedded tokens (B, T, G) to content vectors (B, T, D), as published."""

    def __init__(self, dim: int, layers: int, dropout: float, output_dim: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(CausalBlock(dim, dropout) for _ in range(layers))
        self.out = nn.Linear(dim, output_dim)

    def forward(self, x_BTG: Tensor) -> Tensor:
        """Return one vector a prefix."""
        x_BTG = self.dropout(x_BTG)
        for block in self.blocks:
            x_BTG = block(x_BTG)
        y_BTD: Tensor = self.out(_norm(x_BTG))
        return y_BTD


class PrefixSum(nn.Module):
    """Weighted sum of the tokens of a prefix, then two layers that know its length."""

    def __init__(self, positions: int, dim: int, dropout: float, output_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(positions, 1))
        self.place = nn.Parameter(torch.zeros(positions, dim))
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(dim, 2 * dim)
        self.straight = nn.Linear(dim, output_dim)
        self.down = nn.Linear(2 * dim, output_dim)

    def forward(self, x_BTG: Tensor) -> Tensor:
        """Return one vector a prefix."""
        positions = x_BTG.shape[1]
        sum_BTG = (self.weight[:positions] * x_BTG).cumsum(dim=1) + self.place[:positions]
        deep: Tensor = self.down(self.dropout(F.gelu(self.up(sum_BTG))))
        return self.straight(sum_BTG) + deep


class StopTransformer(nn.Module):
    """One causal layer over [b(x), residuals] (B, T, H) to hazard logits (B, T - 1), as published."""

    def __init__(self, positions: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.block = CausalBlock(dim, dropout)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(positions - 1))
        nn.init.zeros_(self.out.weight)  # every hazard starts at one half

    def forward(self, states_BTH: Tensor) -> Tensor:
        """Return the logit of stopping after token l, which sees the item and tokens up to l."""
        hidden = self.dropout(_norm(self.block(states_BTH))[:, 1:])
        hazards: Tensor = self.out(hidden)[..., 0] + self.bias
        return hazards


class StopMlp(nn.Module):
    """Two layers over [b(x), residual after token l] to hazard logits (B, T - 1)."""

    def __init__(self, positions: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(positions - 1))
        nn.init.zeros_(self.out.weight)  # every hazard starts at one half

    def forward(self, states_BTH: Tensor) -> Tensor:
        """Return the logit of stopping after token l, which sees the item and tokens up to l."""
        item = states_BTH[:, :1].expand(-1, states_BTH.shape[1] - 1, -1)
        hidden = F.gelu(self.up(torch.cat([item, states_BTH[:, 1:]], dim=-1)))
        hazards: Tensor = self.out(self.dropout(hidden))[..., 0] + self.bias
        return hazards


class CausalBlock(nn.Module):
    """Self-attention with normalised queries and keys and rotary positions on half of a head, then squared ReLU.

    Norms have no gain; both projections back to the stream start at 0, so a fresh block is the identity.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        check_width("dim", dim)
        self.head = min(HEAD, dim)
        self.into = nn.Linear(dim, 3 * dim, bias=False)
        self.back = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.back.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return (B, T, C); position t depends on positions up to t."""
        query, key, value = (
            part.unflatten(-1, (-1, self.head)).transpose(1, 2)
            for part in self.into(_norm(x_BTC)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(
            _turn(_norm(query)), _turn(_norm(key)), value, is_causal=True
        )
        x_BTC = x_BTC + self.dropout(self.back(attended.transpose(1, 2).flatten(2)))
        deep: Tensor = self.down(F.relu(self.up(_norm(x_BTC))).square())
        return x_BTC + self.dropout(deep)


def check_width(name: str, dim: int) -> None:
    """Refuse a width that does not split into heads, each in four parts."""
    head = min(HEAD, dim)
    if dim % head or head % 4:
        raise ValueError(
            f"{name} {dim} does not split into heads of {head}: take a multiple of {HEAD}, or a smaller multiple of "
            "4, for network transformer"
        )


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _turn(x_BHTE: Tensor) -> Tensor:
    """Rotary positions on the first half of the last axis.

    References
    ----------
    Su et al., "RoFormer: enhanced transformer with rotary position embedding" (arXiv 2104.09864), section 3.
    """
    pairs = x_BHTE.shape[-1] // 4
    rate = ROPE_BASE ** (-torch.arange(pairs, device=x_BHTE.device) / pairs)
    angle = torch.arange(x_BHTE.shape[-2], device=x_BHTE.device)[:, None] * rate
    one, two, still = torch.split(x_BHTE, [pairs, pairs, x_BHTE.shape[-1] - 2 * pairs], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - two * sin, one * sin + two * cos, still], dim=-1)
