"""Transformer stacks: decoder-only (``CausalStack``) and T5's encoder and decoder.

Shapes as in ``layers.py``. Every stack normalises before each part (RMS norm) and once at its end.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from components.config import Config
from components.recommenders.layers import (
    Attention,
    FeedForward,
    KeysValues,
    RelativeBias,
    mask_bias,
    reorder,
)

L = TypeVar("L", bound=nn.Module)


class StackConfig(Config):
    """Size of a transformer stack."""

    dim: int = Field(128, ge=1)
    """Width D of the model."""
    layers: int = Field(2, ge=1)
    """Layers of the stack (of each stack, in an encoder-decoder)."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    head_dim: int = Field(32, ge=1)
    """Width E of a head."""
    hidden: int = Field(512, ge=1)
    """Width of the feed-forward layer; not read by hstu."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on residual branches, and in T5's stacks on attention weights and hidden units too."""


class BeamCache(NamedTuple):
    """What beams attend to: the user's context, projected once, and their own tokens, by layer."""

    context: list[KeysValues]
    context_bias: Tensor
    written: list[KeysValues | None]

    def reorder(self, index_BW: Tensor) -> "BeamCache":
        """Follow the beams that survived."""
        written = [None if kv is None else reorder(kv, index_BW) for kv in self.written]
        return self._replace(written=written)


class SelfLayer(nn.Module):
    """Self-attention and feed-forward; ``inner`` is the dropout on attention weights and hidden units."""

    def __init__(self, config: StackConfig, scale: float, inner: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config.dim, config.heads, config.head_dim, inner, scale)
        self.forward_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.feed_forward = FeedForward(config.dim, config.hidden, inner)
        self.dropout = nn.Dropout(config.dropout)


def last_states(hidden_BND: Tensor, length_B: Tensor) -> Tensor:
    """Return the states (B, D) at the last token of each row."""
    return hidden_BND[torch.arange(len(length_B), device=length_B.device), length_B - 1]


def _stack(layers: Iterable[L]) -> Sequence[L]:
    """Register layers as torch wants them; the type says what they are."""
    return nn.ModuleList(layers)  # type: ignore[return-value]


class CausalStack(nn.Module):
    """Decoder-only transformer. Padding stands on the right, so the causal mask alone keeps it out.

    Dropout is on the residual branches alone: drawing it for attention weights and hidden units as well took
    a third of a training step on CPU.
    """

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        scale = config.head_dim**-0.5
        self.layers: Sequence[SelfLayer] = _stack(
            SelfLayer(config, scale, inner=0.0) for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)

    def forward(self, x_BND: Tensor, bias: Tensor | None = None) -> tuple[Tensor, list[KeysValues]]:
        """Run whole sequences; return hidden states and every layer's keys and values.

        A bias (N, N) on the scores, -inf where a token is not to be read, stands in for the causal mask.
        """
        context = []
        for layer in self.layers:
            y = layer.attention_norm(x_BND)
            context.append(layer.attention.project(y))
            x_BND = x_BND + layer.dropout(layer.attention(y, context[-1], bias, causal=bias is None))
            x_BND = x_BND + layer.dropout(layer.feed_forward(layer.forward_norm(x_BND)))
        return self.norm(x_BND), context

    def start(self, context: list[KeysValues], mask_BC: Tensor) -> BeamCache:
        """Make the cache of beams that continue the contexts; ``mask_BC`` is True where a token is."""
        return BeamCache(context, mask_bias(mask_BC), [None] * len(context))

    def step(self, x_BWD: Tensor, cache: BeamCache) -> tuple[Tensor, BeamCache]:
        """Run one new token of every beam."""
        written: list[KeysValues | None] = []
        for layer, context, own in zip(self.layers, cache.context, cache.written, strict=True):
            y = layer.attention_norm(x_BWD)
            own = layer.attention.append(y, own)
            written.append(own)
            x_BWD = x_BWD + layer.attention.beams(y, context, cache.context_bias, own)
            x_BWD = x_BWD + layer.feed_forward(layer.forward_norm(x_BWD))
        return self.norm(x_BWD), cache._replace(written=written)


class EncoderStack(nn.Module):
    """T5's encoder: bidirectional, unscaled attention, one relative bias shared by all layers."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.bias = RelativeBias(config.heads, bidirectional=True)
        self.layers: Sequence[SelfLayer] = _stack(
            SelfLayer(config, 1.0, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BND: Tensor, mask_BN: Tensor) -> Tensor:
        """Encode whole sequences; ``mask_BN`` is True where a token is."""
        position = torch.arange(x_BND.shape[1], device=x_BND.device)
        bias = self.bias(position, position) + mask_bias(mask_BN)
        x_BND = self.dropout(x_BND)
        for layer in self.layers:
            y = layer.attention_norm(x_BND)
            x_BND = x_BND + layer.dropout(layer.attention(y, layer.attention.project(y), bias))
            x_BND = x_BND + layer.dropout(layer.feed_forward(layer.forward_norm(x_BND)))
        return self.dropout(self.norm(x_BND))


class CrossLayer(SelfLayer):
    """Self-attention, attention to the encoder's memory, feed-forward."""

    def __init__(self, config: StackConfig, scale: float) -> None:
        super().__init__(config, scale, inner=config.dropout)
        self.cross_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.cross = Attention(config.dim, config.heads, config.head_dim, config.dropout, scale)


class DecoderStack(nn.Module):
    """T5's decoder: causal over what is written, attending to the encoder's memory."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.bias = RelativeBias(config.heads, bidirectional=False)
        self.layers: Sequence[CrossLayer] = _stack(CrossLayer(config, 1.0) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, y_BND: Tensor, memory_BCD: Tensor, mask_BC: Tensor) -> Tensor:
        """Run known strings (teacher forcing) against the memory."""
        position = torch.arange(y_BND.shape[1], device=y_BND.device)
        future = torch.full((len(position), len(position)), -torch.inf, device=y_BND.device).triu(1)
        bias, memory_bias = self.bias(position, position) + future, mask_bias(mask_BC)
        y_BND = self.dropout(y_BND)
        for layer in self.layers:
            z = layer.attention_norm(y_BND)
            y_BND = y_BND + layer.dropout(layer.attention(z, layer.attention.project(z), bias))
            memory = layer.cross.project(memory_BCD)
            y_BND = y_BND + layer.dropout(layer.cross(layer.cross_norm(y_BND), memory, memory_bias))
            y_BND = y_BND + layer.dropout(layer.feed_forward(layer.forward_norm(y_BND)))
        return self.dropout(self.norm(y_BND))

    def start(self, memory_BCD: Tensor, mask_BC: Tensor) -> BeamCache:
        """Project the memory once a user and layer."""
        context = [layer.cross.project(memory_BCD) for layer in self.layers]
        return BeamCache(context, mask_bias(mask_BC), [None] * len(context))

    def step(self, y_BWD: Tensor, cache: BeamCache) -> tuple[Tensor, BeamCache]:
        """Run one new token of every beam."""
        first = cache.written[0]
        length = 1 if first is None else first.keys.shape[-2] + 1
        position = torch.arange(length, device=y_BWD.device)
        own_bias = self.bias(position[-1:], position)
        written: list[KeysValues | None] = []
        for layer, context, own in zip(self.layers, cache.context, cache.written, strict=True):
            z = layer.attention_norm(y_BWD)
            own = layer.attention.append(z, own)
            written.append(own)
            y_BWD = y_BWD + layer.attention.beams(z, None, None, own, own_bias)
            z = layer.cross_norm(y_BWD)
            y_BWD = y_BWD + layer.cross.beams(z, context, cache.context_bias, None)
            y_BWD = y_BWD + layer.feed_forward(layer.forward_norm(y_BWD))
        return self.norm(y_BWD), cache._replace(written=written)
