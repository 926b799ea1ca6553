"""The settings of a whole pipeline: a section for each stage."""

from typing import Self

from pydantic import Field, model_validator

from components.config import Config
from components.data.ingest import IngestConfig
from components.data.splits import SplitConfig
from components.metrics.compare import CompareConfig
from components.metrics.report import EvaluateConfig
from components.metrics.sids import CollisionConfig
from components.tokenizers.sids import SidConfig
from components.training.joint import JointConfig, JointStage
from components.training.recommender import RecommenderStage
from components.training.tokenizer import TokenizerStage
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

    @model_validator(mode="after")
    def _joint_fits_the_recommender(self) -> Self:
        JointConfig(recommender=self.recommender, joint=self.joint)
        return self

    @model_validator(mode="after")
    def _codebooks_fit_joint_training(self) -> Self:
        smallest, wanted = min(self.tokenizer.model.codebook_sizes), self.joint.top_probability
        if wanted * smallest <= 1:
            raise ValueError(
                f"joint.top_probability {wanted} must lie above 1/{smallest}, the share of one code in the "
                "smallest of tokenizer.model.codebook_sizes: raise it, or take larger codebooks"
            )
        return self
