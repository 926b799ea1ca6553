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

from components.artifacts import ContentEmbeddings, SequenceSplit, SidTable, TokenizerCheckpoint
from components.config import Config
from components.data.splits import training_counts
from components.folders import ArtifactError, Provenance
from components.seams import SymbolSpace
from components.tokenizers.build import load_tokenizer
from components.tokenizers.dvae import Dvae
from components.tokenizers.quantize import residual_codes, sinkhorn_codes
from components.tokenizers.rkmeans import RkMeans
from components.tokenizers.rqvae import RqVae
from components.tokenizers.stopping import LengthRule

SCHEMA = SidTable.SCHEMAS["codes"]


class OverfullBucket(ValueError):
    """More items share their codes than the suffix can tell apart."""


class AssignmentRule(Config):
    """How items get their codes."""

    assignment: Literal["nearest", "sinkhorn"] = "nearest"
    """nearest: each item the nearest codeword, level by level. sinkhorn: all items together, each code about
    equally often; fewer collisions, but codes depend on the other items and differ from the nearest. Where a
    table is extended, newcomers take the nearest: to balance all would rename the others."""
    epsilon: float = Field(0.003, gt=0)
    """Only for sinkhorn: entropy weight relative to half the range of the distances."""
    iterations: int = Field(50, ge=1)
    """Only for sinkhorn: rounds of scaling."""
    length: LengthRule = "argmax"
    """Only for dvae: where a name stops. argmax or median of the learned posterior, or the optimum for its codes by
    the price rule, which needs no learned stop."""


class SidConfig(AssignmentRule):
    """How items get their codes, and how many may share them."""

    suffix_size: int = Field(256, ge=1, le=65536)
    """Most items that may share their codes. Leave room where codes move: joint training grows buckets."""
    suffix_order: Literal["item_id", "popularity"] = "item_id"
    """Who gets suffix 0 among items of equal codes: the lowest item id, or the item with most training interactions,
    so that a suffix says something. Beside an earlier table suffixes stay, and newcomers go by item id."""
    other_embeddings: Literal["refuse", "accept"] = "refuse"
    """What to do with embeddings that the tokenizer was not trained on: accept them for a grown catalogue
    that the same encoder has read."""


def assign(
    checkpoint: TokenizerCheckpoint,
    embeddings: ContentEmbeddings,
    config: SidConfig,
    previous: SidTable | None = None,
    split: SequenceSplit | None = None,
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
    split : SequenceSplit, optional
        Its training events order suffixes by popularity.

    Returns
    -------
    SidTable

    Raises
    ------
    ArtifactError
        The tokenizer was trained on other embeddings, or on vectors of another width; or the split is of
        another catalogue.
    ValueError
        Suffixes are to follow popularity and there is no split, or sinkhorn is asked of a dvae.
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
    counts_N = None
    if config.suffix_order == "popularity" and previous is None:
        counts = training_counts(split, len(embeddings.matrix), "sids.suffix_order=popularity")
        counts_N = torch.from_numpy(counts)
    tokenizer = load_tokenizer(checkpoint)
    table = codes_to_table(
        name_items(tokenizer, embeddings.matrix, config),
        tokenizer.codebook_sizes,
        config.suffix_size,
        checkpoint.fingerprint,
        previous,
        shared=isinstance(tokenizer, Dvae),
        counts_N=counts_N,
    )
    parents = {"TokenizerCheckpoint": checkpoint.fingerprint, "ContentEmbeddings": embeddings.fingerprint}
    if previous is not None:
        parents["SidTable"] = previous.fingerprint
    if counts_N is not None and split is not None:
        parents["SequenceSplit"] = split.fingerprint
    return replace(table, provenance=Provenance(config=config.model_dump(mode="json"), parents=parents))


@torch.no_grad()
def name_items(
    tokenizer: RqVae | RkMeans | Dvae, x_ND: Tensor, rule: AssignmentRule, shortest: int = 1
) -> Tensor:
    """Return the codes (N, T) long of all items, -1 behind the last code of a name that stops early.

    Parameters
    ----------
    tokenizer : RqVae, RkMeans or Dvae
        What names them.
    x_ND : Tensor
        Content vectors.
    rule : AssignmentRule
        How they get their codes.
    shortest : int
        Least number of codes, for a dvae: a name that would stop before goes on to so many.

    Raises
    ------
    ValueError
        Sinkhorn is asked of a dvae, whose codes are no nearest codewords.
    """
    match tokenizer:
        case RqVae() | RkMeans():
            return assign_codes(tokenizer.latents(x_ND), list(tokenizer.codebooks), rule)
        case Dvae():
            check_assignment(rule)
            names = tokenizer.names(x_ND)
            at_T = torch.arange(names.codes.shape[1], device=names.codes.device)
            reached = at_T < tokenizer.lengths(names, rule.length).clamp(min=shortest)[:, None]
            return names.codes.masked_fill(~reached, -1)


def check_assignment(rule: AssignmentRule) -> None:
    """Refuse a rule that does not fit the codes of a dvae."""
    if rule.assignment != "nearest":
        raise ValueError(
            f"sids.assignment {rule.assignment} balances distances to codewords, which a dvae does not have: its "
            "training spreads the codes; set sids.assignment=nearest, which gives each item its likeliest codes"
        )


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
    *,
    shared: bool = False,
    counts_N: Tensor | None = None,
) -> SidTable:
    """Close every item's codes with a suffix that tells it from the others in its bucket.

    Without ``previous`` suffixes count from 0 in every bucket, in item-id order or the most popular item first.
    With it an item that keeps its codes keeps its suffix, and a newcomer to a bucket takes the lowest free one,
    in item-id order; then suffixes are unique and below ``suffix_size``, but not always dense.

    Parameters
    ----------
    codes_NL : Tensor
        Codes (N, L), row = item id; -1 behind the last code of a shorter name.
    codebook_sizes : list of int
        Codes of each level.
    suffix_size : int
        Most items in a bucket.
    tokenizer : str
        Fingerprint of the tokenizer that made the codes.
    previous : SidTable, optional
        The table before this one, of the first of these items or of all.
    shared : bool
        Whether all levels read one codebook.
    counts_N : Tensor, optional
        (N,) training events of each item, which order the suffixes of a new table; ties by item id.

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
    frame = code_lists(codes_NL)
    _check_room(frame, suffix_size)
    if previous is None:
        codes = _dense(frame, counts_N).select(pl.col(name).cast(kind) for name, kind in SCHEMA.items())
    else:
        codes = keep_suffixes(frame, previous, codebook_sizes, suffix_size)
    return SidTable(
        codes=codes,
        codebook_sizes=list(codebook_sizes),
        suffix_size=suffix_size,
        shared=shared,
        tokenizer=tokenizer,
    )


def code_lists(codes_NL: Tensor, first: int = 0) -> pl.DataFrame:
    """Return codes (N, L), -1 behind the end of a shorter name, as a frame item_id, codes; ids count from ``first``."""
    return pl.DataFrame({"codes": codes_NL.cpu().numpy()}).select(
        pl.int_range(first, first + pl.len(), dtype=pl.UInt32).alias("item_id"),
        pl.col("codes").arr.to_list().list.filter(pl.element() >= 0).cast(pl.List(pl.UInt16)),
    )


def padded_codes(table: SidTable) -> Tensor:
    """Return the content codes of every item, (N, L) long, -1 where it has fewer than L."""
    codes = pl.col("codes").list
    columns = [
        codes.get(level, null_on_oob=True).cast(pl.Int64).fill_null(-1).alias(str(level))
        for level in range(len(table.codebook_sizes))
    ]
    return torch.from_numpy(table.codes.select(columns).to_numpy(writable=True))


def _check_room(frame: pl.DataFrame, suffix_size: int) -> None:
    largest = frame.group_by("codes").len().sort("len", "codes", descending=[True, False]).row(0, named=True)
    if largest["len"] > suffix_size:
        raise OverfullBucket(
            f"{largest['len']} items share the codes {largest['codes']}, the suffix tells only {suffix_size} "
            "apart: raise suffix_size, use more or larger codebooks or assignment=sinkhorn, or a lower price of a "
            "dvae; items of equal text always collide"
        )


def _dense(frame: pl.DataFrame, counts_N: Tensor | None) -> pl.DataFrame:
    if counts_N is None:
        return frame.with_columns(suffix=pl.int_range(pl.len()).over("codes"))
    # A stable order by falling count: of equals the lower item id comes first.
    popular = torch.argsort(counts_N, descending=True, stable=True).argsort()
    ranked = frame.with_columns(rank=pl.Series(popular.cpu().numpy()))
    return ranked.with_columns(suffix=pl.col("rank").rank("ordinal").over("codes").cast(pl.Int64) - 1)


def keep_suffixes(
    frame: pl.DataFrame, previous: SidTable, codebook_sizes: list[int], suffix_size: int
) -> pl.DataFrame:
    """Close codes with suffixes beside an earlier table: who keeps codes keeps the suffix, others take the lowest free.

    Parameters
    ----------
    frame : DataFrame
        item_id, codes of all items; no more than ``suffix_size`` of them share their codes.
    previous : SidTable
        The table before, of the first of these items or of all.
    codebook_sizes, suffix_size
        Of the table that is to be made.

    Returns
    -------
    DataFrame
        As ``SidTable.codes``.

    Raises
    ------
    ValueError
        ``previous`` is of another shape, or has more items.
    """
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
    suffixed = merged.with_columns(suffix=pl.col("old").cast(pl.Int64).fill_null(pl.col("free") + skipped))
    return suffixed.sort("item_id").select(pl.col(name).cast(kind) for name, kind in SCHEMA.items())


def space_of(table: SidTable) -> SymbolSpace:
    """Return the symbols that strings of this table are written in.

    Raises
    ------
    ValueError
        SIDs differ in length, but levels have codebooks of their own: where a SID may end, codes and suffixes
        would not stand side by side.
    """
    shortest = int(table.codes["codes"].list.len().min())  # type: ignore[arg-type]
    if shortest < len(table.codebook_sizes) and not table.shared:
        row = table.codes.filter(pl.col("codes").list.len() == shortest).row(0, named=True)
        raise ValueError(
            f"item {row['item_id']} has the codes {row['codes']}, not {len(table.codebook_sizes)} of them: SIDs of "
            "unequal length need one codebook that all levels share; take a tokenizer of kind dvae"
        )
    return SymbolSpace(tuple(table.codebook_sizes), table.suffix_size, table.shared, shortest)


def table_symbols(table: SidTable) -> Tensor:
    """Return the symbols (N, S) long of every item's SID: its codes, its suffix, then -1 up to the longest."""
    space = space_of(table)
    frame = table.codes.with_columns(
        symbols=pl.concat_list(
            pl.col("codes").cast(pl.List(pl.Int64)), pl.col("suffix").cast(pl.Int64) + space.num_codes
        )
    )
    lengths_N = torch.from_numpy(frame["symbols"].list.len().to_numpy().astype("int64"))
    at_NS = torch.arange(space.num_steps)
    symbols_NS = torch.full((len(frame), space.num_steps), -1)
    symbols_NS[at_NS < lengths_N[:, None]] = torch.from_numpy(frame["symbols"].explode().to_numpy().copy())
    code = at_NS < lengths_N[:, None] - 1
    return symbols_NS + code * torch.tensor(space.starts)


def symbol_counts(symbols_xS: Tensor) -> Tensor:
    """Return how many symbols each SID (..., S) has, its suffix included: (...) long."""
    return (symbols_xS >= 0).sum(dim=-1)
