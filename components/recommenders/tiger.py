"""TIGER: a T5 encoder reads the history's SIDs, a T5 decoder writes the next item's SID.

One target a row: a training row is a prefix of a user's history and the item that follows it. SIDs are of one
length, so a history is a rectangle of items and steps.
Shapes: B batch, T items of a history, S steps of a SID, D width, U unique items, W beams.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from components.recommenders.backbones import BeamCache, DecoderStack, EncoderStack, StackConfig
from components.recommenders.code_heads import step_losses
from components.recommenders.decoding import beam_search
from components.recommenders.item_encoders import SymbolEmbedding, latest
from components.seams import BatchTokens, Catalogue, Ranking, RecommenderLoss, SequenceBatch, SymbolSpace
from components.tokenizers.trie import PrefixTrie

# Unscaled attention and tied, unscaled logits start near uniform only if all weights start this small.
_STD = 0.02


class TigerConfig(StackConfig):
    """Encoder-decoder recommender, one target a row; reads SIDs of one length."""

    kind: Literal["tiger"] = "tiger"
    max_history: int = Field(20, ge=1)
    """Latest items of a history that are read."""


class Tiger(nn.Module):
    """Flat item tokens, T5 encoder-decoder, autoregressive head whose weights are the token tables.

    References
    ----------
    Rajput et al., Recommender Systems with Generative Retrieval (NeurIPS 2023), section 3.2. The tied tables,
    one a step, and the initial spread are those of LETTER (CIKM 2024) and DIGER (arXiv 2601.19711).
    """

    positions: Literal["all", "last"] = "last"

    def __init__(self, config: TigerConfig, space: SymbolSpace) -> None:
        super().__init__()
        self.config, self.space = config, space
        self.symbols = SymbolEmbedding(space, config.dim, std=_STD)
        self.begin = nn.Parameter(torch.randn(config.dim) * _STD)
        self.encoder = EncoderStack(config)
        self.decoder = DecoderStack(config)
        self.apply(_spread)

    def loss(self, batch: SequenceBatch, tokens: BatchTokens) -> RecommenderLoss:
        """Return the mean cross-entropy of each row's target, from the latest items of its history.

        The history, the known beginning of the target and the target itself each come from their own tokens,
        so the three gradient paths are independent.
        """
        recent = latest(batch.items, batch.mask, self.config.max_history)
        memory, read = self._encode(self.symbols(tokens.history)[recent.items], recent.mask)
        known_BSD = self.symbols(tokens.forced)[batch.target][:, :-1]
        begin = self.begin.expand(len(known_BSD), 1, -1)
        h_BSD = self.decoder(torch.cat([begin, known_BSD], dim=1), memory, read)
        steps = self.space.num_steps
        return step_losses(self._logits, h_BSD.unbind(1), tokens.target, [batch.target] * steps, self.space)

    def catalogue(self, symbols: Tensor, trie: PrefixTrie) -> Catalogue:
        """Return the table and its tree: histories are read as symbols."""
        return Catalogue(symbols, trie)

    def rank(self, batch: SequenceBatch, catalogue: Catalogue, beams: int, *, exclude_seen: bool) -> Ranking:
        """Return the ``beams`` best items of each history; its latest ``max_history`` items are read."""
        items = batch.unique[batch.items]
        excluded = items.masked_fill(~batch.mask, -1) if exclude_seen else None
        recent = latest(items, batch.mask, self.config.max_history)
        memory, read = self._encode(self.symbols.hard(catalogue.symbols[recent.items]), recent.mask)
        state = self.decoder.start(memory, read)
        return beam_search(self, state, catalogue.trie, self.space.starts, beams, excluded)

    def step(self, state: BeamCache, step: int, symbols: Tensor | None) -> tuple[Tensor, BeamCache]:
        """Write one symbol a beam (see ``decoding.CodeHead``)."""
        begin = self.begin.expand(len(state.context_bias), 1, -1)
        y_BWD = begin if symbols is None else self.symbols.hard(symbols)
        hidden, state = self.decoder.step(y_BWD, state)
        return self._logits(hidden, step), state

    def reorder(self, state: BeamCache, index: Tensor) -> BeamCache:
        """Follow the beams that survived (see ``decoding.CodeHead``)."""
        return state.reorder(index)

    def _encode(self, x_BTSD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder's memory (B, T * S, D) and a mask of the symbols that are there."""
        read = mask_BT.repeat_interleave(self.space.num_steps, dim=1)
        return self.encoder(x_BTSD.flatten(1, 2), read), read

    def _logits(self, hidden: Tensor, step: int) -> Tensor:
        return nn.functional.linear(hidden, self.symbols.weight[slice(*self.space.range(step))])


def _spread(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_STD)
