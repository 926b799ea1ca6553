"""Retraining that keeps names: the new codes take the labels of the old ones that they share most items with.

Which number a code has is arbitrary, so a tokenizer may be relabelled at no cost; names then stay where the grouping
of the items stays. Match before a recommender is trained: its symbols are these labels.

Shapes: M items that two tables share, L levels, K codes of a codebook.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from components.artifacts import SidChurn, SidTable, TokenizerCheckpoint
from components.config import require
from components.folders import ArtifactError, Provenance
from components.tokenizers.build import load_tokenizer
from components.tokenizers.dvae import Dvae
from components.tokenizers.rkmeans import RkMeans
from components.tokenizers.rqvae import RqVae
from components.tokenizers.sids import code_lists, keep_suffixes, padded_codes

Codes = NDArray[np.int64]


class Matched(NamedTuple):
    """A retrained tokenizer under the labels of the one before."""

    tokenizer: TokenizerCheckpoint
    sids: SidTable
    churn: SidChurn


def match_names(old: SidTable, checkpoint: TokenizerCheckpoint, new: SidTable) -> Matched:
    """Relabel a retrained tokenizer and its table so that as many items as possible keep their names.

    Parameters
    ----------
    old : SidTable
        The table whose names are to be kept.
    checkpoint : TokenizerCheckpoint
        The retrained tokenizer.
    new : SidTable
        Its table: the items of the old one in their order, and any behind them.

    Returns
    -------
    Matched
        Where both tables are of one shape, items that keep their codes keep their suffix.

    Raises
    ------
    ArtifactError
        The new table is not of this tokenizer.
    ValueError
        It lacks items of the old one, or has another number of levels, or only one of them shares a codebook.
    """
    if new.tokenizer != checkpoint.fingerprint:
        raise ArtifactError(
            f"SidTable came from tokenizer {new.tokenizer[:12]}, got {checkpoint.fingerprint[:12]}: give the "
            "tokenizer that made the new table"
        )
    permutations = match_codes(old, new)
    tokenizer = relabel(checkpoint, permutations)
    parents = {"SidTable": new.fingerprint, "old SidTable": old.fingerprint}
    tokenizer = replace(
        tokenizer,
        provenance=replace(tokenizer.provenance, parents={**tokenizer.provenance.parents, **parents}),
    )
    renamed = replace(
        rename(new, permutations, tokenizer.fingerprint, old),
        provenance=Provenance(
            config=new.provenance.config,
            parents={"TokenizerCheckpoint": tokenizer.fingerprint, **parents},
            seed=new.provenance.seed,
        ),
    )
    return Matched(tokenizer, renamed, churn(old, new, renamed))


def match_codes(old: SidTable, new: SidTable) -> list[Tensor]:
    """Find the labels under which the codes of a new table agree best with those of an old one.

    Level by level, a Hungarian assignment on the table of counts of old and new codes. A level counts the items whose
    names agree so far: an item that has lost its first code has lost its name, whatever comes behind. Where that
    leaves a choice, all shared items decide. One codebook for all levels has one assignment, on all codes of all items
    alike, since one choice of labels serves all levels at once.

    Level by level is greedy, and could keep fewer whole names than no relabelling at all; then nothing is relabelled.

    Parameters
    ----------
    old, new : SidTable
        Items are shared by their ids. Codebooks may differ in size, not in number: a code that nothing is left for
        takes a label that is free.

    Returns
    -------
    list of Tensor
        The new label of each code, (K,) long; one a level, or a single one where the levels of ``new`` share their
        codebook.

    Raises
    ------
    ValueError
        ``new`` lacks items of the old table, or has another number of levels, or only one of them shares a codebook.

    References
    ----------
    Kuhn, "The Hungarian method for the assignment problem", 1955; solved by scipy.
    """
    old_ML, new_ML = _shared(old, new)
    if new.shared:
        found = [_assign(old_ML.ravel(), new_ML.ravel(), new.codebook_sizes[0])]
    else:
        agrees_M, found = np.ones(len(old_ML), dtype=bool), []
        for before_M, now_M, size in zip(old_ML.T, new_ML.T, new.codebook_sizes, strict=True):
            found.append(_assign(before_M, now_M, size, agrees_M))
            agrees_M &= _relabelled(now_M, found[-1]) == before_M
    same = [np.arange(len(labels)) for labels in found]
    best = max(
        (found, same), key=lambda labels: int((_relabel_all(new_ML, labels) == old_ML).all(axis=1).sum())
    )
    return [torch.from_numpy(labels) for labels in best]


def relabel(checkpoint: TokenizerCheckpoint, permutations: Sequence[Tensor]) -> TokenizerCheckpoint:
    """Give the codes of a tokenizer other labels: it names items by them, and decodes as before.

    Parameters
    ----------
    checkpoint : TokenizerCheckpoint
        Of any kind.
    permutations : sequence of Tensor
        As ``match_codes`` returns them.

    Raises
    ------
    ValueError
        Not one permutation of all codes for each codebook.
    """
    tokenizer = load_tokenizer(checkpoint)
    match tokenizer:
        case RqVae() | RkMeans():
            rows = [[f"codebooks.{level}"] for level in range(len(tokenizer.codebooks))]
        case Dvae():
            rows = [["codebook", "table"]]
    require(
        len(permutations) == len(rows),
        f"{len(permutations)} permutations for {len(rows)} codebooks: one each, the first level first",
    )
    weights = dict(checkpoint.weights)
    for number, (names, labels_K) in enumerate(zip(rows, permutations, strict=True), start=1):
        size = len(weights[names[0]])
        require(
            torch.equal(labels_K.sort().values, torch.arange(size)),
            f"permutation {number} is none of the {size} codes: every label from 0 to {size - 1}, each once",
        )
        weights |= {name: weights[name][labels_K.argsort()] for name in names}
    parents = {"TokenizerCheckpoint": checkpoint.fingerprint}
    provenance = replace(checkpoint.provenance, parents=parents, git=None)
    return replace(checkpoint, weights=weights, provenance=provenance)


def rename(table: SidTable, permutations: Sequence[Tensor], tokenizer: str, previous: SidTable) -> SidTable:
    """Write a table in other labels, without naming any item again.

    Parameters
    ----------
    table : SidTable
        As the tokenizer named its items before.
    permutations : sequence of Tensor
        What it was relabelled by.
    tokenizer : str
        Fingerprint of the relabelled tokenizer.
    previous : SidTable
        Whose suffixes items keep along with their codes, where it is of the same shape; else those of ``table`` stay.
    """
    codes_NL = _relabel_all(padded_codes(table).numpy(), [labels_K.numpy() for labels_K in permutations])
    codes = code_lists(torch.from_numpy(codes_NL)).with_columns(table.codes["suffix"])
    if (previous.codebook_sizes, previous.suffix_size) == (table.codebook_sizes, table.suffix_size):
        codes = keep_suffixes(codes.drop("suffix"), previous, table.codebook_sizes, table.suffix_size)
    return replace(table, codes=codes, tokenizer=tokenizer)


def churn(old: SidTable, before: SidTable, after: SidTable) -> SidChurn:
    """Count the items of an old table that two later ones name otherwise: before matching, and after.

    Parameters
    ----------
    old : SidTable
        The names that were.
    before, after : SidTable
        The retrained table, and the same relabelled.
    """
    shares = [_changed(old, later) for later in (before, after)]
    names = ["SID", "codes", *(f"level {level}" for level in range(1, len(shares[0]) - 1))]
    return SidChurn(
        changes=pl.DataFrame(
            {"part": names, "before": shares[0], "after": shares[1]}, schema=SidChurn.SCHEMAS["changes"]
        ),
        items=old.num_items,
        old=old.fingerprint,
        new=before.fingerprint,
        renamed=after.fingerprint,
        provenance=Provenance(parents={"SidTable": after.fingerprint, "old SidTable": old.fingerprint}),
    )


def _changed(old: SidTable, later: SidTable) -> list[float]:
    """Return the shares of items whose SID changed, whose codes, and whose code on each level."""
    old_ML, new_ML = _shared(old, later)
    moved_ML = old_ML != new_ML
    moved_M = moved_ML.any(axis=1)
    suffix = later.codes["suffix"].head(old.num_items) != old.codes["suffix"]
    whole = moved_M | suffix.to_numpy()
    return [float(part.mean()) for part in (whole, moved_M, *moved_ML.T)]


def unlike(old: SidTable, new: SidTable) -> str:
    """Say why no name of one table can be a name of the other, or nothing where it can."""
    shapes = [(len(table.codebook_sizes), table.shared) for table in (old, new)]
    if shapes[0] == shapes[1]:
        return ""
    return (
        f"the tables have {shapes[0][0]} and {shapes[1][0]} levels, one codebook for all of them: {shapes[0][1]} and "
        f"{shapes[1][1]}; no name of one is a name of the other"
    )


def _shared(old: SidTable, new: SidTable) -> tuple[Codes, Codes]:
    """Return the codes (M, L) of the items that both tables have: those of the old one."""
    different = unlike(old, new)
    require(not different, f"{different}: retrain with as many levels, or without matching")
    require(
        new.num_items >= old.num_items,
        f"the old table has {old.num_items} items, the new one {new.num_items}: items are shared by their ids, so "
        "ingest onto the old catalogue, which keeps them",
    )
    return padded_codes(old).numpy(), padded_codes(new).numpy()[: old.num_items]


def _assign(old_M: Codes, new_M: Codes, size: int, agrees_M: NDArray[np.bool_] | None = None) -> Codes:
    """Return the label of each of ``size`` new codes that makes the sum of shared items largest.

    Of codes in use alone: their table is no larger than items need, however many codes there are. What is left of the
    codes keeps its own number where that is free, and else takes the lowest that is.

    Parameters
    ----------
    old_M, new_M : array
        (M,) codes of the shared items, -1 for none; an old code beyond ``size`` can be no label.
    size : int
        K, codes of the new codebook.
    agrees_M : array, optional
        (M,) items that decide first; all others break ties.
    """
    both = (old_M >= 0) & (old_M < size) & (new_M >= 0)
    new_codes, row = np.unique(new_M[both], return_inverse=True)
    old_codes, column = np.unique(old_M[both], return_inverse=True)
    weight = 1.0 if agrees_M is None else 1.0 + agrees_M[both] * (len(old_M) + 1.0)
    gain = np.zeros((len(new_codes), len(old_codes)))
    np.add.at(gain, (row, column), weight)
    chosen: Any = linear_sum_assignment(gain, maximize=True)
    labels_K = np.full(size, -1)
    labels_K[new_codes[chosen[0]]] = old_codes[chosen[1]]
    own = np.intersect1d(np.flatnonzero(labels_K < 0), np.setdiff1d(np.arange(size), labels_K))
    labels_K[own] = own
    labels_K[labels_K < 0] = np.setdiff1d(np.arange(size), labels_K)
    return labels_K


def _relabelled(codes_M: Codes, labels_K: Codes) -> Codes:
    return np.where(codes_M < 0, -1, labels_K[codes_M])


def _relabel_all(codes_ML: Codes, labels: Sequence[Codes]) -> Codes:
    """Relabel every level; a single list of labels serves all."""
    every = list(labels) * codes_ML.shape[1] if len(labels) == 1 else labels
    columns = [_relabelled(codes_M, own) for codes_M, own in zip(codes_ML.T, every, strict=True)]
    return np.stack(columns, axis=1)
