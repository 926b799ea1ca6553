"""Begin and end of an execution: its MLflow run, its last page, and what happens when it fails."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from flytekit import task
from flytekit.types.error import FlyteError

from components.artifacts import Bundle, CollisionReport, Comparison
from components.folders import Artifact
from components.metrics.compare import headline, markdown_table
from components.metrics.figures import comparison_figure
from tasks import runtime
from tasks.flyte_types import by_content
from tasks.model import measure_model
from tasks.summary import show_summary
from tasks.tracking import fail_execution, finish_pipeline, record_result, start_pipeline
from workflows.config import PipelineConfig


@task(**runtime.CPU)
def start_run(workflow: str, config: PipelineConfig) -> str:
    """Open the MLflow run that all stages of this execution become children of.

    Args:
        workflow: Name of the workflow.
        config: Settings of the pipeline, a YAML file or JSON.
    """
    if workflow == "joint":
        config.check_joint()
    return start_pipeline(workflow, config.name, config)


@task(**runtime.CPU)
def finish_run(
    run_id: str,
    comparison: Annotated[Comparison, by_content],
    names: list[str],
    collisions: list[Annotated[CollisionReport, by_content]],
    model: Annotated[Bundle, by_content],
) -> None:
    """Close the MLflow run of this execution, name who made what, and show the result.

    Args:
        run_id: MLflow run of the pipeline.
        comparison: The methods side by side.
        names: What to call each SID table; the last is the method that was logged as a model.
        collisions: A report for each of them.
        model: The model that was logged.
    """
    close_run(run_id, comparison, list(zip(names, collisions, strict=True)), model)


def close_run(
    run_id: str,
    comparison: Comparison,
    tables: Sequence[tuple[str, CollisionReport]],
    model: Bundle,
    *others: Artifact,
    note: str = "",
) -> None:
    """Put the result on the MLflow run of this execution and its model, close the run, and show the last page.

    Parameters
    ----------
    run_id : str
        MLflow run of the pipeline.
    comparison : Comparison
        The methods side by side.
    tables : sequence of (str, CollisionReport)
        A name and the report of each SID table; the last is the method that was logged as a model.
    model : Bundle
        What was logged.
    *others : Artifact
        What else came out at the end.
    note : str
        Markdown that stands above the comparison in the description of the run.
    """
    figures, (method, _) = headline(comparison), tables[-1]
    description = "\n\n".join(filter(None, [note, markdown_table(comparison)]))
    record_result(run_id, figures, description, comparison_figure(comparison))
    measure_model(run_id, model, {k: v for k, v in figures.items() if k.startswith(f"{method}/")})
    collisions = [report for _, report in tables]
    stages = finish_pipeline(run_id, [comparison, *collisions, model, *others])
    show_summary(comparison, tables, stages, run_id)


@task(**runtime.CPU)
def record_failure(
    config: PipelineConfig, until: datetime | None = None, err: FlyteError | None = None
) -> None:
    """Close as FAILED what this execution left running in MLflow.

    Args:
        config: Settings of the pipeline; a failure node takes the inputs of its workflow.
        until: Moment that some workflows are run as of.
        err: What Flyte says about the failure.
    """
    fail_execution(err.message if err else "failed")
