"""Train SASRec, the baseline over item ids."""

from collections.abc import Callable, Mapping

import polars as pl
import torch
from pydantic import Field
from torch import Tensor

from components.artifacts import SasRecCheckpoint, SequenceSplit
from components.config import Config
from components.data.batches import training_batches, window_rows
from components.folders import Provenance
from components.metrics.ranking import contributions
from components.recommenders.full_ranking import Scorer, rank_exactly
from components.recommenders.sasrec import SasRec, SasRecConfig
from components.seams import SequenceBatch
from components.seeding import seed_everything
from components.training.loop import Device, Log, LoopConfig, State, cosine, device_of, fit
from components.training.recommender import OptimConfig, adam

SCORED_AT_ONCE = 256
"""Validation users scored at once: 256 users by 100,000 items are 200 MB."""


class SasRecStage(Config):
    """Train SASRec."""

    model: SasRecConfig = SasRecConfig()
    """Size of the model."""
    loop: LoopConfig = LoopConfig(epochs=10)
    """Length of training."""
    batch_size: int = Field(32, ge=1)
    """Windows of histories a step; memory holds a score for each of their items and each item of the catalogue."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    validation_users: int = Field(1000, ge=1)
    """Validation users that epochs are compared on, drawn once; all if there are fewer."""
    seed: int = 0
    """Seed of initial weights, batches and dropout."""
    device: Device = "auto"
    """Where to train; ``auto`` takes a GPU if there is one."""


def train_sasrec(
    split: SequenceSplit,
    config: SasRecStage,
    log: Log,
    save: Callable[[State], None] = lambda state: None,
    resume: State | None = None,
) -> SasRecCheckpoint:
    """Train on the split's training sequences and keep the best validated epoch.

    Parameters
    ----------
    split : SequenceSplit
        Training sequences and validation targets; the test targets are not read.
    config : SasRecStage
        Model and recipe.
    log : callable
        Receives losses and validation figures by step.
    save, resume
        See ``training.loop.fit``.
    """
    device = device_of(config.device)
    generator = seed_everything(config.seed)
    model = SasRec(config.model, split.num_items).to(device)
    group = {
        "params": model.parameters(),
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
    }
    optimizer = adam([group], config.optim)
    history = config.model.max_history
    # Windows are cut at random: this is the count of one draw.
    windows = window_rows(split.train, history, torch.Generator().manual_seed(0))
    steps = config.loop.epochs * -(-len(windows.start) // config.batch_size)
    users = min(config.validation_users, len(split.valid))
    valid = split.valid.sample(users, seed=config.seed, shuffle=True)

    def step(batch: SequenceBatch) -> Mapping[str, Tensor]:
        return {"loss": model.loss(batch.to(device))}

    result = fit(
        {"sasrec": model},
        optimizer,
        cosine(optimizer, config.optim.warmup_steps, steps),
        lambda epoch: training_batches(
            window_rows(split.train, history, generator), config.batch_size, generator
        ),
        step,
        lambda epoch: validate(model, valid),
        config.loop,
        select="valid_N@10",
        generator=generator,
        log=log,
        save=save,
        resume=resume,
    )
    return SasRecCheckpoint(
        weights=result.best["sasrec"],
        config=config.model.model_dump(mode="json"),
        num_items=split.num_items,
        split=split.fingerprint,
        step=result.step,
        epoch=result.epoch,
        metrics=result.metrics,
        provenance=Provenance(
            config=config.model_dump(mode="json"),
            parents={"SequenceSplit": split.fingerprint},
            seed=config.seed,
        ),
    )


def validate(scorer: Scorer, valid: pl.DataFrame) -> dict[str, float]:
    """Return R@10 and N@10 of exact ranks among all items, seen items kept."""
    exact = rank_exactly(
        scorer, valid["history"], valid["target"], k=0, exclude_seen=False, batch_size=SCORED_AT_ONCE
    )
    recall, ndcg = contributions(exact.ranks, ["R@10", "N@10"]).mean(axis=0)
    return {"valid_R@10": float(recall), "valid_N@10": float(ndcg)}
