"""Arms by seeds over one preset: which part of a method earns its place."""

from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, NamedTuple

from flytekit import dynamic, task, workflow
from flytekit.core.promise import Promise
from flytekit.types.error import FlyteError

from components.artifacts import (
    Ablation,
    ContentEmbeddings,
    EvaluationReport,
    InteractionLog,
    ItemCatalog,
    SequenceSplit,
)
from components.config import Config
from components.metrics.ablation import headline, run_name
from components.metrics.ablation_tables import markdown_table
from components.metrics.figures import ablation_figure
from tasks import runtime
from tasks.ablation import ArmRun, gather_ablation, mark_collapses, show_ablation
from tasks.evaluation import evaluate_baselines, evaluate_recommender
from tasks.flyte_types import by_content
from tasks.joint import fit_jointly
from tasks.recommender import fit_recommender
from tasks.sasrec import evaluate_sasrec, fit_sasrec
from tasks.tokenizer import analyze_collisions, assign_sids, fit_tokenizer
from tasks.tracking import fail_execution, finish_pipeline, record_result, start_pipeline
from workflows.config import AblationConfig, Recipe
from workflows.steps import read_data

ALL_ARMS = runtime.CPU | {"timeout": timedelta(0)}
"""The node that holds all arms: each arm's stages have timeouts of their own, together they take what they take."""
NOTE = 5000
"""Characters that MLflow shows of a run's description."""


@task(**runtime.CPU)
def start_ablation(config: AblationConfig) -> str:
    """Open the MLflow run that all stages of this execution become children of.

    Args:
        config: Settings of the ablation, a YAML file or JSON.
    """
    return start_pipeline("ablation", config.name, config)


@task(**runtime.CPU)
def finish_ablation(run_id: str, result: Annotated[Ablation, by_content]) -> None:
    """Close the MLflow run of this execution, name who made what, and show the result.

    Args:
        run_id: MLflow run of the pipeline.
        result: Arms over seeds.
    """
    note = markdown_table(result, longest=NOTE)
    record_result(run_id, headline(result), note, ablation_figure(result))
    mark_collapses(result, run_id)
    finish_pipeline(run_id, [result])
    show_ablation(result, run_id)


@task(**runtime.CPU)
def record_ablation_failure(config: AblationConfig, err: FlyteError | None = None) -> None:
    """Close as FAILED what this execution left running in MLflow.

    Args:
        config: Settings of the ablation; a failure node takes the inputs of its workflow.
        err: What Flyte says about the failure.
    """
    fail_execution(err.message if err else "failed")


class Shared(NamedTuple):
    """What all arms read."""

    log: InteractionLog
    catalog: ItemCatalog
    split: SequenceSplit
    embeddings: ContentEmbeddings
    baselines: EvaluationReport
    run_id: str


Made = dict[tuple[str, ...], Promise]
"""Nodes made so far, by stage and the settings that shape them."""


class Start(NamedTuple):
    """What a recommender is trained on: SIDs from content, and how they look."""

    tokenizer: Promise
    sids: Promise
    collisions: Promise


class Outcome(NamedTuple):
    """What one arm at one seed hands to the table; no codes and no recommender for sasrec."""

    report: Promise
    collisions: Promise | None = None
    recommender: Promise | None = None


@dynamic(**ALL_ARMS)
def run_arms(
    config: AblationConfig,
    log: Annotated[InteractionLog, by_content],
    catalog: Annotated[ItemCatalog, by_content],
    split: Annotated[SequenceSplit, by_content],
    embeddings: Annotated[ContentEmbeddings, by_content],
    baselines: Annotated[EvaluationReport, by_content],
    run_id: str,
) -> Annotated[Ablation, by_content]:
    """Train and evaluate every arm with every seed. Arms do not wait for one another; equal stages are one node.

    Args:
        config: Settings of the ablation, a YAML file or JSON.
        log: Folder of the InteractionLog.
        catalog: Folder of the ItemCatalog.
        split: Folder of the SequenceSplit.
        embeddings: Folder of the ContentEmbeddings.
        baselines: Folder of the EvaluationReport of the baselines.
        run_id: MLflow run of the pipeline.
    """
    data = Shared(log, catalog, split, embeddings, baselines, run_id)
    made: Made = {}
    runs, outcomes = [], []
    for seed in config.seeds:
        for arm in config.arms:
            runs.append(ArmRun(arm=arm.name, method=arm.method, against=config.against(arm), seed=seed))
            build = {"two_stage": _two_stage, "joint": _joint, "sasrec": _sasrec}[arm.method]
            outcomes.append(build(run_name(arm.name, seed), config.resolve(arm, seed), data, made))
    return gather_ablation(
        runs=runs,
        reports=[outcome.report for outcome in outcomes],
        collisions=[outcome.collisions for outcome in outcomes if outcome.collisions is not None],
        recommenders=[outcome.recommender for outcome in outcomes if outcome.recommender is not None],
        run_id=run_id,
    )


def _two_stage(name: str, recipe: Recipe, data: Shared, made: Made) -> Outcome:
    """Train on frozen SIDs."""
    start = _start(name, recipe, data, made)
    recommender = fit_recommender(
        split=data.split,
        sids=start.sids,
        embeddings=data.embeddings,
        config=recipe.recommender,
        run_id=data.run_id,
        name=name,
    )
    start.collisions >> recommender
    return Outcome(_evaluate(name, recipe, data, start.sids, recommender), start.collisions, recommender)


def _joint(name: str, recipe: Recipe, data: Shared, made: Made) -> Outcome:
    """Train tokenizer and recommender together, and look at the SIDs that come of it."""
    start = _start(name, recipe, data, made)
    trained = fit_jointly(
        split=data.split,
        embeddings=data.embeddings,
        tokenizer=start.tokenizer,
        sids=start.sids,
        recipe=recipe.recommender,
        config=recipe.joint,
        run_id=data.run_id,
        name=name,
    )
    start.collisions >> trained.recommender
    collisions = _analyze(name, recipe, data, trained.tokenizer, trained.sids)
    report = _evaluate(name, recipe, data, trained.sids, trained.recommender)
    return Outcome(report, collisions, trained.recommender)


def _sasrec(name: str, recipe: Recipe, data: Shared, made: Made) -> Outcome:
    """Train over item ids."""
    model = fit_sasrec(split=data.split, config=recipe.sasrec, run_id=data.run_id, name=name)
    report = evaluate_sasrec(
        name=name,
        model=model,
        split=data.split,
        baselines=data.baselines,
        config=recipe.evaluate,
        run_id=data.run_id,
    )
    return Outcome(report)


def _start(first_arm: str, recipe: Recipe, data: Shared, made: Made) -> Start:
    """Learn SIDs from content, unless an earlier arm has made these nodes with the same settings."""

    def once(stage: str, make: Callable[[], Promise], *settings: Config) -> Promise:
        key = (stage, *(part.model_dump_json() for part in settings))
        if key not in made:
            made[key] = make()
        return made[key]

    # Several arms share a tokenizer, and several tokenizers a kind: the first arm names it.
    name = f"{recipe.tokenizer.model.kind} of {first_arm}"
    tokenizer = once(
        "tokenizer",
        lambda: fit_tokenizer(
            embeddings=data.embeddings,
            split=data.split,
            config=recipe.tokenizer,
            run_id=data.run_id,
            name=name,
        ),
        recipe.tokenizer,
    )
    sids = once(
        "sids",
        lambda: assign_sids(
            tokenizer=tokenizer,
            embeddings=data.embeddings,
            split=data.split,
            catalog=data.catalog,
            config=recipe.sids,
            run_id=data.run_id,
            name=name,
        ),
        recipe.tokenizer,
        recipe.sids,
    )
    collisions = once(
        "collisions",
        lambda: _analyze(name, recipe, data, tokenizer, sids),
        recipe.tokenizer,
        recipe.sids,
        recipe.collisions,
    )
    return Start(tokenizer, sids, collisions)


def _analyze(name: str, recipe: Recipe, data: Shared, tokenizer: Promise, sids: Promise) -> Promise:
    return analyze_collisions(
        name=name,
        tokenizer=tokenizer,
        sids=sids,
        catalog=data.catalog,
        embeddings=data.embeddings,
        log=data.log,
        config=recipe.collisions,
        run_id=data.run_id,
    )


def _evaluate(name: str, recipe: Recipe, data: Shared, sids: Promise, recommender: Promise) -> Promise:
    return evaluate_recommender(
        name=name,
        recommender=recommender,
        sids=sids,
        split=data.split,
        baselines=data.baselines,
        catalog=data.catalog,
        config=recipe.evaluate,
        run_id=data.run_id,
    )


@workflow(on_failure=record_ablation_failure)
def ablation(config: AblationConfig) -> Ablation:
    """Train arms with several seeds on one data set, and put them in one table beside the baselines.

    Args:
        config: Settings of all stages, arms and seeds: a YAML file such as workflows/presets/ablation.yaml, or JSON.
    """
    run_id = start_ablation(config=config)
    log, catalog, split, _, embeddings = read_data(config, run_id)
    baselines = evaluate_baselines(split=split, config=config.evaluate, run_id=run_id)
    result = run_arms(
        config=config,
        log=log,
        catalog=catalog,
        split=split,
        embeddings=embeddings,
        baselines=baselines,
        run_id=run_id,
    )
    finish_ablation(run_id=run_id, result=result)
    return result
