"""The items that came since the last training get names, and the model in use learns to list them, without training."""

from datetime import datetime
from functools import partial
from typing import Annotated, NamedTuple

from flytekit import map_task, task, workflow

from components.artifacts import (
    Bundle,
    CollisionReport,
    Comparison,
    ContentEmbeddings,
    ContentEncoder,
    ItemCatalog,
    Promotion,
    SidDrift,
    SidTable,
)
from components.metrics.drift import markdown_table, table
from tasks import runtime
from tasks.champion import open_champion
from tasks.data import (
    EmbeddingStage,
    assemble_embeddings,
    embed_shard,
    ingest_onto,
    plan_shards,
    set_aside,
    split_newcomers,
)
from tasks.evaluation import compare_reports
from tasks.flyte_types import by_content
from tasks.new_items import extend_recommender, extend_sids, report_drift
from tasks.promotion import promote
from tasks.summary import screen
from tasks.tracking import mark_pipeline
from workflows.as_of import as_of
from workflows.config import PipelineConfig
from workflows.lifecycle import close_run, record_failure, start_run
from workflows.steps import Data, bundle, check_names, evaluate


class Night(NamedTuple):
    """The grown table, whether its codes still fit, and what became of the model that knows it."""

    sids: SidTable
    drift: SidDrift
    promotion: Promotion


@task(**runtime.CPU)
def finish_night(
    run_id: str,
    comparison: Annotated[Comparison, by_content],
    collisions: Annotated[CollisionReport, by_content],
    model: Annotated[Bundle, by_content],
    known: Annotated[SidTable, by_content],
    drift: Annotated[SidDrift, by_content],
    promotion: Annotated[Promotion, by_content],
) -> None:
    """Close the MLflow run of this execution and say what came, whether it fits, and which model is in use.

    Args:
        run_id: MLflow run of the pipeline.
        comparison: The grown model beside the baselines.
        collisions: Report on the grown table.
        model: The model that was logged.
        known: The table before.
        drift: How well the codes still fit.
        promotion: What became of the model.
    """
    if drift.reasons:  # a report from Flyte's cache has no run here that could say so
        mark_pipeline(run_id, "retraining_due", {"report_drift": "; ".join(drift.reasons)})
    lines = [*_news(drift, model.sids.num_items - known.num_items), promotion.reason]
    note = "\n\n".join([*lines, markdown_table(drift)])
    close_run(run_id, comparison, [("extended", collisions)], model, drift, promotion, note=note)
    page = screen()
    page.print(table(drift))
    for line in lines:
        page.print(line)


def _news(drift: SidDrift, tonight: int) -> list[str]:
    """Say in sentences what came, and how it fares."""
    f = drift.figures
    came = f"New items: {tonight:,}." if tonight else "No new items: all names are as they were."
    lines = [f"{came} Since the last training: {f['newcomers']:,.0f} of {f['items']:,.0f}."]
    if f["newcomers"]:
        lines.append(
            f"Of those since the last training {f['collision_share_newcomers']:.1%} share their codes, of the items "
            f"that it knew {f['collision_share_known']:.1%} did."
        )
    if "recall_newcomers" in f and "recall_known" in f:
        lines.append(
            f"R@{drift.provenance.config['recall_at']} is {f['recall_newcomers']:.4f} where the target came since, "
            f"{f['recall_known']:.4f} elsewhere, {f['recall_chance']:.4f} by chance."
        )
    return lines


@workflow
def embed_with(
    encoder: ContentEncoder, catalog: ItemCatalog, config: EmbeddingStage, run_id: str = ""
) -> ContentEmbeddings:
    """Embed a catalogue with an encoder that there is, in shards that are put together in order.

    Args:
        encoder: Folder of a ContentEncoder, of this catalogue or of the one that it grew from.
        catalog: Folder of an ItemCatalog.
        config: Number of shards, a YAML file or JSON; the encoder in it is not read. Keys: make keys SECTION=embedding.
        run_id: MLflow run of the pipeline; leave it out to run alone.
    """
    embed = partial(embed_shard, encoder=encoder, catalog=catalog, config=config, run_id=run_id)
    shards = map_task(embed)(shard=plan_shards(config=config))
    return assemble_embeddings(shards=shards, catalog=catalog, encoder=encoder, run_id=run_id)


@workflow(on_failure=record_failure)
def new_items(config: PipelineConfig, until: datetime | None = None) -> Night:
    """Name new items and change no name that there is, let the model in use list them, and say if training is due.

    A night without new items evaluates the model again; a version is added if what is popular has changed.

    Args:
        config: Settings of all stages: a YAML file such as workflows/presets/quickstart.yaml, or JSON. Encoder,
            tokenizer and recommender are those of the model in use; their sections are not read.
        until: The day: events at or after it are not read. Leave it out for all that there is.
    """
    dated = as_of(config=config, until=until)
    run_id = start_run(workflow="new_items", config=dated)
    champion = open_champion(config=dated.promote, ingest=dated.ingest, run_id=run_id)
    log, catalog = ingest_onto(catalog=champion.catalog, config=dated.ingest, run_id=run_id)
    log, catalog = set_aside(
        log=log, catalog=catalog, known=champion.catalog, encoder=champion.encoder, run_id=run_id
    )
    held = split_newcomers(
        log=log, catalog=catalog, known=champion.trained_catalog, config=dated.split, run_id=run_id
    )
    embeddings = embed_with(encoder=champion.encoder, catalog=catalog, config=dated.embedding, run_id=run_id)
    sids = extend_sids(
        tokenizer=champion.tokenizer,
        sids=champion.sids,
        known=champion.embeddings,
        embeddings=embeddings,
        config=dated.sids,
        run_id=run_id,
    )
    data = Data(log, catalog, held, champion.encoder, embeddings)
    named = check_names("extended", dated, run_id, data, champion.tokenizer, sids)
    recommender = extend_recommender(
        recommender=champion.recommender,
        sids=champion.sids,
        grown=sids,
        embeddings=embeddings,
        run_id=run_id,
    )
    named.collisions >> recommender
    report = evaluate("extended", dated, run_id, named, recommender).report
    drift = report_drift(
        tokenizer=champion.tokenizer,
        trained=champion.trained_sids,
        grown=sids,
        embeddings=embeddings,
        reports=[report],
        config=dated.drift,
        run_id=run_id,
    )
    comparison = compare_reports(reports=[report], config=dated.compare, run_id=run_id)
    model = bundle("extended", run_id, named, recommender)
    promotion = promote(
        bundle=model,
        report=report,
        split=held,
        config=dated.promote,
        run_id=run_id,
        base=champion.version,
        until=champion.until,
    )
    finish_night(
        run_id=run_id,
        comparison=comparison,
        collisions=named.collisions,
        model=model,
        known=champion.sids,
        drift=drift,
        promotion=promotion,
    )
    return Night(sids, drift, promotion)
