"""The valid SIDs as a prefix tree in flat tensors: what decoding may write next.

Nodes are numbered breadth first with the children of a node side by side, so a tree of any size is five
vectors: no table of nodes x symbols. Node 0 is the root. SIDs may differ in length: their leaves then lie at
unequal depth.
Shapes: N items, S symbols of the longest SID, M nodes.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.seams import Choices


class PrefixTrie(NamedTuple):
    """A tree whose leaves are items, at unequal depth where SIDs differ in length."""

    symbol: Tensor
    """(M,) long, the symbol that leads to a node; -1 for the root."""
    first_child: Tensor
    """(M,) long, the first of a node's children."""
    num_children: Tensor
    """(M,) long, 0 for a leaf."""
    item: Tensor
    """(M,) long, the item id of a leaf; -1 inside."""
    leaves: Tensor
    """(M,) long, items below or at a node."""
    path: Tensor
    """(N, S + 1) long, the nodes from the root to an item's leaf; the columns behind a short SID repeat its leaf."""
    fan_out: list[int]
    """For each step, the most children that any node of its depth has; 0 where no SID is so long."""
    ends: list[bool]
    """For each step, whether its symbol is the last one of some SID."""

    def to(self, device: torch.device | str) -> "PrefixTrie":
        """Return the tree on another device."""
        tensors = (t.to(device) if isinstance(t, Tensor) else t for t in self)
        return PrefixTrie(*tensors)  # type: ignore[arg-type]


def build_trie(symbols: Tensor) -> PrefixTrie:
    """Build the tree of all SIDs, on the device of the symbols.

    Parameters
    ----------
    symbols : Tensor
        (N, S) long, one SID an item, -1 behind those shorter than S; row = item id.

    Raises
    ------
    ValueError
        A row is not a string of symbols followed by -1 alone, two items share a SID, or one SID is the
        beginning of another.
    """
    device, symbols = symbols.device, symbols.cpu()
    num_items, num_steps = symbols.shape
    present = symbols >= 0
    broken = ~present[:, 0] | (present[:, 1:] & ~present[:, :-1]).any(dim=1)
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        raise ValueError(
            f"item {row} has the symbols {symbols[row].tolist()}: a SID is one symbol >= 0 or more, then -1 alone"
        )
    order = torch.from_numpy(np.lexsort(symbols.numpy().T[::-1]))  # by the first symbol, then the second ...
    ordered, present = symbols[order], present[order]
    # Row i opens a new node at depth d if it differs from row i - 1 in one of its first d symbols.
    differs = torch.ones(num_items, num_steps, dtype=torch.bool)
    differs[1:] = (ordered[1:] != ordered[:-1]).int().cumsum(dim=1) > 0
    _check_prefix_free(order, ordered, differs)

    symbol, parents, offset = [torch.tensor([-1])], [torch.tensor([0])], 1
    path_sorted = torch.zeros(num_items, num_steps + 1, dtype=torch.long)
    for depth in range(num_steps):
        opens = differs[:, depth] & present[:, depth]
        node = offset - 1 + opens.long().cumsum(dim=0)
        path_sorted[:, depth + 1] = torch.where(present[:, depth], node, path_sorted[:, depth])
        symbol.append(ordered[opens, depth])
        parents.append(path_sorted[opens, depth])
        offset += int(opens.sum())
    parent = torch.cat(parents)[1:]
    num_children = torch.bincount(parent, minlength=offset)
    first_child = torch.full((offset,), offset, dtype=torch.long)
    first_child.scatter_reduce_(0, parent, torch.arange(1, offset), reduce="amin")
    # An item counts once for a node, however often its path repeats the leaf; the root is on every path.
    leaves = torch.bincount(path_sorted[:, 1:][present], minlength=offset)
    leaves[0] = num_items
    item = torch.full((offset,), -1, dtype=torch.long)
    item[path_sorted[:, -1]] = order
    path = torch.empty_like(path_sorted)
    path[order] = path_sorted
    fan_out = [int(num_children[path_sorted[:, depth]].max()) for depth in range(num_steps)]
    ends = (torch.bincount(present.sum(dim=1), minlength=num_steps + 1)[1:] > 0).tolist()
    trie = PrefixTrie(torch.cat(symbol), first_child, num_children, item, leaves, path, fan_out, ends)
    return trie.to(device)


def choices(trie: PrefixTrie, item_ids: Tensor, starts: list[int]) -> tuple[Choices, ...]:
    """Return what each symbol of some items' SIDs is chosen from: the children of the node before it.

    Parameters
    ----------
    trie : PrefixTrie
        The valid SIDs.
    item_ids : Tensor
        (U,) long.
    starts : list of int
        First symbol of each step (``SymbolSpace.range``).
    """
    found = []
    for step, start in enumerate(starts):
        parent = trie.path[item_ids, step]
        first, count = trie.first_child[parent], trie.num_children[parent]
        brood = torch.arange(trie.fan_out[step], device=item_ids.device)
        real = brood < count[:, None]
        child = torch.where(real, first[:, None] + brood, 0)
        columns = (trie.symbol[child] - start).clamp(min=0)
        found.append(Choices(columns, real, (trie.path[item_ids, step + 1] - first).clamp(min=0)))
    return tuple(found)


def _check_prefix_free(order: Tensor, ordered: Tensor, differs: Tensor) -> None:
    """Refuse a SID that begins another: as -1 sorts first, the row behind it would go on like it to its end."""
    last = (ordered >= 0).sum(dim=1, keepdim=True) - 1
    begins = ~differs[1:].gather(1, last[:-1]).flatten()
    if not bool(begins.any()):
        return
    row = int(begins.nonzero()[0])
    items = [int(order[row]), int(order[row + 1])]
    short, long = (ordered[r, : int(last[r]) + 1].tolist() for r in (row, row + 1))
    if short == long:
        raise ValueError(f"items {items[0]} and {items[1]} share the SID {short}")
    raise ValueError(
        f"the SID {short} of item {items[0]} is the beginning of {long}, that of item {items[1]}: "
        "end every SID with a suffix, and number suffixes apart from codes"
    )
