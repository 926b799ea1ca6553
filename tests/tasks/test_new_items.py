"""New items as tasks: from the text of newcomers to a recommender that writes them, and what the runs say."""

from dataclasses import replace
from typing import NamedTuple

import polars as pl
import pytest
import torch
from mlflow.entities import Run

from components.artifacts import ContentEmbeddings, ContentEncoder, ItemCatalog, SidTable, TokenizerCheckpoint
from components.embeddings import LsaConfig, assemble, encode_shard, fit_encoder
from components.metrics.drift import DriftConfig
from components.recommenders.build import load_recommender
from components.recommenders.causal import CausalConfig
from components.tokenizers.matching import relabel
from components.tokenizers.rkmeans import RkMeansConfig
from components.tokenizers.sids import SidConfig, assign
from components.training.loop import LoopConfig
from components.training.recommender import RecommenderStage, train_recommender
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage
from tasks.data import EmbeddingStage, assemble_embeddings, embed_shard
from tasks.new_items import extend_recommender, extend_sids, match_names, report_drift
from tasks.tracking import open_store, start_pipeline

SIDS = SidConfig(suffix_size=64)
STAGE = RecommenderStage(
    model=CausalConfig(dim=16, layers=1, heads=2, head_dim=8, hidden=32),
    loop=LoopConfig(epochs=1),
    batch_size=64,
    device="cpu",
)


class Trained(NamedTuple):
    """The planted catalogue as it was trained on, and grown by forty items of words that it knows."""

    encoder: ContentEncoder
    known: ContentEmbeddings
    tokenizer: TokenizerCheckpoint
    sids: SidTable
    grown: ItemCatalog


@pytest.fixture(scope="module")
def before(tiny) -> Trained:
    encoder = fit_encoder(tiny.catalog, LsaConfig(dim=16))
    known = assemble([encode_shard(encoder, tiny.catalog, 0, 1)], tiny.catalog, encoder)
    stage = TokenizerStage(model=RkMeansConfig(codebook_sizes=[8, 8, 8]))
    tokenizer = train_tokenizer(known, stage)
    rows = tiny.catalog.items
    more = rows.head(40).with_columns(
        item_id=pl.col("item_id") + len(rows), raw_id=pl.lit("new ") + pl.col("raw_id")
    )
    grown = ItemCatalog(items=pl.concat([rows, more.cast(rows.schema)]))
    return Trained(encoder, known, tokenizer, assign(tokenizer, known, SIDS), grown)


def runs(experiment: str) -> list[Run]:
    client = open_store()
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def test_newcomers_go_from_text_to_a_recommender_and_a_mark_says_when_training_is_due(
    tiny, before: Trained, flyte_home
) -> None:
    encoder, known, tokenizer, sids, catalog = before
    stage, pipeline = EmbeddingStage(shards=2), start_pipeline("new_items", "growing", SIDS)
    shards = [
        embed_shard(shard=shard, encoder=encoder, catalog=catalog, config=stage, run_id=pipeline)
        for shard in (0, 1)
    ]
    embeddings = assemble_embeddings(shards=shards, catalog=catalog, encoder=encoder, run_id=pipeline)
    assert torch.equal(embeddings.matrix[:120], known.matrix)
    grown = extend_sids(
        tokenizer=tokenizer, sids=sids, known=known, embeddings=embeddings, config=SIDS, run_id=pipeline
    )
    assert grown.codes.head(120).equals(sids.codes) and grown.num_items == 160
    trained = train_recommender(tiny.split, sids, known, STAGE, lambda step, values: None)
    extended = extend_recommender(
        recommender=trained, sids=sids, grown=grown, embeddings=embeddings, run_id=pipeline
    )
    load_recommender(extended, grown)
    drift = {"tokenizer": tokenizer, "trained": sids, "grown": grown, "embeddings": embeddings, "reports": []}
    twins = DriftConfig(max_collision_excess=1)  # the newcomers have the texts of known items
    assert report_drift(**drift, config=twins, run_id=pipeline).verdict == "keep"
    assert "sidflow.retraining_due" not in str([run.data.tags for run in runs("growing")])
    strict = twins.model_copy(update={"max_new_share": 0.1})
    assert (
        report_drift(**drift, config=strict, run_id=pipeline, name="strict").verdict == "full retraining due"
    )
    by_name = {run.info.run_name: run for run in runs("growing")}
    marked = by_name["report_drift strict"]
    reason = "25.0% of the catalogue is new since the last training; at most 10%"
    assert marked.data.tags["sidflow.retraining_due"] == reason
    assert open_store().get_run(pipeline).data.tags["sidflow.retraining_due.report_drift strict"] == reason
    assert marked.data.metrics["new_share"] == 0.25
    assert by_name["extend_sids"].data.metrics["newcomers"] == 40
    assert by_name["extend_sids"].data.tags["parent.ContentEmbeddings.2"] == embeddings.fingerprint
    assert by_name["extend_recommender"].data.tags["output.RecommenderCheckpoint"] == extended.fingerprint
    extend_sids(
        tokenizer=tokenizer, sids=sids, known=known, embeddings=embeddings, config=SIDS, run_id="other"
    )
    assert len(runs("growing")) == len(by_name)  # equal inputs are answered from the cache


def test_newcomers_without_a_free_suffix_end_the_night_with_the_mark_that_training_is_due(
    before: Trained, flyte_home
) -> None:
    encoder, known, tokenizer, sids, catalog = before
    full = replace(sids, suffix_size=int(sids.codes["suffix"].max()) + 1)  # type: ignore[operator]
    embeddings = assemble([encode_shard(encoder, catalog, 0, 1)], catalog, encoder)
    pipeline = start_pipeline("new_items", "full", SIDS)
    with pytest.raises(Exception, match="newcomers find no free suffix"):
        extend_sids(
            tokenizer=tokenizer, sids=full, known=known, embeddings=embeddings, config=SIDS, run_id=pipeline
        )
    marked = open_store().get_run(pipeline).data.tags["sidflow.retraining_due.extend_sids"]
    assert "A full retraining is due" in marked


def test_a_retrained_tokenizer_gets_its_old_labels_back(before: Trained, flyte_home) -> None:
    known, tokenizer, sids = before.known, before.tokenizer, before.sids
    again = relabel(replace(tokenizer, steps=7), [torch.arange(8).roll(turn) for turn in (1, 2, 3)])
    matched = match_names(old=sids, tokenizer=again, sids=assign(again, known, SIDS))
    assert matched.sids.codes.equals(sids.codes)
    assert matched.sids.tokenizer == matched.tokenizer.fingerprint
    (run,) = runs("stages")
    assert run.data.metrics["churn/codes/before"] > 0.9 and run.data.metrics["churn/codes/after"] == 0
    assert run.data.tags["output.SidChurn"] == matched.churn.fingerprint
    assert run.data.tags["output.TokenizerCheckpoint"] == matched.tokenizer.fingerprint


def test_more_than_one_evaluation_is_refused(before: Trained, flyte_home) -> None:
    with pytest.raises(ValueError, match="reads one EvaluationReport or none, got 2"):
        report_drift.task_function(
            tokenizer=before.tokenizer,
            trained=before.sids,
            grown=before.sids,
            embeddings=before.known,
            reports=[before.known, before.known],
            config=DriftConfig(),
        )
