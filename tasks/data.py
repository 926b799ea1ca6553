"""Raw files to sequences and content vectors: ingest, split, and embedding in shards."""

from typing import Annotated, NamedTuple

import polars as pl
from flytekit import task
from pydantic import Field

from components import embeddings
from components.artifacts import (
    ContentEmbeddings,
    ContentEncoder,
    EmbeddingShard,
    InteractionLog,
    ItemCatalog,
    SequenceSplit,
)
from components.config import Config
from components.data import growth, splits
from components.data import ingest as reading
from components.data.ingest import IngestConfig
from components.data.splits import SplitConfig
from components.embeddings import EncoderConfig, LsaConfig
from components.pages.data import data_page, split_page
from components.pages.embeddings import embeddings_page
from tasks import runtime
from tasks.decks import show
from tasks.flyte_types import by_content
from tasks.tracking import StageRun, tracked


class EmbeddingStage(Config):
    """How items become vectors, and over how many nodes that is spread."""

    encoder: EncoderConfig = LsaConfig()
    """The encoder, by kind: lsa, sentence_transformer or precomputed."""
    shards: int = Field(1, ge=1)
    """Parts that are encoded independently; not more than there are items."""


class Ingested(NamedTuple):
    """A log and the catalogue that its item ids point into."""

    log: Annotated[InteractionLog, by_content]
    catalog: Annotated[ItemCatalog, by_content]


@task(**runtime.CPU, **runtime.DECK)
def ingest(config: IngestConfig, run_id: str = "") -> Ingested:
    """Read raw files: dense ids, k-core, time order. Not cached: files may change under the same name.

    Args:
        config: Source and rules, a YAML file or JSON. Keys: make keys SECTION=ingest.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("ingest", config, run_id) as run:
        log, catalog = reading.ingest(config)
        run.output(log, catalog)
        _tell_log(run, config, log, catalog)
        return Ingested(log, catalog)


@task(**runtime.CPU, **runtime.DECK)
def ingest_onto(
    catalog: Annotated[ItemCatalog, by_content], config: IngestConfig, run_id: str = ""
) -> Ingested:
    """Read newer raw files for a catalogue that exists: its items keep their ids. Not cached: files may change.

    Args:
        catalog: Folder of the ItemCatalog that is known.
        config: Source and rules, a YAML file or JSON. Keys: make keys SECTION=ingest.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("ingest_onto", config, run_id, [catalog]) as run:
        log, grown = reading.ingest(config, catalog)
        # A catalogue that did not grow was made by an earlier run.
        run.output(*([log] if grown is catalog else [log, grown]))
        _tell_log(run, config, log, grown)
        run.say(f"{grown.num_items - catalog.num_items:,} items are new")
        return Ingested(log, grown)


def _tell_log(run: StageRun, config: IngestConfig, log: InteractionLog, catalog: ItemCatalog) -> None:
    for source in log.sources:
        run.dataset(source["name"], source["sha256"], config.source.model_dump_json(), "raw")
    run.metrics({k: v for k, v in log.statistics.items() if isinstance(v, int | float)})
    run.say(f"{len(log.events):,} events, {log.num_users:,} users, {catalog.num_items:,} items")
    show(run, "Data", data_page, log, catalog)


@task(**runtime.CPU)
def set_aside(
    log: Annotated[InteractionLog, by_content],
    catalog: Annotated[ItemCatalog, by_content],
    known: Annotated[ItemCatalog, by_content],
    encoder: Annotated[ContentEncoder, by_content],
    run_id: str = "",
) -> Ingested:
    """Leave out new items whose text the encoder cannot read, and mark the run: they wait for the next training.

    Not cached, so that the run of every night says whom it left out.

    Args:
        log: Folder of an InteractionLog.
        catalog: Folder of the ItemCatalog that was made with it, by ingest_onto.
        known: Folder of the ItemCatalog that it grew from.
        encoder: Folder of the ContentEncoder that will read it, fitted to the known items.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("set_aside", None, run_id, [log, catalog, known, encoder]) as run:
        dumb = embeddings.unreadable(encoder, catalog)
        kept = Ingested(*growth.leave_out(log, catalog, known, dumb))
        run.metrics(
            {"items_set_aside": len(dumb), "events_set_aside": len(log.events) - len(kept.log.events)}
        )
        if len(dumb):
            first = catalog.items[dumb.head(5).to_list()]
            names = first.select(pl.format("{} ({})", "raw_id", pl.col("text").fill_null("")))
            more = f" and {len(dumb) - 5:,} more" if len(dumb) > 5 else ""
            run.mark(
                "set_aside",
                f"{len(dumb):,} new items whose text the encoder cannot read: "
                f"{', '.join(names.to_series())}{more}; they come with the next training",
            )
            # What did not change was made by an earlier run.
            run.output(*([kept.log] if kept.catalog is known else kept))
        return kept


@task(**runtime.CPU, **runtime.DECK, cache=runtime.cached("2"))
def split(
    log: Annotated[InteractionLog, by_content],
    catalog: Annotated[ItemCatalog, by_content],
    config: SplitConfig,
    run_id: str = "",
) -> Annotated[SequenceSplit, by_content]:
    """Hold out events of each user for validation and test: the last, the last baskets, or those after a moment.

    Args:
        log: Folder of an InteractionLog.
        catalog: Folder of the ItemCatalog that was made with it.
        config: Protocol, a YAML file or JSON. Keys: make keys SECTION=split.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("split", config, run_id, [log, catalog]) as run:
        held = splits.hold_out(log, catalog, config)
        run.output(held)
        _tell_split(run, held, log, catalog)
        return held


@task(**runtime.CPU, **runtime.DECK, cache=runtime.cached("1"))
def split_newcomers(
    log: Annotated[InteractionLog, by_content],
    catalog: Annotated[ItemCatalog, by_content],
    known: Annotated[ItemCatalog, by_content],
    config: SplitConfig,
    run_id: str = "",
) -> Annotated[SequenceSplit, by_content]:
    """Split with the items that a grown catalogue has beyond the one before as cold: only test meets them.

    Args:
        log: Folder of an InteractionLog.
        catalog: Folder of the ItemCatalog that was made with it, by ingest_onto.
        known: Folder of the ItemCatalog that it grew from.
        config: Protocol, a YAML file or JSON; cold_share is 0. Keys: make keys SECTION=split.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("split_newcomers", config, run_id, [log, catalog, known]) as run:
        held = splits.hold_out(log, catalog, config, known)
        run.output(held)
        _tell_split(run, held, log, catalog)
        return held


def _tell_split(run: StageRun, held: SequenceSplit, log: InteractionLog, catalog: ItemCatalog) -> None:
    figures = {"test_users": len(held.test), "cold_items": len(held.cold)}
    run.metrics({"training_targets": held.num_training_targets} | figures)
    run.say(f"{held.num_training_targets:,} training targets, {len(held.test):,} test users")
    show(run, "Split", split_page, held, log, catalog)


@task(**runtime.CPU, cache=runtime.cached("1"))
def fit_encoder(
    catalog: Annotated[ItemCatalog, by_content], config: EmbeddingStage, run_id: str = ""
) -> Annotated[ContentEncoder, by_content]:
    """Fit the text encoder to the catalogue, or pin the pretrained weights that will be used.

    Args:
        catalog: Folder of an ItemCatalog.
        config: Encoder, a YAML file or JSON. Keys: make keys SECTION=embedding.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("fit_encoder", config, run_id, [catalog]) as run:
        encoder = embeddings.fit_encoder(catalog, config.encoder)
        run.output(encoder)
        return encoder


@task(**runtime.CPU)
def plan_shards(config: EmbeddingStage) -> list[int]:
    """List the shards that the catalogue is embedded in.

    Args:
        config: Settings of the embedding, a YAML file or JSON.
    """
    return list(range(config.shards))


@task(**runtime.GPU, cache=runtime.cached("1"))
def embed_shard(
    shard: int,
    encoder: Annotated[ContentEncoder, by_content],
    catalog: Annotated[ItemCatalog, by_content],
    config: EmbeddingStage,
    run_id: str = "",
) -> Annotated[EmbeddingShard, by_content]:
    """Encode one part of the catalogue.

    Args:
        shard: Number of the part, from 0.
        encoder: Folder of a ContentEncoder.
        catalog: Folder of an ItemCatalog.
        config: Settings of the embedding, a YAML file or JSON.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked(f"embed_shard {shard}", config, run_id, [encoder, catalog]) as run:
        part = embeddings.encode_shard(encoder, catalog, shard, config.shards)
        run.output(part)
        return part


@task(**runtime.CPU, **runtime.DECK, cache=runtime.cached("1"))
def assemble_embeddings(
    shards: list[Annotated[EmbeddingShard, by_content]],
    catalog: Annotated[ItemCatalog, by_content],
    encoder: Annotated[ContentEncoder, by_content],
    run_id: str = "",
) -> Annotated[ContentEmbeddings, by_content]:
    """Put the parts together in the order of the items.

    Args:
        shards: Folders of all EmbeddingShards.
        catalog: Folder of an ItemCatalog.
        encoder: Folder of the ContentEncoder that made the parts.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("assemble_embeddings", None, run_id, [*shards, catalog, encoder]) as run:
        whole = embeddings.assemble(shards, catalog, encoder)
        run.output(whole)
        run.say(f"{whole.matrix.shape[0]:,} vectors of width {whole.matrix.shape[1]}")
        show(run, "Embeddings", embeddings_page, whole, catalog)
        return whole
