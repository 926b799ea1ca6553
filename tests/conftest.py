"""Fixtures shared by all tests."""

import importlib.util
import os

# One thread, here and in every process that tests start: the models are small, equal thread counts give equal
# bytes, and two suites on one machine do not wait for each other's cores. torch reads this when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from components.artifacts import (
    ContentEmbeddings,
    InteractionLog,
    ItemCatalog,
    SequenceSplit,
    SidTable,
    TokenizerCheckpoint,
)
from components.data.planted import plant
from components.data.splits import SplitConfig, hold_out
from components.embeddings import LsaConfig, encode_items
from components.exploration import GumbelConfig
from components.tokenizers.build import load_tokenizer
from components.tokenizers.rkmeans import RkMeansConfig
from components.tokenizers.sids import AssignmentRule, SidConfig, assign
from components.tokenizers.sources import LiveSids, Paths
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; making one takes seconds, so tests copy this one."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@contextmanager
def private_flyte(folder: Path, empty_store: Path) -> Iterator[Path]:
    """Give Flyte and MLflow a place of their own: cache, artefacts, raw files and runs under ``folder``."""
    from flytekit import FlyteContextManager
    from flytekit.core import local_cache
    from flytekit.core.data_persistence import FileAccessProvider
    from flytekit.core.type_engine import TypeEngine

    home = folder / ".sidflow"
    home.mkdir()
    shutil.copy(empty_store, home / "mlflow.db")
    TypeEngine._LITERAL_CACHE.clear()  # remembers the folders of equal artefacts in earlier tests
    files = FileAccessProvider(str(folder / "sandbox"), str(folder / "raw"))
    context = FlyteContextManager.current_context()
    with (
        pytest.MonkeyPatch.context() as patch,
        FlyteContextManager.with_context(context.with_file_access(files)),
    ):
        patch.setenv("SIDFLOW_HOME", str(home))
        patch.setenv("HOME", str(folder / "user"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(local_cache, "CACHE_LOCATION", str(home / "flyte-cache"))
        patch.setattr(local_cache.LocalTaskCache, "_initialized", False)
        yield home


@pytest.fixture
def flyte_home(tmp_path: Path, empty_store: Path) -> Iterator[Path]:
    """A private place for one test."""
    with private_flyte(tmp_path, empty_store) as home:
        yield home


@pytest.fixture(scope="module")
def module_home(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    """A private place for all tests of a file, where one run serves many questions."""
    with private_flyte(tmp_path_factory.mktemp("module"), empty_store) as home:
        yield home


class Tiny(NamedTuple):
    """The planted log taken through the stages before training, once for all tests."""

    log: InteractionLog
    catalog: ItemCatalog
    split: SequenceSplit
    embeddings: ContentEmbeddings
    tokenizer: TokenizerCheckpoint
    sids: SidTable


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """Planted log, split, LSA vectors, residual k-means with 3 levels of 8 codes, and their SIDs."""
    ingested = plant()
    embeddings = encode_items(ingested.catalog, LsaConfig(dim=16))
    tokenizer = train_tokenizer(embeddings, TokenizerStage(model=RkMeansConfig(codebook_sizes=[8, 8, 8])))
    return Tiny(
        *ingested,
        hold_out(*ingested, SplitConfig()),
        embeddings,
        tokenizer,
        assign(tokenizer, embeddings, SidConfig(suffix_size=32)),
    )


@pytest.fixture(scope="session")
def live_sids(tiny: Tiny) -> Callable[..., LiveSids]:
    """Make a live source of the planted items; keywords replace what a plain Gumbel run would have."""

    def make(
        exploration: Any = None,
        paths: Paths = Paths(),  # noqa: B008
        *,
        tokenizer: TokenizerCheckpoint = tiny.tokenizer,
        sids: SidTable = tiny.sids,
        rule: AssignmentRule | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> LiveSids:
        plain = {"residual": "sampled", "top_probability": 0.5, "logit_scale": None, "train_encoder": False}
        return LiveSids(
            load_tokenizer(tokenizer),
            tiny.embeddings.matrix,
            sids,
            exploration or GumbelConfig(),
            paths,
            rule or AssignmentRule(),
            **plain | settings,
            generator=torch.Generator().manual_seed(seed),
        )

    return make


@pytest.fixture(scope="session")
def benchmark_script() -> Iterator[Callable[[str], ModuleType]]:
    """Load a script of ``benchmarks`` as it is when run: its folder is on the path."""
    folder = Path(__file__).parents[1] / "benchmarks"

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield load
