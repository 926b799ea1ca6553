"""Laws of new items: names that are there stay, newcomers are named by the tokenizer, and nothing else passes."""

from dataclasses import replace

import polars as pl
import pytest
import torch
from torch import Tensor

from components.artifacts import ContentEmbeddings, ItemCatalog, SidTable, TokenizerCheckpoint
from components.embeddings import LsaConfig, assemble, encode_shard, fit_encoder
from components.folders import ArtifactError
from components.tokenizers.build import build_tokenizer, checkpoint_of, load_tokenizer
from components.tokenizers.dvae import Dvae, DvaeConfig
from components.tokenizers.extend import check_extends, extend
from components.tokenizers.rkmeans import RkMeans, RkMeansConfig
from components.tokenizers.rqvae import RqVae, RqVaeConfig
from components.tokenizers.sids import (
    OverfullBucket,
    SidConfig,
    assign,
    name_items,
    padded_codes,
    space_of,
    table_symbols,
)

OLD, ALL = 60, 80
CONFIG = SidConfig(suffix_size=40)
KINDS = {
    "rkmeans": RkMeansConfig(codebook_sizes=[6, 4]),
    "rqvae": RqVaeConfig(codebook_sizes=[6, 4], hidden=[12], latent_dim=8),
    "dvae": DvaeConfig(vocabulary=8, positions=3, hidden=8, decoder_hidden=8, price=1.0),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def vectors(rows: int = ALL) -> Tensor:
    return torch.randn(ALL, 6, generator=torch.Generator().manual_seed(0))[:rows]


def embeddings_of(x_ND: Tensor) -> ContentEmbeddings:
    return ContentEmbeddings(
        vectors={"vectors": x_ND.contiguous()}, encoder="lsa", revision="1", normalised=False, catalog="c"
    )


KNOWN, GROWN = embeddings_of(vectors(OLD)), embeddings_of(vectors())


def checkpoint(kind: str = "rkmeans") -> TokenizerCheckpoint:
    """A tokenizer that has seen the old items; the dvae's names are of all lengths."""
    torch.manual_seed(3)
    tokenizer = build_tokenizer(KINDS[kind], 6)
    match tokenizer:
        case RkMeans():
            tokenizer.fit(vectors(OLD), seed=0)
        case RqVae():
            tokenizer.standardise(vectors(OLD))
            tokenizer.fit_codebooks(vectors(OLD), seed=0)
        case Dvae():
            with torch.no_grad():
                tokenizer.stop.out.weight.normal_(std=6.0)
    return checkpoint_of(tokenizer, embeddings=KNOWN.fingerprint, steps=0, metrics={})


def rows_of(table: SidTable, count: int | None = None) -> list[tuple]:
    return table.codes.head(count or table.num_items).rows()


@every_kind
def test_no_name_changes_and_newcomers_have_the_tokenizers_codes(kind: str) -> None:
    tokenizer = checkpoint(kind)
    before = assign(tokenizer, KNOWN, CONFIG)
    after = extend(tokenizer, GROWN, before, CONFIG, KNOWN)
    assert after.num_items == ALL and rows_of(after, OLD) == rows_of(before)
    named = name_items(load_tokenizer(tokenizer), vectors()[OLD:], CONFIG, space_of(before).shortest or 1)
    assert torch.equal(padded_codes(after)[OLD:], named)
    assert (after.suffix_size, after.shared, after.tokenizer) == (40, kind == "dvae", tokenizer.fingerprint)
    assert after.provenance.parents == {
        "SidTable": before.fingerprint,
        "TokenizerCheckpoint": tokenizer.fingerprint,
        "ContentEmbeddings": GROWN.fingerprint,
    }
    check_extends(before, after)


@every_kind
def test_newcomers_take_the_lowest_free_suffix_in_item_order(kind: str) -> None:
    tokenizer = checkpoint(kind)
    before = assign(tokenizer, KNOWN, CONFIG)
    table = extend(tokenizer, GROWN, before, CONFIG, KNOWN)
    taken: dict[tuple, set[int]] = {}
    for item, codes, suffix in table.codes.rows():
        used = taken.setdefault(tuple(codes), set())
        if item >= OLD:
            assert suffix == min(set(range(ALL)) - used)
        used.add(suffix)
    assert max(map(len, taken.values())) > 1


@every_kind
def test_two_extensions_are_one(kind: str) -> None:
    tokenizer, half = checkpoint(kind), embeddings_of(vectors(70))
    before = assign(tokenizer, KNOWN, CONFIG)
    twice = extend(tokenizer, GROWN, extend(tokenizer, half, before, CONFIG, KNOWN), CONFIG, half)
    assert twice.fingerprint == extend(tokenizer, GROWN, before, CONFIG, KNOWN).fingerprint
    assert extend(tokenizer, KNOWN, before, CONFIG, KNOWN).fingerprint == before.fingerprint


def test_a_balanced_table_stays_though_the_tokenizer_would_name_it_otherwise_now() -> None:
    tokenizer, balanced = checkpoint(), CONFIG.model_copy(update={"assignment": "sinkhorn"})
    before = assign(tokenizer, KNOWN, balanced)
    nearest = assign(tokenizer, GROWN, CONFIG.model_copy(update={"other_embeddings": "accept"}))
    assert rows_of(before) != rows_of(nearest, OLD)
    after = extend(tokenizer, GROWN, before, balanced, KNOWN)
    assert rows_of(after, OLD) == rows_of(before)
    assert after.codes["codes"][OLD:].to_list() == nearest.codes["codes"][OLD:].to_list()
    assert after.provenance.config["assignment"] == "nearest"


def test_no_newcomer_has_a_shorter_name_than_recommenders_of_the_table_can_write() -> None:
    tokenizer = checkpoint("dvae")
    lengths = (name_items(load_tokenizer(tokenizer), vectors(), CONFIG) >= 0).sum(dim=1)
    assert lengths.unique().tolist() == [1, 2, 3]
    order = torch.cat([(lengths > 1).nonzero()[:, 0], (lengths == 1).nonzero()[:, 0]])
    count = int((lengths > 1).sum())
    known, grown = embeddings_of(vectors()[order[:count]]), embeddings_of(vectors()[order])
    tokenizer = replace(tokenizer, embeddings=known.fingerprint)
    before = assign(tokenizer, known, CONFIG)
    after = extend(tokenizer, grown, before, CONFIG, known)
    assert space_of(after) == space_of(before)
    assert after.codes["codes"].list.len()[count:].unique().to_list() == [2]
    assert table_symbols(after)[:count].equal(table_symbols(before))


def test_newcomers_without_a_free_suffix_are_counted_and_the_bucket_is_named() -> None:
    tokenizer = checkpoint()
    fullest = assign(tokenizer, KNOWN, CONFIG).codes.group_by("codes").agg(pl.len(), pl.col("item_id").min())
    codes, size, item = fullest.sort("len", "codes").row(-1)
    config = SidConfig(suffix_size=size)
    before = assign(tokenizer, KNOWN, config)
    apart = next(i for i, other in enumerate(before.codes["codes"].to_list()) if other != codes)
    more = vectors()[torch.tensor([item, item, item, apart])]
    with pytest.raises(OverfullBucket) as refused:
        extend(tokenizer, embeddings_of(torch.cat([vectors(OLD), more])), before, config, KNOWN)
    assert f"3 of 4 newcomers find no free suffix, first items [{OLD}, {OLD + 1}, {OLD + 2}]" in str(
        refused.value
    )
    assert f"{size + 3} items would share the codes {codes}" in str(refused.value)
    assert "full retraining is due" in str(refused.value)


def test_a_twin_gets_the_codes_of_its_twin() -> None:
    tokenizer = checkpoint()
    before = assign(tokenizer, KNOWN, CONFIG)
    after = extend(
        tokenizer, embeddings_of(torch.cat([vectors(OLD), vectors(OLD)[:7]])), before, CONFIG, KNOWN
    )
    assert after.codes["codes"][OLD:].to_list() == before.codes["codes"][:7].to_list()


def test_what_does_not_belong_to_the_table_is_refused() -> None:
    tokenizer = checkpoint()
    before = assign(tokenizer, KNOWN, CONFIG)
    with pytest.raises(ArtifactError, match="give the tokenizer that made the table"):
        extend(replace(tokenizer, steps=1), GROWN, before, CONFIG, KNOWN)
    with pytest.raises(ArtifactError, match="80 items and 5 columns do not extend a table of 60 items"):
        extend(tokenizer, embeddings_of(vectors()[:, :5]), before, CONFIG, KNOWN)
    with pytest.raises(ArtifactError, match="59 items and 6 columns do not extend"):
        extend(tokenizer, embeddings_of(vectors(59)), before, CONFIG, KNOWN)
    with pytest.raises(ArtifactError, match="are not what the SidTable of 60 items was made from"):
        extend(tokenizer, GROWN, before, CONFIG, embeddings_of(vectors(59)))


@pytest.mark.parametrize("wanted", [1, 64])
def test_the_suffixes_of_a_table_are_as_many_as_it_was_made_with(wanted: int) -> None:
    """Whatever the settings say by now: its symbols cannot grow."""
    tokenizer = checkpoint()
    before = assign(tokenizer, KNOWN, CONFIG)
    after = extend(tokenizer, GROWN, before, SidConfig(suffix_size=wanted), KNOWN)
    assert after.fingerprint == extend(tokenizer, GROWN, before, CONFIG, KNOWN).fingerprint


def test_a_catalogue_numbered_anew_is_refused_by_its_first_row() -> None:
    tokenizer = checkpoint()
    before = assign(tokenizer, KNOWN, CONFIG)
    moved = embeddings_of(torch.cat([vectors()[:9], vectors()[70:71], vectors()[9:]]))
    with pytest.raises(ArtifactError, match="item 9 and 50 more have other vectors"):
        extend(tokenizer, moved, before, CONFIG, KNOWN)
    rounded = embeddings_of(vectors() * (1 + 1e-6))
    assert rows_of(extend(tokenizer, rounded, before, CONFIG, KNOWN), OLD) == rows_of(before)


def test_a_table_that_changed_a_name_does_not_extend_another() -> None:
    tokenizer = checkpoint()
    before = assign(tokenizer, KNOWN, CONFIG)
    after = extend(tokenizer, GROWN, before, CONFIG, KNOWN)
    free = pl.when(pl.col("item_id") == 7).then(39).otherwise("suffix").cast(pl.UInt16)
    with pytest.raises(ArtifactError, match="item 7 and 0 more lack the SID"):
        check_extends(before, replace(after, codes=after.codes.with_columns(suffix=free)))
    with pytest.raises(ArtifactError, match="item 60 and 19 more"):
        check_extends(after, before)
    with pytest.raises(ArtifactError, match=r"differ in \['suffix_size'\]"):
        check_extends(before, replace(after, suffix_size=41))


def catalog_of(texts: list[str]) -> ItemCatalog:
    frame = pl.DataFrame({"item_id": range(len(texts)), "raw_id": map(str, range(len(texts))), "text": texts})
    schema = ItemCatalog.SCHEMAS["items"]
    missing = [pl.lit(None, kind).alias(name) for name, kind in schema.items() if name not in frame.columns]
    return ItemCatalog(items=frame.with_columns(missing).select(pl.col(n).cast(k) for n, k in schema.items()))


def test_an_old_encoder_reads_a_grown_catalogue_in_shards_and_leaves_old_rows_alone() -> None:
    texts = [f"{c} {t}" for c in ("red", "blue", "pink", "white") for t in ("mug", "lamp", "clock", "candle")]
    old, grown = catalog_of(texts[:12]), catalog_of([*texts[:12], "red blue mug", "green lamp"])
    encoder = fit_encoder(old, LsaConfig(dim=4))

    def read(catalog: ItemCatalog, shards: int) -> ContentEmbeddings:
        parts = [encode_shard(encoder, catalog, shard, shards) for shard in range(shards)]
        return assemble(parts, catalog, encoder)

    known, all_of_them = read(old, 1), read(grown, 3)
    assert torch.equal(all_of_them.matrix[:12], known.matrix)
    tokenizer = RkMeans(RkMeansConfig(codebook_sizes=[3, 2]), 4)
    tokenizer.fit(known.matrix, seed=0)
    trained = checkpoint_of(tokenizer, embeddings=known.fingerprint, steps=0, metrics={})
    before = assign(trained, known, CONFIG)
    assert extend(trained, all_of_them, before, CONFIG, known).num_items == 14
    again = fit_encoder(grown, LsaConfig(dim=4))
    refitted = assemble([encode_shard(again, grown, 0, 1)], grown, again)
    with pytest.raises(ArtifactError, match="ingest onto the old catalogue, and encode with its encoder"):
        extend(trained, refitted, before, CONFIG, known)
    with pytest.raises(ValueError, match=r"raw ids \['12'\] .* or fit it again in a full retraining"):
        encode_shard(encoder, catalog_of([*texts[:12], "zeppelin"]), 0, 1)
