"""Decoder-only recommender over flattened SIDs: a history is one string of symbols, the next item its end.

Every position of a history is trained in one pass. SIDs may differ in length (see ``strings``).
Shapes: B batch, T items of a history, N symbols of a row, S steps of the longest SID, D width, U unique items,
P predicted symbols, W beams.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.recommenders.backbone_head import BackboneHead
from components.recommenders.backbones import CausalStack, StackConfig
from components.recommenders.code_heads import step_losses
from components.recommenders.decoding import beam_search
from components.recommenders.item_encoders import SymbolEmbedding, append_target, latest
from components.recommenders.strings import Strings, lay_out
from components.seams import BatchTokens, Catalogue, Ranking, RecommenderLoss, SequenceBatch, SymbolSpace
from components.tokenizers.sids import symbol_counts
from components.tokenizers.trie import PrefixTrie


class CausalConfig(StackConfig):
    """Decoder-only recommender, all positions trained in one pass."""

    kind: Literal["causal"] = "causal"
    max_history: int = Field(20, ge=1)
    """Latest items of a history that are read."""
    max_tokens: int | None = None
    """Most symbols of a history that are read, suffixes included: whole items, the latest first; null: max_history
    alone says how much is read."""
    length_penalty: float = Field(0.0, ge=0)
    """Items are ranked by log-probability / symbols^a; 0: by log-probability alone. Above 0 it favours items that
    have longer SIDs."""


class Causal(nn.Module):
    """Flat item tokens, causal stack, autoregressive head."""

    positions: Literal["all", "last"] = "all"

    def __init__(self, config: CausalConfig, space: SymbolSpace) -> None:
        super().__init__()
        if config.max_tokens is not None and config.max_tokens < space.num_steps:
            raise ValueError(
                f"model.max_tokens {config.max_tokens} holds no SID of {space.num_steps} symbols, the longest here: "
                f"set it to {space.num_steps} at least, or to null"
            )
        self.config, self.space = config, space
        self.symbols = SymbolEmbedding(space, config.dim, std=1.0)
        self.place = nn.Parameter(torch.randn(config.max_history + 1, config.dim) * 0.1)
        self.step_place = nn.Parameter(torch.randn(space.num_steps, config.dim) * 0.1)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = CausalStack(config)
        self.out = nn.Linear(config.dim, space.num_symbols, bias=False)
        nn.init.normal_(self.out.weight, std=0.02)

    @property
    def head(self) -> BackboneHead:
        """What writes the next item."""
        return BackboneHead(self.symbols, self.place, self.step_place, self.stack, self.out)

    def loss(self, batch: SequenceBatch, tokens: BatchTokens) -> RecommenderLoss:
        """Return the mean cross-entropy over all symbols after the first item of each history, target included.

        Raises
        ------
        ValueError
            Only one of history and teacher forcing carries weights: here every item is both.
        """
        check_paths(
            history=tokens.history.weights is not None, teacher_forcing=tokens.forced.weights is not None
        )
        items, present = append_target(batch)

        strings = lay_out(symbol_counts(tokens.history.symbols)[items], present)
        items_BN = items.gather(1, strings.place)
        x_BND = self._place(self.symbols(tokens.history)[items_BN, strings.step], strings)
        hidden, _ = self.stack(self.dropout(x_BND[:, :-1]))

        # The symbol before predicts a symbol: the suffix of the item before an item's first, and so on.
        predicted = (strings.present & (strings.place > 0))[:, 1:]
        step_P, order = strings.step[:, 1:][predicted].sort(stable=True)
        at_P = predicted.flatten().nonzero().squeeze(1)[order]
        hidden_PD = hidden.flatten(0, 1).index_select(0, at_P)
        items_P = items_BN[:, 1:].flatten()[at_P]
        sizes = torch.bincount(step_P, minlength=self.space.num_steps).tolist()
        return step_losses(
            self.head.logits,
            torch.split_with_sizes(hidden_PD, sizes),
            tokens.target,
            torch.split_with_sizes(items_P, sizes),
            self.space,
        )

    def catalogue(self, symbols: Tensor, trie: PrefixTrie) -> Catalogue:
        """Return the table and its tree: histories are read as symbols."""
        return Catalogue(symbols, trie)

    def rank(self, batch: SequenceBatch, catalogue: Catalogue, beams: int, *, exclude_seen: bool) -> Ranking:
        """Return the ``beams`` best items of each history.

        Its latest ``max_history`` items are read, or as many of these as ``max_tokens`` symbols hold.
        """
        items = batch.unique[batch.items]
        excluded = items.masked_fill(~batch.mask, -1) if exclude_seen else None
        most = self.config.max_tokens
        budget = None if most is None else (symbol_counts(catalogue.symbols[items]), most)
        recent = latest(items, batch.mask, self.config.max_history, budget)
        strings = lay_out(symbol_counts(catalogue.symbols[recent.items]), recent.mask)
        symbol_BN = catalogue.symbols[recent.items.gather(1, strings.place), strings.step]
        x_BND = self._place(self.symbols.hard(symbol_BN), strings)
        return beam_search(
            self.head,
            self.head.start(x_BND, strings.present, recent.length),
            catalogue.trie,
            self.space.starts,
            beams,
            excluded,
            length_penalty=self.config.length_penalty,
        )

    def _place(self, x_BND: Tensor, strings: Strings) -> Tensor:
        """Add an item's place in the history and a symbol's place in the item."""
        place_BND = F.embedding(strings.place, self.place)
        return x_BND + place_BND + F.embedding(strings.step, self.step_place)


def check_paths(*, history: bool, teacher_forcing: bool) -> None:
    """Refuse to attach the gradient to only one of the two ways in which this recommender reads an item."""
    if history != teacher_forcing:
        raise ValueError(
            "the causal recommender reads an item as history and as teacher forcing in one token: "
            "switch the gradient paths history and teacher_forcing on or off together"
        )
