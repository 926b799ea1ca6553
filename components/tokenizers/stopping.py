"""When a name may stop: the posterior over lengths from hazards, its prior, and the rule of the price.

Shapes: B rows, T positions; lengths count from 1, so column l - 1 belongs to length l. Logarithms are natural.
Symbols of the paper: lambda is ``price`` (nats a token), beta and the weight w of smoothing as there.

References
----------
Khrylchenko, "Variable-Length Semantic IDs for Recommender Systems" (arXiv 2602.16375), sections 3 and 4.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LengthRule = Literal["argmax", "median", "optimum"]


def log_pmf(hazards_BH: Tensor) -> Tensor:
    """Return log q(L = l), (B, T), from the T - 1 hazard logits: stop after token l, given that l was reached."""
    gone_on = F.pad(F.logsigmoid(-hazards_BH).cumsum(dim=1), (1, 0))
    return gone_on + F.pad(F.logsigmoid(hazards_BH), (0, 1))


def survival(hazards_BH: Tensor) -> Tensor:
    """Return q(L >= l), (B, T): 1 for the first token, never rising."""
    return F.pad(F.logsigmoid(-hazards_BH).cumsum(dim=1), (1, 0)).exp()


def log_prior(price: float, positions: int) -> Tensor:
    """Return log p(l), (T,): a geometric prior cut off at T, uniform at price 0."""
    return (-price * torch.arange(1, positions + 1, dtype=torch.float64)).log_softmax(dim=0)


def entropy(log_q_BT: Tensor) -> Tensor:
    """Return the entropy (B,) of the length, in nats; its gradient stays finite where a length is all but ruled out."""
    return -(log_q_BT.exp() * log_q_BT).sum(dim=1)


def expected(log_q_BT: Tensor) -> Tensor:
    """Return E[L], (B,)."""
    return log_q_BT.exp() @ torch.arange(
        1, log_q_BT.shape[1] + 1, device=log_q_BT.device, dtype=log_q_BT.dtype
    )


def argmax_length(log_q_BT: Tensor) -> Tensor:
    """Return the likeliest length (B,), the shorter of equals."""
    return log_q_BT.argmax(dim=1) + 1


def median_length(log_q_BT: Tensor) -> Tensor:
    """Return the smallest length (B,) that is reached with probability one half."""
    below = log_q_BT.double().exp().cumsum(dim=1) < 0.5 - 1e-9
    return below[:, :-1].sum(dim=1) + 1


def optimal_log_pmf(
    errors_BT: Tensor, divergences_BT: Tensor, price: float, beta: float, weight: float
) -> Tensor:
    """Return the log posterior over lengths (B, T) that minimises the training loss for given tokens.

    Parameters
    ----------
    errors_BT : Tensor
        Squared errors D_l of the prefixes.
    divergences_BT : Tensor
        Cost of each token beside the price: its KL to the uniform code beyond the free bits, in nats.
    price, beta : float
        Lambda, and the factor on everything that is in nats.
    weight : float
        Share of the reconstruction that follows q (0.9: a tenth goes to all prefixes alike).
    """
    lengths = torch.arange(1, errors_BT.shape[1] + 1, device=errors_BT.device)
    paid = price * lengths + divergences_BT.cumsum(dim=1)
    return (-paid - weight * errors_BT / beta).log_softmax(dim=1)


def price_for(gain: float, beta: float, weight: float, surprise: float) -> float:
    """Return the price at which a token is worth its cost if it lowers the squared error by ``gain``.

    ``surprise`` is what a full token costs beside the price: ln V less the free bits.
    """
    return weight * gain / beta - surprise


def rule_length(errors_T: Tensor, price: float, beta: float, weight: float, surprise: float) -> int:
    """Return the first length whose next token gains less than it costs; T if none does."""
    gains = (errors_T[:-1] - errors_T[1:]).tolist()
    threshold = beta * (price + surprise) / weight
    return next((length for length, gain in enumerate(gains, start=1) if gain <= threshold), len(gains) + 1)


def free_nats(vocabulary: int) -> float:
    """Return the free bits of a token, in nats, that keep the published share of its information: 2.0 of ln 4096."""
    return 0.24 * math.log(vocabulary)
