"""A planted log as a user would bring it, and settings that train on it in seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.data.planted import plant
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
