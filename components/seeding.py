"""One seed, turned into every random stream that a stage draws from."""

import random

import numpy as np
import torch


def seed_everything(seed: int, *, deterministic: bool = True) -> torch.Generator:
    """Seed python, numpy and torch, and return a generator for the stage's own draws.

    Parameters
    ----------
    seed : int
        The one seed of the stage.
    deterministic : bool
        Ask torch for deterministic algorithms; on CPU this makes equal seeds give equal bytes.

    Returns
    -------
    torch.Generator
        A CPU generator seeded with ``seed``; batches and noise are drawn from it explicitly.
    """
    random.seed(seed)
    np.random.seed(seed)  # faiss and scikit-learn take explicit seeds; this covers third parties
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    return torch.Generator().manual_seed(seed)
