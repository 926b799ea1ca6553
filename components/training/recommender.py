"""Train a recommender on frozen SIDs: the second of the two usual stages."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

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
from components.metrics.sids import COLLAPSED_AT, CollapseError
from components.recommenders.build import RecommenderConfig, build_recommender
from components.recommenders.causal import Causal, CausalConfig
from components.recommenders.decoding import rank_rows
from components.recommenders.intrr import Intrr, IntrrConfig
from components.recommenders.tiger import Tiger, TigerConfig
from components.seams import Catalogue, ItemFacts, Recommender, SequenceBatch, SymbolSpace
from components.seeding import seed_everything
from components.tokenizers.sids import symbol_counts
from components.tokenizers.sources import FrozenSids
from components.tokenizers.trie import build_trie, choices
from components.training.item_figures import check_paths, item_figures
from components.training.loop import Device, Halt, Log, LoopConfig, State, cosine, device_of, fit

SidRecommender = Causal | Tiger | Intrr


class OptimConfig(Config):
    """Adam with weight decay, warm-up and a cosine to 0."""

    lr: float = Field(2e-3, gt=0)
    """Learning rate at its highest."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay. Of an ``intrr``, tables, biases and norms are left out: decay would shrink what is rarely met."""
    decay: Literal["decoupled", "coupled"] = "decoupled"
    """decoupled: AdamW. coupled: L2 in the gradient of everything, tables included, as IntRR was released; vectors of
    rare items then shrink to nothing. Only to reproduce that."""
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
    """The recommender: ``causal`` (decoder-only), ``tiger`` (encoder-decoder) or ``intrr`` (one token an item)."""
    loop: LoopConfig = LoopConfig(epochs=12)
    """Length of training."""
    batch_size: int = Field(64, ge=1)
    """Histories a step."""
    batch_tokens: int | None = Field(None, ge=1)
    """Tokens a step, symbols of SIDs or whole items as the recommender reads them: histories are packed until they have
    about so many, instead of ``batch_size`` histories; null: ``batch_size`` histories."""
    normalise: Literal["range", "children"] = "range"
    """What a symbol is predicted among. range: all symbols that its step may write, as published. children: those that
    lead on to an item, as in decoding, so that the loss is the likelihood of items. Only for frozen SIDs."""
    optim: OptimConfig = OptimConfig()
    """Optimiser of the recommender."""
    validation: ValidationConfig = ValidationConfig()
    """How the best epoch is found."""
    min_paths: float = Field(0.1, ge=0, lt=1)
    """Only where items walk through the codebooks (intrr): training stops once fewer distinct paths than this share of
    the items are left, and the best epoch before is kept; 0: never."""
    seed: int = 0
    """Seed of initial weights, batches and dropout."""
    device: Device = "auto"
    """Where to train; ``auto`` takes a GPU if there is one."""


def epoch_batches(
    recommender: SidRecommender,
    train: pl.DataFrame,
    counts_N: Tensor,
    stage: RecommenderStage,
    generator: torch.Generator,
) -> Callable[[int], Iterator[SequenceBatch]]:
    """Return the batches of an epoch, in the form that the recommender learns from.

    Parameters
    ----------
    recommender : Causal, Tiger or Intrr
        Says whether every position of a row is a target or its last alone, and how much it reads.
    train : DataFrame
        Training sequences.
    counts_N : Tensor
        (N,) long, tokens that each item is read as (``tokens_an_item``).
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
    recommender: SidRecommender, train: pl.DataFrame, counts_N: Tensor, stage: RecommenderStage
) -> int:
    """Count the batches of an epoch; windows are cut at random, so this is the count of one draw."""
    counts, generator = counts_N.cpu().numpy(), torch.Generator().manual_seed(0)
    rows = _rows_of(recommender, train, counts)(generator)
    return len(cut_batches(rows, stage.batch_size, generator, row_symbols(rows, counts), stage.batch_tokens))


def _rows_of(
    recommender: SidRecommender, train: pl.DataFrame, counts: Ints
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
        case IntrrConfig():
            most = config.max_history
            return lambda generator: window_rows(train, most, generator)


def tokens_an_item(recommender: SidRecommender, symbols_NS: Tensor) -> Tensor:
    """Return how many tokens (N,) long of the backbone each item takes in training: one, or those of its SID."""
    config = recommender.config
    if isinstance(config, IntrrConfig) and config.reads != "flat" and config.writes == "ran":
        return torch.ones_like(symbols_NS[:, 0])
    return symbol_counts(symbols_NS)


def optimizer_of(
    recommender: SidRecommender, config: OptimConfig, *others: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return the optimiser of a recommender, and of other groups of parameters beside it."""
    tables = []
    if isinstance(recommender, Intrr) and config.decay == "decoupled":
        tables = list(recommender.undecayed())
    kept = {id(table) for table in tables}
    decayed = [p for p in recommender.parameters() if id(p) not in kept]
    groups = [{"params": decayed, "lr": config.lr, "weight_decay": config.weight_decay}]
    if tables:
        groups.append({"params": tables, "lr": config.lr, "weight_decay": 0.0})
    return adam([*groups, *others], config)


def adam(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW, or Adam where decay is coupled."""
    return torch.optim.AdamW(groups) if config.decay == "decoupled" else torch.optim.Adam(groups)


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
    CollapseError
        Items walk through the codebooks on too few paths before any epoch was validated as sound. Later, the best
        epoch before is kept and ``metrics`` says when training stopped.
    ArtifactError
        Table, split and embeddings have not the same number of items.
    """
    check_items(split, sids, embeddings)
    device = device_of(config.device)
    generator = seed_everything(config.seed)
    source = FrozenSids(sids).to(device)
    recommender = build_recommender(config.model, source.space, item_facts(split, embeddings)).to(device)
    optimizer = optimizer_of(recommender, config.optim)
    counts = tokens_an_item(recommender, source.symbols)
    events_N = torch.from_numpy(count_events(split.train["sequence"], split.num_items)).to(device)
    steps = config.loop.epochs * steps_an_epoch(recommender, split.train, counts, config)
    validator = Validator(split.valid, config.validation, config.seed)
    names = step_names(source.space)
    trie = build_trie(source.symbols)

    def step(batch: SequenceBatch) -> Mapping[str, Tensor]:
        batch = batch.to(device)
        tokens = source.tokens(batch.unique)
        if config.normalise == "children":
            among = choices(trie, batch.unique, source.space.starts)
            tokens = tokens._replace(target=tokens.target._replace(choices=among))
        loss = recommender.loss(batch, tokens)
        return {
            "loss": loss.total + sum(loss.beside.values()),
            **dict(zip(names, loss.steps, strict=True)),
            **loss.beside,
        }

    def validate(epoch: int) -> Mapping[str, float]:
        figures = validator(recommender, recommender.catalogue(source.symbols, trie))
        if isinstance(recommender, Intrr):
            figures |= item_figures(recommender, source.symbols, events_N)
            check_paths(epoch, figures, config.min_paths)
        return figures

    try:
        result = fit(
            {"recommender": recommender},
            optimizer,
            cosine(optimizer, config.optim.warmup_steps, steps),
            epoch_batches(recommender, split.train, counts, config, generator),
            step,
            validate,
            config.loop,
            select="valid_N@10",
            generator=generator,
            log=log,
            save=save,
            resume=resume,
        )
    except Halt as halt:
        raise CollapseError(f"{halt}; no earlier epoch was validated, so there is nothing to keep") from halt
    metrics = dict(result.metrics)
    if result.halted:
        metrics[COLLAPSED_AT] = float(result.halted[0])
    return RecommenderCheckpoint(
        weights=result.best["recommender"],
        config=config.model.model_dump(mode="json"),
        sids=sids.fingerprint,
        step=result.step,
        epoch=result.epoch,
        metrics=metrics,
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
    """Return which items are read in training, and the content vectors of all.

    The last event of a sequence is predicted but never read.
    """
    sequence = pl.col("sequence")
    read = split.train.select(sequence.list.head(sequence.list.len() - 1))["sequence"]
    return ItemFacts(torch.from_numpy(count_events(read, split.num_items)) > 0, embeddings.matrix)


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
