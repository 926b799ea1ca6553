"""The next item written through a causal backbone, symbol by symbol: each symbol is read before the next is written.

Shapes: B batch, N tokens that are read, T items, S steps of the longest SID, D width, K symbols of a step, W beams.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.recommenders.backbones import BeamCache, CausalStack, last_states
from components.recommenders.code_heads import step_losses
from components.recommenders.item_encoders import SymbolEmbedding
from components.seams import BatchTokens, RecommenderLoss


class BackboneState(NamedTuple):
    """What beams have that write through the backbone."""

    hidden: Tensor
    """(B, W, D), what the next symbol is written from."""
    length: Tensor
    """(B,) long, items of each history: the place of the one that is written."""
    cache: BeamCache
    """Keys and values of what was read."""


@dataclass(frozen=True)
class BackboneHead:
    """A head over codes (``decoding.CodeHead``) made of a recommender's parts, which stay the recommender's."""

    symbols: SymbolEmbedding
    """What symbols are read as, and what they are written in."""
    place: Tensor
    """(T, D), a vector for each place of a history, and one for the place behind it."""
    step_place: Tensor
    """(S, D), a vector for each symbol's place in its item."""
    stack: CausalStack
    """The backbone."""
    out: nn.Linear
    """D to all symbols."""

    def start(self, x_BND: Tensor, mask_BN: Tensor, items_B: Tensor) -> BackboneState:
        """Read histories of so many items, which stand where the mask is True; one beam each."""
        hidden, context = self.stack(x_BND)
        last_BD = last_states(hidden, mask_BN.sum(dim=1))
        return BackboneState(last_BD[:, None], items_B, self.stack.start(context, mask_BN))

    def step(self, state: BackboneState, step: int, symbols: Tensor | None) -> tuple[Tensor, BackboneState]:
        """Write one symbol a beam (see ``decoding.CodeHead``)."""
        if symbols is not None:
            x_BWD = self.symbols.hard(symbols) + self.place[state.length][:, None] + self.step_place[step - 1]
            hidden, cache = self.stack.step(x_BWD, state.cache)
            state = state._replace(hidden=hidden, cache=cache)
        return self.logits(state.hidden, step), state

    def reorder(self, state: BackboneState, index: Tensor) -> BackboneState:
        """Follow the beams that survived (see ``decoding.CodeHead``)."""
        return state._replace(cache=state.cache.reorder(index))

    def logits(self, hidden_xD: Tensor, step: int) -> Tensor:
        """Return the scores (..., K) of the symbols that a step may write."""
        return F.linear(hidden_xD, self.out.weight[slice(*self.symbols.space.range(step))])

    def loss(
        self, x_BTD: Tensor, next_BT: Tensor, predicted_BT: Tensor, tokens: BatchTokens, dropout: nn.Module
    ) -> RecommenderLoss:
        """Write the item after each one: its symbols see the items before and their own beginning.

        Parameters
        ----------
        x_BTD : Tensor
            What is read, one token an item.
        next_BT : Tensor
            (B, T) long, the item after each, among the unique ones.
        predicted_BT : Tensor
            (B, T) bool, where there is one.
        tokens : BatchTokens
            Those of the unique items.
        dropout : Module
            What the known beginnings go through.
        """
        batch, length, dim = x_BTD.shape
        steps = len(self.step_place)
        known_BTSD = self.symbols(tokens.forced)[next_BT][:, :, :-1]
        places = self.place[1 : length + 1, None] + self.step_place[:-1]
        x_BND = torch.cat([x_BTD[:, :, None], dropout(known_BTSD + places)], dim=2).flatten(1, 2)
        at_N = torch.arange(length * steps, device=x_BTD.device)
        item_N, step_N = at_N // steps, at_N % steps
        reads_NN = ((step_N == 0) & (item_N <= item_N[:, None])) | (
            (item_N == item_N[:, None]) & (step_N <= step_N[:, None])
        )
        hidden, _ = self.stack(
            x_BND, torch.zeros_like(reads_NN, dtype=x_BND.dtype).masked_fill(~reads_NN, -torch.inf)
        )
        hidden_PSD = hidden.view(batch, length, steps, dim)[predicted_BT]
        items_P = next_BT[predicted_BT]
        writes_SP = (tokens.target.symbols[items_P] >= 0).T
        return step_losses(
            self.logits,
            [hidden_PSD[writes, step] for step, writes in enumerate(writes_SP)],
            tokens.target,
            [items_P[writes] for writes in writes_SP],
            self.symbols.space,
        )
