"""Train tokenizer and recommender together: the recommendation loss moves the codes (DIGER)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from components.artifacts import (
    ContentEmbeddings,
    RecommenderCheckpoint,
    SequenceSplit,
    SidTable,
    TokenizerCheckpoint,
)
from components.config import Config
from components.data.splits import count_events
from components.exploration import ExplorationConfig, GumbelConfig, SdudConfig, SdudFrqudConfig
from components.folders import ArtifactError, Provenance
from components.metrics.sids import COLLAPSED_AT, CollapseError
from components.recommenders import build
from components.recommenders.build import build_recommender
from components.recommenders.intrr import Intrr, IntrrConfig
from components.seams import SequenceBatch
from components.seeding import seed_everything
from components.tokenizers.build import checkpoint_of, load_tokenizer
from components.tokenizers.dvae import Dvae
from components.tokenizers.live_dvae import LiveDvae, LiveSource
from components.tokenizers.rkmeans import RkMeans
from components.tokenizers.rqvae import RqVae
from components.tokenizers.sids import AssignmentRule, OverfullBucket, symbol_counts
from components.tokenizers.sources import LiveSids, Paths
from components.tokenizers.suffix_cost import Occupancy, occupancy, suffix_cost
from components.tokenizers.trie import build_trie
from components.training.dvae import total_loss
from components.training.item_figures import check_paths, item_figures
from components.training.joint_figures import exploration_figures, gradient_figures, table_figures
from components.training.loop import Halt, Log, State, cosine, device_of, fit
from components.training.recommender import (
    RecommenderStage,
    Validator,
    check_items,
    epoch_batches,
    item_facts,
    optimizer_of,
    step_names,
    steps_an_epoch,
    tokens_an_item,
)

STRAY = 0.01
"""Share of items whose codes may differ from the rule's at the start: ties fall otherwise on other machines."""


class PathsConfig(Config):
    """On which ways the recommendation loss reaches the codes: three switches."""

    history: bool = True
    """Through the items that are read as context; nothing goes this way where intrr reads ran or uid, which know no
    codes."""
    teacher_forcing: bool = True
    """Through the known beginning of the item that is written."""
    target: bool = True
    """Through the item that is predicted."""
    target_weight: float = Field(1.0, gt=0)
    """Factor on the gradient through the target, which pulls items towards codes that are easy to predict."""


class RefreshConfig(AssignmentRule):
    """When and by which rule the SID table follows the codebooks."""

    every: int = Field(1, ge=1)
    """Epochs between two refreshes; divides ``validate_every`` and ``epochs`` of the recommender's loop, so that a
    table is validated with the codebooks that made it."""


class CollapseConfig(Config):
    """When training stops because the codes no longer tell items apart; the best epoch before it is kept."""

    min_perplexity: float = Field(0.5, ge=0, lt=1)
    """Stop once a level's perplexity is below this share of what it was at the start."""


class JointStage(Config):
    """What joint training adds to the recommender's own recipe."""

    exploration: ExplorationConfig = GumbelConfig()
    """How codes are drawn: ``none``, ``ste``, ``gumbel``, ``sdud``, ``frqud`` or ``sdud_frqud``."""
    routing: Literal["end_to_end", "historical"] = "end_to_end"
    """historical: the recommendation loss sends nothing to the codes, as in the published runs; for comparison.
    Codebooks then learn from the other losses alone, and the recommender follows the table."""
    paths: PathsConfig = PathsConfig()
    """Where the recommendation loss may enter the tokenizer; not read if the routing is historical."""
    residual: Literal["sampled", "table"] = "sampled"
    """Which code a level's residual subtracts: the one drawn now, or the one of the table. A dvae always takes the
    table's, to which lengths belong."""
    top_probability: float = Field(0.5, gt=0, lt=1)
    """Sets the logit scale of each level: the mean probability of an item's best code at tau 1. With noise 1
    this is also how often a drawn code equals the nearest one. A dvae has learned its scales."""
    logit_scale: float | None = Field(None, gt=0)
    """One fixed logit scale for all levels instead (1 in the authors' gradient-fix release); null: found from
    ``top_probability``. Not for dvae."""
    tokenizer_lr: float = Field(1e-4, gt=0)
    """Learning rate of the codebooks (and encoder); 1e-3 collapses the deeper levels within a dozen epochs. Of a dvae
    all but the encoder, or all."""
    tokenizer_weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the codebooks: any decay pulls all codes to one point."""
    recommendation_weight: float = Field(1.0, ge=0)
    """Weight of the recommendation loss."""
    codebook_weight: float = Field(1.0, ge=0)
    """Weight of the term that pulls codewords to their items. Not for dvae."""
    commitment_weight: float = Field(0.25, ge=0)
    """Weight of the term that pulls latents to their codewords; with a frozen encoder it moves the codewords of
    earlier levels only. Not for dvae."""
    latent_reconstruction_weight: float = Field(1.0, ge=0)
    """Weight of the squared error of the quantised latents. Not for dvae."""
    tokenizer_weight: float = Field(1.0, ge=0)
    """Only for dvae: weight of the loss that it was trained on, after its warm-ups. Decoder, stop and so lengths learn
    from this alone. Over items that are met in a batch, each once: popularity counts less than in training alone."""
    suffix_cost: float = Field(0.0, ge=0)
    """Weight of the expected cost of the suffix, which the recommendation loss cannot send to the codes; 1 by
    derivation (see ``tokenizers.suffix_cost``), 0 as published. It balances the path through the target, which must be
    open, and shares its weights. Takes (buckets of the table) x (items of a batch) x 4 bytes, twice."""
    train_encoder: bool = False
    """Train the encoder too; frozen, its latents are computed once. Of a dvae, the layers that read content vectors."""
    refresh: RefreshConfig = RefreshConfig()
    """How the SID table follows the codebooks."""
    collapse: CollapseConfig | None = CollapseConfig()
    """When to stop a run whose codes collapse; null: never."""


class JointConfig(Config):
    """A joint run: the recommender's recipe and what is added to it."""

    recommender: RecommenderStage = RecommenderStage()
    """Model, length, optimiser and validation, as in the two-stage run it is compared with."""
    joint: JointStage = JointStage()
    """Exploration and tokenizer."""

    @model_validator(mode="after")
    def _paths_fit(self) -> Self:
        if self.joint.routing == "historical":
            return self
        paths = self.joint.paths
        build.check_paths(
            self.recommender.model,
            history=paths.history,
            teacher_forcing=paths.teacher_forcing,
            target=paths.target,
        )
        return self

    @model_validator(mode="after")
    def _suffix_cost_has_a_counterpart(self) -> Self:
        joint = self.joint
        if not joint.suffix_cost:
            return self
        if joint.routing == "historical" or not joint.paths.target:
            raise ValueError(
                "joint.suffix_cost balances the gradient through the target: it needs joint.routing end_to_end and "
                "joint.paths.target true; set it to 0, or open the path"
            )
        if getattr(joint.exploration, "scaling", "raw") == "scaled":
            raise ValueError(
                "joint.suffix_cost cannot balance a recommendation loss that joint.exploration.scaling=scaled "
                "rescales: take raw or detached, or set joint.suffix_cost to 0"
            )
        return self

    @model_validator(mode="after")
    def _refresh_fits(self) -> Self:
        every, loop = self.joint.refresh.every, self.recommender.loop
        if loop.validate_every % every or loop.epochs % every:
            raise ValueError(
                f"refresh.every {every} must divide validate_every {loop.validate_every} and epochs {loop.epochs}: "
                "else tokenizer and table of a validated epoch do not belong together"
            )
        return self


class JointResult(NamedTuple):
    """Tokenizer, table and recommender of one epoch; they only work together."""

    tokenizer: TokenizerCheckpoint
    sids: SidTable
    recommender: RecommenderCheckpoint
    collapsed: str | None
    """Epoch, level and figure at which training was stopped, if it was; the other three are of an epoch before."""


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
    as configured; an item that keeps its codes keeps its suffix. Names of a dvae may change their length with it, and
    batches are cut anew. The tokenizer's own losses run over the batch's unique items, each once; the authors' release
    takes them over the targets, repeats counted.

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
        Embeddings, tokenizer, table and split do not belong together, or the table was made by another rule than
        it would be refreshed by.
    ValueError
        A setting does not fit the tokenizer: a dvae whose drawn codes shall be read, or an encoder that is not there;
        or the recommender's recipe fits frozen SIDs alone (``check_moving_codes``).
    CollapseError
        The codes collapsed, or a bucket outgrew ``suffix_size``, before any epoch was validated as sound. Later, the
        best epoch before is returned.

    References
    ----------
    DIGER (arXiv 2601.19711), sections 3.2 and 3.4, with the routing of the authors' gradient-fix release.
    """
    check_items(split, sids, embeddings)
    if sids.tokenizer != tokenizer.fingerprint or tokenizer.embeddings != embeddings.fingerprint:
        raise ArtifactError(
            f"SidTable of tokenizer {sids.tokenizer[:12]}, tokenizer {tokenizer.fingerprint[:12]} of embeddings "
            f"{tokenizer.embeddings[:12]}, embeddings {embeddings.fingerprint[:12]}: take the three of one run"
        )
    stage, joint = config.recommender, config.joint
    check_moving_codes(stage, joint)
    device = device_of(stage.device)
    # Before seeding: the recommender then starts as in the two-stage run.
    module = load_tokenizer(tokenizer)
    generator = seed_everything(stage.seed)
    live, own_loss = live_source(module, embeddings.matrix, sids, config)
    live = live.to(device)
    check_rule(live, joint.refresh)
    recommender = build_recommender(stage.model, live.space, item_facts(split, embeddings)).to(device)
    optimizer = optimizer_of(
        recommender,
        stage.optim,
        {
            "params": list(live.trained_parameters()),
            "lr": joint.tokenizer_lr,
            "weight_decay": joint.tokenizer_weight_decay,
        },
        *sigma_group(live.exploration, joint.exploration),
    )
    # By the names at the start: where lengths change and batches are filled by symbols, later epochs may differ.
    counts = tokens_an_item(recommender, live.symbols)
    steps = stage.loop.epochs * steps_an_epoch(recommender, split.train, counts, stage)
    validator = Validator(split.valid, stage.validation, stage.seed)
    names = step_names(live.space)
    first, moved = live.codes.clone(), torch.zeros(len(live.codes))
    start = table_figures(live)
    events_N = torch.from_numpy(count_events(split.train["sequence"], split.num_items)).to(device)
    # One more for each item, so that none is without mass. A user's first event counts too, though it is no target.
    mass_N = events_N.float() + 1
    occupied: Occupancy | None = None
    overfull: OverfullBucket | None = None
    probe: dict[str, float] = {}

    def step(batch: SequenceBatch) -> Mapping[str, Tensor]:
        batch = batch.to(device)
        tokens, quantized = live.assign(batch.unique)
        loss = recommender.loss(batch, tokens)
        recommendation = joint.recommendation_weight * live.exploration.weigh(loss.total)
        quantisation = own_loss(quantized.losses)
        parts = {"recommendation": recommendation, "quantisation": quantisation, **loss.beside}
        figures = dict(loss.beside)
        if joint.suffix_cost:
            assert tokens.target.weights is not None and occupied is not None
            # The weights of the target: each code is priced beside the others that the loss predicts with it.
            cost_U = suffix_cost(tokens.target.weights, batch.unique, occupied)
            count_U = target_counts(batch, recommender.positions)
            figures["suffix_cost"] = (count_U / count_U.sum() * cost_U).sum()
            # Divided as the mean over the symbols divides the cross-entropy of the suffix that it stands for.
            symbols = (count_U * symbol_counts(tokens.target.symbols)).sum()
            weight = joint.recommendation_weight * joint.suffix_cost * (count_U.sum() / symbols)
            parts["suffix_cost"] = weight * figures["suffix_cost"]
        if not probe:
            probe.update(gradient_figures(parts, live.codebooks))
        return {
            "loss": torch.stack(list(parts.values())).sum(),
            "recommendation": loss.total,
            **dict(zip(names, loss.steps, strict=True)),
            **quantized.losses,
            **figures,
            **exploration_figures(quantized, live.codes[batch.unique]),
        }

    def batches(number: int) -> Iterator[SequenceBatch]:
        nonlocal moved, occupied, overfull
        probe.clear()
        if joint.suffix_cost:
            occupied = occupancy(live.codes, mass_N, live.space.codebook_sizes)
        counts = tokens_an_item(recommender, live.symbols)
        yield from epoch_batches(recommender, split.train, counts, stage, generator)(number)
        # Behind the epoch's last step: the table that is validated is the one that the next epoch reads.
        if (number + 1) % joint.refresh.every == 0:
            try:
                moved, overfull = live.refresh(), None
            except OverfullBucket as error:
                overfull = error

    def validate(number: int) -> Mapping[str, float]:
        table = table_figures(live)
        if overfull is not None:
            raise Halt(f"epoch {number}: {overfull}", table)
        catalogue = recommender.catalogue(live.symbols, build_trie(live.symbols))
        figures = {
            **validator(recommender, catalogue),
            "sids/churn": float(moved.float().mean()),
            "sids/churn_since_start": float((live.codes != first).any(dim=1).float().mean()),
            **table,
            **probe,
        }
        if joint.collapse is not None:
            check_collapse(number, figures, start, joint.collapse)
        if isinstance(recommender, Intrr):
            figures |= item_figures(recommender, live.symbols, events_N)
            check_paths(number, figures, stage.min_paths)
        return figures

    try:
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
    except Halt as halt:
        raise CollapseError(f"{halt}; no earlier epoch was validated, so there is nothing to keep") from halt
    live.load_state_dict(result.best["sids"])
    metrics = dict(result.metrics)
    if result.halted:
        metrics[COLLAPSED_AT] = float(result.halted[0])
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
        metrics={name: value for name, value in metrics.items() if name.startswith("sids/")},
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
            metrics=metrics,
            provenance=provenance,
        ),
        result.halted and result.halted[1],
    )


def live_source(
    module: RqVae | RkMeans | Dvae, x_ND: Tensor, sids: SidTable, config: JointConfig
) -> tuple[LiveSource, Callable[[Mapping[str, Tensor]], Tensor]]:
    """Return a tokenizer as a source of tokens, and what its own losses are in the sum that is minimised."""
    joint = config.joint
    open_paths = (
        Paths(**joint.paths.model_dump()) if joint.routing == "end_to_end" else Paths(False, False, False)
    )
    noise = torch.Generator().manual_seed(config.recommender.seed)
    match module:
        case Dvae():
            live_dvae = LiveDvae(
                module,
                x_ND,
                sids,
                joint.exploration,
                open_paths,
                joint.refresh,
                train_encoder=joint.train_encoder,
                generator=noise,
            )
            return live_dvae, lambda losses: joint.tokenizer_weight * total_loss(losses, module.config.beta)
        case RqVae() | RkMeans():
            live_sids = LiveSids(
                module,
                x_ND,
                sids,
                joint.exploration,
                open_paths,
                joint.refresh,
                residual=joint.residual,
                top_probability=joint.top_probability,
                logit_scale=joint.logit_scale,
                train_encoder=joint.train_encoder,
                generator=noise,
            )
            return (
                live_sids,
                lambda losses: (
                    joint.codebook_weight * losses["codebook"]
                    + joint.commitment_weight * losses["commitment"]
                    + joint.latent_reconstruction_weight * losses["latent_reconstruction"]
                ),
            )


def sigma_group(noise: nn.Module, config: ExplorationConfig) -> list[dict[str, Any]]:
    """Return the optimiser's group of a learned noise scale, with a rate of its own; none where none is learned."""
    if not isinstance(config, SdudConfig | SdudFrqudConfig):
        return []
    return [{"params": list(noise.parameters()), "lr": config.sigma_lr, "weight_decay": 0.0}]


def check_moving_codes(recommender: RecommenderStage, joint: JointStage) -> None:
    """Refuse a recommender's recipe that fits frozen SIDs alone.

    Raises
    ------
    ValueError
        Symbols are predicted among the children of the table's tree, or walks are held to codes that noise has drawn.
    """
    model, forward = recommender.model, joint.exploration.forward
    if recommender.normalise == "children":
        raise ValueError(
            "recommender.normalise=children predicts a symbol among those that lead to an item, but codes that move "
            "learn from the others too: take range for joint training"
        )
    if isinstance(model, IntrrConfig) and model.reads == "ran" and model.alignment and forward == "sample":
        raise ValueError(
            "recommender.model.alignment holds the walks of items to their SIDs, but with "
            "joint.exploration.forward=sample codes drawn by noise are read in their place: take forward=table, or "
            "alignment 0"
        )


def check_rule(live: LiveSource, refresh: RefreshConfig) -> None:
    """Refuse a table that another rule made: the first refresh would replace it without a word."""
    differs = float((live.assigned() != live.codes).any(dim=1).float().mean())
    if differs > STRAY:
        raise ArtifactError(
            f"{differs:.0%} of the items have other codes in the SidTable than assignment={refresh.assignment}, "
            f"length={refresh.length} gives them, by which joint training refreshes the table: start from a table "
            "made with the same sids.assignment and sids.length, or change them in joint.refresh"
        )


def check_collapse(
    epoch: int, figures: Mapping[str, float], start: Mapping[str, float], config: CollapseConfig
) -> None:
    """Halt training if a level's perplexity has fallen too far below its start; name epoch, level and figure.

    Where a balanced table hides it, or names of other lengths look like it, the perplexity of the nearest codes of all
    items is what counts.
    """
    hidden = any(name.startswith("sids/nearest_perplexity/") for name in start)
    group = "sids/nearest_perplexity/level" if hidden else "sids/perplexity/level"
    for name, first in start.items():
        if name.startswith(group) and figures[name] < config.min_perplexity * first:
            raise Halt(
                f"epoch {epoch}: the codes of level {name.removeprefix(group)} collapse, perplexity "
                f"{figures[name]:.1f} of {first:.1f} at the start, below joint.collapse.min_perplexity "
                f"{config.min_perplexity:g}; lower joint.tokenizer_lr, add noise or set joint.suffix_cost",
                figures,
            )


def target_counts(batch: SequenceBatch, positions: Literal["all", "last"]) -> Tensor:
    """Return how often each unique item (U,) is predicted in a batch."""
    predicted = batch.target
    if positions == "all":
        later = batch.mask.clone()
        later[:, 0] = False
        predicted = torch.cat([batch.items[later], predicted])
    return torch.bincount(predicted, minlength=len(batch.unique))
