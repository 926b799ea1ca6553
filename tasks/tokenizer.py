"""Content vectors to semantic IDs: learn codebooks, give every item its SID, look at the collisions."""

from typing import Annotated

import torch
from flytekit import task

from components.artifacts import (
    CollisionReport,
    ContentEmbeddings,
    InteractionLog,
    ItemCatalog,
    SequenceSplit,
    SidTable,
    TokenizerCheckpoint,
)
from components.config import require
from components.metrics import sids as collisions
from components.metrics.figures import (
    code_usage,
    collision_histogram,
    length_by_popularity,
    reconstruction_by_level,
)
from components.metrics.lengths import lengths_differ
from components.metrics.sids import CollisionConfig
from components.pages.sids import collisions_page, sids_page
from components.pages.training import training_page
from components.tokenizers import sids as naming
from components.tokenizers.build import load_tokenizer
from components.tokenizers.prefixes import prefix_errors
from components.tokenizers.sids import SidConfig, padded_codes
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage
from tasks import runtime
from tasks.checkpoints import resumable
from tasks.decks import show
from tasks.flyte_types import by_content
from tasks.tracking import tracked


@task(**runtime.GPU, **runtime.DECK, cache=runtime.cached("2", "name"))
def fit_tokenizer(
    embeddings: Annotated[ContentEmbeddings, by_content],
    split: Annotated[SequenceSplit, by_content],
    config: TokenizerStage,
    run_id: str = "",
    name: str = "",
) -> Annotated[TokenizerCheckpoint, by_content]:
    """Learn codebooks from content vectors.

    Args:
        embeddings: Folder of ContentEmbeddings.
        split: Folder of the SequenceSplit whose training events say how popular items are, and whose cold items are
            left out.
        config: Recipe, a YAML file or JSON. Keys: make keys SECTION=tokenizer.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    with tracked(f"fit_tokenizer {name}".strip(), config, run_id, [embeddings, split]) as run:
        checkpoint = train_tokenizer(embeddings, config, run.log, *resumable(), split=split)
        run.output(checkpoint)
        run.finish_training(checkpoint.metrics)
        about = ("Tokenizer", run.history, checkpoint.metrics, checkpoint.steps)
        show(run, "Tokenizer", training_page, *about, [("kind", config.model.kind)])
        return checkpoint


@task(**runtime.CPU, **runtime.DECK, cache=runtime.cached("2", "name"))
def assign_sids(
    tokenizer: Annotated[TokenizerCheckpoint, by_content],
    embeddings: Annotated[ContentEmbeddings, by_content],
    split: Annotated[SequenceSplit, by_content],
    catalog: Annotated[ItemCatalog, by_content],
    config: SidConfig,
    run_id: str = "",
    name: str = "",
) -> Annotated[SidTable, by_content]:
    """Give every item its semantic ID, and a suffix where items share their codes.

    Args:
        tokenizer: Folder of a TokenizerCheckpoint.
        embeddings: Folder of the ContentEmbeddings to name.
        split: Folder of the SequenceSplit whose training events say how popular items are.
        catalog: Folder of the ItemCatalog, for names on the deck.
        config: Rules, a YAML file or JSON. Keys: make keys SECTION=sids.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    read = [tokenizer, embeddings, split, catalog]
    with tracked(f"assign_sids {name}".strip(), config, run_id, read) as run:
        table = naming.assign(tokenizer, embeddings, config, split=split)
        run.output(table)
        show(run, "SIDs", sids_page, table, catalog, split)
        return table


@task(**runtime.CPU, **runtime.DECK, cache=runtime.cached("2", "name"))
def analyze_collisions(
    name: str,
    tokenizer: Annotated[TokenizerCheckpoint, by_content],
    sids: Annotated[SidTable, by_content],
    catalog: Annotated[ItemCatalog, by_content],
    embeddings: Annotated[ContentEmbeddings, by_content],
    log: Annotated[InteractionLog, by_content],
    config: CollisionConfig,
    run_id: str = "",
) -> Annotated[CollisionReport, by_content]:
    """Describe collisions, code usage, lengths and reconstruction, and fail if the semantic IDs have collapsed.

    Args:
        name: What to call these SIDs, for instance two-stage.
        tokenizer: Folder of the TokenizerCheckpoint that made the SIDs.
        sids: Folder of a SidTable.
        catalog: Folder of the ItemCatalog.
        embeddings: Folder of the ContentEmbeddings.
        log: Folder of the InteractionLog.
        config: Thresholds, a YAML file or JSON. Keys: make keys SECTION=collisions.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    read = [tokenizer, sids, catalog, embeddings, log]
    with tracked(f"analyze_collisions {name}", config, run_id, read) as run:
        require(
            sids.tokenizer == tokenizer.fingerprint,
            f"analyze_collisions: the SidTable came from tokenizer {sids.tokenizer[:12]}, "
            f"got {tokenizer.fingerprint[:12]}: give the tokenizer that made these SIDs",
        )
        events = torch.bincount(
            torch.from_numpy(log.events["item_id"].to_numpy().astype("int64")), minlength=catalog.num_items
        )
        report = collisions.analyze(
            sids,
            catalog,
            config,
            events=events,
            embeddings=embeddings,
            errors=prefix_errors(load_tokenizer(tokenizer), embeddings.matrix, padded_codes(sids)),
            sequences=log.events.group_by("user_id", maintain_order=True).agg("item_id")["item_id"],
        )
        run.output(report)
        run.metrics(report.figures)
        run.figure("code_usage", code_usage(report))
        run.figure("collisions", collision_histogram(report))
        run.figure("prefix_errors", reconstruction_by_level(report))
        if lengths_differ(report):
            run.figure("length_by_popularity", length_by_popularity(report))
        run.text("verdict.md", "\n".join([f"# {report.verdict}", *report.bands.values()]))
        show(run, "Collisions", collisions_page, report, catalog)
        run.say(f"{report.verdict}, {report.figures['collision_rate']:.1%} of the items share their codes")
        collisions.gate(report, config)
        return report
