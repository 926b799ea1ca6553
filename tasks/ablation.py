"""Arms over seeds put together, and the last page of an ablation in the terminal."""

from typing import Annotated, Literal

from flytekit import task
from pydantic import Field

from components.artifacts import Ablation, CollisionReport, EvaluationReport, RecommenderCheckpoint
from components.config import Config
from components.metrics import ablation as arms
from components.metrics.ablation import Measured
from components.metrics.ablation_tables import markdown_table, tables
from components.metrics.figures import ablation_figure
from components.pages.ablation import ablation_page
from tasks import runtime
from tasks.decks import show
from tasks.flyte_types import by_content
from tasks.summary import screen
from tasks.tracking import mark_pipeline, tracked

STAGES = {"two_stage": "fit_recommender", "joint": "fit_jointly"}
"""The stage that trains the recommender, by method."""
WIDTH = 120
"""Columns of a log file, which has no width of its own."""


class ArmRun(Config):
    """One arm at one seed, as it stands in the lists of an ablation."""

    arm: str = Field(min_length=1)
    """Name of the arm."""
    method: Literal["two_stage", "joint", "sasrec"]
    """What was trained; sasrec has neither SIDs nor a recommender over them."""
    against: str | None = None
    """Arm that the paired difference is taken to."""
    seed: int
    """Seed of weights, batches and noise."""


@task(**runtime.CPU, **runtime.DECK, cache=runtime.cached("2"))
def gather_ablation(
    runs: list[ArmRun],
    reports: list[Annotated[EvaluationReport, by_content]],
    collisions: list[Annotated[CollisionReport, by_content]],
    recommenders: list[Annotated[RecommenderCheckpoint, by_content]],
    run_id: str = "",
) -> Annotated[Ablation, by_content]:
    """Put arms over seeds together: means, paired differences, codes, and what is adopted.

    Args:
        runs: Arm and seed of each report, as JSON.
        reports: Folders of EvaluationReports, one for each of ``runs``, in the same order.
        collisions: Folders of CollisionReports, one for each of ``runs`` but those of sasrec, in the same order.
        recommenders: Folders of RecommenderCheckpoints, as ``collisions``.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked("gather_ablation", None, run_id, [*reports, *collisions, *recommenders]) as run:
        result = arms.ablate(_measured(runs, reports, collisions, recommenders))
        run.output(result)
        run.metrics(arms.headline(result))
        figure = ablation_figure(result)
        run.figure("ablation", figure)
        run.text("ablation.md", markdown_table(result))
        show(run, "Ablation", ablation_page, result, figure)
        return result


def _measured(
    runs: list[ArmRun],
    reports: list[EvaluationReport],
    collisions: list[CollisionReport],
    recommenders: list[RecommenderCheckpoint],
) -> list[Measured]:
    named = sum(run.method != "sasrec" for run in runs)
    if (len(reports), len(collisions), len(recommenders)) != (len(runs), named, named):
        raise ValueError(
            f"{len(runs)} runs, {named} of them with semantic IDs, but {len(reports)} reports, {len(collisions)} "
            f"collision reports and {len(recommenders)} recommenders: give one of each for each, in the same order"
        )
    codes, trained = iter(collisions), iter(recommenders)
    return [
        Measured(
            run.arm,
            run.method,
            run.against,
            run.seed,
            report,
            *((None, None) if run.method == "sasrec" else (next(codes), next(trained))),
        )
        for run, report in zip(runs, reports, strict=True)
    ]


def mark_collapses(result: Ablation, run_id: str) -> None:
    """Mark the pipeline's run with every arm whose training a collapse has stopped, now or in the run that was cached.

    Parameters
    ----------
    result : Ablation
        Arms over seeds.
    run_id : str
        MLflow run of the pipeline.
    """
    stopped = result.tables.drop_nulls("collapsed_at_epoch")
    methods = dict(result.summary.select("arm", "method").iter_rows())
    texts = {
        f"{STAGES[methods[row['arm']]]} {arms.run_name(row['arm'], row['seed'])}": f"epoch {row['collapsed_at_epoch']}"
        for row in stopped.iter_rows(named=True)
    }
    mark_pipeline(run_id, "collapsed", texts)


def show_ablation(result: Ablation, run_id: str) -> None:
    """Print the tables, what is adopted, and how to open the runs.

    Parameters
    ----------
    result : Ablation
        Arms over seeds.
    run_id : str
        MLflow run of the pipeline.
    """
    console = screen(WIDTH, soft_wrap=False)
    for view in tables(result):
        console.print(view)
        console.print()
    for sentence in arms.decision(result):
        console.print(sentence)
    console.print(f"MLflow run {run_id}. Open the runs in a browser: make ui", soft_wrap=True)
