"""One seed, turned into every random stream that a stage draws from."""

import os
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
    # cuBLAS repeats itself only with a fixed workspace; it reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Only code that reads what it never wrote could tell, and filling costs 4 % of a training step on CPU.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.Generator().manual_seed(seed)
