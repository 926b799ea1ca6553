"""The valid SIDs as a prefix tree in flat tensors: what decoding may write next.

Nodes are numbered breadth first with the children of a node side by side, so a tree of any size is five
vectors: no table of nodes x symbols. Node 0 is the root.
Shapes: N items, S symbols of a SID, M nodes.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class PrefixTrie(NamedTuple):
    """A tree whose leaves are items."""

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
    """(N, S + 1) long, the nodes from the root to an item's leaf."""
    fan_out: list[int]
    """For each step, the most children that any node of its depth has."""

    def to(self, device: torch.device | str) -> "PrefixTrie":
        """Return the tree on another device."""
        tensors = (t.to(device) if isinstance(t, Tensor) else t for t in self)
        return PrefixTrie(*tensors)  # type: ignore[arg-type]


def build_trie(symbols: Tensor) -> PrefixTrie:
    """Build the tree of all SIDs, on the device of the symbols.

    Parameters
    ----------
    symbols : Tensor
        (N, S) long, one SID an item; row = item id.

    Raises
    ------
    ValueError
        Two items share a SID.
    """
    device, symbols = symbols.device, symbols.cpu()
    num_items, num_steps = symbols.shape
    order = torch.from_numpy(np.lexsort(symbols.numpy().T[::-1]))  # by the first symbol, then the second ...
    ordered = symbols[order]
    # Row i opens a new node at depth d if it differs from row i - 1 in one of its first d symbols.
    differs = torch.ones(num_items, num_steps, dtype=torch.bool)
    differs[1:] = (ordered[1:] != ordered[:-1]).int().cumsum(dim=1) > 0
    if not bool(differs[:, -1].all()):
        row = int((~differs[:, -1]).nonzero()[0])
        raise ValueError(
            f"items {int(order[row - 1])} and {int(order[row])} share the SID {ordered[row].tolist()}"
        )

    symbol, parents, offset = [torch.tensor([-1])], [torch.tensor([0])], 1
    path_sorted = torch.zeros(num_items, num_steps + 1, dtype=torch.long)
    for depth in range(num_steps):
        opens = differs[:, depth]
        path_sorted[:, depth + 1] = offset - 1 + opens.long().cumsum(dim=0)
        symbol.append(ordered[opens, depth])
        parents.append(path_sorted[opens, depth])
        offset += int(opens.sum())
    parent = torch.cat(parents)[1:]
    num_children = torch.bincount(parent, minlength=offset)
    first_child = torch.full((offset,), offset, dtype=torch.long)
    first_child.scatter_reduce_(0, parent, torch.arange(1, offset), reduce="amin")
    leaves = torch.bincount(path_sorted.flatten(), minlength=offset)
    item = torch.full((offset,), -1, dtype=torch.long)
    item[path_sorted[:, -1]] = order
    path = torch.empty_like(path_sorted)
    path[order] = path_sorted
    fan_out = [int(num_children[path_sorted[:, depth]].max()) for depth in range(num_steps)]
    return PrefixTrie(torch.cat(symbol), first_child, num_children, item, leaves, path, fan_out).to(device)
