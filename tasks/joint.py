"""Train tokenizer and recommender on one loss."""

from typing import Annotated, NamedTuple

from flytekit import task

from components.artifacts import (
    ContentEmbeddings,
    RecommenderCheckpoint,
    SequenceSplit,
    SidTable,
    TokenizerCheckpoint,
)
from components.pages.training import training_page
from components.training.joint import JointConfig, JointStage, train_jointly
from components.training.recommender import RecommenderStage
from tasks import runtime
from tasks.checkpoints import resumable
from tasks.decks import show
from tasks.flyte_types import by_content
from tasks.tracking import tracked


class Joint(NamedTuple):
    """Tokenizer, table and recommender of one epoch; they only work together."""

    tokenizer: Annotated[TokenizerCheckpoint, by_content]
    sids: Annotated[SidTable, by_content]
    recommender: Annotated[RecommenderCheckpoint, by_content]


@task(**runtime.GPU, **runtime.DECK, cache=runtime.cached("2", "name"))
def fit_jointly(
    split: Annotated[SequenceSplit, by_content],
    embeddings: Annotated[ContentEmbeddings, by_content],
    tokenizer: Annotated[TokenizerCheckpoint, by_content],
    sids: Annotated[SidTable, by_content],
    recipe: RecommenderStage,
    config: JointStage,
    run_id: str = "",
    name: str = "",
) -> Joint:
    """Train a pretrained tokenizer and a fresh recommender together; the three results are of one epoch.

    Args:
        split: Folder of a SequenceSplit.
        embeddings: Folder of the ContentEmbeddings.
        tokenizer: Folder of the TokenizerCheckpoint to start from.
        sids: Folder of the SidTable of that tokenizer.
        recipe: Recommender and its training, a YAML file or JSON. Keys: make keys SECTION=recommender.
        config: What joint training adds, a YAML file or JSON. Keys: make keys SECTION=joint.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    both = JointConfig(recommender=recipe, joint=config)
    with tracked(f"fit_jointly {name}".strip(), both, run_id, [split, embeddings, tokenizer, sids]) as run:
        result = train_jointly(split, embeddings, tokenizer, sids, both, run.log, *resumable())
        tokenizer, table, recommender, collapsed = result
        run.output(tokenizer, table, recommender)
        run.finish_training(recommender.metrics)
        if collapsed:
            run.mark("collapsed", collapsed)
        top = [("kind", recipe.model.kind), ("epoch kept", str(recommender.epoch))]
        about = ("Joint training", run.history, recommender.metrics, recommender.step, top, collapsed or "")
        show(run, "Joint", training_page, *about)
        return Joint(tokenizer, table, recommender)
