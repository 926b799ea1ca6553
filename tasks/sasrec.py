"""SASRec, the baseline over item ids: train it, and rank the whole catalogue with it."""

from typing import Annotated

import polars as pl
import torch
from flytekit import task

from components.artifacts import EvaluationReport, SasRecCheckpoint, SequenceSplit
from components.metrics import report as reporting
from components.metrics.report import EvaluateConfig, RankFn
from components.pages.training import training_page
from components.recommenders.full_ranking import Scorer, rank_exactly
from components.recommenders.sasrec import load_sasrec
from components.seams import Ranking
from components.training.loop import device_of
from components.training.sasrec import SasRecStage, train_sasrec
from tasks import runtime
from tasks.checkpoints import resumable
from tasks.decks import show
from tasks.evaluation import record_method
from tasks.flyte_types import by_content
from tasks.tracking import tracked


@task(**runtime.GPU, **runtime.DECK, cache=runtime.cached("1", "name"))
def fit_sasrec(
    split: Annotated[SequenceSplit, by_content], config: SasRecStage, run_id: str = "", name: str = ""
) -> Annotated[SasRecCheckpoint, by_content]:
    """Train SASRec on item ids and keep its best validated epoch.

    Args:
        split: Folder of a SequenceSplit.
        config: Recipe, a YAML file or JSON. Keys: make keys SECTION=sasrec.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    with tracked(f"fit_sasrec {name}".strip(), config, run_id, [split]) as run:
        checkpoint = train_sasrec(split, config, run.log, *resumable())
        run.output(checkpoint)
        run.finish_training(checkpoint.metrics)
        top = [("epoch kept", str(checkpoint.epoch))]
        show(run, "SASRec", training_page, "SASRec", run.history, checkpoint.metrics, checkpoint.step, top)
        return checkpoint


def exact_ranker(scorer: Scorer, config: EvaluateConfig) -> RankFn:
    """Return the function that lists the best of all items for held-out rows, by a scorer's log-probabilities."""

    def rank(frame: pl.DataFrame, exclude_seen: bool) -> Ranking:
        exact = rank_exactly(
            scorer,
            frame["history"],
            frame["target"],
            k=config.beams,
            exclude_seen=exclude_seen,
            batch_size=config.batch_size,
        )
        return Ranking(torch.from_numpy(exact.items), torch.from_numpy(exact.scores))

    return rank


@task(**runtime.GPU, cache=runtime.cached("1"))
def evaluate_sasrec(
    name: str,
    model: Annotated[SasRecCheckpoint, by_content],
    split: Annotated[SequenceSplit, by_content],
    baselines: Annotated[EvaluationReport, by_content],
    config: EvaluateConfig,
    run_id: str = "",
) -> Annotated[EvaluationReport, by_content]:
    """Evaluate SASRec on the test targets, seen items kept and excluded.

    Args:
        name: What to call the method in tables.
        model: Folder of a SasRecCheckpoint.
        split: Folder of the SequenceSplit that it was trained on.
        baselines: Folder of the EvaluationReport of the baselines, made with the same settings.
        config: Settings, a YAML file or JSON. Keys: make keys SECTION=evaluate.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    with tracked(f"evaluate_sasrec {name}", config, run_id, [model, split, baselines]) as run:
        rank = exact_ranker(load_sasrec(model, split).to(device_of("auto")), config)
        report = reporting.evaluate_recommender(name, rank, split, config, baselines)
        record_method(run, name, report)
        run.output(report)
        return report
