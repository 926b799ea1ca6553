"""The two-stage pipeline as it would have been on each of many days."""

from datetime import datetime, timedelta
from typing import NamedTuple

from flytekit import dynamic, task, workflow
from flytekit.types.error import FlyteError
from pydantic import TypeAdapter

from components.artifacts import Comparison
from components.data.times import Moment
from components.metrics.windows import Window, moments
from tasks import runtime
from tasks.backfill import adopt_windows, record_windows, show_windows, survey_windows
from tasks.tracking import fail_execution, finish_pipeline, start_pipeline
from workflows.as_of import cut
from workflows.config import PipelineConfig
from workflows.two_stage import two_stage

ALL_WINDOWS = runtime.CPU | {"timeout": timedelta(0)}
"""The node that holds all windows: their stages have timeouts of their own, together they take what they take."""


class BackfillConfig(PipelineConfig):
    """The settings of a backfill, as its MLflow run keeps them."""

    first: Moment
    """End of the first test window."""
    last: Moment
    """No test window ends after it."""
    every_days: int
    """Days from one window to the next."""


class Plan(NamedTuple):
    """What a backfill is going to do."""

    run_id: str
    config: PipelineConfig
    ends: list[datetime]


@task(**runtime.CPU)
def start_backfill(config: PipelineConfig, first: datetime, last: datetime, every_days: int) -> Plan:
    """Lay out the windows and open the MLflow run that their runs become children of.

    Args:
        config: Settings of all stages, a YAML file or JSON, without an until.
        first: End of the first test window; a date is its midnight; without a time zone, UTC.
        last: No test window ends after it.
        every_days: Days from one window to the next.
    """
    first, last = (TypeAdapter[datetime](Moment).validate_python(moment) for moment in (first, last))
    ends = moments(first, last, every_days)
    by_time = config.model_copy(update={"split": config.split.model_copy(update={"protocol": "by_time"})})
    if by_time.ingest.until or by_time.split.until:
        raise ValueError(
            "ingest.until and split.until are what a backfill sets, window by window: leave them out of the settings, "
            "and say with last where to end"
        )
    asked = BackfillConfig(**by_time.model_dump(), first=first, last=last, every_days=every_days)
    return Plan(start_pipeline("backfill", config.name, asked), by_time, ends)


@dynamic(**ALL_WINDOWS)
def run_windows(config: PipelineConfig, windows: list[Window]) -> list[Comparison]:
    """Run the pipeline as of every window that was not skipped. Windows do not wait for one another.

    Args:
        config: Settings of all stages, a YAML file or JSON.
        windows: All windows, as JSON.
    """
    return [two_stage(config=cut(config, window.until)) for window in windows if not window.skipped]


@task(**runtime.CPU, **runtime.DECK)
def finish_backfill(run_id: str, windows: list[Window], comparisons: list[Comparison]) -> None:
    """Close the MLflow run of the backfill, and show the table over all windows.

    Args:
        run_id: MLflow run of the backfill.
        windows: All windows, as JSON.
        comparisons: Folders of Comparisons, one for each window that was not skipped, in their order.
    """
    adopt_windows(run_id)
    values = record_windows(run_id, windows, comparisons)
    finish_pipeline(run_id, comparisons)
    show_windows(windows, values, run_id)


@task(**runtime.CPU)
def record_backfill_failure(
    config: PipelineConfig, first: datetime, last: datetime, every_days: int, err: FlyteError | None = None
) -> None:
    """Close as FAILED what this execution left running in MLflow.

    Args:
        config: Settings of the pipeline; a failure node takes the inputs of its workflow.
        first: As the workflow's.
        last: As the workflow's.
        every_days: As the workflow's.
        err: What Flyte says about the failure.
    """
    fail_execution(err.message if err else "failed")


@workflow(on_failure=record_backfill_failure)
def backfill(
    config: PipelineConfig, first: datetime, last: datetime, every_days: int = 7
) -> list[Comparison]:
    """Train and evaluate as of many days, each on what was known then, and put the results in one table.

    A window without enough data is reported as skipped, and has no comparison in what is returned. Finished stages are
    cached, so an interrupted backfill goes on.

    Args:
        config: Settings of all stages without an until: a YAML file such as workflows/presets/quickstart.yaml, or JSON.
            The split is by_time, whatever protocol they name; test_days and valid_days are theirs.
        first: End of the first test window, such as 2011-09-01: its midnight; without a time zone, UTC.
        last: No test window ends after it.
        every_days: Days from one window to the next.
    """
    run_id, by_time, ends = start_backfill(config=config, first=first, last=last, every_days=every_days)
    windows = survey_windows(ingest=by_time.ingest, split=by_time.split, ends=ends, run_id=run_id)
    comparisons = run_windows(config=by_time, windows=windows)
    finish_backfill(run_id=run_id, windows=windows, comparisons=comparisons)
    return comparisons
