"""Item text to content vectors, spread over as many nodes as there are shards."""

from functools import partial
from typing import NamedTuple

from flytekit import map_task, workflow

from components.artifacts import ContentEmbeddings, ContentEncoder, ItemCatalog
from tasks.data import EmbeddingStage, assemble_embeddings, embed_shard, fit_encoder, plan_shards


class Embedded(NamedTuple):
    """The encoder, and one vector an item."""

    encoder: ContentEncoder
    embeddings: ContentEmbeddings


@workflow
def embed_items(catalog: ItemCatalog, config: EmbeddingStage, run_id: str = "") -> Embedded:
    """Fit the text encoder and embed the catalogue in shards that are put together in order.

    Args:
        catalog: Folder of an ItemCatalog.
        config: Encoder and shards, a YAML file or JSON. Keys: make keys SECTION=embedding.
        run_id: MLflow run of the pipeline; leave it out to run alone.
    """
    encoder = fit_encoder(catalog=catalog, config=config, run_id=run_id)
    embed = partial(embed_shard, encoder=encoder, catalog=catalog, config=config, run_id=run_id)
    shards = map_task(embed)(shard=plan_shards(config=config))
    embeddings = assemble_embeddings(shards=shards, catalog=catalog, encoder=encoder, run_id=run_id)
    return Embedded(encoder, embeddings)
