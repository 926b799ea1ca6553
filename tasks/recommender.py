"""Train a recommender on frozen semantic IDs."""

from typing import Annotated

from flytekit import task

from components.artifacts import ContentEmbeddings, RecommenderCheckpoint, SequenceSplit, SidTable
from components.metrics.sids import COLLAPSED_AT
from components.pages.training import training_page
from components.training.item_figures import REMEDY
from components.training.recommender import RecommenderStage, train_recommender
from tasks import runtime
from tasks.checkpoints import resumable
from tasks.decks import show
from tasks.flyte_types import by_content
from tasks.tracking import tracked


@task(**runtime.GPU, **runtime.DECK, cache=runtime.cached("2", "name"))
def fit_recommender(
    split: Annotated[SequenceSplit, by_content],
    sids: Annotated[SidTable, by_content],
    embeddings: Annotated[ContentEmbeddings, by_content],
    config: RecommenderStage,
    run_id: str = "",
    name: str = "",
) -> Annotated[RecommenderCheckpoint, by_content]:
    """Train a recommender on frozen semantic IDs and keep its best validated epoch.

    Args:
        split: Folder of a SequenceSplit.
        sids: Folder of the SidTable that names its items.
        embeddings: Folder of the ContentEmbeddings of its items.
        config: Recipe, a YAML file or JSON. Keys: make keys SECTION=recommender.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
        name: What to add to the name of this MLflow run, where a pipeline has several of the stage.
    """
    with tracked(f"fit_recommender {name}".strip(), config, run_id, [split, sids, embeddings]) as run:
        checkpoint = train_recommender(split, sids, embeddings, config, run.log, *resumable())
        run.output(checkpoint)
        run.finish_training(checkpoint.metrics)
        text = ""
        if (epoch := checkpoint.metrics.get(COLLAPSED_AT)) is not None:
            text = (
                f"epoch {epoch:.0f}: the items' walks through the codebooks collapse, their share of distinct paths is "
                f"below recommender.min_paths {config.min_paths:g}; {REMEDY}"
            )
            run.mark("collapsed", text)
        top = [("kind", config.model.kind), ("epoch kept", str(checkpoint.epoch))]
        about = ("Recommender", run.history, checkpoint.metrics, checkpoint.step, top, text)
        show(run, "Recommender", training_page, *about)
        return checkpoint
