"""The only training loop: tokenizer, recommender and joint stage all run it."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from components.config import Config

Batch = TypeVar("Batch")
Log = Callable[[int, Mapping[str, float]], None]
State = dict[str, Any]
Device = Literal["auto", "cpu", "cuda"]


class LoopConfig(Config):
    """How long to train, and when to look."""

    epochs: int = Field(10, ge=1)
    """Passes over the training data."""
    validate_every: int = Field(1, ge=1)
    """Epochs between validations; the last epoch is always validated."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many validations without a better selection metric; null: never."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest gradient norm of each module; null: no clipping."""
    log_every: int = Field(50, ge=1)
    """Steps between two logged losses, which are means since the last; an epoch's remainder is logged at its end."""


class Halt(Exception):
    """Raised by a validation that finds training no longer worth going on with; carries what it measured."""

    def __init__(self, reason: str, figures: Mapping[str, float]) -> None:
        super().__init__(reason)
        self.figures = dict(figures)


class FitResult(NamedTuple):
    """What a training run leaves behind."""

    best: dict[str, dict[str, Tensor]]
    """State of every module at the best validated epoch."""
    epoch: int
    """Epochs trained when ``best`` was taken."""
    step: int
    """Steps taken when ``best`` was taken."""
    metrics: dict[str, float]
    """Validation figures of ``best``."""
    halted: tuple[int, str] | None = None
    """Epoch at which a validation ended the run, and why; ``best`` is then of an epoch before."""


def device_of(choice: Device) -> torch.device:
    """Return the device that a configuration asks for; ``auto`` is a GPU where there is one."""
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)


def constant(optimizer: Optimizer, warmup: int) -> LambdaLR:
    """Warm up linearly over ``warmup`` steps, then stay."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)))


def cosine(optimizer: Optimizer, warmup: int, total: int) -> LambdaLR:
    """Warm up linearly over ``warmup`` steps, then fall along a cosine to 0 at step ``total``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return LambdaLR(optimizer, factor)


def _ignore(*_: object) -> None:
    """Stand in for a hook nobody asked for."""


def fit(
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer,
    schedule: LambdaLR,
    batches: Callable[[int], Iterable[Batch]],
    step: Callable[[Batch], Mapping[str, Tensor]],
    validate: Callable[[int], Mapping[str, float]],
    config: LoopConfig,
    *,
    select: str,
    generator: torch.Generator,
    log: Log = _ignore,
    save: Callable[[State], None] = _ignore,
    resume: State | None = None,
) -> FitResult:
    """Train until the last epoch or until patience runs out, and return the best validated state.

    Parameters
    ----------
    modules : mapping of str to Module
        Everything with state: what is trained, and buffers such as the SID table that must match it.
    optimizer, schedule
        Over the trainable parameters; the schedule advances once a step.
    batches : callable
        Epoch number to the batches of that epoch.
    step : callable
        Batch to named scalar losses; ``"loss"`` is minimised, the others are logged.
    validate : callable
        Number of epochs trained to figures; after every ``validate_every`` epochs and the last. ``Halt`` ends the
        run at the best state so far.
    config : LoopConfig
        Length, patience, clipping.
    select : str
        The figure of ``validate`` that is maximised.
    generator : torch.Generator
        The stage's random stream, part of the saved state so that a resumed run repeats an unbroken one.
    log, save : callable
        Receive numbers, and a resumable state after every validation.
    resume : dict, optional
        A state that ``save`` received earlier.

    Returns
    -------
    FitResult

    Raises
    ------
    Halt
        The first validation halted: there is no earlier state to return.
    FloatingPointError
        The loss is no longer finite.
    """
    epoch, steps, waited = 0, 0, 0
    best: FitResult | None = None
    if resume is not None:
        epoch, steps, waited, best = _restore(resume, modules, optimizer, schedule, generator)
    patience = math.inf if config.patience is None else config.patience
    while epoch < config.epochs and waited < patience:
        for module in modules.values():
            module.train()
        since_log, since_epoch = Means(), Means()
        for batch in batches(epoch):
            losses = step(batch)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            if config.clip_norm is not None:
                for module in modules.values():
                    nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
            optimizer.step()
            schedule.step()
            steps += 1
            since_log.add(losses)
            since_epoch.add({"loss": losses["loss"]})
            if steps % config.log_every == 0:
                log(steps, {f"train/{name}": value for name, value in since_log.take(steps).items()})
        if steps % config.log_every:  # what is left of the epoch: short runs have curves too
            log(steps, {f"train/{name}": value for name, value in since_log.take(steps).items()})
        epoch += 1
        if epoch % config.validate_every and epoch < config.epochs:
            continue

        for module in modules.values():
            module.eval()
        try:
            with torch.no_grad():
                figures = dict(validate(epoch))
        except Halt as halt:
            log(steps, {"epoch": epoch, **since_epoch.take(steps), **halt.figures})
            if best is None:
                raise
            return best._replace(halted=(epoch, str(halt)))
        log(steps, {"epoch": epoch, **since_epoch.take(steps), **figures})
        if best is None or figures[select] > best.metrics[select]:
            best, waited = FitResult(_states(modules), epoch, steps, figures), 0
        else:
            waited += 1
        save(_snapshot(epoch, steps, waited, best, modules, optimizer, schedule, generator))
    assert best is not None
    return best


class Means:
    """Running means of named scalars; they stay on their device until they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's values; NaN says that a step had nothing to measure, except in the loss."""
        for name, value in values.items():
            value = value.detach()
            known = torch.ones_like(value) if name == "loss" else (~value.isnan()).to(value)
            self._sums[name] = self._sums.get(name, 0) + (value if name == "loss" else value.nan_to_num(0.0))
            self._counts[name] = self._counts.get(name, 0) + known

    def take(self, step: int) -> dict[str, float]:
        """Return the means and start anew.

        Raises
        ------
        FloatingPointError
            The loss is no longer finite.
        """
        counts = {name: float(count) for name, count in self._counts.items()}
        means = {name: float(value) / counts[name] for name, value in self._sums.items() if counts[name]}
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"step {step}: the loss is {means['loss']}; lower the learning rate")
        self._sums, self._counts = {}, {}
        return means


def _states(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}


def _snapshot(
    epoch: int,
    steps: int,
    waited: int,
    best: FitResult,
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer,
    schedule: LambdaLR,
    generator: torch.Generator,
) -> State:
    return {
        "epoch": epoch,
        "steps": steps,
        "waited": waited,
        "best": best._asdict(),
        "modules": _states(modules),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "schedule": schedule.state_dict(),
        "generator": generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore(
    state: State,
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer,
    schedule: LambdaLR,
    generator: torch.Generator,
) -> tuple[int, int, int, FitResult]:
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    return state["epoch"], state["steps"], state["waited"], FitResult(**state["best"])
