"""Content vectors to semantic IDs: learn codebooks, give every item its SID, look at the collisions."""

from typing import Annotated

import torch
from flytekit import task

from components.artifacts import (
    CollisionReport,
    ContentEmbeddings,
    InteractionLog,
    ItemCatalog,
    SidTable,
    TokenizerCheckpoint,
)
from components.metrics import sids as collisions
from components.metrics.figures import code_usage, collision_histogram
from components.metrics.sids import CollisionConfig
from components.tokenizers import sids as naming
from components.tokenizers.sids import SidConfig
from components.training.tokenizer import TokenizerStage, train_tokenizer
from tasks import runtime
from tasks.checkpoints import resumable
from tasks.flyte_types import by_content
from tasks.tracking import tracked


@task(**runtime.GPU, cache=runtime.cached("1", "name"))
def fit_tokenizer(
    embeddings: Annotated[ContentEmbeddings, by_content],
    config: TokenizerStage,
    run_id: str = "",
    name: str = "",
) -> Annotated[TokenizerCheckpoint, by_content]:
    """Learn codebooks from content vectors.

    Args:
        embeddings: Folder of ContentEmbeddings.
        config: Recipe, a YAML file or JSON. Keys: make keys SECTION=tokenizer.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    with tracked(f"fit_tokenizer {name}".strip(), config, run_id, [embeddings]) as run:
        checkpoint = train_tokenizer(embeddings, config, run.log, *resumable())
        run.finish_training(checkpoint.metrics)
        run.output(checkpoint)
        return checkpoint


@task(**runtime.CPU, cache=runtime.cached("1", "name"))
def assign_sids(
    tokenizer: Annotated[TokenizerCheckpoint, by_content],
    embeddings: Annotated[ContentEmbeddings, by_content],
    config: SidConfig,
    run_id: str = "",
    name: str = "",
) -> Annotated[SidTable, by_content]:
    """Give every item its semantic ID, and a suffix where items share their codes.

    Args:
        tokenizer: Folder of a TokenizerCheckpoint.
        embeddings: Folder of the ContentEmbeddings to name.
        config: Rules, a YAML file or JSON. Keys: make keys SECTION=sids.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    with tracked(f"assign_sids {name}".strip(), config, run_id, [tokenizer, embeddings]) as run:
        table = naming.assign(tokenizer, embeddings, config)
        run.output(table)
        return table


@task(**runtime.CPU, cache=runtime.cached("1"))
def analyze_collisions(
    name: str,
    sids: Annotated[SidTable, by_content],
    catalog: Annotated[ItemCatalog, by_content],
    embeddings: Annotated[ContentEmbeddings, by_content],
    log: Annotated[InteractionLog, by_content],
    config: CollisionConfig,
    run_id: str = "",
) -> Annotated[CollisionReport, by_content]:
    """Describe collisions and code usage, and fail if the semantic IDs have collapsed.

    Args:
        name: What to call these SIDs, for instance two-stage.
        sids: Folder of a SidTable.
        catalog: Folder of the ItemCatalog.
        embeddings: Folder of the ContentEmbeddings.
        log: Folder of the InteractionLog.
        config: Thresholds, a YAML file or JSON. Keys: make keys SECTION=collisions.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked(f"analyze_collisions {name}", config, run_id, [sids, catalog, embeddings, log]) as run:
        events = torch.bincount(
            torch.from_numpy(log.events["item_id"].to_numpy().astype("int64")), minlength=catalog.num_items
        )
        report = collisions.analyze(sids, catalog, config, events=events, embeddings=embeddings)
        run.metrics(report.figures)
        run.figure("code_usage", code_usage(report))
        run.figure("collisions", collision_histogram(report))
        run.text("verdict.md", "\n".join([f"# {report.verdict}", *report.bands.values()]))
        run.output(report)
        run.say(f"{report.verdict}, {report.figures['collision_rate']:.1%} of the items share their codes")
        collisions.gate(report, config)
        return report
