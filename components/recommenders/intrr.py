"""IntRR: one token an item, made from a vector of its own that walks through the codebooks; codes without a decoder.

The backbone reads items, not symbols, and runs once a user: the codes of the next item follow from the user's state
by small networks (``ran``). What an item is read as, and how the next is written, are two independent choices, so the
controls that tell redistribution from mere capacity are configurations.

Shapes: B batch, T items of a history, N items of the catalogue, U unique items of a batch, P predicted items, S steps
of the longest SID, D width, E width of an item's own vector, X content width, W beams.
"""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from components.recommenders.backbone_head import BackboneHead
from components.recommenders.backbones import CausalStack, StackConfig, last_states
from components.recommenders.code_heads import step_losses
from components.recommenders.decoding import beam_search
from components.recommenders.hstu import HstuStack
from components.recommenders.item_encoders import Recent, SymbolEmbedding, append_target, latest
from components.recommenders.ran import Ran, RanState, Walk
from components.recommenders.strings import lay_out
from components.seams import (
    BatchTokens,
    Catalogue,
    ItemFacts,
    ItemTokens,
    Ranking,
    RecommenderLoss,
    SequenceBatch,
    SymbolSpace,
)
from components.tokenizers.sids import symbol_counts
from components.tokenizers.trie import PrefixTrie

ROWS = 16384
"""Items read at once when the whole catalogue is."""


class IntrrConfig(StackConfig):
    """One token an item, all positions trained in one pass, codes by a Recursive-Assignment Network (RAN)."""

    kind: Literal["intrr"] = "intrr"
    max_history: int = Field(20, ge=1)
    """Latest items of a history that are read."""
    reads: Literal["ran", "uid", "codewords", "uid_codewords", "flat"] = "ran"
    """ran: its own vector (UID), walked through the codebooks. Controls: uid, that vector itself; codewords, the sum of
    its SID's code vectors; uid_codewords, both added; flat, one token a symbol, as causal reads it."""
    writes: Literal["ran", "autoregressive"] = "ran"
    """ran: codes by the RAN, from the user's state. autoregressive: through the backbone, code by code, as causal does;
    a control."""
    assignment: Literal["soft", "ste"] = "soft"
    """Only where reads is ran. soft: a walk reads the weighted mean of a codebook's vectors. ste: the best one, with
    the gradient of the mean (as released); two items can then have one token."""
    context: Literal["last", "prefix_sum"] = "last"
    """Only where a RAN reads or writes. last: its step looks back at the code before. prefix_sum: at the sum of all
    before. Only with last can the whole catalogue be scored exactly."""
    alignment: float = Field(0.1, ge=0)
    """Only where reads is ran: weight of the cross-entropy between an item's walk and its SID. 0: as released, nothing
    holds them together."""
    product: Literal["scaled", "raw"] = "scaled"
    """Only where a RAN reads or writes. scaled: scores of codes are divided by sqrt(dim). raw: they are not, as
    released, and start saturated."""
    backbone: Literal["transformer", "hstu"] = "transformer"
    """transformer or hstu: what runs over the tokens; hstu only with writes=ran."""
    uid_dim: int = Field(64, ge=1)
    """Only where items have a vector of their own (reads ran, uid or uid_codewords): its width E."""
    ran_hidden: int = Field(128, ge=1)
    """Only where a RAN reads or writes: its hidden width."""
    text: bool = False
    """Only where items have a vector of their own: read the content vector beside it. Items that training never met
    then have a token of their own. Without it they are read as the sum of their SID's code vectors."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.reads == "flat" and self.writes == "autoregressive":
            raise ValueError(
                "reads=flat with writes=autoregressive is the recommender of kind causal: take that"
            )
        if self.writes == "autoregressive" and self.backbone == "hstu":
            raise ValueError(
                "writes=autoregressive continues the backbone code by code from cached keys, which hstu does not "
                "offer: take backbone=transformer or writes=ran"
            )
        if self.text and not self.has_uids:
            raise ValueError(
                f"text stands beside the UID, which reads={self.reads} does not have: unset it, or take reads ran, "
                "uid or uid_codewords"
            )
        return self

    @property
    def has_uids(self) -> bool:
        """Whether items have a vector of their own."""
        return self.reads in ("ran", "uid", "uid_codewords")

    @property
    def scores_exactly(self) -> bool:
        """Whether the whole catalogue can be scored (``exact``): a code depends on the one before alone."""
        return self.writes == "ran" and self.context == "last"


class Intrr(nn.Module):
    """Item tokens, a causal backbone, and a head over codes.

    Parameters
    ----------
    config : IntrrConfig
        Sizes and choices.
    space : SymbolSpace
        What SIDs are written in.
    facts : ItemFacts
        Which items have training events, and content vectors; both travel with the weights.

    References
    ----------
    Wang et al., "IntRR: A Framework for Integrating SID Redistribution and Length Reduction" (arXiv 2602.20704).
    """

    positions: Literal["all", "last"] = "all"
    shortest: Tensor
    trained: Tensor
    text: Tensor | None

    def __init__(self, config: IntrrConfig, space: SymbolSpace, facts: ItemFacts) -> None:
        super().__init__()
        self.config, self.space = config, space
        self.symbols = SymbolEmbedding(space, config.dim, std=1.0)
        # Codes of the shortest SID that training knew, which no later table says: a walk chooses among what may stand.
        self.register_buffer("shortest", torch.tensor(space.shortest or space.num_levels))
        self.register_buffer("trained", facts.trained)
        self.register_buffer("text", _unit_mean_square(facts.vectors) if config.text else None)
        if config.has_uids:
            self.uids = nn.Parameter(torch.randn(len(facts.trained), config.uid_dim))
            self.read_uid = nn.Linear(config.uid_dim, config.dim)
        if config.text:
            self.read_text = nn.Linear(facts.vectors.shape[1], config.dim, bias=False)
        if "ran" in (config.reads, config.writes):
            self.ran = Ran(self.symbols, config.ran_hidden, config.context, config.product)
        self.place = nn.Parameter(torch.randn(config.max_history + 1, config.dim) * 0.1)
        if config.reads == "flat" or config.writes == "autoregressive":
            self.step_place = nn.Parameter(torch.randn(space.num_steps, config.dim) * 0.1)
        if config.writes == "autoregressive":
            self.out = nn.Linear(config.dim, space.num_symbols, bias=False)
            nn.init.normal_(self.out.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = HstuStack(config) if config.backbone == "hstu" else CausalStack(config)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """Yield all but the matrices that multiply: biases, gains, and tables, whose rows may be met rarely."""
        matrices = {id(part.weight) for part in self.modules() if isinstance(part, nn.Linear)}
        yield from (p for p in self.parameters() if id(p) not in matrices)

    @property
    def head(self) -> BackboneHead:
        """What writes the next item through the backbone; only where ``writes`` is autoregressive."""
        assert isinstance(self.stack, CausalStack)
        return BackboneHead(self.symbols, self.place, self.step_place, self.stack, self.out)

    def loss(self, batch: SequenceBatch, tokens: BatchTokens) -> RecommenderLoss:
        """Return the mean cross-entropy over all symbols after the first item of each history, target included.

        ``beside`` holds the alignment: the mean cross-entropy of the walks of the items that are read, over their
        occurrences and symbols, times its weight.
        """
        items, present = append_target(batch)
        predicted, items_P = present[:, 1:], items[:, 1:][present[:, 1:]]

        beside = {}
        if self.config.reads == "flat":
            hidden_PD = self._read_strings(self.symbols(tokens.history), tokens.history, items, present)
        else:
            x_UD, walk = self._read(batch.unique, tokens.history)
            if walk is not None and self.config.alignment:
                read_U = torch.bincount(batch.items[batch.mask], minlength=len(x_UD))
                aligned = alignment(walk, tokens.history.symbols, self.space, read_U)
                beside["alignment"] = self.config.alignment * aligned
            x_BTD = self.dropout(x_UD[items[:, :-1]] + self.place[: items.shape[1] - 1])
            if self.config.writes == "autoregressive":
                loss = self.head.loss(x_BTD, items[:, 1:], predicted, tokens, self.dropout)
                return loss._replace(beside=beside)
            hidden_PD = self._run(x_BTD)[predicted]

        symbols_PS = tokens.target.symbols[items_P]
        context_USD = self.ran.contexts(self.symbols(tokens.forced))
        queries, written = [], []
        for step in range(self.space.num_steps):
            guide_PD, written_P = hidden_PD, items_P
            if not self.space.one_length:
                writes_P = symbols_PS[:, step] >= 0
                guide_PD, written_P = hidden_PD[writes_P], items_P[writes_P]
            if step:
                projected_UH = self.ran.project(context_USD[:, step - 1], step)
                guide_PD = self.ran.ask(guide_PD, step, projected_UH[written_P])
            queries.append(guide_PD)
            written.append(written_P)
        return step_losses(self.ran.logits, queries, tokens.target, written, self.space)._replace(
            beside=beside
        )

    def catalogue(self, symbols: Tensor, trie: PrefixTrie) -> Catalogue:
        """Return table and tree, and the token of every item as it is read now, without dropout.

        Items without training events have no vector of their own that means anything: without ``text`` they are read
        as the sum of their SID's code vectors.
        """
        if self.config.reads == "flat":
            return Catalogue(symbols, trie)
        tokens = []
        for item_ids in torch.split(torch.arange(len(symbols), device=symbols.device), ROWS):
            items = ItemTokens(symbols[item_ids])
            x_UD, _ = self._read(item_ids, items)
            if self.config.has_uids and self.text is None:
                x_UD = torch.where(self.trained[item_ids, None], x_UD, self._sum_codes(items))
            tokens.append(x_UD)
        return Catalogue(symbols, trie, torch.cat(tokens))

    def walk(self, item_ids: Tensor, symbols_US: Tensor) -> Walk:
        """Let items (U,) of these SIDs walk through the codebooks; only where ``reads`` is ran."""
        return self.ran.walk(
            self._guide(item_ids), symbol_counts(symbols_US), hard=self.config.assignment == "ste"
        )

    def user_states(self, batch: SequenceBatch, catalogue: Catalogue) -> Tensor:
        """Return (B, D) what the backbone makes of the latest ``max_history`` items of each history."""
        recent = latest(batch.unique[batch.items], batch.mask, self.config.max_history)
        return last_states(*self._read_recent(recent, catalogue))

    def rank(self, batch: SequenceBatch, catalogue: Catalogue, beams: int, *, exclude_seen: bool) -> Ranking:
        """Return the ``beams`` best items of each history; its latest ``max_history`` items are read."""
        items = batch.unique[batch.items]
        excluded = items.masked_fill(~batch.mask, -1) if exclude_seen else None
        trie, starts = catalogue.trie, self.space.starts
        if self.config.writes == "ran":
            user = RanState(self.user_states(batch, catalogue))
            return beam_search(self.ran, user, trie, starts, beams, excluded)
        recent = latest(items, batch.mask, self.config.max_history)
        assert catalogue.items is not None
        x_BTD = catalogue.items[recent.items] + self.place[: recent.items.shape[1]]
        state = self.head.start(x_BTD, recent.mask, recent.length)
        return beam_search(self.head, state, trie, starts, beams, excluded)

    def _guide(self, item_ids: Tensor) -> Tensor:
        """Return the vector (U, D) of each item; without training events it is the content's alone."""
        uid_UE = F.embedding(item_ids, self.uids)
        if self.text is None:
            return self.read_uid(uid_UE)
        met_U1 = self.trained[item_ids, None]
        return self.read_uid(uid_UE * met_U1) + self.read_text(self.text[item_ids])

    def _read(self, item_ids: Tensor, tokens: ItemTokens) -> tuple[Tensor, Walk | None]:
        """Return the token (U, D) of each item, and the walk that made it, if one did."""
        match self.config.reads:
            case "ran":
                walk = self.walk(item_ids, tokens.symbols)
                return walk.token, walk
            case "uid":
                return self._guide(item_ids), None
            case "codewords":
                return self._sum_codes(tokens), None
            case "uid_codewords":
                return self._guide(item_ids) + self._sum_codes(tokens), None
        raise AssertionError(f"items are read as strings: {self.config.reads}")

    def _sum_codes(self, tokens: ItemTokens) -> Tensor:
        """Return the sum (U, D) of the vectors of each SID's symbols."""
        present_US1 = (tokens.symbols >= 0)[..., None]
        return (self.symbols(tokens) * present_US1).sum(dim=1)

    def _run(self, x_BND: Tensor) -> Tensor:
        return self.stack(x_BND) if isinstance(self.stack, HstuStack) else self.stack(x_BND)[0]

    def _read_recent(self, recent: Recent, catalogue: Catalogue) -> tuple[Tensor, Tensor]:
        """Return hidden states and the number of tokens of each history."""
        if catalogue.items is not None:
            x_BTD = catalogue.items[recent.items] + self.place[: recent.items.shape[1]]
            return self._run(x_BTD), recent.length
        strings = lay_out(symbol_counts(catalogue.symbols[recent.items]), recent.mask)
        symbol_BN = catalogue.symbols[recent.items.gather(1, strings.place), strings.step]
        place_BND = F.embedding(strings.place, self.place) + F.embedding(strings.step, self.step_place)
        return self._run(self.symbols.hard(symbol_BN) + place_BND), strings.length

    def _read_strings(
        self, codes_USD: Tensor, tokens: ItemTokens, items_BT: Tensor, present_BT: Tensor
    ) -> Tensor:
        """Return the states (P, D) behind the last symbol of every item that another follows."""
        counts_BT = symbol_counts(tokens.symbols)[items_BT[:, :-1]]
        strings = lay_out(counts_BT, present_BT[:, :-1])
        item_BN = items_BT.gather(1, strings.place)
        place_BND = F.embedding(strings.place, self.place) + F.embedding(strings.step, self.step_place)
        hidden = self._run(self.dropout(codes_USD[item_BN, strings.step] + place_BND))
        # Rows go by place, so the items that end here stand in the order of the items that they predict.
        last = strings.step == symbol_counts(tokens.symbols)[item_BN] - 1
        followed = strings.place < present_BT.sum(dim=1, keepdim=True) - 1
        return hidden[last & strings.present & followed]


def alignment(walk: Walk, symbols_US: Tensor, space: SymbolSpace, weights_U: Tensor) -> Tensor:
    """Return the mean cross-entropy of the walks against the items' SIDs, in nats a symbol.

    Parameters
    ----------
    walk : Walk
        What the items choose.
    symbols_US : Tensor
        (U, S) long, their SIDs as they are now; without gradient.
    space : SymbolSpace
        Ranges of the steps.
    weights_U : Tensor
        (U,) how often each item counts.

    References
    ----------
    IntRR (arXiv 2602.20704), L_aln, whose sum over steps is divided here by the number of symbols, as the
    recommendation loss is: the ratio of the two is the published one.
    """
    weights_US = weights_U[:, None] * (symbols_US >= 0)
    columns_US = (symbols_US - torch.tensor(space.starts, device=symbols_US.device)).clamp(min=0)
    nats_US = torch.stack(
        [-log_p.gather(1, columns_US[:, step, None])[:, 0] for step, log_p in enumerate(walk.log_p)], dim=1
    )
    return (weights_US * nats_US).sum() / weights_US.sum()


def _unit_mean_square(x_NX: Tensor) -> Tensor:
    """Scale content vectors so that their coordinates are of the size of a UID's."""
    return x_NX / x_NX.square().mean().sqrt()
