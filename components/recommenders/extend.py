"""A trained recommender reads and writes items that its table got later, with the weights that it has.

Shapes: N items of the grown table, n of the one before, E width of an item's own vector, X content width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from components.artifacts import ContentEmbeddings, RecommenderCheckpoint, SidTable
from components.folders import ArtifactError, Provenance
from components.recommenders.build import load_recommender
from components.tokenizers.extend import CLOSE, check_extends


def extend_recommender(
    recommender: RecommenderCheckpoint, previous: SidTable, grown: SidTable, embeddings: ContentEmbeddings
) -> RecommenderCheckpoint:
    """Bind a recommender to a table that extends its own; nothing is trained.

    What is read and written as symbols needs no more than that. Where items have vectors of their own, newcomers are
    items that training never met (``trained`` is False): they are read by their content, or as the sum of their code
    vectors, and a vector of their own, all zeros, is never read. For a history of old items every step divides its
    probability among the old symbols as before, and what newcomers get is taken from all of them alike.

    Parameters
    ----------
    recommender : RecommenderCheckpoint
        Trained on frozen SIDs or jointly.
    previous : SidTable
        The table that it was trained with, of n items.
    grown : SidTable
        The same with items behind it (``tokenizers.extend``).
    embeddings : ContentEmbeddings
        The grown catalogue, as the encoder of the old one reads it.

    Raises
    ------
    ArtifactError
        The recommender is of another table, the grown one does not extend it, embeddings are of another catalogue, or
        their first rows are not the content that the recommender reads.
    """
    recommender.check_sids(previous)
    check_extends(previous, grown)
    if len(embeddings.matrix) != grown.num_items:
        raise ArtifactError(
            f"embeddings of {len(embeddings.matrix)} items, SidTable of {grown.num_items}: they are of different "
            "catalogues"
        )
    weights, more = dict(recommender.weights), grown.num_items - previous.num_items
    for name in ("trained", "uids"):
        if name in weights:
            rows = weights[name]
            weights[name] = torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])])
    if "text" in weights:
        weights["text"] = _more_text(weights["text"], embeddings.matrix)
    extended = replace(
        recommender,
        weights=weights,
        sids=grown.fingerprint,
        provenance=Provenance(
            config=recommender.provenance.config,
            parents={
                "RecommenderCheckpoint": recommender.fingerprint,
                "SidTable": grown.fingerprint,
                "ContentEmbeddings": embeddings.fingerprint,
            },
            seed=recommender.provenance.seed,
        ),
    )
    load_recommender(extended, grown)  # what does not fit is refused here, not where it is served
    return extended


def _more_text(text_nX: Tensor, x_NX: Tensor) -> Tensor:
    """Append the content of newcomers, in the scale that the rows before were brought to in training."""
    old_nX = x_NX[: len(text_nX)]
    # The median, so that a few rows that differ are found out and do not shift it; 0 / 0 has no say.
    scale = (text_nX.norm(dim=1) / old_nX.norm(dim=1)).nanmedian()
    apart_n = (text_nX - scale * old_nX).norm(dim=1) > CLOSE * text_nX.norm(dim=1)
    if bool(apart_n.any()):
        raise ArtifactError(
            f"item {int(apart_n.nonzero()[0])} and {int(apart_n.sum()) - 1} more have other vectors than those that "
            "the recommender was trained on: encode the grown catalogue with the encoder of the old one"
        )
    return torch.cat([text_nX, scale * x_NX[len(text_nX) :]])
