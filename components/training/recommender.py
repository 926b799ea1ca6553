"""Train a recommender on frozen SIDs: the second of the two usual stages."""

from collections.abc import Callable, Iterator, Mapping

import polars as pl
import torch
from pydantic import Field
from torch import Tensor

from components.artifacts import ContentEmbeddings, RecommenderCheckpoint, SequenceSplit, SidTable
from components.config import Config
from components.data.batches import (
    Ints,
    Rows,
    cut_batches,
    held_out_rows,
    prefix_rows,
    row_symbols,
    training_batches,
    window_rows,
)
from components.data.splits import count_events
from components.folders import ArtifactError, Provenance
from components.metrics.ranking import contributions, ranks_in_lists
from components.recommenders.build import RecommenderConfig, build_recommender
from components.recommenders.causal import Causal, CausalConfig
from components.recommenders.decoding import rank_rows
from components.recommenders.tiger import Tiger, TigerConfig
from components.seams import Catalogue, ItemFacts, Recommender, SequenceBatch, SymbolSpace
from components.seeding import seed_everything
from components.tokenizers.sids import symbol_counts
from components.tokenizers.sources import FrozenSids
from components.tokenizers.trie import build_trie
from components.training.loop import Device, Log, LoopConfig, State, cosine, device_of, fit


class OptimConfig(Config):
    """AdamW with warm-up and a cosine to 0."""

    lr: float = Field(2e-3, gt=0)
    """Learning rate at its highest."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(100, ge=1)
    """Steps of linear warm-up."""


class ValidationConfig(Config):
    """How epochs are compared: full ranking of held-out targets."""

    users: int = Field(1000, ge=1)
    """Validation users, drawn once; all if there are fewer."""
    beams: int = Field(20, ge=10)
    """Width of the beam search."""
    batch_size: int = Field(128, ge=1)
    """Users decoded at once."""


class RecommenderStage(Config):
    """Train a recommender on frozen SIDs."""

    model: RecommenderConfig = CausalConfig()
    """The recommender: ``causal`` (decoder-only) or ``tiger`` (encoder-decoder)."""
    loop: LoopConfig = LoopConfig(epochs=12)
    """Length of training."""
    batch_size: int = Field(64, ge=1)
    """Histories a step."""
    batch_tokens: int | None = Field(None, ge=1)
    """Symbols a step: histories are packed until they have about so many, instead of ``batch_size`` histories; null:
    ``batch_size`` histories."""
    optim: OptimConfig = OptimConfig()
    """Optimiser of the recommender."""
    validation: ValidationConfig = ValidationConfig()
    """How the best epoch is found."""
    seed: int = 0
    """Seed of initial weights, batches and dropout."""
    device: Device = "auto"
    """Where to train; ``auto`` takes a GPU if there is one."""


def epoch_batches(
    recommender: Causal | Tiger,
    train: pl.DataFrame,
    counts_N: Tensor,
    stage: RecommenderStage,
    generator: torch.Generator,
) -> Callable[[int], Iterator[SequenceBatch]]:
    """Return the batches of an epoch, in the form that the recommender learns from.

    Parameters
    ----------
    recommender : Causal or Tiger
        Says whether every position of a row is a target or its last alone, and how much it reads.
    train : DataFrame
        Training sequences.
    counts_N : Tensor
        (N,) long, symbols of each item.
    stage : RecommenderStage
        Size of a batch.
    generator : torch.Generator
        Draws cuts and order.
    """
    counts = counts_N.cpu().numpy()
    rows_of = _rows_of(recommender, train, counts)

    def batches(epoch: int) -> Iterator[SequenceBatch]:
        rows = rows_of(generator)
        return training_batches(
            rows, stage.batch_size, generator, row_symbols(rows, counts), stage.batch_tokens
        )

    return batches


def steps_an_epoch(
    recommender: Causal | Tiger, train: pl.DataFrame, counts_N: Tensor, stage: RecommenderStage
) -> int:
    """Count the batches of an epoch; windows are cut at random, so this is the count of one draw."""
    counts, generator = counts_N.cpu().numpy(), torch.Generator().manual_seed(0)
    rows = _rows_of(recommender, train, counts)(generator)
    return len(cut_batches(rows, stage.batch_size, generator, row_symbols(rows, counts), stage.batch_tokens))


def _rows_of(
    recommender: Causal | Tiger, train: pl.DataFrame, counts: Ints
) -> Callable[[torch.Generator], Rows]:
    """Return how the rows of an epoch are made; prefixes are the same in each."""
    config = recommender.config
    match config:
        case TigerConfig():
            prefixes = prefix_rows(train, config.max_history)
            return lambda generator: prefixes
        case CausalConfig():
            history, tokens = config.max_history, config.max_tokens
            return lambda generator: window_rows(train, history, generator, counts, tokens)


class Validator:
    """Full ranking of a fixed sample of validation users."""

    def __init__(self, valid: pl.DataFrame, config: ValidationConfig, seed: int) -> None:
        self._rows: Rows = held_out_rows(valid.sample(min(config.users, len(valid)), seed=seed, shuffle=True))
        self._config = config

    def __call__(self, recommender: Recommender, catalogue: Catalogue) -> dict[str, float]:
        """Return R@10 and N@10 with seen items kept."""
        ranking = rank_rows(
            recommender,
            self._rows,
            catalogue,
            self._config.batch_size,
            self._config.beams,
            exclude_seen=False,
        )
        ranks = ranks_in_lists(ranking.items.numpy(), self._rows.target)
        recall, ndcg = contributions(ranks, ["R@10", "N@10"]).mean(axis=0)
        return {"valid_R@10": float(recall), "valid_N@10": float(ndcg)}


def step_names(space: SymbolSpace) -> list[str]:
    """Name the steps of a SID for the log: ``level1 ... suffix``, or ``symbol1 ...`` where any may be a suffix."""
    if not space.one_length:
        return [f"symbol{step + 1}" for step in range(space.num_steps)]
    return [*(f"level{level + 1}" for level in range(space.num_levels)), "suffix"]


def train_recommender(
    split: SequenceSplit,
    sids: SidTable,
    embeddings: ContentEmbeddings,
    config: RecommenderStage,
    log: Log,
    save: Callable[[State], None] = lambda state: None,
    resume: State | None = None,
) -> RecommenderCheckpoint:
    """Train on the split's training sequences and keep the best validated epoch.

    Parameters
    ----------
    split : SequenceSplit
        Training sequences and validation targets; the test targets are not read.
    sids : SidTable
        Frozen names of the items.
    embeddings : ContentEmbeddings
        Content vectors of the items; read by an ``intrr`` with ``text``.
    config : RecommenderStage
        Model and recipe.
    log : callable
        Receives losses and validation figures by step.
    save, resume
        See ``training.loop.fit``.

    Raises
    ------
    ArtifactError
        Table, split and embeddings have not the same number of items.
    """
    check_items(split, sids, embeddings)
    device = device_of(config.device)
    generator = seed_everything(config.seed)
    source = FrozenSids(sids).to(device)
    recommender = build_recommender(config.model, source.space, item_facts(split, embeddings)).to(device)
    optimizer = torch.optim.AdamW(
        recommender.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay
    )
    counts = symbol_counts(source.symbols)
    steps = config.loop.epochs * steps_an_epoch(recommender, split.train, counts, config)
    validator = Validator(split.valid, config.validation, config.seed)
    names = step_names(source.space)
    trie = build_trie(source.symbols)

    def step(batch: SequenceBatch) -> Mapping[str, Tensor]:
        batch = batch.to(device)
        loss = recommender.loss(batch, source.tokens(batch.unique))
        return {
            "loss": loss.total + sum(loss.beside.values()),
            **dict(zip(names, loss.steps, strict=True)),
            **loss.beside,
        }

    result = fit(
        {"recommender": recommender},
        optimizer,
        cosine(optimizer, config.optim.warmup_steps, steps),
        epoch_batches(recommender, split.train, counts, config, generator),
        step,
        lambda epoch: validator(recommender, recommender.catalogue(source.symbols, trie)),
        config.loop,
        select="valid_N@10",
        generator=generator,
        log=log,
        save=save,
        resume=resume,
    )
    return RecommenderCheckpoint(
        weights=result.best["recommender"],
        config=config.model.model_dump(mode="json"),
        sids=sids.fingerprint,
        step=result.step,
        epoch=result.epoch,
        metrics=result.metrics,
        provenance=Provenance(
            config=config.model_dump(mode="json"),
            parents={
                "SequenceSplit": split.fingerprint,
                "SidTable": sids.fingerprint,
                "ContentEmbeddings": embeddings.fingerprint,
            },
            seed=config.seed,
        ),
    )


def item_facts(split: SequenceSplit, embeddings: ContentEmbeddings) -> ItemFacts:
    """Return which items have training events, and their content vectors."""
    counts = torch.from_numpy(count_events(split.train["sequence"], split.num_items))
    return ItemFacts(counts > 0, embeddings.matrix)


def check_items(split: SequenceSplit, sids: SidTable, embeddings: ContentEmbeddings) -> None:
    """Refuse a table or content vectors of another catalogue."""
    if split.num_items != sids.num_items:
        raise ArtifactError(
            f"the SidTable names {sids.num_items} items, the SequenceSplit has {split.num_items}: "
            "they come from different catalogues"
        )
    if split.num_items != len(embeddings.matrix):
        raise ArtifactError(
            f"the ContentEmbeddings describe {len(embeddings.matrix)} items, the SequenceSplit has "
            f"{split.num_items}: they come from different catalogues"
        )
