"""One beam search for every recommender, kept on valid SIDs by a trie.

Shapes: B users, W beams, S steps of the longest SID, K symbols of a step, F most children of a node at a depth,
T history items.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from components.data.batches import Rows, ranking_batches
from components.seams import Catalogue, Ranker, Ranking
from components.tokenizers.trie import PrefixTrie


class CodeHead(Protocol):
    """Writes one symbol a step. The state is the head's own: caches, user vectors."""

    def step(self, state: Any, step: int, symbols: Tensor | None) -> tuple[Tensor, Any]:
        """Return logits (B, W, K) of a step's symbols and the new state.

        ``symbols`` (B, W) are those chosen at the step before; None at step 0, where W = 1.
        """
        ...

    def reorder(self, state: Any, index: Tensor) -> Any:
        """Let beam w go on from old beam ``index[:, w]``."""
        ...


def beam_search(
    head: CodeHead,
    state: Any,
    trie: PrefixTrie,
    starts: list[int],
    width: int,
    excluded: Tensor | None = None,
    length_penalty: float = 0.0,
) -> Ranking:
    """Find the best items of each user.

    The log-probability of a SID is that under the model restricted to valid SIDs: each step is normalised
    over the children of its node, so all items together are a distribution, whatever the length of their SIDs.

    SIDs end where their leaf is. A finished one leaves the beam: it takes no place of those still being written,
    nor do they push it out, even if all of them are more probable so far.

    Parameters
    ----------
    head, state
        The recommender's head, after it has read the histories of B users.
    trie : PrefixTrie
        The valid SIDs.
    starts : list of int
        First symbol of each step (``SymbolSpace.range``).
    width : int
        Beams W, which is also the length of the ranking. So many unfinished strings are kept at each step.
    excluded : Tensor, optional
        (B, T) item ids that must not be recommended, -1 for none. Subtrees with no other item are left
        out before the beam is cut, so exclusion costs no beams.
    length_penalty : float, optional
        Exponent a >= 0. Items are ranked by log-probability / (symbols of the SID)^a, which favours long SIDs;
        0 ranks by log-probability. Unfinished strings, which are of one length, compete by log-probability.

    Returns
    -------
    Ranking
        (B, W), its scores what items are ranked by; padded with -1 where a user has fewer than W items left.
    """
    scores = nodes = symbols = None
    finished: list[Ranking] = []
    for step, start in enumerate(starts):
        logits, state = head.step(state, step, symbols)
        if scores is None or nodes is None:
            scores = logits.new_zeros(len(logits), 1)
            nodes = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
        brood = torch.arange(trie.fan_out[step], device=logits.device)
        real = brood < trie.num_children[nodes].unsqueeze(-1)
        child = torch.where(real, trie.first_child[nodes].unsqueeze(-1) + brood, 0)
        gain = logits.gather(-1, (trie.symbol[child] - start).clamp(min=0)).masked_fill(~real, -math.inf)
        # A dead beam (score -inf, node of another's) keeps a finite sum: its score stays -inf.
        gain = gain - gain.logsumexp(dim=-1, keepdim=True).clamp(min=torch.finfo(gain.dtype).min)
        if excluded is not None:
            exhausted = _exhausted(trie, excluded, step + 1)
            gain = gain.masked_fill(_contains(exhausted, child.flatten(1)).view_as(child), -math.inf)
        child = child.flatten(1)
        complete = unfinished = (scores.unsqueeze(-1) + gain).flatten(1)
        ends, goes_on = trie.ends[step], any(trie.fan_out[step + 1 :])
        if ends and goes_on:  # both kinds stand side by side: the best of each, not the best of all
            leaf = trie.num_children[child] == 0
            complete, unfinished = (complete.masked_fill(mask, -math.inf) for mask in (~leaf, leaf))
        if ends:
            top = complete.topk(min(width, complete.shape[1]), dim=1)
            item = trie.item[child.gather(1, top.indices)]
            finished.append(Ranking(item, top.values / (step + 1) ** length_penalty))
        if not goes_on:
            break
        top = unfinished.topk(min(width, unfinished.shape[1]), dim=1)
        scores = top.values
        nodes = child.gather(1, top.indices)
        symbols = trie.symbol[nodes].clamp(min=start)
        state = head.reorder(state, top.indices // trie.fan_out[step])
    return _best(finished, width)


def _best(finished: list[Ranking], width: int) -> Ranking:
    """Return the best ``width`` of all finished items; each list is in order already."""
    items, scores = (torch.cat(part, dim=1) for part in zip(*finished, strict=True))
    if len(finished) > 1:
        top = scores.topk(min(width, scores.shape[1]), dim=1)
        items, scores = items.gather(1, top.indices), top.values
    items = torch.where(scores > -math.inf, items, -1)
    missing = width - items.shape[1]
    if missing > 0:
        items = torch.nn.functional.pad(items, (0, missing), value=-1)
        scores = torch.nn.functional.pad(scores, (0, missing), value=-math.inf)
    return Ranking(items, scores)


def _exhausted(trie: PrefixTrie, excluded_BT: Tensor, depth: int) -> Tensor:
    """Return (B, T) sorted nodes of a depth below which every item is excluded; other places hold M.

    Leaves of lesser depth may be among them; no child that is looked up is one.
    """
    none = len(trie.symbol)
    items = excluded_BT.sort(dim=1).values
    repeated = torch.zeros_like(items, dtype=torch.bool)
    repeated[:, 1:] = items[:, 1:] == items[:, :-1]  # an item met twice counts once
    node = torch.where(repeated | (items < 0), none, trie.path[items.clamp(min=0), depth]).sort(dim=1).values
    below = torch.searchsorted(node, node, right=True) - torch.searchsorted(node, node)
    all_seen = (node < none) & (below == trie.leaves[node.clamp(max=none - 1)])
    return torch.where(all_seen, node, none).sort(dim=1).values


def _contains(sorted_BT: Tensor, values_BX: Tensor) -> Tensor:
    """Return (B, X) whether a value occurs in its row."""
    index = torch.searchsorted(sorted_BT, values_BX).clamp(max=sorted_BT.shape[1] - 1)
    return sorted_BT.gather(1, index) == values_BX


@torch.no_grad()
def rank_rows(
    recommender: Ranker,
    rows: Rows,
    catalogue: Catalogue,
    batch_size: int,
    beams: int,
    *,
    exclude_seen: bool,
) -> Ranking:
    """Rank the catalogue for many histories, users of like length together.

    Parameters
    ----------
    recommender : Ranker
        A recommender, or what ranks from its exact scores; in evaluation mode, on the device where ranking shall run.
    rows : Rows
        R histories; their targets are not read.
    catalogue : Catalogue
        What the recommender reads of all items, on its device; made once for a table and its weights.
    batch_size : int
        Users decoded at once.
    beams : int
        Width W of the search and length of the ranking.
    exclude_seen : bool
        Leave out the items of the history.

    Returns
    -------
    Ranking
        (R, W) on the CPU, in the order of ``rows``.
    """
    items = torch.empty(len(rows.start), beams, dtype=torch.long)
    scores = torch.empty(len(rows.start), beams)
    for which, batch in ranking_batches(rows, batch_size):
        batch = batch.to(catalogue.symbols.device)
        ranking = recommender.rank(batch, catalogue, beams, exclude_seen=exclude_seen)
        items[which], scores[which] = ranking.items.cpu(), ranking.scores.cpu()
    return Ranking(items, scores)
