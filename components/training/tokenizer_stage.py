"""Settings of the tokenizer stage, for all kinds of tokenizers."""

from typing import Literal

from pydantic import Field

from components.config import Config
from components.tokenizers.build import TokenizerConfig
from components.tokenizers.rqvae import RqVaeConfig
from components.training.loop import Device, LoopConfig


class TokenizerStage(Config):
    """Settings of the tokenizer stage. ``rkmeans`` reads model, device and seed; the rest is for descent."""

    model: TokenizerConfig = RqVaeConfig()
    """The tokenizer, by kind."""
    loop: LoopConfig = LoopConfig(epochs=100, validate_every=5)
    """How long to train, and how often the whole catalogue is tokenized to compare epochs."""
    batch_size: int = Field(256, ge=1)
    """Items a step; for dvae, draws."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate of AdamW; falls along a cosine to 0, but stays there for dvae."""
    warmup_steps: int = Field(20, ge=0)
    """Steps over which the learning rate rises."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of AdamW."""
    keep: Literal["collision_rate", "reconstruction"] = "collision_rate"
    """Only for rqvae: of the eligible validated epochs, the one with the lowest such figure is kept; dvae keeps the
    last."""
    keep_from: float = Field(0.5, gt=0, le=1)
    """Only for rqvae: share of the epochs before one is eligible; codes of a raw encoder collide least, and say
    least."""
    device: Device = "auto"
    """Where to train; ``auto`` takes a GPU if there is one."""
    seed: int = 0
    """Seeds weights, batches, k-means and revivals."""
