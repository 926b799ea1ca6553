"""A retried stage goes on from the state that the attempt before it left in Flyte's checkpoint."""

from pathlib import Path

import pytest
import torch
from flytekit import FlyteContextManager, task
from flytekit.core.checkpointer import SyncCheckpoint
from flytekit.core.context_manager import ExecutionParameters

from components.recommenders.causal import CausalConfig
from components.training.loop import LoopConfig
from components.training.recommender import RecommenderStage, train_recommender
from tasks.checkpoints import resumable

STAGE = RecommenderStage(
    model=CausalConfig(dim=16, layers=1, heads=2, head_dim=8, hidden=32),
    loop=LoopConfig(epochs=3),
    batch_size=64,
    device="cpu",
)


def _attempt(source: str | None, destination: Path):
    """Enter a task's context as Flyte does on a cluster, with the folder of an earlier attempt or none."""
    destination.mkdir()
    context = FlyteContextManager.current_context()
    builder = ExecutionParameters.new_builder(context.user_space_params)
    builder.checkpoint = SyncCheckpoint(str(destination), source)
    state = context.execution_state.with_params(user_space_params=builder.build())
    return FlyteContextManager.with_context(context.with_execution_state(state))


def test_an_interrupted_attempt_is_continued(tiny, flyte_home: Path, tmp_path: Path) -> None:
    whole = train_recommender(tiny.split, tiny.sids, tiny.embeddings, STAGE, lambda step, values: None)

    class Interrupted(Exception):
        pass

    def preempt(step: int, values) -> None:
        if values.get("epoch") == 3:
            raise Interrupted

    with _attempt(None, tmp_path / "first"):
        first = resumable()
        assert first.resume is None
        with pytest.raises(Interrupted):
            train_recommender(tiny.split, tiny.sids, tiny.embeddings, STAGE, preempt, *first)
    epochs: list[float] = []
    with _attempt(str(tmp_path / "first"), tmp_path / "second"):
        second = resumable()
        assert second.resume is not None and second.resume["epoch"] == 2
        torch.manual_seed(123)  # the process is another one
        again = train_recommender(
            tiny.split,
            tiny.sids,
            tiny.embeddings,
            STAGE,
            lambda step, values: epochs.append(values["epoch"]) if "epoch" in values else None,
            *second,
        )
    assert epochs == [3]
    assert again.fingerprint == whole.fingerprint


def test_a_first_attempt_on_one_machine_starts_anew(flyte_home: Path) -> None:
    @task
    def stage() -> bool:
        found = resumable()
        found.save({"epoch": 1})
        return found.resume is None

    assert stage()
