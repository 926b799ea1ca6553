"""Items that came after the training: names beside those that stand, and whether it is time to train again."""

from typing import Annotated, NamedTuple

from flytekit import task

from components.artifacts import (
    ContentEmbeddings,
    EvaluationReport,
    RecommenderCheckpoint,
    SidChurn,
    SidDrift,
    SidTable,
    TokenizerCheckpoint,
)
from components.config import require
from components.metrics import drift as drifting
from components.metrics.drift import DriftConfig
from components.pages.names import churn_page, drift_page
from components.recommenders import extend as binding
from components.tokenizers import matching
from components.tokenizers.extend import extend
from components.tokenizers.sids import OverfullBucket, SidConfig
from tasks import runtime
from tasks.decks import show
from tasks.flyte_types import by_content
from tasks.tracking import tracked


class Named(NamedTuple):
    """A retrained tokenizer under the labels of the one before, its table, and what changed."""

    tokenizer: Annotated[TokenizerCheckpoint, by_content]
    sids: Annotated[SidTable, by_content]
    churn: Annotated[SidChurn, by_content]


@task(**runtime.CPU, cache=runtime.cached("1", "name"))
def extend_sids(
    tokenizer: Annotated[TokenizerCheckpoint, by_content],
    sids: Annotated[SidTable, by_content],
    known: Annotated[ContentEmbeddings, by_content],
    embeddings: Annotated[ContentEmbeddings, by_content],
    config: SidConfig,
    run_id: str = "",
    name: str = "",
) -> Annotated[SidTable, by_content]:
    """Name new items and change no name that there is.

    Args:
        tokenizer: Folder of the TokenizerCheckpoint that made the SIDs.
        sids: Folder of the SidTable to extend.
        known: Folder of the ContentEmbeddings that it was made from.
        embeddings: Folder of the ContentEmbeddings of the grown catalogue, by the same encoder.
        config: Rules, a YAML file or JSON. Keys: make keys SECTION=sids.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    read = [tokenizer, sids, known, embeddings]
    with tracked(f"extend_sids {name}".strip(), config, run_id, read) as run:
        try:
            grown = extend(tokenizer, embeddings, sids, config, known)
        except OverfullBucket as error:  # the drift report behind this stage would never say so
            run.mark("retraining_due", str(error))
            raise
        newcomers = grown.num_items - sids.num_items
        run.metrics({"items": grown.num_items, "newcomers": newcomers})
        run.say(f"{newcomers:,} newcomers named, {sids.num_items:,} names as they were")
        if not newcomers:
            return sids  # what did not grow was made by an earlier run
        run.output(grown)
        return grown


@task(**runtime.CPU, cache=runtime.cached("1", "name"))
def extend_recommender(
    recommender: Annotated[RecommenderCheckpoint, by_content],
    sids: Annotated[SidTable, by_content],
    grown: Annotated[SidTable, by_content],
    embeddings: Annotated[ContentEmbeddings, by_content],
    run_id: str = "",
    name: str = "",
) -> Annotated[RecommenderCheckpoint, by_content]:
    """Let a recommender read and write new items, with the weights that it has.

    Args:
        recommender: Folder of a RecommenderCheckpoint.
        sids: Folder of the SidTable that it was trained with.
        grown: Folder of the SidTable that extends it.
        embeddings: Folder of the ContentEmbeddings of the grown catalogue.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    read = [recommender, sids, grown, embeddings]
    with tracked(f"extend_recommender {name}".strip(), None, run_id, read) as run:
        extended = binding.extend_recommender(recommender, sids, grown, embeddings)
        if grown.num_items == sids.num_items:
            return recommender  # what did not grow was made by an earlier run
        run.output(extended)
        return extended


@task(**runtime.CPU, **runtime.DECK, cache=runtime.cached("2", "name"))
def report_drift(
    tokenizer: Annotated[TokenizerCheckpoint, by_content],
    trained: Annotated[SidTable, by_content],
    grown: Annotated[SidTable, by_content],
    embeddings: Annotated[ContentEmbeddings, by_content],
    reports: list[Annotated[EvaluationReport, by_content]],
    config: DriftConfig,
    run_id: str = "",
    name: str = "",
) -> Annotated[SidDrift, by_content]:
    """Say how well the codebooks still fit, and mark the run when a full retraining is due.

    Args:
        tokenizer: Folder of the TokenizerCheckpoint of both tables.
        trained: Folder of the SidTable of the last training.
        grown: Folder of the SidTable as it is now.
        embeddings: Folder of the ContentEmbeddings of the grown catalogue.
        reports: Folder of the EvaluationReport of the extended recommender, newcomers cold; or none.
        config: Limits, a YAML file or JSON.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    require(len(reports) < 2, f"report_drift reads one EvaluationReport or none, got {len(reports)}")
    read = [tokenizer, trained, grown, embeddings, *reports]
    with tracked(f"report_drift {name}".strip(), config, run_id, read) as run:
        report = drifting.drift(tokenizer, embeddings, trained, grown, config, next(iter(reports), None))
        run.output(report)
        run.metrics(report.figures)
        run.text("drift.md", drifting.markdown_table(report))
        run.say(report.verdict)
        if report.reasons:
            run.mark("retraining_due", "; ".join(report.reasons))
        show(run, "Names", drift_page, report)
        return report


@task(**runtime.CPU, **runtime.DECK, cache=runtime.cached("1", "name"))
def match_names(
    old: Annotated[SidTable, by_content],
    tokenizer: Annotated[TokenizerCheckpoint, by_content],
    sids: Annotated[SidTable, by_content],
    run_id: str = "",
    name: str = "",
) -> Named:
    """Give a retrained tokenizer the labels of the one before, so that names stay where items stay together.

    Args:
        old: Folder of the SidTable whose names are to be kept.
        tokenizer: Folder of the retrained TokenizerCheckpoint.
        sids: Folder of its SidTable, before any recommender is trained on it.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    with tracked(f"match_names {name}".strip(), None, run_id, [old, tokenizer, sids]) as run:
        matched = matching.match_names(old, tokenizer, sids)
        run.output(*matched)
        for part, before, after in matched.churn.changes.iter_rows():
            run.metrics({f"churn/{part}/before": before, f"churn/{part}/after": after})
        run.say(
            f"{matched.churn.share('SID', 'before'):.1%} of {old.num_items:,} items renamed by retraining, "
            f"{matched.churn.share('SID'):.1%} after matching"
        )
        show(run, "Names", churn_page, matched.churn)
        return Named(*matched)
