"""New items beside a table that stands: they get names, and no name that there is changes.

Shapes: N items, n of them in the table before, D content width, L levels.
"""

from dataclasses import replace

import polars as pl
import torch

from components.artifacts import ContentEmbeddings, SidTable, TokenizerCheckpoint
from components.folders import ArtifactError, Provenance
from components.tokenizers.build import load_tokenizer
from components.tokenizers.sids import (
    OverfullBucket,
    SidConfig,
    code_lists,
    keep_suffixes,
    name_items,
    space_of,
)

CLOSE = 1e-3
"""How far two readings of one text may lie apart, relative to the length of the vector: a sentence transformer that
pads its batches differs in the last bits, another encoder by more than this."""


def extend(
    checkpoint: TokenizerCheckpoint,
    embeddings: ContentEmbeddings,
    previous: SidTable,
    config: SidConfig,
    known: ContentEmbeddings,
) -> SidTable:
    """Name the items behind those of a table; its rows are copied, never encoded again.

    Newcomers get their nearest codes, however the table was assigned, and the lowest free suffix of their bucket, in
    item-id order. No name is shorter than the shortest of the table, so the symbols that each step may write stay, and
    a recommender of the old table reads the new one.

    Parameters
    ----------
    checkpoint : TokenizerCheckpoint
        The tokenizer of the table.
    embeddings : ContentEmbeddings
        The grown catalogue, read by the encoder of the old one: its first rows are the table's items.
    previous : SidTable
        The table, of n items.
    config : SidConfig
        ``length`` holds for newcomers. The rest does not matter: a table's symbols cannot grow, so ``suffix_size`` is
        the table's, and the rows themselves are compared, whatever ``other_embeddings`` says.
    known : ContentEmbeddings
        What the table was made from, to compare the first n rows with: nothing else tells another encoder, or a
        catalogue numbered anew, of which names would be nonsense.

    Returns
    -------
    SidTable
        Of N items; its parents are tokenizer, embeddings and the table before.

    Raises
    ------
    ArtifactError
        Tokenizer, table and embeddings do not belong together, or the first rows are not those of ``known``.
    OverfullBucket
        Newcomers without a free suffix; nothing is named then. The message counts them, and names the fullest bucket.
    """
    x_ND, old = embeddings.matrix, previous.num_items
    if previous.tokenizer != checkpoint.fingerprint:
        raise ArtifactError(
            f"SidTable came from tokenizer {previous.tokenizer[:12]}, got {checkpoint.fingerprint[:12]}: newcomers "
            "would be named in another language; give the tokenizer that made the table"
        )
    if len(x_ND) < old or x_ND.shape[1] != checkpoint.input_dim:
        raise ArtifactError(
            f"embeddings of {len(x_ND)} items and {x_ND.shape[1]} columns do not extend a table of {old} items whose "
            f"tokenizer reads {checkpoint.input_dim} columns: encode the grown catalogue with the old encoder"
        )
    _check_known(known, embeddings, previous, checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    rule = config.model_copy(update={"assignment": "nearest", "suffix_size": previous.suffix_size})
    shortest = space_of(previous).shortest or len(previous.codebook_sizes)
    newcomers = code_lists(name_items(tokenizer, x_ND[old:], rule, shortest), first=old)
    frame = pl.concat([previous.codes.select("item_id", "codes"), newcomers])
    _check_room(frame, previous.suffix_size, old)
    return replace(
        previous,
        codes=keep_suffixes(frame, previous, previous.codebook_sizes, previous.suffix_size),
        provenance=Provenance(
            config=rule.model_dump(mode="json"),
            parents={
                "SidTable": previous.fingerprint,
                "TokenizerCheckpoint": checkpoint.fingerprint,
                "ContentEmbeddings": embeddings.fingerprint,
            },
        ),
    )


def check_extends(previous: SidTable, grown: SidTable) -> None:
    """Refuse a table that is not another with items behind it, in the same symbols.

    Raises
    ------
    ArtifactError
        Another tokenizer or shape, or an item whose SID is another; the message names it.
    """
    parts = ("tokenizer", "codebook_sizes", "suffix_size", "shared")
    differ = [name for name in parts if getattr(previous, name) != getattr(grown, name)]
    if differ or space_of(previous) != space_of(grown):
        raise ArtifactError(
            f"SidTable {grown.fingerprint[:12]} does not extend {previous.fingerprint[:12]}: they differ in "
            f"{differ or 'the shortest SID'}, so their symbols are others; extend the one to get the other"
        )
    changed = previous.codes.join(grown.codes, on=["item_id", "codes", "suffix"], how="anti").sort("item_id")
    if len(changed):
        raise ArtifactError(
            f"SidTable {grown.fingerprint[:12]} does not extend {previous.fingerprint[:12]}: item "
            f"{changed['item_id'][0]} and {len(changed) - 1} more lack the SID that they had; extend the one to get "
            "the other"
        )


def _check_known(
    known: ContentEmbeddings,
    embeddings: ContentEmbeddings,
    previous: SidTable,
    checkpoint: TokenizerCheckpoint,
) -> None:
    """Refuse embeddings whose first rows are not what the table was made from."""
    source = previous.provenance.parents.get("ContentEmbeddings")
    if known.fingerprint not in (checkpoint.embeddings, source) or len(known.matrix) != previous.num_items:
        raise ArtifactError(
            f"embeddings {known.fingerprint[:12]} of {len(known.matrix)} items are not what the SidTable of "
            f"{previous.num_items} items was made from ({(source or checkpoint.embeddings)[:12]}): give those"
        )
    before, now = known.matrix, embeddings.matrix[: len(known.matrix)]
    apart_N = (now - before).norm(dim=1) > CLOSE * before.norm(dim=1)
    if bool(apart_N.any()):
        row = int(apart_N.nonzero()[0])
        cosine = float(torch.nn.functional.cosine_similarity(before[row], now[row], dim=0))
        raise ArtifactError(
            f"item {row} and {int(apart_N.sum()) - 1} more have other vectors than the table was made from (cosine "
            f"{cosine:.3f}; encoders {known.encoder} {known.revision[:12]} and {embeddings.encoder} "
            f"{embeddings.revision[:12]}): ingest onto the old catalogue, and encode with its encoder"
        )


def _check_room(frame: pl.DataFrame, suffix_size: int, old: int) -> None:
    """Refuse newcomers that find no suffix; those of a bucket with the highest ids go without."""
    place = pl.int_range(pl.len()).over("codes")
    unnamed = frame.with_columns(place=place, size=pl.len().over("codes")).filter(
        pl.col("place") >= suffix_size
    )
    if len(unnamed):
        fullest = unnamed.sort("size", "item_id", descending=[True, False]).row(0, named=True)
        raise OverfullBucket(
            f"{len(unnamed)} of {len(frame) - old} newcomers find no free suffix, first items "
            f"{unnamed['item_id'].head(5).to_list()}; {fullest['size']} items would share the codes "
            f"{fullest['codes']}, the suffix tells {suffix_size} apart. Nothing was named. A full retraining is due, "
            "with a larger suffix_size or more codes, since a table's symbols cannot grow; items of equal text always "
            "collide: leave out those that are not worth it"
        )
