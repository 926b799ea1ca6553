"""The Recursive-Assignment Network (IntRR): a vector walks through the codebooks, code by code.

One network serves both sides. Reading, the vector of an item chooses its own codes, softly, and their sum is the
item's token. Writing, the state of a user is asked for the codes of the next item, each given the one before.

Shapes: U items or P users, S steps of the longest SID, K symbols of a step, D width, H hidden width.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.recommenders.item_encoders import SymbolEmbedding
from components.tokenizers.quantize import straight_through


class Walk(NamedTuple):
    """What items chose on their way through the codebooks."""

    token: Tensor
    """(U, D) the sum of the chosen code vectors: what the item is read as."""
    log_p: list[Tensor]
    """One (U, K) a step: log-probabilities of its symbols."""


class RanState(NamedTuple):
    """What the beams of a user have in common, and what each looks back at."""

    user: Tensor
    """(B, D)."""
    context: Tensor | None = None
    """(B, W, D); None before the first code."""


class Ran(nn.Module):
    """Code vectors, and for every step but the first a network of two layers.

    Step 1 asks the codebook by the guiding vector itself: ``q_1 = g``. A later one looks at the code before too:
    ``q_l = MLP_l([k; g])``. The symbols of a step score ``q_l C_l^T``, divided by sqrt(D) unless raw. Suffixes are
    the symbols of a last step like any other.

    Parameters
    ----------
    symbols : SymbolEmbedding
        The code vectors (V, D), started N(0, 1); they belong to the recommender.
    hidden : int
        Width H of the networks.
    context : {"last", "prefix_sum"}
        k is the code before, or the sum of all before. With ``last`` a SID is a Markov chain given the guide.
    product : {"scaled", "raw"}
        Whether scores are divided by sqrt(D). Raw ones start saturated: nearly one-hot at D 256.

    References
    ----------
    Wang et al., "IntRR: A Framework for Integrating SID Redistribution and Length Reduction" (arXiv 2602.20704),
    section 3; the scale is ours.
    """

    symbols: SymbolEmbedding

    def __init__(
        self,
        symbols: SymbolEmbedding,
        hidden: int,
        context: Literal["last", "prefix_sum"],
        product: Literal["scaled", "raw"],
    ) -> None:
        super().__init__()
        # Not a part of this module: the recommender owns the vectors, and its state would name them twice.
        object.__setattr__(self, "symbols", symbols)
        self.space, self.context = symbols.space, context
        dim = symbols.weight.shape[1]
        self.scale = dim**-0.5 if product == "scaled" else 1.0
        later = range(1, self.space.num_steps)
        self.into: Sequence[nn.Linear] = nn.ModuleList(nn.Linear(2 * dim, hidden) for _ in later)  # type: ignore[assignment]
        self.out: Sequence[nn.Linear] = nn.ModuleList(nn.Linear(hidden, dim) for _ in later)  # type: ignore[assignment]

    def query(self, guide_xD: Tensor, step: int, context_xD: Tensor | None) -> Tensor:
        """Return q (..., D) of a step; guide and context may be broadcast against one another."""
        if context_xD is None:
            return guide_xD
        return self.ask(guide_xD, step, self.project(context_xD, step))

    def project(self, context_xD: Tensor, step: int) -> Tensor:
        """Return the context's share (..., H) of a step's hidden units, to be made once for a code, not for a user."""
        into = self.into[step - 1]
        return F.linear(context_xD, into.weight[:, : context_xD.shape[-1]])

    def ask(self, guide_xD: Tensor, step: int, projected_xH: Tensor) -> Tensor:
        """Return q (..., D) of a step after the first, from a projected context."""
        into, dim = self.into[step - 1], guide_xD.shape[-1]
        hidden = projected_xH + F.linear(guide_xD, into.weight[:, dim:], into.bias)
        query: Tensor = self.out[step - 1](F.relu(hidden))
        return query

    def logits(self, query_xD: Tensor, step: int) -> Tensor:
        """Return the scores (..., K) of the symbols that a step may write."""
        return self.scale * F.linear(query_xD, self.words(step))

    def words(self, step: int) -> Tensor:
        """Return the vectors (K, D) of the symbols that a step may write."""
        return self.symbols.weight[slice(*self.space.range(step))]

    def walk(self, guide_UD: Tensor, steps_U: Tensor, *, hard: bool) -> Walk:
        """Let every item choose its codes.

        Parameters
        ----------
        guide_UD : Tensor
            The items' own vectors.
        steps_U : Tensor
            (U,) long, symbols of each item's SID: as many steps count.
        hard : bool
            Read the best symbol, with the gradient of the weighted mean, in place of the weighted mean.
        """
        token, context = torch.zeros_like(guide_UD), None
        log_p = []
        for step in range(self.space.num_steps):
            log_p.append(self.logits(self.query(guide_UD, step, context), step).log_softmax(dim=-1))
            weights_UK = log_p[-1].exp()
            if hard:
                weights_UK = straight_through(weights_UK.argmax(dim=-1), weights_UK)
            chosen_UD = weights_UK @ self.words(step)
            token = token + chosen_UD * (step < steps_U)[:, None]
            context = chosen_UD if context is None or self.context == "last" else context + chosen_UD
        return Walk(token, log_p)

    def step(self, state: RanState, step: int, symbols: Tensor | None) -> tuple[Tensor, RanState]:
        """Write one symbol a beam (see ``decoding.CodeHead``)."""
        if symbols is None:
            return self.logits(state.user[:, None], step), state
        context_BWD = self.symbols.hard(symbols)
        if self.context == "prefix_sum" and state.context is not None:
            context_BWD = state.context + context_BWD
        query = self.query(state.user[:, None], step, context_BWD)
        return self.logits(query, step), state._replace(context=context_BWD)

    def reorder(self, state: RanState, index: Tensor) -> RanState:
        """Follow the beams that survived (see ``decoding.CodeHead``)."""
        if state.context is None or self.context == "last":  # the next code alone is looked back at
            return state
        rows = torch.arange(len(index), device=index.device)[:, None]
        return state._replace(context=state.context[rows, index])

    def transitions(self, user_BD: Tensor, step: int) -> Tensor:
        """Return logits (B, C, K) of a step for each code of the level before; C is 1 at step 0.

        With the context ``last`` they are all that a SID's probability is made of (see ``exact.FirstOrderHead``).
        """
        if step == 0:
            return self.logits(user_BD[:, None], step)
        codes_CD = self.symbols.weight[slice(*self.space.codes(step - 1))]
        return self.logits(self.query(user_BD[:, None], step, codes_CD), step)

    def contexts(self, known_USD: Tensor) -> Tensor:
        """Return what each step after the first looks back at (U, S - 1, D), from the vectors of known SIDs."""
        before = known_USD[:, :-1]
        return before if self.context == "last" else before.cumsum(dim=1)
