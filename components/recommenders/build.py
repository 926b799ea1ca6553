"""The recommenders by configuration: one union, one match."""

from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError

from components.artifacts import RecommenderCheckpoint, SidTable
from components.folders import ArtifactError
from components.recommenders import causal
from components.recommenders.causal import Causal, CausalConfig
from components.recommenders.intrr import Intrr, IntrrConfig
from components.recommenders.tiger import Tiger, TigerConfig
from components.seams import ItemFacts, SymbolSpace
from components.tokenizers.sids import space_of

RecommenderConfig = Annotated[CausalConfig | TigerConfig | IntrrConfig, Field(discriminator="kind")]


def build_recommender(
    config: RecommenderConfig, space: SymbolSpace, facts: ItemFacts | None = None
) -> Causal | Tiger | Intrr:
    """Build the recommender that a configuration names, with fresh weights from torch's global stream.

    Parameters
    ----------
    config : RecommenderConfig
        One kind of the union.
    space : SymbolSpace
        What SIDs are written in.
    facts : ItemFacts, optional
        What else is known of the items; recommenders that read symbols alone do without.

    Raises
    ------
    ValueError
        The recommender cannot read SIDs of this space: ``tiger`` those of unequal length, ``causal`` those that
        its ``max_tokens`` has no room for. Or an ``intrr`` is asked for without facts.
    """
    match config:
        case CausalConfig():
            return Causal(config, space)
        case TigerConfig():
            if not space.one_length:
                raise ValueError(
                    f"tiger reads SIDs of one length, but here they have from {space.shortest} to "
                    f"{space.num_levels} codes: take causal, or a tokenizer of fixed length"
                )
            return Tiger(config, space)
        case IntrrConfig():
            if facts is None:
                raise ValueError("intrr has a vector for every item: it needs the ItemFacts of the catalogue")
            return Intrr(config, space, facts)


def check_paths(config: RecommenderConfig, *, history: bool, teacher_forcing: bool, target: bool) -> None:
    """Refuse gradient paths that a recommender cannot tell apart, or that carry nothing to the codes.

    Parameters
    ----------
    config : RecommenderConfig
        The recommender that would be trained.
    history, teacher_forcing, target : bool
        Whether gradient reaches the codes through items read as context, through the known beginning of the item
        being written, and through the item that is predicted, which is free in every recommender.

    Raises
    ------
    ValueError
        All are off; or only one of history and teacher forcing is on, and the recommender reads an item as both in
        one token; or history alone is on, and the recommender reads items without their codes.
    """
    if not (history or teacher_forcing or target):
        raise ValueError(
            "joint.paths are all closed, so the recommendation loss reaches no code: open one, or take "
            "joint.routing=historical"
        )
    match config:
        case CausalConfig():
            causal.check_paths(history=history, teacher_forcing=teacher_forcing)
        case IntrrConfig(reads="ran" | "uid") if not (teacher_forcing or target):
            raise ValueError(
                f"joint.paths opens history alone, but intrr with reads={config.reads} reads items without their "
                "codes: open teacher_forcing or target, or take reads uid_codewords, codewords or flat"
            )
        case TigerConfig() | IntrrConfig():
            pass


def load_recommender(checkpoint: RecommenderCheckpoint, table: SidTable) -> Causal | Tiger | Intrr:
    """Rebuild a trained recommender for the table that it was trained with, in evaluation mode.

    Raises
    ------
    ArtifactError
        Another table, a configuration that this version does not know, or weights that do not fit it.
    """
    checkpoint.check_sids(table)
    try:
        config: RecommenderConfig = TypeAdapter(RecommenderConfig).validate_python(checkpoint.config)
    except ValidationError as error:
        raise ArtifactError(f"RecommenderCheckpoint.config is not one this sidflow knows: {error}") from error
    # Shapes alone count here: what an intrr knows of its items travels with its weights.
    width = checkpoint.weights["text"].shape[1] if "text" in checkpoint.weights else 1
    facts = ItemFacts(torch.ones(table.num_items, dtype=torch.bool), torch.ones(table.num_items, width))
    space = space_of(table)
    if "shortest" in checkpoint.weights:  # after joint training the table may have no SID so short
        space = space._replace(shortest=int(checkpoint.weights["shortest"]))
    recommender = build_recommender(config, space, facts)
    try:
        recommender.load_state_dict(checkpoint.weights, strict=True)
    except RuntimeError as error:
        raise ArtifactError(
            f"RecommenderCheckpoint: weights do not fit its configuration: {error}"
        ) from error
    return recommender.eval()
