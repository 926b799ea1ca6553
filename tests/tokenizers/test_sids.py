"""Laws of SID tables: unique, prefix-free, independent of row order; suffixes stay where codes stay."""

from dataclasses import replace

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.artifacts import ContentEmbeddings, SidTable, TokenizerCheckpoint
from components.folders import ArtifactError
from components.tokenizers.build import build_tokenizer, checkpoint_of, load_tokenizer
from components.tokenizers.quantize import sinkhorn_codes
from components.tokenizers.rkmeans import RkMeans, RkMeansConfig
from components.tokenizers.sids import SidConfig, assign, codes_to_table, space_of, table_symbols

SIZES = [3, 2]
codes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=40)


def table_of(
    rows: list[tuple[int, ...]], previous: SidTable | None = None, suffix_size: int = 64
) -> SidTable:
    return codes_to_table(torch.tensor(rows), SIZES, suffix_size, "t", previous)


def strings(table: SidTable) -> list[tuple[int, ...]]:
    return [tuple(row) for row in table_symbols(table).tolist()]


def suffixes(table: SidTable) -> list[int]:
    return table.codes["suffix"].to_list()


@settings(max_examples=30, deadline=None)
@given(codes)
def test_strings_are_unique_prefix_free_and_dense(rows: list[tuple[int, ...]]) -> None:
    table = table_of(rows)
    written = strings(table)
    assert len(set(written)) == len(rows)
    beginnings = {string[:length] for string in written for length in range(1, len(string))}
    assert not beginnings & set(written)
    for bucket in set(rows):
        inside = [s for s, row in zip(suffixes(table), rows, strict=True) if row == bucket]
        assert inside == list(range(len(inside)))


@settings(max_examples=30, deadline=None)
@given(codes, st.randoms(use_true_random=False))
def test_the_set_of_strings_does_not_depend_on_row_order(rows: list[tuple[int, ...]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(strings(table_of(shuffled))) == set(strings(table_of(rows)))


def expected_suffixes(before: SidTable, rows: list[tuple[int, ...]]) -> list[int]:
    """The law as a loop: keepers keep, then each newcomer takes the lowest free number of its bucket."""
    old = dict(zip(before.codes["item_id"], before.codes.select("codes", "suffix").rows(), strict=True))
    taken: dict[tuple[int, ...], set[int]] = {row: set() for row in rows}
    result: dict[int, int] = {}
    for item, row in enumerate(rows):
        if item in old and tuple(old[item][0]) == row:
            result[item] = old[item][1]
            taken[row].add(old[item][1])
    for item, row in enumerate(rows):
        if item not in result:
            result[item] = min(set(range(len(rows))) - taken[row])
            taken[row].add(result[item])
    return [result[item] for item in range(len(rows))]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_suffixes_stay_and_newcomers_take_the_lowest_free(data: st.DataObject) -> None:
    table = table_of(data.draw(codes))
    for _ in range(3):
        pair = st.tuples(st.integers(0, 2), st.integers(0, 1))
        size = table.num_items + data.draw(st.integers(0, 5))
        rows = data.draw(st.lists(pair, min_size=size, max_size=size))
        expected = expected_suffixes(table, rows)
        table = table_of(rows, previous=table)
        assert suffixes(table) == expected


def test_the_same_codes_again_give_the_same_table() -> None:
    rows = [(0, 1), (0, 1), (2, 0), (0, 1)]
    moved = table_of([(2, 0), (0, 1), (2, 0), (0, 1)], previous=table_of(rows))
    assert suffixes(moved) == [1, 1, 0, 2]
    assert table_of([(2, 0), (0, 1), (2, 0), (0, 1)], previous=moved).fingerprint == moved.fingerprint


def test_an_overfull_bucket_is_named() -> None:
    rows = [(0, 1)] * 2 + [(2, 0)] * 5
    assert max(suffixes(table_of(rows, suffix_size=5))) == 4
    with pytest.raises(
        ValueError, match=r"5 items share the codes \[2, 0\], the suffix tells only 4 apart: raise"
    ):
        table_of(rows, suffix_size=4)
    with pytest.raises(ValueError, match="tells only 4 apart"):
        table_of(rows, previous=table_of([(1, 1)] * 3, suffix_size=4), suffix_size=4)


def test_a_previous_table_of_another_shape_is_refused() -> None:
    before = table_of([(0, 1), (0, 1)])
    with pytest.raises(ValueError, match="suffix_size 64, the new one"):
        table_of([(0, 1), (0, 1)], previous=before, suffix_size=32)
    with pytest.raises(ValueError, match="none may vanish"):
        table_of([(0, 1)], previous=before)


def test_symbols_have_a_range_for_every_step() -> None:
    table = table_of([(0, 1), (2, 0), (0, 1)], suffix_size=4)
    space = space_of(table)
    assert (space.num_steps, space.num_symbols) == (3, 9)
    assert table_symbols(table).tolist() == [[0, 4, 5], [2, 3, 5], [0, 4, 6]]
    assert table_symbols(table).dtype == torch.long


def test_strings_of_unequal_length_do_not_become_a_rectangle() -> None:
    table = table_of([(0, 1), (2, 0)])
    shorter = table.codes.with_columns(codes=pl.Series([[0, 1], [2]], dtype=pl.List(pl.UInt16)))
    with pytest.raises(ValueError, match=r"item 1 has the codes \[2\], not 2 of them"):
        table_symbols(replace(table, codes=shorter))


def vectors(rows: int = 60) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))


def embeddings_of(x_ND: Tensor) -> ContentEmbeddings:
    return ContentEmbeddings(
        vectors={"vectors": x_ND}, encoder="precomputed", revision="1", normalised=False, catalog="c"
    )


@pytest.fixture(scope="module")
def checkpoint() -> TokenizerCheckpoint:
    tokenizer = build_tokenizer(RkMeansConfig(codebook_sizes=[8, 4]), 6)
    assert isinstance(tokenizer, RkMeans)
    tokenizer.fit(vectors(), seed=0)
    return checkpoint_of(tokenizer, embeddings=embeddings_of(vectors()).fingerprint, steps=0, metrics={})


def test_assign_writes_the_nearest_codes(checkpoint: TokenizerCheckpoint) -> None:
    table = assign(checkpoint, embeddings_of(vectors()), SidConfig())
    assert table.tokenizer == checkpoint.fingerprint
    assert table.suffix_size == 256
    assert table.codes["codes"].to_list() == load_tokenizer(checkpoint).encode(vectors()).tolist()
    assert assign(checkpoint, embeddings_of(vectors()), SidConfig()).fingerprint == table.fingerprint


def test_assign_notes_settings_and_parents(checkpoint: TokenizerCheckpoint) -> None:
    embeddings, config = embeddings_of(vectors()), SidConfig(suffix_size=99)
    first = assign(checkpoint, embeddings, config)
    parents = {"TokenizerCheckpoint": checkpoint.fingerprint, "ContentEmbeddings": embeddings.fingerprint}
    assert dict(first.provenance.config) == config.model_dump(mode="json")
    assert first.provenance.parents == parents
    again = assign(checkpoint, embeddings, config, previous=first)
    assert again.provenance.parents == parents | {"SidTable": first.fingerprint}


def test_assign_balances_all_items_together(checkpoint: TokenizerCheckpoint) -> None:
    nearest = assign(checkpoint, embeddings_of(vectors()), SidConfig())
    balanced = assign(checkpoint, embeddings_of(vectors()), SidConfig(assignment="sinkhorn"))
    tokenizer = load_tokenizer(checkpoint)
    expected = sinkhorn_codes(tokenizer.latents(vectors()), list(tokenizer.codebooks), 0.003, 50)
    assert balanced.codes["codes"].to_list() == expected.tolist()

    def heaviest(table: SidTable) -> int:
        return int(table.codes["codes"].list.first().value_counts()["count"].max())  # type: ignore[arg-type]

    assert heaviest(balanced) < heaviest(nearest)


def test_assign_refuses_embeddings_of_another_making(checkpoint: TokenizerCheckpoint) -> None:
    with pytest.raises(ArtifactError, match="5 columns, the tokenizer was trained on 6"):
        assign(checkpoint, embeddings_of(vectors()[:, :5].contiguous()), SidConfig())
    with pytest.raises(ArtifactError, match=r"are not those .* other_embeddings=accept"):
        assign(checkpoint, embeddings_of(vectors() + 1), SidConfig())


def test_a_grown_catalogue_keeps_the_strings_it_had(checkpoint: TokenizerCheckpoint) -> None:
    config = SidConfig(other_embeddings="accept")
    before = assign(checkpoint, embeddings_of(vectors()), SidConfig())
    grown_ND = torch.cat([vectors(), vectors()[:7] * 1.01])
    after = assign(checkpoint, embeddings_of(grown_ND), config, previous=before)
    assert strings(after)[:60] == strings(before)
    assert after.num_items == 67
