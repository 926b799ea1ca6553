"""Transformer parts, each with two ways to run: whole sequences in training, beams over a shared context.

Shapes: B batch, N tokens, D width, H heads, E width of a head, C context tokens, W beams, P tokens a beam
has written so far.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeysValues(NamedTuple):
    """Projected keys and values: (B, H, C, E) of a context, (B, H, W, P, E) of the beams' own tokens."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """Multi-head attention without biases; ``scale`` multiplies the scores (1 in T5, 1/sqrt(E) elsewhere)."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, scale: float) -> None:
        super().__init__()
        self.heads, self.scale, self.dropout = heads, scale, dropout
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key = nn.Linear(dim, heads * head_dim, bias=False)
        self.value = nn.Linear(dim, heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def _split(self, x_BND: Tensor) -> Tensor:
        batch, length, _ = x_BND.shape
        return x_BND.view(batch, length, self.heads, -1).transpose(1, 2)

    def project(self, x_BND: Tensor) -> KeysValues:
        """Return the keys and values of a sequence, (B, H, N, E) each."""
        return KeysValues(self._split(self.key(x_BND)), self._split(self.value(x_BND)))

    def forward(
        self, x_BND: Tensor, context: KeysValues, bias: Tensor | None = None, *, causal: bool = False
    ) -> Tensor:
        """Attend from every token to a context; ``bias`` is added to the scores, broadcast to (B, H, N, C)."""
        attended = F.scaled_dot_product_attention(
            self._split(self.query(x_BND)),
            context.keys,
            context.values,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.scale,
        )
        return self.out(attended.transpose(1, 2).flatten(2))

    def beams(
        self,
        x_BWD: Tensor,
        context: KeysValues | None,
        context_bias: Tensor | None,
        written: KeysValues | None,
        written_bias: Tensor | None = None,
    ) -> Tensor:
        """Attend from one new token a beam to the user's context and to what its own beam has written.

        The context is projected once a user and never copied to the beams: beams are rows of one query
        matrix. ``written`` includes the new token itself.
        """
        query = self._split(self.query(x_BWD)) * self.scale
        scores = []
        if context is not None:
            shared = query @ context.keys.transpose(-1, -2)
            scores.append(shared if context_bias is None else shared + context_bias)
        if written is not None:
            own = (query.unsqueeze(-2) * written.keys).sum(-1)
            scores.append(own if written_bias is None else own + written_bias)
        weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1)
        width = 0 if context is None else context.keys.shape[-2]
        attended = torch.zeros((), device=x_BWD.device)
        if context is not None:
            attended = weights[..., :width] @ context.values
        if written is not None:
            attended = attended + (weights[..., width:].unsqueeze(-1) * written.values).sum(-2)
        return self.out(attended.transpose(1, 2).flatten(2))

    def append(self, x_BWD: Tensor, written: KeysValues | None) -> KeysValues:
        """Add the new token of every beam to what the beams have written."""
        keys, values = (t.unsqueeze(-2) for t in self.project(x_BWD))
        if written is None:
            return KeysValues(keys, values)
        return KeysValues(torch.cat([written.keys, keys], -2), torch.cat([written.values, values], -2))


class FeedForward(nn.Module):
    """Two layers with ReLU and no biases, as in T5 1.0."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        return self.down(self.dropout(F.relu(self.up(x))))


class RelativeBias(nn.Module):
    """T5's relative position bias: one learned number a head and distance bucket.

    Half of the buckets are exact small distances, the others grow logarithmically up to ``max_distance``.

    References
    ----------
    Raffel et al., Exploring the Limits of Transfer Learning (JMLR 2020), section 2.1.
    """

    def __init__(
        self, heads: int, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128
    ) -> None:
        super().__init__()
        self.bidirectional, self.max_distance = bidirectional, max_distance
        self.table = nn.Embedding(buckets, heads)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return (1, H, Q, C) for the positions of queries (Q,) and keys (C,)."""
        distance = keys[None, :] - queries[:, None]
        buckets = self.table.num_embeddings
        if self.bidirectional:
            buckets //= 2
            side = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            side = torch.zeros_like(distance)
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        far = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (far * (buckets - exact)).long()).clamp(max=buckets - 1)
        bucket = side + torch.where(distance < exact, distance, far)
        return self.table(bucket).permute(2, 0, 1).unsqueeze(0)


def mask_bias(mask_BC: Tensor) -> Tensor:
    """Turn a mask of present tokens into (B, 1, 1, C) scores: 0 where present, -inf where not."""
    return torch.zeros(mask_BC.shape, device=mask_BC.device).masked_fill(~mask_BC, -math.inf)[
        :, None, None, :
    ]


def reorder(cache: KeysValues, index_BW: Tensor) -> KeysValues:
    """Give every new beam the written tokens of the old beam that it continues."""
    batch = torch.arange(len(index_BW), device=index_BW.device)[:, None]
    keys, values = (t.transpose(1, 2)[batch, index_BW].transpose(1, 2) for t in cache)
    return KeysValues(keys, values)
