"""Decoder-only recommender over flattened SIDs: a history is one string of symbols, the next item its end.

Every position of a history is trained in one pass.
Shapes: B batch, T items of a history, S steps of a SID, D width, U unique items, P predicted items, W beams.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from components.recommenders.backbones import BeamCache, CausalStack, StackConfig
from components.recommenders.code_heads import step_losses
from components.recommenders.decoding import beam_search
from components.recommenders.item_encoders import SymbolEmbedding, latest
from components.seams import BatchTokens, Ranking, RecommenderLoss, SequenceBatch, SymbolSpace
from components.tokenizers.trie import PrefixTrie


class CausalConfig(StackConfig):
    """Decoder-only recommender, all positions trained in one pass."""

    kind: Literal["causal"] = "causal"
    max_history: int = Field(20, ge=1)
    """Latest items of a history that are read."""


class _State(NamedTuple):
    hidden: Tensor
    length: Tensor
    cache: BeamCache


class Causal(nn.Module):
    """Flat item tokens, causal stack, autoregressive head."""

    positions: Literal["all", "last"] = "all"

    def __init__(self, config: CausalConfig, space: SymbolSpace) -> None:
        super().__init__()
        self.config, self.space = config, space
        self.symbols = SymbolEmbedding(space, config.dim, std=1.0)
        self.place = nn.Parameter(torch.randn(config.max_history + 1, config.dim) * 0.1)
        self.step_place = nn.Parameter(torch.randn(space.num_steps, config.dim) * 0.1)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = CausalStack(config)
        self.out = nn.Linear(config.dim, space.num_symbols, bias=False)
        nn.init.normal_(self.out.weight, std=0.02)

    def loss(self, batch: SequenceBatch, tokens: BatchTokens) -> RecommenderLoss:
        """Return the mean cross-entropy over all items after the first of each history, target included.

        Raises
        ------
        ValueError
            Only one of history and teacher forcing carries weights: here every item is both.
        """
        check_paths(
            history=tokens.history.weights is not None, teacher_forcing=tokens.forced.weights is not None
        )
        length = batch.mask.sum(dim=1, keepdim=True)
        items = torch.cat([batch.items, batch.items[:, -1:]], dim=1).scatter(1, length, batch.target[:, None])
        present = torch.arange(items.shape[1], device=items.device) <= length

        x_BTSD = self._read(self.symbols(tokens.history)[items])
        hidden, _ = self.stack(self.dropout(x_BTSD.flatten(1, 2)[:, :-1]))
        # The token before an item predicts its first symbol, each of its symbols the one after.
        steps = self.space.num_steps
        h_PSD = hidden[:, steps - 1 :].unflatten(1, (-1, steps))[present[:, 1:]]
        return step_losses(self._logits, h_PSD, tokens.target, items[:, 1:][present[:, 1:]], self.space)

    def rank(
        self, batch: SequenceBatch, symbols: Tensor, trie: PrefixTrie, beams: int, *, exclude_seen: bool
    ) -> Ranking:
        """Return the ``beams`` best items of each history; its latest ``max_history`` items are read."""
        items = batch.unique[batch.items]
        excluded = items.masked_fill(~batch.mask, -1) if exclude_seen else None
        recent, length = latest(items, batch.mask, self.config.max_history)
        x_BTSD = self._read(self.symbols.hard(symbols[recent]))
        hidden, context = self.stack(x_BTSD.flatten(1, 2))
        steps = self.space.num_steps
        read = torch.arange(hidden.shape[1], device=hidden.device) < (length * steps)[:, None]
        last = hidden.gather(1, (length * steps - 1)[:, None, None].expand(-1, 1, hidden.shape[-1]))
        state = _State(last, length, self.stack.start(context, read))
        return beam_search(self, state, trie, self.space.starts, beams, excluded)

    def step(self, state: _State, step: int, symbols: Tensor | None) -> tuple[Tensor, _State]:
        """Write one symbol a beam (see ``decoding.CodeHead``)."""
        if symbols is not None:
            x_BWD = self.symbols.hard(symbols) + self.place[state.length][:, None] + self.step_place[step - 1]
            hidden, cache = self.stack.step(x_BWD, state.cache)
            state = state._replace(hidden=hidden, cache=cache)
        return self._logits(state.hidden, step), state

    def reorder(self, state: _State, index: Tensor) -> _State:
        """Follow the beams that survived (see ``decoding.CodeHead``)."""
        return state._replace(cache=state.cache.reorder(index))

    def _read(self, x_BTSD: Tensor) -> Tensor:
        """Add an item's place in the history and a symbol's place in the item."""
        return x_BTSD + self.place[: x_BTSD.shape[1], None] + self.step_place

    def _logits(self, hidden: Tensor, step: int) -> Tensor:
        return nn.functional.linear(hidden, self.out.weight[slice(*self.space.range(step))])


def check_paths(*, history: bool, teacher_forcing: bool) -> None:
    """Refuse to attach the gradient to only one of the two ways in which this recommender reads an item."""
    if history != teacher_forcing:
        raise ValueError(
            "the causal recommender reads an item as history and as teacher forcing in one token: "
            "switch the gradient paths history and teacher_forcing on or off together"
        )
