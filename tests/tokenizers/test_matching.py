"""Laws of matching: a relabelled tokenizer is found out, labels change nothing else, and no name is lost by it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.artifacts import ContentEmbeddings, SidChurn, SidTable, TokenizerCheckpoint
from components.folders import ArtifactError
from components.tokenizers.build import build_tokenizer, checkpoint_of, load_tokenizer
from components.tokenizers.dvae import Dvae, DvaeConfig
from components.tokenizers.matching import churn, match_codes, match_names, relabel, rename
from components.tokenizers.prefixes import prefix_errors
from components.tokenizers.rkmeans import RkMeans, RkMeansConfig
from components.tokenizers.rqvae import RqVae, RqVaeConfig
from components.tokenizers.sids import SidConfig, assign, codes_to_table, name_items, padded_codes

CONFIG = SidConfig(suffix_size=60)
X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
EMBEDDINGS = ContentEmbeddings(
    vectors={"vectors": X}, encoder="lsa", revision="1", normalised=False, catalog="c"
)
KINDS = {
    "rkmeans": RkMeansConfig(codebook_sizes=[6, 4]),
    "rqvae": RqVaeConfig(codebook_sizes=[6, 4], hidden=[12], latent_dim=8),
    "dvae": DvaeConfig(vocabulary=8, positions=3, hidden=8, decoder_hidden=8, price=1.0),
    "dvae transformer": DvaeConfig(
        vocabulary=8, positions=3, hidden=8, decoder_hidden=8, price=1.0, network="transformer"
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def checkpoint(kind: str, seed: int = 0) -> TokenizerCheckpoint:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(KINDS[kind], 6)
    match tokenizer:
        case RkMeans():
            tokenizer.fit(X, seed=seed)
        case RqVae():
            tokenizer.standardise(X)
            tokenizer.fit_codebooks(X, seed=seed)
        case Dvae():
            with torch.no_grad():
                tokenizer.stop.out.weight.normal_(std=6.0)
    return checkpoint_of(tokenizer, embeddings=EMBEDDINGS.fingerprint, steps=0, metrics={})


def random_labels(kind: str, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [8] if kind.startswith("dvae") else [6, 4]
    return [torch.randperm(size, generator=generator) for size in sizes]


@every_kind
def test_a_relabelled_tokenizer_gives_the_permuted_codes_and_decodes_to_the_same_bits(kind: str) -> None:
    before, labels = checkpoint(kind), random_labels(kind)
    after = relabel(before, labels)
    old, new = load_tokenizer(before), load_tokenizer(after)
    codes, renamed = name_items(old, X, CONFIG), name_items(new, X, CONFIG)
    by_level = labels * codes.shape[1] if len(labels) == 1 else labels
    expected = [torch.where(c < 0, -1, own[c]) for c, own in zip(codes.T, by_level, strict=True)]
    assert torch.equal(renamed, torch.stack(expected, dim=1)) and not torch.equal(renamed, codes)
    errors = [prefix_errors(tokenizer, X, own) for tokenizer, own in ((old, codes), (new, renamed))]
    assert torch.equal(errors[0].nan_to_num(-1), errors[1].nan_to_num(-1))
    assert after.provenance.parents == {"TokenizerCheckpoint": before.fingerprint}
    back = relabel(after, [own.argsort() for own in labels])
    assert back.fingerprint == before.fingerprint


@every_kind
def test_a_permuted_copy_is_matched_back_exactly(kind: str, tmp_path) -> None:
    original = checkpoint(kind)
    old = assign(original, EMBEDDINGS, CONFIG)
    copy = relabel(original, random_labels(kind))
    new = assign(copy, EMBEDDINGS, CONFIG)
    matched = match_names(old, copy, new)
    assert matched.churn.share("codes", "before") > 0.5
    assert set(matched.churn.changes["after"]) == {0.0}
    assert matched.sids.codes.equals(old.codes)
    assert matched.sids.tokenizer == matched.tokenizer.fingerprint
    assert assign(matched.tokenizer, EMBEDDINGS, CONFIG).fingerprint == matched.sids.fingerprint
    for name, rows in original.weights.items():
        if name.startswith("codebook"):
            level = int(name[-1]) if name[-1].isdigit() else None
            used = padded_codes(old) if level is None else padded_codes(old)[:, level]
            used = used[used >= 0].unique()
            assert torch.equal(matched.tokenizer.weights[name][used], rows[used])
    matched.churn.save(tmp_path / "churn")
    assert SidChurn.load(tmp_path / "churn").fingerprint == matched.churn.fingerprint


CODES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25)


def table_of(rows: list[tuple[int, ...]], **changes) -> SidTable:
    return codes_to_table(torch.tensor(rows), [4] * len(rows[0]), 64, "t", **changes)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_a_level_agrees_as_well_as_under_the_best_of_all_permutations(pairs: list[tuple[int, int]]) -> None:
    old, new = (table_of([(pair[which],) for pair in pairs]) for which in (0, 1))
    (labels,) = match_codes(old, new)
    best = max(sum(perm[b] == a for a, b in pairs) for perm in permutations(range(4)))
    assert sum(int(labels[b]) == a for a, b in pairs) == best
    assert sorted(labels.tolist()) == [0, 1, 2, 3]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=30))
def test_one_codebook_for_all_levels_gets_the_best_single_permutation(rows: list[tuple[int, ...]]) -> None:
    old, new = (table_of([row[part] for row in rows], shared=True) for part in (slice(2), slice(2, 4)))
    (labels,) = match_codes(old, new)
    pairs = [pair for row in rows for pair in ((row[0], row[2]), (row[1], row[3]))]

    def agreeing(labels: Sequence[int]) -> int:
        return sum(labels[b] == a for a, b in pairs)

    best = max(map(agreeing, permutations(range(4))))
    # Where no relabelling keeps more whole names, there is none.
    assert agreeing(labels.tolist()) == best or labels.tolist() == [0, 1, 2, 3]
    assert sorted(labels.tolist()) == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_matching_never_costs_a_name_however_the_codes_were_labelled(data: st.DataObject) -> None:
    rows = data.draw(CODES)
    others = data.draw(st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=len(rows), max_size=len(rows)))
    labels = [data.draw(st.permutations(range(4))) for _ in range(2)]
    old = table_of(rows)
    new = table_of([tuple(labels[i][row[i]] for i in (0, 1)) for row in others])
    after = rename(new, match_codes(old, new), "relabelled", old)
    found = churn(old, new, after)
    for part in ("SID", "codes"):
        assert found.share(part) <= found.share(part, "before")
    assert found.share("SID") == found.share("codes")
    assert found.items == len(rows)


def test_churn_is_counted_by_part_over_the_items_of_the_old_table() -> None:
    old = table_of([(0, 1), (0, 1), (2, 2), (3, 0)])
    new = table_of([(0, 1), (0, 2), (1, 2), (3, 0), (3, 0), (0, 1)])
    found = churn(old, new, new).changes
    assert found["part"].to_list() == ["SID", "codes", "level 1", "level 2"]
    assert found["before"].to_list() == [0.5, 0.5, 0.25, 0.25]
    moved = replace(
        new, codes=new.codes.with_columns(suffix=pl.lit(9, pl.UInt16) - pl.col("item_id").cast(pl.UInt16))
    )
    assert churn(old, moved, new).changes["before"].to_list() == [1.0, 0.5, 0.25, 0.25]


def test_deeper_levels_go_by_the_items_whose_names_agree_so_far() -> None:
    """Five items keep code 0 and say 0 -> 1 below it; the other nine lose their first code and say 0 -> 2."""
    old = table_of([(0, 1)] * 5 + [(1, 2)] * 3 + [(2, 2)] * 3 + [(3, 2)] * 3)
    new = table_of([(0, 0)] * 5 + [(1, 0)] * 9)
    first, second = match_codes(old, new)
    assert (int(first[0]), int(second[0])) == (0, 1)
    assert churn(old, new, rename(new, [first, second], "t", old)).share("codes") <= 9 / 14


def test_where_level_by_level_would_cost_names_nothing_is_relabelled() -> None:
    """Code 0 shares more items with old code 1, but of these only two could keep a name; five have it already."""
    old = table_of([(0, 0)] * 5 + [(1, 0), (1, 1), (1, 2), (1, 3), (1, 0), (1, 1)])
    new = table_of([(0, 0)] * 11)
    assert [labels.tolist() for labels in match_codes(old, new)] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("size", [3, 6])
def test_codebooks_of_another_size_keep_the_labels_that_both_have(size: int) -> None:
    old = table_of([(0,), (1,), (2,), (3,), (3,)])
    if size > 4:
        new = codes_to_table(torch.tensor([[5], [4], [3], [2], [1]]), [size], 64, "t")
        kept = [0, 1, 2]
    else:
        new = codes_to_table(torch.tensor([[2], [0], [1], [0], [0]]), [size], 64, "t")
        kept = [0, 1, 2]
    (labels,) = match_codes(old, new)
    assert sorted(labels.tolist()) == list(range(size))
    after = rename(new, [labels], "t", old)
    assert [after.codes["codes"][item].to_list() for item in kept] == [[item] for item in kept]
    assert after.codes["suffix"].equals(new.codes["suffix"])


def test_an_empty_place_behind_a_short_name_is_no_code() -> None:
    def names(rows: list[list[int]]) -> SidTable:
        return codes_to_table(torch.tensor(rows), [4, 4], 64, "t", shared=True)

    old, new = names([[1, -1], [2, 3], [2, -1]]), names([[3, -1], [0, 1], [0, 1]])
    (labels,) = match_codes(old, new)
    assert [int(labels[code]) for code in (3, 0, 1)] == [1, 2, 3]
    found = churn(old, new, rename(new, [labels], "t", old))
    assert found.changes["after"].to_list() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])


def test_what_cannot_be_matched_is_refused() -> None:
    old = table_of([(0, 1), (2, 3)])
    with pytest.raises(ValueError, match="2 items, the new one 1"):
        match_codes(old, table_of([(0, 1)]))
    with pytest.raises(ValueError, match="2 and 3 levels"):
        match_codes(old, table_of([(0, 1, 1), (2, 3, 1)]))
    with pytest.raises(ValueError, match="one codebook for all of them: False and True"):
        match_codes(old, table_of([(0, 1), (2, 3)], shared=True))
    some = checkpoint("rkmeans")
    with pytest.raises(ArtifactError, match="give the tokenizer that made the new table"):
        match_names(old, some, old)
    with pytest.raises(ValueError, match="1 permutations for 2 codebooks"):
        relabel(some, [torch.arange(6)])
    with pytest.raises(ValueError, match="permutation 2 is none of the 4 codes"):
        relabel(some, [torch.arange(6), torch.tensor([0, 1, 1, 3])])


def test_a_codebook_far_larger_than_its_use_is_matched_on_the_codes_in_use() -> None:
    """A table of all pairs of 60,000 codes would be 29 GB. Codes without items keep their number where it is free."""
    size, generator = 60_000, torch.Generator().manual_seed(0)
    before = torch.randperm(size, generator=generator)[:300].repeat_interleave(2)[:, None]
    after = (before + 7) % size
    old, new = (codes_to_table(codes, [size], 64, "t") for codes in (before, after))
    (labels,) = match_codes(old, new)
    assert torch.equal(labels.sort().values, torch.arange(size))
    assert torch.equal(labels[after[:, 0]], before[:, 0])
    idle = torch.ones(size, dtype=torch.bool).index_fill(0, torch.cat([before, after]).flatten(), False)
    assert torch.equal(labels[idle], torch.arange(size)[idle])
