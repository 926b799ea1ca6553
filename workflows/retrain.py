"""Everything is learned anew, and names stay where they can: the first training, and each one after it."""

from datetime import datetime, timedelta
from typing import Annotated, NamedTuple

from flytekit import dynamic, task, workflow
from rich import box
from rich.table import Table

from components.artifacts import (
    Bundle,
    CollisionReport,
    Comparison,
    ItemCatalog,
    Promotion,
    SidChurn,
    SidTable,
    TokenizerCheckpoint,
)
from components.data.ingest import IngestConfig
from components.tokenizers.matching import unlike
from tasks import runtime
from tasks.champion import find_names
from tasks.data import Ingested, ingest, ingest_onto
from tasks.evaluation import compare_reports
from tasks.flyte_types import by_content
from tasks.new_items import match_names
from tasks.promotion import promote
from tasks.summary import screen
from tasks.tracking import mark_pipeline
from workflows.as_of import as_of
from workflows.config import PipelineConfig
from workflows.lifecycle import close_run, record_failure, start_run
from workflows.steps import bundle, check_names, learn_names, prepare, train_and_evaluate

CHOICE = runtime.CPU | {"timeout": timedelta(0)}
"""A node that chooses a stage; the stage has a timeout of its own."""


class Kept(NamedTuple):
    """Tokenizer and table under the labels of the names before, and what changed; no churn if there were none."""

    tokenizer: Annotated[TokenizerCheckpoint, by_content]
    sids: Annotated[SidTable, by_content]
    churn: list[Annotated[SidChurn, by_content]]


@dynamic(**CHOICE)
def read_onto(
    known: list[Annotated[ItemCatalog, by_content]], config: IngestConfig, run_id: str = ""
) -> Ingested:
    """Read the data onto the catalogue in use, where items keep their ids, or afresh if there is none.

    Args:
        known: Folder of the ItemCatalog in use; or none.
        config: Source and rules, a YAML file or JSON. Keys: make keys SECTION=ingest.
        run_id: MLflow run of the pipeline; leave it out to run alone.
    """
    if known:
        return ingest_onto(catalog=known[0], config=config, run_id=run_id)
    return ingest(config=config, run_id=run_id)


@dynamic(**CHOICE)
def keep_names(
    old: list[Annotated[SidTable, by_content]],
    tokenizer: Annotated[TokenizerCheckpoint, by_content],
    sids: Annotated[SidTable, by_content],
    run_id: str = "",
) -> Kept:
    """Match a retrained tokenizer with the names in use, or leave it as it is if there are none, or none of its form.

    Args:
        old: Folder of the SidTable in use; or none.
        tokenizer: Folder of the retrained TokenizerCheckpoint.
        sids: Folder of its SidTable.
        run_id: MLflow run of the pipeline; leave it out to run alone.
    """
    if not old:
        return Kept(tokenizer, sids, [])
    if different := unlike(old[0], sids):
        mark_pipeline(run_id, "names_lost", {"match_names": different})
        return Kept(tokenizer, sids, [])
    named = match_names(old=old[0], tokenizer=tokenizer, sids=sids, run_id=run_id)
    return Kept(named.tokenizer, named.sids, [named.churn])


@task(**runtime.CPU)
def finish_training(
    run_id: str,
    comparison: Annotated[Comparison, by_content],
    collisions: Annotated[CollisionReport, by_content],
    model: Annotated[Bundle, by_content],
    churn: list[Annotated[SidChurn, by_content]],
    promotion: Annotated[Promotion, by_content],
) -> None:
    """Close the MLflow run of this execution and say how many names changed and which model is in use.

    Args:
        run_id: MLflow run of the pipeline.
        comparison: The model beside the baselines.
        collisions: Report on its table.
        model: The model that was logged.
        churn: What changed against the names in use; or none.
        promotion: What became of the model.
    """
    close_run(
        run_id,
        comparison,
        [("two-stage", collisions)],
        model,
        *churn,
        promotion,
        note="\n\n".join([*map(_sentence, churn), promotion.reason]),
    )
    page = screen()
    for changed in churn:
        page.print(_table(changed))
    page.print(promotion.reason)


def _sentence(churn: SidChurn) -> str:
    before, after = churn.share("SID", "before"), churn.share("SID")
    return f"Of {churn.items:,} items that had names, training renames {before:.1%} and matching leaves {after:.1%}."


def _table(churn: SidChurn) -> Table:
    """Draw which parts of the names changed."""
    view = Table(title=_sentence(churn), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    view.add_column("share of items whose ... changed")
    view.add_column("before matching", justify="right")
    view.add_column("after", justify="right")
    for part, before, after in churn.changes.iter_rows():
        view.add_row(part, f"{before:.1%}", f"{after:.1%}")
    return view


@workflow(on_failure=record_failure)
def retrain(config: PipelineConfig, until: datetime | None = None) -> Comparison:
    """Train encoder, tokenizer and recommender in two stages on all items, and keep the names in use where they fit.

    Without a model in use this is the first training. Items of a model in use keep their ids; new codes take the labels
    of the old ones before the recommender is trained on them; the model is promoted if it is good enough.

    Args:
        config: Settings of all stages: a YAML file such as workflows/presets/quickstart.yaml, or JSON.
        until: The day: events at or after it are not read. Leave it out for all that there is.
    """
    dated = as_of(config=config, until=until)
    run_id = start_run(workflow="retrain", config=dated)
    used = find_names(config=dated.promote, ingest=dated.ingest, run_id=run_id)
    log, catalog = read_onto(known=used.catalogs, config=dated.ingest, run_id=run_id)
    data = prepare(dated, run_id, log, catalog)
    learned, assigned = learn_names(dated, run_id, data)
    tokenizer, sids, churn = keep_names(old=used.sids, tokenizer=learned, sids=assigned, run_id=run_id)
    named = check_names("two-stage", dated, run_id, data, tokenizer, sids)
    trained = train_and_evaluate(dated, run_id, named)
    comparison = compare_reports(reports=[trained.report], config=dated.compare, run_id=run_id)
    model = bundle("two-stage", run_id, named, trained.recommender)
    promotion = promote(
        bundle=model,
        report=trained.report,
        split=data.split,
        config=dated.promote,
        run_id=run_id,
        base=used.version,
        until=used.until,
    )
    finish_training(
        run_id=run_id,
        comparison=comparison,
        collisions=named.collisions,
        model=model,
        churn=churn,
        promotion=promotion,
    )
    return comparison
