"""How an item of the history is read: its SID's symbols as vectors, hard or soft.

"Differentiable" lives here: a soft symbol is a weighted mean of the same table rows that a hard one picks,
so the forward value is equal and only the gradient differs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.seams import ItemTokens, SequenceBatch, SymbolSpace


class SymbolEmbedding(nn.Module):
    """One vector a symbol."""

    def __init__(self, space: SymbolSpace, dim: int, std: float) -> None:
        super().__init__()
        self.space = space
        self.weight = nn.Parameter(torch.randn(space.num_symbols, dim) * std)

    def forward(self, tokens: ItemTokens) -> Tensor:
        """Return (U, S, D); what stands behind the end of a SID is not to be read."""
        hard_USD = self.hard(tokens.symbols)
        if tokens.weights is None:
            return hard_USD
        soft_ULD = torch.stack([self.code(weights, level) for level, weights in enumerate(tokens.weights)], 1)
        symbols_UL = tokens.symbols[:, :-1]
        is_code = (symbols_UL >= 0) & (symbols_UL < self.space.num_codes)
        return torch.cat(
            [torch.where(is_code[..., None], soft_ULD, hard_USD[:, :-1]), hard_USD[:, -1:]], dim=1
        )

    def code(self, weights_xK: Tensor, level: int) -> Tensor:
        """Return the weighted mean (..., D) of a level's codes."""
        return weights_xK @ self.weight[slice(*self.space.codes(level))]

    def hard(self, symbols: Tensor) -> Tensor:
        """Return the vectors of symbols of any shape; -1, behind the end of a SID, reads as symbol 0."""
        return F.embedding(symbols.clamp(min=0), self.weight)


class Recent(NamedTuple):
    """The latest items of histories, left-aligned."""

    items: Tensor
    """(B, T) long; what stands in padding is not to be read."""
    mask: Tensor
    """(B, T) bool, True where there is an item."""
    length: Tensor
    """(B,) long, items of each history."""


def latest(items_BT: Tensor, mask_BT: Tensor, most: int, budget: tuple[Tensor, int] | None = None) -> Recent:
    """Keep the latest items of each history; an item is kept whole or not at all.

    Parameters
    ----------
    items_BT, mask_BT : Tensor
        Histories, left-aligned, and where there is an item.
    most : int
        Most items.
    budget : tuple, optional
        (B, T) long, what each item costs, and the most that a history may cost; None: any.

    Returns
    -------
    Recent
        (B, min(T, most)).
    """
    kept_BT = mask_BT & (_to_end(mask_BT.long()) <= most)
    if budget is not None:
        costs_BT, limit = budget
        kept_BT = kept_BT & (_to_end(costs_BT * mask_BT) <= limit)
    length_B, kept_B = mask_BT.sum(dim=1), kept_BT.sum(dim=1)
    place = torch.arange(min(most, items_BT.shape[1]), device=items_BT.device)
    at = (length_B - kept_B)[:, None] + place
    items = items_BT.gather(1, at.clamp(max=items_BT.shape[1] - 1))
    return Recent(items, place < kept_B[:, None], kept_B)


def append_target(batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Put the item that follows each history behind it.

    Returns
    -------
    tuple
        (B, T + 1) long, indices into ``batch.unique``; and (B, T + 1) bool, True where there is an item.
    """
    length = batch.mask.sum(dim=1, keepdim=True)
    items = torch.cat([batch.items, batch.items[:, -1:]], dim=1).scatter(1, length, batch.target[:, None])
    return items, torch.arange(items.shape[1], device=items.device) <= length


def _to_end(costs_BT: Tensor) -> Tensor:
    """Return what an item and all after it cost together; falls along a row, so what fits is the row's end."""
    return costs_BT.sum(dim=1, keepdim=True) - costs_BT.cumsum(dim=1) + costs_BT
