"""Many windows of one log: the survey before they run, what their runs become, and the last page of a backfill."""

from collections.abc import Sequence
from datetime import datetime

import polars as pl
from flytekit import task
from mlflow.entities import RunTag

from components.artifacts import Comparison
from components.data.ingest import IngestConfig
from components.data.splits import SplitConfig
from components.metrics import windows as over_time
from components.metrics.compare import headline
from components.metrics.windows import Window
from components.pages.windows import windows_page
from tasks import runtime
from tasks.decks import show
from tasks.origin import execution_tags
from tasks.runs import all_pages, get_run, open_store
from tasks.summary import screen
from tasks.tracking import StageRun, record_result, tracked


@task(**runtime.CPU)
def survey_windows(
    ingest: IngestConfig, split: SplitConfig, ends: list[datetime], run_id: str = ""
) -> list[Window]:
    """Find the windows that have enough data, and say of the others why not. Trains nothing.

    Args:
        ingest: Source and rules without until, a YAML file or JSON.
        split: Protocol by_time without until, a YAML file or JSON.
        ends: Ends of the test windows, ascending, as a JSON list of dates.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("survey_windows", ingest, run_id) as run:
        windows = over_time.survey(ingest, split, ends)
        for window in windows:
            found = window.skipped or f"{window.items:,} items, {window.test_users:,} test users"
            run.say(f"{window.until:%Y-%m-%d}  {found}")
        return windows


def adopt_windows(run_id: str) -> int:
    """Put the pipelines that ran inside a backfill's execution under its MLflow run, and name them by their day.

    Parameters
    ----------
    run_id : str
        MLflow run of the backfill.

    Returns
    -------
    int
        How many they are.
    """
    client = open_store()
    parent = get_run(client, run_id)
    # On one machine the process is the execution: what began before is not of this backfill.
    query = (
        f"tags.`flyte.execution_id` = '{execution_tags('')['flyte.execution_id']}' and "
        f"tags.`sidflow.workflow` = 'two_stage' and attributes.start_time >= {parent.info.start_time}"
    )
    found = list(all_pages(client.search_runs, [parent.info.experiment_id], query))
    for run in found:
        day = run.data.params["ingest.until"].strip('"')[:10]
        link = {"mlflow.parentRunId": run_id, "sidflow.backfill": run_id}
        client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in link.items()])
        client.update_run(run.info.run_id, name=f"two_stage as of {day}")
    return len(found)


def record_windows(run_id: str, windows: Sequence[Window], comparisons: Sequence[Comparison]) -> pl.DataFrame:
    """Keep the table, the figure and the page in the backfill's run, and every window's figures as a step of curves.

    Parameters
    ----------
    run_id : str
        MLflow run of the backfill.
    windows : sequence of Window
        All of them.
    comparisons : sequence of Comparison
        One for each that was not skipped, in their order.

    Returns
    -------
    pl.DataFrame
        As ``components.metrics.windows.over_windows``.
    """
    values = over_time.over_windows(windows, comparisons)
    note, figure = over_time.markdown_table(windows, values), over_time.windows_figure(windows, values)
    run = StageRun(open_store(), run_id, "backfill")
    steps = [step for step, window in enumerate(windows) if not window.skipped]
    for step, comparison in zip(steps, comparisons, strict=True):
        counts = {"test_users": windows[step].test_users, "items": windows[step].items}
        run.log(
            step, headline(comparison) | {name: count for name, count in counts.items() if count is not None}
        )
    run.text("windows.md", note)
    run.text("windows.csv", values.write_csv())
    show(run, "Windows", windows_page, windows, values)
    record_result(run_id, {}, note, figure)
    run.flush()
    return values


def show_windows(windows: Sequence[Window], values: pl.DataFrame, run_id: str) -> None:
    """Print the table, what was skipped and why, and how to open the runs."""
    console = screen()
    console.print(over_time.table(windows, values))
    for sentence in over_time.skipped(windows):
        console.print(sentence)
    console.print(f"MLflow run {run_id}, one run below it for each window. Open them in a browser: make ui")
