"""Exact scores of the whole catalogue from a head whose steps are a first-order Markov chain given the user.

Where a symbol depends on the user and the code just before alone, one row of logits for each possible code holds all
that any SID can ask for: every item is scored at the price of a few matrix products, and no beam is needed.
Shapes: B users, D width, N items, C codes of the level before (1 at step 0), K symbols of a step, E edges of the tree
between two depths, P nodes that they start from, W length of a ranking, T excluded items of a user.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.recommenders.intrr import Intrr
from components.seams import Catalogue, Ranking, SequenceBatch, SymbolSpace
from components.tokenizers.trie import PrefixTrie

LOGITS = 2**26
"""Most numbers that are held for a step of all users scored at once: 256 MB as float32."""
NOT_EXACT = (
    "decode=exact scores every item, for which a code may depend on the user and the code before it alone: take "
    "recommender.model.kind intrr with writes=ran and context=last, or decode=beam"
)


class FirstOrderHead(Protocol):
    """A head whose step depends on the user and the code just before alone."""

    space: SymbolSpace

    def transitions(self, user_BD: Tensor, step: int) -> Tensor:
        """Return logits (B, C, K) of the symbols that a step may write (``space.range(step)``), one row for each code
        of the level before (``space.codes(step - 1)``); at step 0 there is one row.
        """
        ...


class Edges(NamedTuple):
    """The edges of one step of the tree, in the order of the nodes that they lead to."""

    parent: Tensor
    """(E,) long, the node that an edge starts from, counted among those of its depth."""
    place: Tensor
    """(E,) long, where its logit stands in the flattened (C * K) logits of the step."""


class ExactIndex(NamedTuple):
    """Which logits the SIDs of a table read, made once for the table."""

    edges: list[Edges]
    """One a step, as far as any SID reaches."""
    leaf: Tensor
    """(N,) long, the node of the tree at which an item's SID ends."""


def index_of(trie: PrefixTrie, space: SymbolSpace) -> ExactIndex:
    """Find the logits of all edges, on the device of the tree.

    Parameters
    ----------
    trie : PrefixTrie
        The valid SIDs, at unequal depth where they differ in length.
    space : SymbolSpace
        What they are written in.
    """
    edges: list[Edges] = []
    first, stop = 0, 1  # the nodes of a depth are numbered one after the other, and their children likewise
    for step in range(space.num_steps):
        children = trie.num_children[first:stop]
        parent = torch.repeat_interleave(torch.arange(stop - first, device=children.device), children)
        if not len(parent):
            break
        start, end = space.range(step)
        place = trie.symbol[stop : stop + len(parent)] - start
        if step:
            before = trie.symbol[first:stop][parent] - space.codes(step - 1)[0]
            place = before * (end - start) + place
        edges.append(Edges(parent, place))
        first, stop = stop, stop + len(parent)
    return ExactIndex(edges, trie.path[:, -1])


def exact_scores(head: FirstOrderHead, user_BD: Tensor, index: ExactIndex) -> Tensor:
    """Return the log-probability of every item, in nats, as ``decoding.beam_search`` scores it.

    Each step is normalised over the children of its node, so all items together are a distribution. Beside the head's
    own logits, memory is that of B numbers an edge and item.

    Parameters
    ----------
    head : FirstOrderHead
        Its logits are finite.
    user_BD : Tensor
        What the head writes from, a row a user.
    index : ExactIndex
        What the items' SIDs read.

    Returns
    -------
    Tensor
        (B, N) float.
    """
    scores = user_BD.new_zeros(1, len(user_BD))
    nodes = [scores]
    for step, (parent, place) in enumerate(index.edges):
        logits = head.transitions(user_BD, step)
        # Users last: edges are then whole rows, which are gathered and summed far faster than columns.
        gain_EB = logits.flatten(1).index_select(1, place).T.contiguous()
        gain_EB = gain_EB - _sibling_logsumexp(gain_EB, parent, len(scores))[parent]
        scores = scores[parent] + gain_EB
        nodes.append(scores)
    return torch.cat(nodes)[index.leaf].T


def _sibling_logsumexp(gain_EB: Tensor, parent_E: Tensor, parents: int) -> Tensor:
    """Return (P, B) the log of the summed exponentials of each node's children; -inf where it has none."""
    segment_EB = parent_E[:, None].expand_as(gain_EB)
    highest_PB = gain_EB.new_full((parents, gain_EB.shape[1]), -math.inf)
    highest_PB = highest_PB.scatter_reduce(0, segment_EB, gain_EB, "amax")
    sums_PB = torch.zeros_like(highest_PB).index_add(0, parent_E, (gain_EB - highest_PB[parent_E]).exp())
    return highest_PB + sums_PB.log()


class ExactRanker:
    """Ranks as a recommender does, from the scores of all items in place of a beam.

    Parameters
    ----------
    recommender : Intrr
        One whose ``config.scores_exactly`` holds.
    catalogue : Catalogue
        What it reads of all items; the one that ``rank`` is called with.
    """

    def __init__(self, recommender: Intrr, catalogue: Catalogue) -> None:
        self.recommender, self.index = recommender, index_of(catalogue.trie, recommender.space)
        space = recommender.space
        words = [stop - start for start, stop in map(space.range, range(space.num_steps))]
        logits = [before * own for before, own in zip((1, *space.codebook_sizes), words, strict=True)]
        self.users = max(1, LOGITS // max(*logits, len(self.index.leaf)))

    def rank(self, batch: SequenceBatch, catalogue: Catalogue, beams: int, *, exclude_seen: bool) -> Ranking:
        """Return the ``beams`` best items of each history (see ``seams.Recommender``).

        Users are scored in parts, so that no step holds more than ``LOGITS`` numbers; one user is the smallest part.
        """
        user_BD = self.recommender.user_states(batch, catalogue)
        seen_BT = torch.where(batch.mask & exclude_seen, batch.unique[batch.items], -1)
        parts = [
            rank_exact(exact_scores(self.recommender.ran, some_BD, self.index), beams, excluded_BT)
            for some_BD, excluded_BT in zip(
                torch.split(user_BD, self.users), torch.split(seen_BT, self.users), strict=True
            )
        ]
        return Ranking(*map(torch.cat, zip(*parts, strict=True)))


def exact_ranker(recommender: nn.Module, catalogue: Catalogue) -> ExactRanker | None:
    """Return what ranks by exact scores, where a recommender has them."""
    if isinstance(recommender, Intrr) and recommender.config.scores_exactly:
        return ExactRanker(recommender, catalogue)
    return None


def rank_exact(scores_BN: Tensor, beams: int, excluded_BT: Tensor | None = None) -> Ranking:
    """Return the best items of each user; of equal scores the lower item id comes first.

    The rule of ``full_ranking.best_items``, in torch: scores of a whole catalogue stay on the device that made them.

    Parameters
    ----------
    scores_BN : Tensor
        What to rank all items by.
    beams : int
        Length W of the ranking.
    excluded_BT : Tensor, optional
        Item ids that must not be recommended, -1 for none.

    Returns
    -------
    Ranking
        (B, W), padded with -1 where a user has fewer than W items left.
    """
    num_items = scores_BN.shape[1]
    # The column behind the last item takes the -1 of ``excluded``; there are more if the catalogue is short.
    scores = F.pad(scores_BN, (0, max(1, beams - num_items)), value=-math.inf)
    if excluded_BT is not None:
        scores = scores.scatter(1, torch.where(excluded_BT < 0, num_items, excluded_BT), -math.inf)
    # ``topk`` takes any of equal scores: it says how low to go, and the lowest ids fill what places are left.
    lowest = scores.topk(beams, dim=1).values[:, -1:]
    above, level = scores > lowest, scores == lowest
    places = beams - above.sum(dim=1, keepdim=True)
    kept = above | (level & (level.cumsum(dim=1) <= places))
    items = kept.nonzero()[:, 1].view(-1, beams)
    order = scores.gather(1, items).sort(dim=1, descending=True, stable=True)
    items = items.gather(1, order.indices).masked_fill(order.values == -math.inf, -1)
    return Ranking(items, order.values)
