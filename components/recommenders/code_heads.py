"""How the next item is written: the loss of its symbols, step by step, against hard or soft targets."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from components.seams import ItemTokens, RecommenderLoss, SymbolSpace


def step_losses(
    logits: Callable[[Tensor, int], Tensor],
    hidden: Sequence[Tensor],
    target: ItemTokens,
    items: Sequence[Tensor],
    space: SymbolSpace,
) -> RecommenderLoss:
    """Return the cross-entropy of the symbols of predicted items, each symbol weighing the same.

    Parameters
    ----------
    logits : callable
        Hidden states (P, D) and a step to logits (P, K) of the step's symbols.
    hidden : sequence of Tensor
        One (P, D) a step, the states that predict it. Where SIDs differ in length, later steps have fewer.
    target : ItemTokens
        Tokens of the batch's unique items; with weights, the target is the soft one-hot, whose value is the
        code and whose gradient is that of the assignment (DIGER, L_gen); a suffix is always hard. With choices, which
        go with hard tokens alone, a symbol is predicted among these: the sum over the steps of an item is then minus
        its log-probability as decoding scores it.
    items : sequence of Tensor
        One (P,) long a step, indices of the predicted items among the unique ones.
    space : SymbolSpace
        Ranges of the steps.
    """
    sums = []
    for step, (hidden_PD, items_P) in enumerate(zip(hidden, items, strict=True)):
        scores = logits(hidden_PD, step)
        if target.choices is not None:
            columns, real, own = (part[items_P] for part in target.choices[step])
            among_PF = scores.gather(1, columns).masked_fill(~real, -torch.inf)
            sums.append(F.cross_entropy(among_PF, own, reduction="sum"))
        elif target.weights is None or step == space.num_levels:
            column_P = target.symbols[items_P, step] - space.starts[step]
            sums.append(F.cross_entropy(scores, column_P, reduction="sum"))
        else:
            weights_PK = _over_range(target, items_P, step, space)
            sums.append(-(weights_PK * scores.log_softmax(dim=-1)).sum())
    steps = torch.stack(sums)
    counts = torch.tensor([len(items_P) for items_P in items], device=steps.device)
    return RecommenderLoss(steps.sum() / counts.sum(), steps.detach() / counts)


def _over_range(target: ItemTokens, items_P: Tensor, step: int, space: SymbolSpace) -> Tensor:
    """Return the weights (P, K) of soft targets over all symbols that a step may write."""
    assert target.weights is not None
    weights_PK = target.weights[step][items_P]
    start, stop = space.range(step)
    missing = stop - start - weights_PK.shape[1]
    if not missing:
        return weights_PK
    symbols_P = target.symbols[items_P, step]
    is_code = (symbols_P < space.num_codes)[:, None]
    one_hot_PK = F.one_hot(symbols_P - start, stop - start)
    return torch.where(is_code, F.pad(weights_PK, (0, missing)), one_hot_PK.to(weights_PK))
