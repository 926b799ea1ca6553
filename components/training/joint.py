"""Train tokenizer and recommender together: the recommendation loss moves the codes (DIGER)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from components.artifacts import (
    ContentEmbeddings,
    RecommenderCheckpoint,
    SequenceSplit,
    SidTable,
    TokenizerCheckpoint,
)
from components.config import Config
from components.exploration import ExplorationConfig, GumbelConfig, build_exploration
from components.folders import ArtifactError, Provenance
from components.recommenders.build import build_recommender, check_paths
from components.seams import Quantized, SequenceBatch
from components.seeding import seed_everything
from components.tokenizers.build import checkpoint_of, load_tokenizer
from components.tokenizers.quantize import residual_codes
from components.tokenizers.sources import LiveSids, Paths
from components.tokenizers.trie import build_trie
from components.training.loop import Log, State, cosine, device_of, fit
from components.training.recommender import (
    RecommenderStage,
    Validator,
    check_items,
    epoch_batches,
    step_names,
    steps_an_epoch,
)

STRAY = 0.01
"""Share of items that may differ from their nearest codes at the start: ties fall otherwise on other machines."""


class PathsConfig(Config):
    """On which ways the recommendation loss reaches the codes: three switches."""

    history: bool = True
    """Through the items that are read as context."""
    teacher_forcing: bool = True
    """Through the known beginning of the item that is written."""
    target: bool = True
    """Through the item that is predicted."""
    target_weight: float = Field(1.0, gt=0)
    """Factor on the gradient through the target, which pulls items towards codes that are easy to predict."""


class JointStage(Config):
    """What joint training adds to the recommender's own recipe."""

    exploration: ExplorationConfig = GumbelConfig()
    """How codes are drawn: ``none``, ``ste`` or ``gumbel``."""
    paths: PathsConfig = PathsConfig()
    """Where the recommendation loss may enter the tokenizer."""
    residual: Literal["sampled", "table"] = "sampled"
    """Which code a level's residual subtracts: the one drawn now, or the one of the table."""
    top_probability: float = Field(0.5, gt=0, lt=1)
    """Sets the logit scale of each level: the mean probability of an item's best code at tau 1. With noise 1
    this is also how often a drawn code equals the nearest one."""
    tokenizer_lr: float = Field(1e-4, gt=0)
    """Learning rate of the codebooks (and encoder); 1e-3 collapses the deeper levels within a dozen epochs."""
    tokenizer_weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the codebooks: any decay pulls all codes to one point."""
    recommendation_weight: float = Field(1.0, ge=0)
    """Weight of the recommendation loss."""
    codebook_weight: float = Field(1.0, ge=0)
    """Weight of the term that pulls codewords to their items."""
    commitment_weight: float = Field(0.25, ge=0)
    """Weight of the term that pulls latents to their codewords; with a frozen encoder it moves the codewords of
    earlier levels only."""
    latent_reconstruction_weight: float = Field(1.0, ge=0)
    """Weight of the squared error of the quantised latents."""
    train_encoder: bool = False
    """Train the encoder too; frozen, its latents are computed once."""
    refresh_every: int = Field(1, ge=1)
    """Epochs between two refreshes of the SID table from the current codebooks; divides ``validate_every`` and
    ``epochs`` of the recommender's loop, so that a table is validated with the codebooks that made it."""


class JointConfig(Config):
    """A joint run: the recommender's recipe and what is added to it."""

    recommender: RecommenderStage = RecommenderStage()
    """Model, length, optimiser and validation, as in the two-stage run it is compared with."""
    joint: JointStage = JointStage()
    """Exploration and tokenizer."""

    @model_validator(mode="after")
    def _paths_fit(self) -> Self:
        paths = self.joint.paths
        check_paths(self.recommender.model, history=paths.history, teacher_forcing=paths.teacher_forcing)
        return self

    @model_validator(mode="after")
    def _refresh_fits(self) -> Self:
        every, loop = self.joint.refresh_every, self.recommender.loop
        if loop.validate_every % every or loop.epochs % every:
            raise ValueError(
                f"refresh_every {every} must divide validate_every {loop.validate_every} and epochs {loop.epochs}: "
                "else tokenizer and table of a validated epoch do not belong together"
            )
        return self


class JointResult(NamedTuple):
    """Tokenizer, table and recommender of one epoch; they only work together."""

    tokenizer: TokenizerCheckpoint
    sids: SidTable
    recommender: RecommenderCheckpoint


def train_jointly(
    split: SequenceSplit,
    embeddings: ContentEmbeddings,
    tokenizer: TokenizerCheckpoint,
    sids: SidTable,
    config: JointConfig,
    log: Log,
    save: Callable[[State], None] = lambda state: None,
    resume: State | None = None,
) -> JointResult:
    """Train a fresh recommender and a pretrained tokenizer on one loss; keep the best validated epoch.

    The recommender reads and writes the codes of the table. The gradient reaches the codebooks through the
    soft assignment of the same items, on the paths that are switched on. The table follows the codebooks
    after each epoch; an item that keeps its codes keeps its suffix. The tokenizer's own losses run over the
    batch's unique items, each once; the authors' release takes them over the targets, repeats counted.

    Parameters
    ----------
    split : SequenceSplit
        Training sequences and validation targets; the test targets are not read.
    embeddings : ContentEmbeddings
        What the tokenizer was trained on.
    tokenizer : TokenizerCheckpoint
        Where the codebooks start.
    sids : SidTable
        The table of that tokenizer; its ``suffix_size`` leaves room for buckets that grow.
    config : JointConfig
        Recipe.
    log : callable
        Receives losses, agreements and the state of the codes by step.
    save, resume
        See ``training.loop.fit``.

    Returns
    -------
    JointResult

    Raises
    ------
    ArtifactError
        Embeddings, tokenizer, table and split do not belong together, or the table does not hold nearest codes.
    ValueError
        A bucket outgrew ``suffix_size``.

    References
    ----------
    DIGER (arXiv 2601.19711), sections 3.2 and 3.4, with the routing of the authors' gradient-fix release.
    """
    check_items(split, sids)
    if sids.tokenizer != tokenizer.fingerprint or tokenizer.embeddings != embeddings.fingerprint:
        raise ArtifactError(
            f"SidTable of tokenizer {sids.tokenizer[:12]}, tokenizer {tokenizer.fingerprint[:12]} of embeddings "
            f"{tokenizer.embeddings[:12]}, embeddings {embeddings.fingerprint[:12]}: take the three of one run"
        )
    stage, joint = config.recommender, config.joint
    device = device_of(stage.device)
    module = load_tokenizer(tokenizer)  # before seeding: the recommender then starts as in the two-stage run
    generator = seed_everything(stage.seed)
    live = LiveSids(
        module,
        embeddings.matrix,
        sids,
        build_exploration(joint.exploration),
        Paths(**joint.paths.model_dump()),
        residual=joint.residual,
        top_probability=joint.top_probability,
        train_encoder=joint.train_encoder,
        generator=torch.Generator().manual_seed(stage.seed),
    ).to(device)
    check_nearest(live)
    recommender = build_recommender(stage.model, live.space).to(device)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": list(recommender.parameters()),
                "lr": stage.optim.lr,
                "weight_decay": stage.optim.weight_decay,
            },
            {
                "params": list(live.trained_parameters()),
                "lr": joint.tokenizer_lr,
                "weight_decay": joint.tokenizer_weight_decay,
            },
        ]
    )
    history = stage.model.max_history
    batches_of = epoch_batches(recommender, split.train, history, stage.batch_size, generator)
    steps = stage.loop.epochs * steps_an_epoch(recommender, split.train, history, stage.batch_size)
    validator = Validator(split.valid, stage.validation, stage.seed)
    names = step_names(live.space.num_levels)
    first, moved = live.codes.clone(), torch.zeros(len(live.codes))

    def step(batch: SequenceBatch) -> Mapping[str, Tensor]:
        batch = batch.to(device)
        tokens, quantized = live.assign(batch.unique)
        loss = recommender.loss(batch, tokens)
        total = (
            joint.recommendation_weight * loss.total
            + joint.codebook_weight * quantized.losses["codebook"]
            + joint.commitment_weight * quantized.losses["commitment"]
            + joint.latent_reconstruction_weight * quantized.losses["latent_reconstruction"]
        )
        return {
            "loss": total,
            "recommendation": loss.total,
            **dict(zip(names, loss.steps, strict=True)),
            **quantized.losses,
            **agreements(quantized, live.codes[batch.unique]),
        }

    def batches(number: int) -> Iterator[SequenceBatch]:
        nonlocal moved
        yield from batches_of(number)
        # Behind the epoch's last step: the table that is validated is the one that the next epoch reads.
        if (number + 1) % joint.refresh_every == 0:
            moved = live.refresh()

    def validate(number: int) -> Mapping[str, float]:
        return {
            **validator(recommender, live.symbols, build_trie(live.symbols)),
            "sids/churn": float(moved.float().mean()),
            "sids/churn_since_start": float((live.codes != first).any(dim=1).float().mean()),
            **table_figures(live),
        }

    result = fit(
        {"recommender": recommender, "sids": live},
        optimizer,
        cosine(optimizer, stage.optim.warmup_steps, steps),
        batches,
        step,
        validate,
        stage.loop,
        select="valid_N@10",
        generator=generator,
        log=log,
        save=save,
        resume=resume,
    )
    live.load_state_dict(result.best["sids"])
    provenance = Provenance(
        config=config.model_dump(mode="json"),
        parents={
            "SequenceSplit": split.fingerprint,
            "ContentEmbeddings": embeddings.fingerprint,
            "TokenizerCheckpoint": tokenizer.fingerprint,
            "SidTable": sids.fingerprint,
        },
        seed=stage.seed,
    )
    trained = checkpoint_of(
        module,
        embeddings=embeddings.fingerprint,
        steps=tokenizer.steps + result.step,
        metrics={name: value for name, value in result.metrics.items() if name.startswith("sids/")},
        provenance=provenance,
    )
    table = live.table(trained.fingerprint, provenance)
    return JointResult(
        trained,
        table,
        RecommenderCheckpoint(
            weights=result.best["recommender"],
            config=stage.model.model_dump(mode="json"),
            sids=table.fingerprint,
            step=result.step,
            epoch=result.epoch,
            metrics=result.metrics,
            provenance=provenance,
        ),
    )


def check_nearest(live: LiveSids) -> None:
    """Refuse a table of other than nearest codes: the first refresh would replace it without a word."""
    nearest = residual_codes(live.latents(), list(live.tokenizer.codebooks))
    differs = float((nearest != live.codes).any(dim=1).float().mean())
    if differs > STRAY:
        raise ArtifactError(
            f"{differs:.0%} of the items do not have their nearest codes in the SidTable; joint training refreshes "
            "the table to nearest codes, so start from a table made with sids.assignment=nearest"
        )


def agreements(quantized: Quantized, table_UL: Tensor) -> dict[str, Tensor]:
    """Return by level how often drawn, nearest and table codes agree, and the mean top probability.

    Drawn against nearest says how much is explored: near 1/K codes are random, near 1 noise does nothing.
    """
    figures = {}
    for level, soft_UK in enumerate(quantized.probabilities):
        name = f"level{level + 1}"
        drawn, nearest = quantized.codes[:, level], quantized.greedy[:, level]
        figures[f"agree/drawn_nearest/{name}"] = (drawn == nearest).float().mean()
        figures[f"agree/nearest_table/{name}"] = (nearest == table_UL[:, level]).float().mean()
        figures[f"top_probability/{name}"] = soft_UK.amax(dim=-1).mean()
    return figures


def table_figures(live: LiveSids) -> dict[str, float]:
    """Return the state of the table: codes in use and perplexity by level, collisions, largest bucket."""
    figures = {}
    for level, (size, code_N) in enumerate(zip(live.space.codebook_sizes, live.codes.T, strict=True)):
        share = torch.bincount(code_N, minlength=size).double() / len(code_N)
        figures[f"sids/perplexity/level{level + 1}"] = float(torch.special.entr(share).sum().exp())
        figures[f"sids/codes_in_use/level{level + 1}"] = float((share > 0).sum())
    buckets = torch.unique(live.codes, dim=0, return_counts=True)[1]
    figures["sids/distinct"] = float(len(buckets))
    figures["sids/colliding"] = float(buckets[buckets > 1].sum()) / len(live.codes)
    figures["sids/largest_bucket"] = float(buckets.max())
    return figures
