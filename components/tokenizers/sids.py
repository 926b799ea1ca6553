"""Codes to semantic IDs: settle collisions with a suffix, and look symbols up.

Shapes: N items, L levels, S = L + 1 steps of a SID.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import polars as pl
import torch
from pydantic import Field
from torch import Tensor

from components.artifacts import ContentEmbeddings, SidTable, TokenizerCheckpoint
from components.config import Config
from components.folders import ArtifactError, Provenance
from components.seams import SymbolSpace
from components.tokenizers.build import load_tokenizer
from components.tokenizers.quantize import residual_codes, sinkhorn_codes

SCHEMA = SidTable.SCHEMAS["codes"]


class OverfullBucket(ValueError):
    """More items share their codes than the suffix can tell apart."""


class AssignmentRule(Config):
    """How items get their codes."""

    assignment: Literal["nearest", "sinkhorn"] = "nearest"
    """nearest: each item the nearest codeword, level by level. sinkhorn: all items together, each code about
    equally often; fewer collisions, but codes depend on the other items and differ from the nearest."""
    epsilon: float = Field(0.003, gt=0)
    """Only for sinkhorn: entropy weight relative to half the range of the distances."""
    iterations: int = Field(50, ge=1)
    """Only for sinkhorn: rounds of scaling."""


class SidConfig(AssignmentRule):
    """How items get their codes, and how many may share them."""

    suffix_size: int = Field(256, ge=1, le=65536)
    """Most items that may share their codes. Leave room where codes move: joint training grows buckets."""
    other_embeddings: Literal["refuse", "accept"] = "refuse"
    """What to do with embeddings that the tokenizer was not trained on: accept them for a grown catalogue
    that the same encoder has read."""


def assign(
    checkpoint: TokenizerCheckpoint,
    embeddings: ContentEmbeddings,
    config: SidConfig,
    previous: SidTable | None = None,
) -> SidTable:
    """Tokenize every item and settle collisions.

    Parameters
    ----------
    checkpoint : TokenizerCheckpoint
        A trained tokenizer.
    embeddings : ContentEmbeddings
        One vector an item.
    config : SidConfig
        Assignment and room for collisions.
    previous : SidTable, optional
        An earlier table of these items, or of the first of them; unmoved items keep their suffix.

    Returns
    -------
    SidTable

    Raises
    ------
    ArtifactError
        The tokenizer was trained on other embeddings, or on vectors of another width.
    OverfullBucket
        More items share their codes than ``suffix_size`` allows.
    """
    width = embeddings.matrix.shape[1]
    if width != checkpoint.input_dim:
        raise ArtifactError(
            f"embeddings have {width} columns, the tokenizer was trained on {checkpoint.input_dim}: "
            "take embeddings of the encoder that the tokenizer was trained on"
        )
    if embeddings.fingerprint != checkpoint.embeddings and config.other_embeddings == "refuse":
        raise ArtifactError(
            f"embeddings {embeddings.fingerprint[:12]} are not those that the tokenizer was trained on "
            f"({checkpoint.embeddings[:12]}): train it on these, or set other_embeddings=accept where the "
            "same encoder read a grown catalogue"
        )
    tokenizer = load_tokenizer(checkpoint)
    with torch.no_grad():
        codes_NL = assign_codes(tokenizer.latents(embeddings.matrix), list(tokenizer.codebooks), config)
    table = codes_to_table(
        codes_NL, tokenizer.codebook_sizes, config.suffix_size, checkpoint.fingerprint, previous
    )
    parents = {"TokenizerCheckpoint": checkpoint.fingerprint, "ContentEmbeddings": embeddings.fingerprint}
    if previous is not None:
        parents["SidTable"] = previous.fingerprint
    return replace(table, provenance=Provenance(config=config.model_dump(mode="json"), parents=parents))


@torch.no_grad()
def assign_codes(z_NZ: Tensor, codebooks: Sequence[Tensor], rule: AssignmentRule) -> Tensor:
    """Return the codes (N, L) long that a rule gives to latents (N, Z)."""
    match rule.assignment:
        case "nearest":
            return residual_codes(z_NZ, codebooks)
        case "sinkhorn":
            return sinkhorn_codes(z_NZ, codebooks, rule.epsilon, rule.iterations)


def codes_to_table(
    codes_NL: Tensor,
    codebook_sizes: list[int],
    suffix_size: int,
    tokenizer: str,
    previous: SidTable | None = None,
) -> SidTable:
    """Close every item's codes with a suffix that tells it from the others in its bucket.

    Without ``previous`` suffixes count from 0 in item-id order in every bucket. With it an item that keeps
    its codes keeps its suffix, and a newcomer to a bucket takes the lowest free one, in item-id order; then
    suffixes are unique and below ``suffix_size``, but not always dense.

    Parameters
    ----------
    codes_NL : Tensor
        Codes (N, L), row = item id.
    codebook_sizes : list of int
        Codes of each level.
    suffix_size : int
        Most items in a bucket.
    tokenizer : str
        Fingerprint of the tokenizer that made the codes.
    previous : SidTable, optional
        The table before this one, of the first of these items or of all.

    Returns
    -------
    SidTable

    Raises
    ------
    OverfullBucket
        A bucket holds more items than there are suffixes.
    ValueError
        ``previous`` is of another shape.
    """
    frame = pl.DataFrame({"codes": codes_NL.cpu().numpy()}).select(
        pl.int_range(pl.len(), dtype=pl.UInt32).alias("item_id"),
        pl.col("codes").arr.to_list().cast(pl.List(pl.UInt16)),
    )
    _check_room(frame, suffix_size)
    suffixed = _dense(frame) if previous is None else _stable(frame, previous, codebook_sizes, suffix_size)
    return SidTable(
        codes=suffixed.select(item_id="item_id", codes="codes", suffix=pl.col("suffix").cast(pl.UInt16)),
        codebook_sizes=list(codebook_sizes),
        suffix_size=suffix_size,
        shared=False,
        tokenizer=tokenizer,
    )


def _check_room(frame: pl.DataFrame, suffix_size: int) -> None:
    largest = frame.group_by("codes").len().sort("len", "codes", descending=[True, False]).row(0, named=True)
    if largest["len"] > suffix_size:
        raise OverfullBucket(
            f"{largest['len']} items share the codes {largest['codes']}, the suffix tells only {suffix_size} "
            "apart: raise suffix_size, use more or larger codebooks, or assignment=sinkhorn; items of equal "
            "text always collide"
        )


def _dense(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(suffix=pl.int_range(pl.len()).over("codes"))


def _stable(
    frame: pl.DataFrame, previous: SidTable, codebook_sizes: list[int], suffix_size: int
) -> pl.DataFrame:
    if (previous.codebook_sizes, previous.suffix_size) != (list(codebook_sizes), suffix_size):
        raise ValueError(
            f"the previous table has codebooks {previous.codebook_sizes} and suffix_size "
            f"{previous.suffix_size}, the new one {list(codebook_sizes)} and {suffix_size}: its suffixes "
            "cannot be kept"
        )
    if previous.num_items > len(frame):
        raise ValueError(
            f"the previous table has {previous.num_items} items, the new one {len(frame)}: none may vanish"
        )
    before = previous.codes.select("item_id", "codes", old="suffix")
    joined = frame.join(before, on=["item_id", "codes"], how="left", maintain_order="left")
    # In ascending order the m-th kept suffix k has k - m free numbers below it. So the j-th newcomer skips
    # every kept suffix with k - m <= j, and takes j plus their count: merge both by rank, and count the kept.
    kept = (
        joined.filter(pl.col("old").is_not_null())
        .sort("codes", "old")
        .with_columns(
            free=pl.col("old").cast(pl.Int64) - pl.int_range(pl.len()).over("codes"), newcomer=pl.lit(False)
        )
    )
    newcomers = joined.filter(pl.col("old").is_null()).with_columns(
        free=pl.int_range(pl.len()).over("codes"), newcomer=pl.lit(True)
    )
    merged = pl.concat([kept, newcomers]).sort("codes", "free", "newcomer", "item_id")
    skipped = (~pl.col("newcomer")).cast(pl.Int64).cum_sum().over("codes")
    return merged.with_columns(suffix=pl.col("old").cast(pl.Int64).fill_null(pl.col("free") + skipped)).sort(
        "item_id"
    )


def space_of(table: SidTable) -> SymbolSpace:
    """Return the symbols that strings of this table are written in."""
    return SymbolSpace(tuple(table.codebook_sizes), table.suffix_size)


def table_symbols(table: SidTable) -> Tensor:
    """Return the symbols (N, S) long of every item's SID: its codes level by level, then its suffix.

    Raises
    ------
    ValueError
        Items differ in their number of codes; such strings fit no rectangle.
    """
    space = space_of(table)
    short = table.codes.filter(pl.col("codes").list.len() != space.num_levels)
    if len(short):
        row = short.row(0, named=True)
        raise ValueError(
            f"item {row['item_id']} has the codes {row['codes']}, not {space.num_levels} of them: "
            "this recommender reads SIDs of one length; take a tokenizer of fixed length"
        )
    codes_NL = torch.from_numpy(table.codes["codes"].explode().cast(pl.Int64).to_numpy().copy())
    suffix_N = torch.from_numpy(table.codes["suffix"].cast(pl.Int64).to_numpy().copy())
    steps_NS = torch.cat([codes_NL.view(-1, space.num_levels), suffix_N[:, None]], dim=1)
    return steps_NS + torch.tensor(space.starts)
