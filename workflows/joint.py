"""Raw interactions to semantic IDs that are learned together with the recommender that uses them."""

from flytekit import workflow

from components.artifacts import Comparison
from tasks.evaluation import compare_reports, evaluate_recommender
from tasks.joint import fit_jointly
from workflows.config import PipelineConfig
from workflows.lifecycle import finish_run, record_failure, start_run
from workflows.steps import bundle, check_names, name_items, train_and_evaluate


@workflow(on_failure=record_failure)
def joint(config: PipelineConfig) -> Comparison:
    """Train in two stages and jointly from the same start, and compare both with the baselines.

    Args:
        config: Settings of all stages: a YAML file such as workflows/presets/quickstart.yaml, or JSON.
    """
    run_id = start_run(workflow="joint", config=config)
    named = name_items(config, run_id)
    trained = train_and_evaluate(config, run_id, named)
    tokenizer, sids, recommender = fit_jointly(
        split=named.split,
        embeddings=named.embeddings,
        tokenizer=named.tokenizer,
        sids=named.sids,
        recipe=config.recommender,
        config=config.joint,
        run_id=run_id,
    )
    named.collisions >> recommender
    moved = check_names("joint", config, run_id, named, tokenizer, sids)
    report = evaluate_recommender(
        name="joint",
        recommender=recommender,
        sids=sids,
        split=named.split,
        baselines=trained.baselines,
        catalog=named.catalog,
        config=config.evaluate,
        run_id=run_id,
    )
    comparison = compare_reports(reports=[trained.report, report], config=config.compare, run_id=run_id)
    model = bundle("joint", run_id, moved, recommender)
    finish_run(
        run_id=run_id,
        comparison=comparison,
        names=["two-stage", "joint"],
        collisions=[named.collisions, moved.collisions],
        model=model,
    )
    return comparison
