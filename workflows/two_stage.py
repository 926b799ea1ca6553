"""Raw interactions to semantic IDs, and then to a recommender that uses them."""

from flytekit import workflow

from components.artifacts import Comparison
from tasks.evaluation import compare_reports
from workflows.config import PipelineConfig
from workflows.lifecycle import finish_run, record_failure, start_run
from workflows.steps import bundle, name_items, train_and_evaluate


@workflow(on_failure=record_failure)
def two_stage(config: PipelineConfig) -> Comparison:
    """Learn semantic IDs from content, train a recommender on them, and compare it with the baselines.

    Args:
        config: Settings of all stages: a YAML file such as workflows/presets/quickstart.yaml, or JSON.
    """
    run_id = start_run(workflow="two_stage", config=config)
    named = name_items(config, run_id)
    trained = train_and_evaluate(config, run_id, named)
    comparison = compare_reports(reports=[trained.report], config=config.compare, run_id=run_id)
    model = bundle("two-stage", run_id, named, trained.recommender)
    finish_run(
        run_id=run_id,
        comparison=comparison,
        names=["two-stage"],
        collisions=[named.collisions],
        model=model,
    )
    return comparison
