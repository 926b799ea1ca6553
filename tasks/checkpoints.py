"""Training states in Flyte's checkpoints: a stage that is retried goes on where it was."""

from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

import torch
from flytekit import current_context

from components.training.loop import State


class Resumable(NamedTuple):
    """What a training function takes to be resumable."""

    save: Callable[[State], None]
    resume: State | None


def resumable() -> Resumable:
    """Bind a training stage to the checkpoint of the Flyte task that runs it.

    A first attempt finds nothing; an attempt after an interruption finds the state of the last validated epoch.
    Locally each process has a checkpoint of its own, so a new ``pyflyte run`` starts anew.
    """
    checkpoint = current_context().checkpoint

    def save(state: State) -> None:
        buffer = BytesIO()
        torch.save(state, buffer)
        checkpoint.write(buffer.getvalue())

    earlier = checkpoint.read()
    # weights_only: tensors and plain values, never code.
    return Resumable(
        save, torch.load(BytesIO(earlier), map_location="cpu", weights_only=True) if earlier else None
    )
