"""A planted log as a user would bring it, and settings that train on it in seconds."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from mlflow.entities import Run

from components.data.planted import plant
from tasks.runs import open_store
from workflows.config import PipelineConfig


@pytest.fixture(scope="module")
def planted_files(module_home: Path) -> Path:
    """The folder of ``events.csv`` and ``items.csv``: 120 users, 60 items."""
    log, catalog = plant(num_users=120, num_items=60)
    names = log.events.join(log.users, on="user_id").join(
        catalog.items.select("item_id", item="raw_id"), on="item_id"
    )
    names.select(user_id="raw_id", item_id="item", timestamp="timestamp").write_csv(
        module_home / "events.csv"
    )
    catalog.items.select(item_id="raw_id", title="title").write_csv(module_home / "items.csv")
    return module_home


@pytest.fixture(scope="module")
def planted_settings(planted_files: Path) -> Callable[..., PipelineConfig]:
    """Make settings for the planted files; keywords replace whole sections."""

    def make(**changes: Any) -> PipelineConfig:
        source = {
            "kind": "tabular",
            "interactions": {"path": str(planted_files / "events.csv")},
            "items": {"path": str(planted_files / "items.csv")},
        }
        values = {
            "name": "planted",
            "ingest": {"source": source, "k_core": 0},
            "embedding": {"encoder": {"kind": "lsa", "dim": 16}},
            "tokenizer": {"model": {"kind": "rkmeans", "codebook_sizes": [8, 8]}},
            "sids": {"suffix_size": 120},
            "recommender": {
                "model": {"kind": "causal", "dim": 16, "layers": 1, "heads": 2, "hidden": 32},
                "loop": {"epochs": 1},
                "validation": {"users": 50},
                "optim": {"warmup_steps": 5},
            },
            "evaluate": {"resamples": 100},
            "compare": {"resamples": 100},
        }
        return PipelineConfig.model_validate(values | changes)

    return make


TRAINED, NIGHT, NEXT, QUIET = (datetime(2020, 12, day) for day in (1, 12, 23, 27))
"""The growing catalogue has more items on each of the first three days; on the last there are more events alone."""


@pytest.fixture(scope="module")
def growing_settings(planted_settings: Callable[..., PipelineConfig]) -> Callable[..., PipelineConfig]:
    """Make settings for planted files in which the fifth item of each group comes at TRAINED and the sixth at NIGHT."""
    source = planted_settings().ingest.source
    comes = {4: TRAINED, 5: NIGHT}
    begins = [
        int(comes.get(item % 10, datetime(1970, 1, 1)).replace(tzinfo=UTC).timestamp()) for item in range(60)
    ]
    events = pl.read_csv(source.interactions.path)
    arrival = events["item_id"].str.slice(5).cast(pl.Int64).replace_strict(range(60), begins)
    path = Path(source.interactions.path).with_name("growing.csv")
    events.filter(pl.col("timestamp") >= arrival).write_csv(path)
    grows = source.model_copy(
        update={"interactions": source.interactions.model_copy(update={"path": str(path)})}
    )

    def make(**changes: Any) -> PipelineConfig:
        values = {
            "ingest": {"source": grows.model_dump(), "k_core": 0},
            "recommender": {
                "model": {"kind": "causal", "dim": 32, "layers": 1, "heads": 2, "hidden": 64},
                "loop": {"epochs": 12, "validate_every": 4},
                "batch_size": 16,
                "validation": {"users": 50},
                "optim": {"lr": 0.01, "warmup_steps": 5},
            },
            "promote": {"margin": 0.9, "resamples": 100},
            "drift": {"max_new_share": 0.15},
        }
        return planted_settings(**values | changes)

    return make


def latest_pipeline() -> Run:
    """Return the MLflow run of the latest execution on the planted files."""
    client = open_store()
    experiment = client.get_experiment_by_name("planted").experiment_id
    query = "tags.`sidflow.workflow` != ''"
    return client.search_runs([experiment], query, order_by=["attributes.start_time DESC"])[0]
