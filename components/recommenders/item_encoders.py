"""How an item of the history is read: its SID's symbols as vectors, hard or soft.

"Differentiable" lives here: a soft symbol is a weighted mean of the same table rows that a hard one picks,
so the forward value is equal and only the gradient differs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.seams import ItemTokens, SymbolSpace


class SymbolEmbedding(nn.Module):
    """One vector a symbol."""

    def __init__(self, space: SymbolSpace, dim: int, std: float) -> None:
        super().__init__()
        self.space = space
        self.weight = nn.Parameter(torch.randn(space.num_symbols, dim) * std)

    def forward(self, tokens: ItemTokens) -> Tensor:
        """Return (U, S, D)."""
        if tokens.weights is None:
            return self.hard(tokens.symbols)
        soft = [
            weights_UK @ self.weight[slice(*self.space.range(level))]
            for level, weights_UK in enumerate(tokens.weights)
        ]
        return torch.stack([*soft, self.hard(tokens.symbols[:, -1])], dim=1)

    def hard(self, symbols: Tensor) -> Tensor:
        """Return the vectors of symbols of any shape."""
        return F.embedding(symbols, self.weight)


def latest(items_BT: Tensor, mask_BT: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Keep the latest ``most`` items of each history; return items (B, min(T, most)) and lengths (B,)."""
    length = mask_BT.sum(dim=1)
    start = (length - most).clamp(min=0)
    at = start[:, None] + torch.arange(min(most, items_BT.shape[1]), device=items_BT.device)
    return items_BT.gather(1, at.clamp(max=items_BT.shape[1] - 1)), length.clamp(max=most)
