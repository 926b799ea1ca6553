"""The settings of a whole pipeline: a section for each stage."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from components.config import Config
from components.data.ingest import IngestConfig
from components.data.splits import SplitConfig
from components.metrics.compare import CompareConfig
from components.metrics.drift import DriftConfig
from components.metrics.promotion import PromoteConfig
from components.metrics.report import BASELINES, EvaluateConfig
from components.metrics.sids import CollisionConfig
from components.recommenders.exact import NOT_EXACT
from components.recommenders.intrr import IntrrConfig
from components.recommenders.tiger import TigerConfig
from components.tokenizers.dvae import DvaeConfig
from components.tokenizers.live_dvae import check_forward
from components.tokenizers.rkmeans import RkMeansConfig
from components.tokenizers.sids import SidConfig, check_assignment
from components.training.joint import JointConfig, JointStage, check_moving_codes
from components.training.recommender import RecommenderStage
from components.training.sasrec import SasRecStage
from components.training.tokenizer_stage import TokenizerStage
from tasks.data import EmbeddingStage


class PipelineConfig(Config):
    """A section for each stage; a stage runs again only if its own section, or what it reads, changed."""

    name: str = Field("sidflow", min_length=1)
    """MLflow experiment that the runs appear in."""
    ingest: IngestConfig = IngestConfig()
    """Source of the data and what is kept of it."""
    split: SplitConfig = SplitConfig()
    """What is held out for validation and test."""
    embedding: EmbeddingStage = EmbeddingStage()
    """Item text to content vectors."""
    tokenizer: TokenizerStage = TokenizerStage()
    """Content vectors to codebooks."""
    sids: SidConfig = SidConfig()
    """Codes to semantic IDs."""
    collisions: CollisionConfig = CollisionConfig()
    """Thresholds at which a run with collapsed SIDs fails."""
    recommender: RecommenderStage = RecommenderStage()
    """The recommender and its training, on frozen SIDs and jointly."""
    joint: JointStage = JointStage()
    """What joint training adds to the recommender's recipe; read by the joint workflow."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How methods are ranked and measured."""
    compare: CompareConfig = CompareConfig()
    """How methods are set side by side."""
    drift: DriftConfig = DriftConfig()
    """Limits beyond which codes no longer fit the items that came since they were learned."""
    promote: PromoteConfig = PromoteConfig()
    """Where models are registered, and what a new one must show to replace the champion."""

    @model_validator(mode="after")
    def _joint_fits_the_recommender(self) -> Self:
        JointConfig(recommender=self.recommender, joint=self.joint)
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        tokenizer, recommender = self.tokenizer.model, self.recommender.model
        variable = isinstance(tokenizer, DvaeConfig) and tokenizer.length == "variable"
        if self.sids.length != "argmax" and not variable:
            raise ValueError(
                f"sids.length {self.sids.length} chooses among learned lengths, which a tokenizer.model of kind "
                f"{tokenizer.kind} and one length does not have: leave sids.length at argmax"
            )
        if isinstance(tokenizer, DvaeConfig):
            check_assignment(self.sids)
            if variable and isinstance(recommender, TigerConfig):
                raise ValueError(
                    "recommender.model.kind tiger reads SIDs of one length, tokenizer.model gives them unequal ones: "
                    "take kind causal, or tokenizer.model.length=fixed"
                )
        steps, most = len(tokenizer.codebook_sizes) + 1, getattr(recommender, "max_tokens", None)
        if most is not None and most < steps:
            raise ValueError(
                f"recommender.model.max_tokens {most} does not hold the longest SID of tokenizer.model, {steps} "
                "symbols with its suffix: raise it"
            )
        return self

    @model_validator(mode="after")
    def _decoding_fits(self) -> Self:
        model = self.recommender.model
        exactly = isinstance(model, IntrrConfig) and model.scores_exactly
        if self.evaluate.decode == "exact" and not exactly:
            raise ValueError(f"evaluate.{NOT_EXACT}")
        return self

    @model_validator(mode="after")
    def _codebooks_fit_joint_training(self) -> Self:
        if isinstance(self.tokenizer.model, DvaeConfig):
            return self  # its logits have scales of their own
        smallest, wanted = min(self.tokenizer.model.codebook_sizes), self.joint.top_probability
        if self.joint.logit_scale is None and wanted * smallest <= 1:
            raise ValueError(
                f"joint.top_probability {wanted} must lie above 1/{smallest}, the share of one code in the "
                "smallest of tokenizer.model.codebook_sizes: raise it, or take larger codebooks"
            )
        return self

    def check_joint(self) -> None:
        """Refuse, before anything is trained, a joint run that would read codes drawn by a dvae, train an encoder that
        is not there, or refresh a table by another rule than made it.

        Raises
        ------
        ValueError
            The message names the keys that differ.
        """
        check_moving_codes(self.recommender, self.joint)
        if isinstance(self.tokenizer.model, DvaeConfig):
            check_forward(self.joint.exploration)
        if isinstance(self.tokenizer.model, RkMeansConfig) and self.joint.train_encoder:
            raise ValueError(
                "joint.train_encoder is set, but tokenizer.model.kind rkmeans has no encoder: take kind rqvae or dvae, "
                "or unset it"
            )
        made, refreshed = self.sids, self.joint.refresh
        keys = ["assignment", "length"] + ["epsilon", "iterations"] * (made.assignment == "sinkhorn")
        for key in keys:
            if getattr(made, key) != getattr(refreshed, key):
                raise ValueError(
                    f"sids.{key} is {getattr(made, key)}, joint.refresh.{key} {getattr(refreshed, key)}: joint "
                    "training would refresh the table by another rule than made it; set both alike"
                )


CHANGES = {
    "two_stage": ("tokenizer", "sids", "collisions", "recommender"),
    "joint": ("tokenizer", "sids", "collisions", "recommender", "joint"),
    "sasrec": ("sasrec",),
}
"""Sections that an arm of each method may change; all arms share data, embeddings and evaluation."""
SEEDED = ("tokenizer", "recommender", "sasrec")
"""Sections whose ``seed`` is the one that the arm is run with."""


Key = Annotated[str, Field(min_length=1)]
"""A dotted path. Written so because flytekit would pickle a ``dict[str, Any]`` and keeps other mappings as JSON."""


class Arm(Config):
    """One line of an ablation: a method, and what it changes in the settings that all arms share."""

    name: str = Field(min_length=1, max_length=40, pattern=r"^[\w.\- ]+$")
    """What tables call it: letters, digits, spaces, dots and dashes."""
    method: Literal["two_stage", "joint", "sasrec"]
    """two_stage: recommender on frozen SIDs. joint: tokenizer and recommender together. sasrec: over item ids."""
    settings: dict[Key, Any] = Field(default_factory=dict)
    """What this arm changes, by dotted key; a mapping as the value replaces the whole section, which is how a section
    of another ``kind`` is written."""
    against: str | None = None
    """Arm that the paired difference is taken to; null: the first two_stage arm."""


class Recipe(PipelineConfig):
    """The settings of one arm at one seed."""

    sasrec: SasRecStage = SasRecStage()
    """SASRec, the baseline over item ids; read by the ablation workflow."""


class AblationConfig(Recipe):
    """A matrix of arms and seeds over the settings of one pipeline."""

    arms: list[Arm] = Field(min_length=1)
    """What is compared, the plainer method first."""
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Each arm is trained once with each: weights, batches, noise and k-means; differences are paired by seed."""

    @model_validator(mode="after")
    def _arms_fit(self) -> Self:
        names = [arm.name for arm in self.arms]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two arms are named {name!r}: names must differ")
            if name in BASELINES:
                raise ValueError(f"arm {name!r}: the name is a baseline's, which is in the table anyway")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must differ and be >= 0, got {self.seeds}")
        if missing := [k for k in (5, 10) if k not in self.evaluate.ks]:
            raise ValueError(
                f"evaluate.ks lacks {missing}: tables show R and N at 5 and 10, got {self.evaluate.ks}"
            )
        for arm in self.arms:
            if arm.against == arm.name or (arm.against is not None and arm.against not in names):
                raise ValueError(
                    f"arm {arm.name!r}: against {arm.against!r} must name another arm of {names}"
                )
            recipe = self.resolve(arm, self.seeds[0])
            if arm.method == "joint":
                try:
                    recipe.check_joint()
                except ValueError as error:
                    raise ValueError(f"arm {arm.name!r}: {error}") from None
        return self

    def against(self, arm: Arm) -> str | None:
        """Return the name of the arm that another is compared with; None for the first two_stage arm itself."""
        plain = next((other.name for other in self.arms if other.method == "two_stage"), None)
        return arm.against or (plain if plain != arm.name else None)

    def resolve(self, arm: Arm, seed: int) -> Recipe:
        """Return the settings of one arm at one seed.

        Raises
        ------
        ValueError
            A setting of the arm does not fit; the message names arm, key and rule.
        """
        values = self.model_dump(mode="json", exclude={"arms", "seeds"})
        for path, value in arm.settings.items():
            self._change(values, arm, path, value)
        for section in SEEDED:
            values[section]["seed"] = seed
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            rules = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(
                f"arm {arm.name!r}: {rules} (to change a kind, give its whole section as a mapping)"
            ) from None

    @staticmethod
    def _change(values: dict[str, Any], arm: Arm, path: str, value: Any) -> None:
        """Set one dotted key in place."""
        section, *_ = keys = path.split(".")
        if section not in CHANGES[arm.method]:
            raise ValueError(
                f"arm {arm.name!r}: {path!r} is not its to change; a {arm.method} arm may change "
                + ", ".join(CHANGES[arm.method])
            )
        if section in SEEDED and (keys[1:] == ["seed"] or len(keys) == 1):
            raise ValueError(
                f"arm {arm.name!r}: {path!r} would set a seed, which `seeds` does for all arms; "
                f"name the keys below {section}"
            )
        node = values
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"arm {arm.name!r}: {path!r} runs through {key!r}, a plain value")
        node[keys[-1]] = value
