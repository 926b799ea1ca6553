"""The union of tokenizer configurations, and the ways between a configuration, a module and a checkpoint."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, TypeAdapter
from torch import Tensor

from components.artifacts import TokenizerCheckpoint
from components.folders import ArtifactError, Provenance
from components.tokenizers.dvae import Dvae, DvaeConfig
from components.tokenizers.rkmeans import RkMeans, RkMeansConfig
from components.tokenizers.rqvae import RqVae, RqVaeConfig

TokenizerConfig = Annotated[RqVaeConfig | RkMeansConfig | DvaeConfig, Field(discriminator="kind")]


def build_tokenizer(config: TokenizerConfig, input_dim: int) -> RqVae | RkMeans | Dvae:
    """Build the tokenizer that a configuration describes, untrained.

    Parameters
    ----------
    config : TokenizerConfig
        One kind of the union.
    input_dim : int
        Width D of the content vectors.
    """
    match config:
        case RqVaeConfig():
            return RqVae(config, input_dim)
        case RkMeansConfig():
            return RkMeans(config, input_dim)
        case DvaeConfig():
            return Dvae(config, input_dim)


def load_tokenizer(checkpoint: TokenizerCheckpoint) -> RqVae | RkMeans | Dvae:
    """Rebuild a trained tokenizer, in evaluation mode.

    Raises
    ------
    ArtifactError
        A weight is missing, unknown or of another shape: nothing is loaded in part.
    """
    config: TokenizerConfig = TypeAdapter(TokenizerConfig).validate_python(checkpoint.config)
    tokenizer = build_tokenizer(config, checkpoint.input_dim)
    wanted = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in checkpoint.weights.items()}
    if wanted != found:
        names = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise ArtifactError(
            f"TokenizerCheckpoint: weights and configuration ({config.kind}) disagree on {len(names)}: "
            + "; ".join(f"{name} wanted {wanted.get(name)}, found {found.get(name)}" for name in names[:5])
        )
    tokenizer.load_state_dict(checkpoint.weights)
    return tokenizer.eval()


def checkpoint_of(
    tokenizer: RqVae | RkMeans | Dvae,
    *,
    embeddings: str,
    steps: int,
    metrics: Mapping[str, float],
    provenance: Provenance | None = None,
) -> TokenizerCheckpoint:
    """Freeze a tokenizer into a checkpoint; later training of the module leaves the checkpoint as it is.

    Parameters
    ----------
    tokenizer : RqVae, RkMeans or Dvae
        The module.
    embeddings : str
        Fingerprint of the content vectors that it was trained on.
    steps : int
        Optimiser steps taken.
    metrics : mapping of str to float
        Figures to keep with the weights.
    provenance : Provenance, optional
        Where it came from.
    """
    weights: dict[str, Tensor] = {
        name: value.detach().cpu().clone() for name, value in tokenizer.state_dict().items()
    }
    return TokenizerCheckpoint(
        weights=weights,
        config=tokenizer.config.model_dump(mode="json"),
        input_dim=tokenizer.input_dim,
        embeddings=embeddings,
        steps=steps,
        metrics=dict(metrics),
        provenance=provenance or Provenance(),
    )
