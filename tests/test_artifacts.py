"""Artefacts on disk: all or nothing, strict, and equal content has an equal name."""

import dataclasses
import json
import resource
import shutil
import signal
from pathlib import Path

import polars as pl
import pytest
import torch

from components.artifacts import (
    Bundle,
    ContentEmbeddings,
    InteractionLog,
    ItemCatalog,
    RecommenderCheckpoint,
    SasRecCheckpoint,
    SequenceSplit,
    SidTable,
)
from components.data.splits import SplitConfig, hold_out
from components.embeddings import LsaConfig, fit_encoder
from components.folders import ArtifactError, Provenance
from components.recommenders.serving import training_popularity


def _sids(codes: list[list[int]], suffix: list[int], **changes) -> SidTable:
    frame = pl.DataFrame(
        {"item_id": range(len(codes)), "codes": codes, "suffix": suffix}, schema=SidTable.SCHEMAS["codes"]
    )
    fields = {"codebook_sizes": [4, 4], "suffix_size": 3, "shared": False, "tokenizer": "t"}
    return SidTable(codes=frame, **fields | changes)


def test_every_kind_comes_back_as_it_was(tiny, tmp_path: Path) -> None:
    for artifact in tiny:
        folder = tmp_path / artifact.kind()
        artifact.save(folder)
        again = type(artifact).load(folder)
        assert again.fingerprint == artifact.fingerprint
        assert again.provenance == artifact.provenance
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["kind"] == artifact.kind() and manifest["format_version"] == 1


def test_sasrec_comes_back_as_it_was_and_knows_its_split(tiny, tmp_path: Path) -> None:
    checkpoint = SasRecCheckpoint(
        weights={"items": torch.arange(6.0).view(3, 2)},
        config={"dim": 2},
        num_items=tiny.split.num_items,
        split=tiny.split.fingerprint,
        step=7,
        epoch=2,
        metrics={"valid_N@10": 0.25},
        provenance=Provenance(seed=1, parents={"SequenceSplit": tiny.split.fingerprint}),
    )
    checkpoint.save(tmp_path / "sasrec")
    again = SasRecCheckpoint.load(tmp_path / "sasrec")
    assert again.fingerprint == checkpoint.fingerprint and again.provenance == checkpoint.provenance
    assert torch.equal(again.weights["items"], checkpoint.weights["items"])
    again.check_split(tiny.split)
    with pytest.raises(ArtifactError, match="scores 120 items, the SequenceSplit has 130"):
        again.check_split(dataclasses.replace(tiny.split, num_items=130))
    with pytest.raises(ArtifactError, match="its ids may mean other items"):
        again.check_split(dataclasses.replace(tiny.split, catalog="another"))


def test_saving_twice_writes_the_same_bytes(tiny, tmp_path: Path) -> None:
    for name in "ab":
        tiny.split.save(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_provenance_stays_out_of_the_fingerprint(tiny) -> None:
    other = dataclasses.replace(tiny.sids, provenance=Provenance(git="abc", seed=9))
    assert other.fingerprint == tiny.sids.fingerprint
    assert dataclasses.replace(tiny.sids, suffix_size=33).fingerprint != tiny.sids.fingerprint


def test_another_kind_is_refused_with_both_names(tiny, tmp_path: Path) -> None:
    tiny.sids.save(tmp_path / "sids")
    with pytest.raises(ArtifactError, match="holds the kind SidTable, the kind InteractionLog is wanted"):
        InteractionLog.load(tmp_path / "sids")


def test_another_version_is_refused(tiny, tmp_path: Path) -> None:
    tiny.tokenizer.save(tmp_path / "t")
    path = tmp_path / "t" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(ArtifactError, match="format version 7, this sidflow reads 1; run the stage"):
        type(tiny.tokenizer).load(tmp_path / "t")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "field"])
def test_damage_is_noticed(tiny, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "catalog"
    tiny.catalog.save(folder)
    file = folder / "items.parquet"
    data = bytearray(file.read_bytes())
    match damage:
        case "flip":
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        case "truncate":
            file.write_bytes(data[:-10])
        case "remove":
            file.unlink()
        case "field":
            manifest = folder / "manifest.json"
            manifest.write_text(manifest.read_text().replace('"fields": {}', '"fields": {"extra": 1}'))
    with pytest.raises(ArtifactError, match=r"is not what was written|is missing|disagree on the fields"):
        ItemCatalog.load(folder)


def test_a_folder_without_manifest_is_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artefact here"):
        SidTable.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        SidTable.load(tmp_path)


def test_nothing_is_overwritten(tiny, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match="will not overwrite"):
        tiny.sids.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_a_full_disk_leaves_nothing_behind(tiny, tmp_path: Path) -> None:
    """The kernel refuses every byte above a file size limit, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        with pytest.raises(OSError):
            tiny.log.save(tmp_path / "log")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []
    tiny.log.save(tmp_path / "log")
    assert InteractionLog.load(tmp_path / "log").fingerprint == tiny.log.fingerprint


def test_log_invariants_name_the_row(tiny) -> None:
    events = tiny.log.events
    wrong = events.with_columns(
        timestamp=pl.when(pl.int_range(pl.len()) == 5).then(0).otherwise("timestamp").cast(pl.Int64)
    )
    with pytest.raises(ArtifactError, match="row 5: rows go by user, position counts from 0, times never"):
        dataclasses.replace(tiny.log, events=wrong)
    with pytest.raises(ArtifactError, match="wants columns"):
        dataclasses.replace(tiny.log, events=events.drop("rating"))


def test_cold_items_come_back_and_stand_in_test_alone(tiny, tmp_path: Path) -> None:
    split = hold_out(tiny.log, tiny.catalog, SplitConfig(cold_share=0.1))
    split.save(tmp_path / "split")
    again = SequenceSplit.load(tmp_path / "split")
    assert again.fingerprint == split.fingerprint and again.cold.equals(split.cold) and len(again.cold) == 12

    def cold(*items: int) -> SequenceSplit:
        frame = pl.DataFrame({"item_id": items}, schema=SequenceSplit.SCHEMAS["cold"])
        return dataclasses.replace(split, cold=frame)

    one, two = again.cold["item_id"][:2].to_list()
    for wrong in ((two, one), (one, one), (one, split.num_items)):
        with pytest.raises(ValueError, match=f"cold: items below {split.num_items} in ascending order, each"):
            cold(*wrong)
    with pytest.raises(ValueError, match=r"SequenceSplit.train: item \[\d+\] is cold, for test alone"):
        cold(split.train["sequence"][3][0])
    for column, values in (("target", one), ("history", [two])):
        known = split.valid.with_columns(pl.lit(values, split.valid.schema[column]).alias(column))
        with pytest.raises(ValueError, match=r"SequenceSplit.valid: item \[\d+\] is cold"):
            dataclasses.replace(split, valid=known)


def test_embeddings_must_be_finite(tiny) -> None:
    vectors = tiny.embeddings.matrix.clone()
    vectors[7, 0] = float("nan")
    with pytest.raises(ArtifactError, match="row 7: a vector must be finite; 1 are not"):
        dataclasses.replace(tiny.embeddings, vectors={"vectors": vectors})
    with pytest.raises(ValueError, match="one float32 tensor 'vectors'"):
        ContentEmbeddings(
            vectors={"vectors": vectors.double()}, encoder="x", revision="", normalised=True, catalog=""
        )


def test_sid_table_invariants() -> None:
    _sids([[0, 1], [0, 1], [3, 3]], [0, 1, 0])
    with pytest.raises(ArtifactError, match=r"item 0 shares SID \[0, 1\]\+0 with another"):
        _sids([[0, 1], [0, 1]], [0, 0])
    with pytest.raises(ValueError, match="code 4 on level 2, the codebook has 4"):
        _sids([[0, 4]], [0])
    with pytest.raises(ValueError, match="suffix 3 is outside suffix_size 3: raise suffix_size"):
        _sids([[0, 0]], [3])
    with pytest.raises(ValueError, match="an item has between 1 and 2 codes"):
        _sids([[0, 0, 0]], [0])


def test_bundle_refuses_parts_of_different_runs(tiny) -> None:
    recommender = RecommenderCheckpoint(
        weights={"w": torch.ones(1)}, config={}, sids=tiny.sids.fingerprint, step=1, epoch=1, metrics={}
    )
    encoder = fit_encoder(tiny.catalog, LsaConfig(dim=16))
    parts = dict(
        catalog=tiny.catalog,
        tokenizer=tiny.tokenizer,
        sids=tiny.sids,
        recommender=recommender,
        encoder=encoder,
        popularity=training_popularity(tiny.split, tiny.catalog),
    )
    Bundle(**parts)
    other = dataclasses.replace(tiny.sids, suffix_size=40)
    with pytest.raises(ArtifactError, match="its symbols mean other items"):
        Bundle(**parts | {"sids": other})
    with pytest.raises(ArtifactError, match="the SidTable came from tokenizer"):
        Bundle(**parts | {"tokenizer": dataclasses.replace(tiny.tokenizer, steps=99)})
    shorter = dataclasses.replace(tiny.catalog, items=tiny.catalog.items.head(7))
    with pytest.raises(ValueError, match="120 SIDs for 7 items"):
        Bundle(**parts | {"catalog": shorter})


def test_bundle_refuses_the_popularity_of_other_items(tiny) -> None:
    recommender = RecommenderCheckpoint(
        weights={"w": torch.ones(1)}, config={}, sids=tiny.sids.fingerprint, step=1, epoch=1, metrics={}
    )
    encoder = fit_encoder(tiny.catalog, LsaConfig(dim=16))
    popularity = training_popularity(tiny.split, tiny.catalog)
    wrong = {
        "popularity of 119 items for 120 items": popularity.head(119),
        "Bundle.popularity row 0: holds item 119, row number is item id": popularity.reverse(),
        "Bundle.popularity: wants columns": popularity.with_columns(pl.col("events").cast(pl.Int64)),
        "no item has a training event": popularity.with_columns(events=pl.lit(0, pl.UInt32)),
    }
    for said, frame in wrong.items():
        with pytest.raises(ValueError, match=said):
            Bundle(
                catalog=tiny.catalog,
                tokenizer=tiny.tokenizer,
                sids=tiny.sids,
                recommender=recommender,
                encoder=encoder,
                popularity=frame,
            )


def test_a_bundle_keeps_its_parts_in_folders(tiny, tmp_path: Path) -> None:
    recommender = RecommenderCheckpoint(
        weights={"w": torch.ones(1)}, config={}, sids=tiny.sids.fingerprint, step=1, epoch=1, metrics={}
    )
    bundle = Bundle(
        catalog=tiny.catalog,
        tokenizer=tiny.tokenizer,
        sids=tiny.sids,
        recommender=recommender,
        encoder=fit_encoder(tiny.catalog, LsaConfig(dim=16)),
        popularity=training_popularity(tiny.split, tiny.catalog),
    )
    bundle.save(tmp_path / "bundle")
    assert Bundle.load(tmp_path / "bundle").fingerprint == bundle.fingerprint
    assert SidTable.load(tmp_path / "bundle" / "sids").fingerprint == tiny.sids.fingerprint
    shutil.rmtree(tmp_path / "bundle" / "sids")
    with pytest.raises(ArtifactError, match="no artefact here"):
        Bundle.load(tmp_path / "bundle")
