"""HSTU: a causal stack of gated attention whose weights are not a softmax, and which has no feed-forward layer.

Shapes as in ``layers.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.recommenders.backbones import StackConfig
from components.recommenders.layers import RelativeBias


class HstuLayer(nn.Module):
    """One projection to gates, values, queries and keys; attention; the gate; one projection back."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads, self.scale = config.heads, config.head_dim**-0.5
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.up = nn.Linear(config.dim, 4 * inner, bias=False)
        self.bias = RelativeBias(config.heads, bidirectional=False)
        self.down = nn.Linear(inner, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Run whole sequences."""
        u, v, q, k = self.up(self.norm(x_BND)).chunk(4, dim=-1)
        attended = self.weights(self._split(q), self._split(k)) @ self._split(v)
        return x_BND + self.dropout(self.down(attended.transpose(1, 2).flatten(2) * F.silu(u)))

    def weights(self, q_BHNE: Tensor, k_BHNE: Tensor) -> Tensor:
        """Return (B, H, N, N) what each token takes of itself and those before it; they sum to 1."""
        position = torch.arange(q_BHNE.shape[2], device=q_BHNE.device)
        scores = q_BHNE @ k_BHNE.transpose(-1, -2) * self.scale + self.bias(position, position)
        # Softplus underflows to 0 far below 0; a token that all weights of its past left would divide by it.
        weights = F.softplus(scores).clamp(min=torch.finfo(scores.dtype).tiny).tril()
        return weights / weights.sum(dim=-1, keepdim=True)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class HstuStack(nn.Module):
    """Hierarchical sequential transduction units. Padding stands on the right, so causality alone keeps it out.

    Differs from the paper: weights are softplus and sum to 1 over the past, where the paper's are SiLU and are not
    normalised; of the four projections only the gate passes through SiLU; what attention returns is gated without a
    norm of its own; the bias, one table a layer, is of distance alone, not of time. As in the other stacks here, RMS
    norms stand before each layer and at the end (layer norms in the paper), projections have no bias, and dropout is
    on the residual branch. ``StackConfig.hidden`` is not read.

    References
    ----------
    Zhai et al., Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
    Recommendations (ICML 2024, arXiv 2402.17152), section 3. Softplus and the sum of 1: Wang et al., IntRR
    (arXiv 2602.20704), released code.
    """

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        layers = (HstuLayer(config) for _ in range(config.layers))
        self.layers: Sequence[HstuLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Run whole sequences; return hidden states (B, N, D)."""
        for layer in self.layers:
            x_BND = layer(x_BND)
        return self.norm(x_BND)
