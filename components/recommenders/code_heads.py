"""How the next item is written: the loss of its symbols, step by step, against hard or soft targets."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from components.seams import ItemTokens, RecommenderLoss, SymbolSpace


def step_losses(
    logits: Callable[[Tensor, int], Tensor],
    hidden_PSD: Tensor,
    target: ItemTokens,
    items_P: Tensor,
    space: SymbolSpace,
) -> RecommenderLoss:
    """Return the cross-entropy of the symbols of P predicted items.

    Parameters
    ----------
    logits : callable
        Hidden states (P, D) and a step to logits (P, K) of the step's symbols.
    hidden_PSD : Tensor
        (P, S, D), the states that predict each step.
    target : ItemTokens
        Tokens of the batch's unique items; with weights, the target is the soft one-hot, whose value is the
        code and whose gradient is that of the assignment (DIGER, L_gen).
    items_P : Tensor
        (P,) indices of the predicted items among the unique ones.
    space : SymbolSpace
        Ranges of the steps.
    """
    symbols_PS = target.symbols[items_P]
    losses = []
    for step in range(space.num_steps):
        scores = logits(hidden_PSD[:, step], step)
        if target.weights is None or step == space.num_levels:
            losses.append(F.cross_entropy(scores, symbols_PS[:, step] - space.starts[step]))
        else:
            weights_PK = target.weights[step][items_P]
            losses.append(-(weights_PK * scores.log_softmax(dim=-1)).sum(dim=-1).mean())
    steps = torch.stack(losses)
    return RecommenderLoss(steps.mean(), steps.detach())
