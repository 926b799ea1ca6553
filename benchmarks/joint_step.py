"""CPU time of a joint training step, as a multiple of the same recommender's step on frozen SIDs.

Every arm is the step that ``train_recommender`` or ``train_jointly`` hands to the training loop, taken from there
and not rebuilt. All arms see the same batches, interleaved batch by batch, in one process on one thread, and must
start from the same recommendation loss. CPU time is counted beside wall time, so a busy machine changes little.

    OMP_NUM_THREADS=1 python benchmarks/joint_step.py --batches 60
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from machine import processor
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from components.artifacts import ContentEmbeddings, SequenceSplit, SidTable, TokenizerCheckpoint
from components.config import load_preset
from components.data.ingest import ingest
from components.data.splits import hold_out
from components.embeddings import encode_items
from components.exploration import FrqudConfig, GumbelConfig, NoNoiseConfig, SdudFrqudConfig
from components.recommenders.tiger import TigerConfig
from components.seams import SequenceBatch
from components.tokenizers.sids import assign
from components.training import joint, recommender
from components.training.joint import JointConfig, JointStage, train_jointly
from components.training.loop import Means
from components.training.recommender import RecommenderStage, train_recommender
from components.training.tokenizer import train_tokenizer
from workflows.config import PipelineConfig

CLAIM = 1.3
"""A joint step costs at most this multiple of a frozen one."""
BATCHES, SMOKE, WARM_UP, TOKENIZER_EPOCHS = 60, 2, 3, 5
RESULT = Path(__file__).parent / "results" / "joint_step.md"

FROZEN, AGAIN, GUMBEL = "frozen SIDs", "frozen SIDs, once more", "joint `gumbel`"
EXPLORATIONS: dict[str, dict[str, Any]] = {
    "joint `none`": {"exploration": NoNoiseConfig()},
    GUMBEL: {"exploration": GumbelConfig()},
    "joint `frqud`": {"exploration": FrqudConfig()},
    "joint `sdud_frqud`": {"exploration": SdudFrqudConfig()},
    "joint `gumbel`, `suffix_cost` 1": {"exploration": GumbelConfig(), "suffix_cost": 1.0},
}
"""The arms that the claim is about, and what they change in the preset's joint section."""
ENCODER_FORWARD = "`gumbel`, encoder run forward each step"
ENCODER_TRAINED = "`gumbel`, `train_encoder`"
EVERY_OCCURRENCE = "`gumbel`, tokenizer over every occurrence"


class Stages(NamedTuple):
    """What training starts from."""

    split: SequenceSplit
    embeddings: ContentEmbeddings
    tokenizer: TokenizerCheckpoint
    sids: SidTable


@dataclass(kw_only=True)
class Arm:
    """One training run, stopped at the door of its loop, and what its steps took."""

    modules: Mapping[str, nn.Module]
    optimizer: Optimizer
    schedule: LambdaLR
    batches: Callable[[int], Iterator[SequenceBatch]]
    step: Callable[[SequenceBatch], Mapping[str, Tensor]]
    see: Callable[[SequenceBatch], SequenceBatch] = lambda batch: batch
    """Brings a batch into the form that this arm learns from; not timed."""
    means: Means = field(default_factory=Means)
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


class _Handed(Exception):
    """Carries out what a training function hands to the loop."""


def stopped_at_the_loop(module: ModuleType, train: Callable[[], object]) -> Arm:
    """Call a training function of a module and return what it hands to ``fit``; nothing is trained."""

    def take(
        modules: Any, optimizer: Any, schedule: Any, batches: Any, step: Any, *_: Any, **__: Any
    ) -> None:
        raise _Handed(
            Arm(modules=modules, optimizer=optimizer, schedule=schedule, batches=batches, step=step)
        )

    with patch.object(module, "fit", take):
        try:
            train()
        except _Handed as handed:
            arm: Arm = handed.args[0]
            for part in arm.modules.values():
                part.train()
            return arm
    raise AssertionError(f"{module.__name__} trained without calling fit")


def frozen_arm(stages: Stages, stage: RecommenderStage) -> Arm:
    """Return the recommender on the table."""
    return stopped_at_the_loop(
        recommender, lambda: train_recommender(stages.split, stages.sids, stages.embeddings, stage, _quiet)
    )


def joint_arm(stages: Stages, stage: RecommenderStage, joint_stage: JointStage, **changes: Any) -> Arm:
    """Return a joint run with some changes to its section, ready for its first step."""
    config = JointConfig(recommender=stage, joint=joint_stage.model_copy(update=changes))
    arm = stopped_at_the_loop(joint, lambda: train_jointly(*stages, config, _quiet))
    next(arm.batches(0))  # what is settled once an epoch, such as the occupancy of the table
    return arm


def without_cached_latents(arm: Arm, x_ND: Tensor) -> Arm:
    """Make the frozen encoder run over a batch's items in every step, forward only."""
    live = arm.modules["sids"]
    live.tokenizer.encoder.requires_grad_(False)
    live._x_ND, live._latents = x_ND, None
    return arm


def every_occurrence(batch: SequenceBatch) -> SequenceBatch:
    """Give each occurrence of an item a row of its own in ``unique``; padding gets none.

    The tokenizer then works on all of them, its losses weigh items by occurrence, noise is drawn for each, and
    each carries soft weights to the recommender.
    """
    read = int(batch.mask.sum())
    items = torch.zeros_like(batch.items)
    items[batch.mask] = torch.arange(read)
    return SequenceBatch(
        batch.unique[torch.cat([batch.items[batch.mask], batch.target])],
        torch.where(batch.mask, items, items[:, :1]),
        batch.mask,
        torch.arange(read, read + len(batch.target)),
    )


def build_arms(stages: Stages, stage: RecommenderStage, joint_stage: JointStage) -> dict[str, Arm]:
    """Return all arms of one recommender by name; the frozen one stands there twice, to show what chance does."""
    arms = {FROZEN: frozen_arm(stages, stage), AGAIN: frozen_arm(stages, stage)}
    for name, changes in EXPLORATIONS.items():
        arms[name] = joint_arm(stages, stage, joint_stage, **changes)

    def gumbel(**changes: Any) -> Arm:
        return joint_arm(stages, stage, joint_stage, exploration=GumbelConfig(), **changes)

    arms[ENCODER_FORWARD] = without_cached_latents(gumbel(), stages.embeddings.matrix)
    arms[ENCODER_TRAINED] = gumbel(train_encoder=True)
    arms[EVERY_OCCURRENCE] = gumbel()
    arms[EVERY_OCCURRENCE].see = every_occurrence
    return arms


def first_losses(arms: Mapping[str, Arm], batch: SequenceBatch) -> dict[str, float]:
    """Return each arm's recommendation loss on a batch, all with the same dropout."""
    losses = {}
    for name, arm in arms.items():
        torch.manual_seed(0)
        parts = arm.step(arm.see(batch))
        losses[name] = float(parts.get("recommendation", parts["loss"]).detach())
    return losses


def advance(arm: Arm, batch: SequenceBatch, clip_norm: float | None) -> None:
    """Take one step as ``training.loop.fit`` takes it, the running means of the log included."""
    losses = arm.step(batch)
    arm.optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    if clip_norm is not None:
        for module in arm.modules.values():
            nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
    arm.optimizer.step()
    arm.schedule.step()
    arm.means.add(losses)


def measure(arms: Mapping[str, Arm], batches: list[SequenceBatch], warm_up: int, clip: float | None) -> None:
    """Take every arm through all batches in turn; who comes first changes from batch to batch."""
    order = list(arms.values())
    for number, batch in enumerate(batches):
        turn = number % len(order)
        for arm in order[turn:] + order[:turn]:
            seen = arm.see(batch)
            wall, cpu = time.perf_counter(), time.process_time()
            advance(arm, seen, clip)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number >= warm_up:
                arm.cpu.append(cpu)
                arm.wall.append(wall)


def once_an_epoch(arm: Arm, batches: list[SequenceBatch]) -> tuple[float, float]:
    """Return the CPU seconds of what a joint epoch adds to its steps: the gradient probe and the refresh."""
    probes = []
    for batch in batches:
        next(arm.batches(0))  # an epoch's first step probes, the second does not
        first = _cpu_seconds(lambda batch=batch: arm.step(batch))
        probes.append(first - _cpu_seconds(lambda batch=batch: arm.step(batch)))
    return statistics.median(probes), _cpu_seconds(arm.modules["sids"].refresh)


def _cpu_seconds(run: Callable[[], object]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def _quiet(step: int, values: Mapping[str, float]) -> None:
    """Log nothing."""


def ratio_of_medians(arm: Arm, frozen: Arm) -> float:
    """Return the arm's median CPU time over that of the frozen one."""
    return statistics.median(arm.cpu) / statistics.median(frozen.cpu)


def paired_ratios(arm: Arm, frozen: Arm) -> list[float]:
    """Return the ratio of CPU times on each batch, ascending."""
    return sorted(mine / other for mine, other in zip(arm.cpu, frozen.cpu, strict=True))


def _row(name: str, arm: Arm, frozen: Arm) -> str:
    paired = paired_ratios(arm, frozen)
    tenth = len(paired) // 10
    wall = statistics.median(arm.wall) / statistics.median(frozen.wall)
    return (
        f"| {name} | {1e3 * statistics.median(arm.cpu):.1f} | {ratio_of_medians(arm, frozen):.2f} "
        f"| {statistics.median(paired):.2f} | {paired[tenth]:.2f}-{paired[-1 - tenth]:.2f} "
        f"| {1e3 * statistics.median(arm.wall):.1f} | {wall:.2f} |"
    )


def _worth(name: str, arms: Mapping[str, Arm]) -> str:
    """Return the verdict of an arm with a saving off, and what that costs beside the arm with both on."""
    beside = statistics.median(paired_ratios(arms[name], arms[GUMBEL]))
    return f"{_verdict(name, arms[name], arms[FROZEN])}; {beside:.2f}x {GUMBEL}, batch by batch"


def _verdict(name: str, arm: Arm, frozen: Arm) -> str:
    middle, paired = ratio_of_medians(arm, frozen), statistics.median(paired_ratios(arm, frozen))
    said = {True: f"within {CLAIM}x", False: f"**not within {CLAIM}x**"}
    both = "" if (middle <= CLAIM) == (paired <= CLAIM) else f"; by the paired ratio {said[paired <= CLAIM]}"
    return f"- {name}: {said[middle <= CLAIM]} ({middle:.2f}x){both}"


def block(stages: Stages, stage: RecommenderStage, joint_stage: JointStage, count: int) -> list[str]:
    """Measure all arms of one recommender and return the lines that say what came out."""
    model, clip = stage.model, stage.loop.clip_norm
    arms = build_arms(stages, stage, joint_stage)
    frozen = arms[FROZEN]
    drawn = frozen.batches(0)
    batches = list(islice(drawn, WARM_UP + count))
    steps = len(batches) + sum(1 for _ in drawn)

    losses = first_losses(arms, batches[0])
    apart = max(losses.values()) - min(losses.values())
    if apart > 1e-4:
        raise SystemExit(f"the arms do not start from one recommendation loss: {losses}")
    measure(arms, batches, WARM_UP, clip)
    probe, refresh = once_an_epoch(arms[GUMBEL], batches[:3])
    epoch = steps * statistics.mean(frozen.cpu)

    unique = statistics.mean(len(batch.unique) for batch in batches[WARM_UP:])
    occurrences = statistics.mean(int(b.mask.sum()) + len(b.target) for b in batches[WARM_UP:])
    off = [ENCODER_FORWARD, ENCODER_TRAINED, EVERY_OCCURRENCE]
    return [
        f"## `{model.kind}`",
        "",
        "| arm | CPU ms a step, median | to frozen, of medians | to frozen, batch by batch, median "
        "| the same, 10 to 90 % | wall ms, median | wall, to frozen |",
        "|---|---|---|---|---|---|---|",
        *(_row(name, arm, frozen) for name, arm in arms.items()),
        "",
        f"Claim: at most {CLAIM}x the frozen step, by the ratio of medians of CPU time.",
        "",
        *(_verdict(name, arms[name], frozen) for name in EXPLORATIONS),
        "",
        "With a saving switched off, which the claim does not cover:",
        "",
        *(_worth(name, arms) for name in off),
        "",
        f"Model: d {model.dim}, layers {model.layers}, {model.heads} heads x {model.head_dim}, hidden "
        f"{model.hidden}, dropout {model.dropout}, {model.max_history} items read. Batches of "
        f"{stage.batch_size} rows, on average {unique:.0f} unique items in {occurrences:.0f} occurrences. {count} "
        f"batches after {WARM_UP} of warm-up, of an epoch of {steps}. Before the first step all arms have the same "
        f"recommendation loss, {apart:.0e} apart at most. Not in the step: once an epoch, joint training takes "
        f"{1e3 * probe:.0f} ms for the gradient probe and {1e3 * refresh:.0f} ms for the refresh of the table, "
        f"together {(probe + refresh) / epoch:.1%} of a frozen epoch's steps.",
        "",
    ]


def prepare(config: PipelineConfig) -> Stages:
    """Run the stages before the recommender."""
    log, catalog = ingest(config.ingest)
    split = hold_out(log, catalog, config.split)
    embeddings = encode_items(catalog, config.embedding.encoder)
    tokenizer = train_tokenizer(embeddings, config.tokenizer)
    return Stages(split, embeddings, tokenizer, assign(tokenizer, embeddings, config.sids))


def main() -> None:
    """Measure both recommenders, print the result and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"batches timed (default {BATCHES})")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE} batches, and no result file")
    parser.add_argument("--commit", default="not given", help="commit to name in the result file")
    arguments = parser.parse_args()
    count = SMOKE if arguments.smoke else arguments.batches
    torch.set_num_threads(1)
    load, started = os.getloadavg()[0], time.process_time()

    short = [f"tokenizer.loop.{key}={TOKENIZER_EPOCHS}" for key in ("epochs", "validate_every")]
    config = load_preset(PipelineConfig, "quickstart", [*short, "recommender.device=cpu"])
    stages = prepare(config)
    sizes = config.recommender.model.model_dump(include=set(TigerConfig.model_fields) - {"kind"})
    tiger = config.recommender.model_copy(update={"model": TigerConfig(**sizes)})
    blocks = [block(stages, stage, config.joint, count) for stage in (config.recommender, tiger)]

    lines = [
        "# A joint training step beside the same step on frozen SIDs",
        "",
        "A step is loss, backward, clipping, optimiser, schedule and the running means of the log, as the training "
        "loop takes it; making the batch is left out for all. `frozen SIDs, once more` is the same arm a second "
        "time: how far it is from 1.00 is what chance does. The last three arms each switch one saving off:",
        "",
        f"- {ENCODER_FORWARD}: no cached latents; the frozen encoder runs over the batch's unique items, without "
        "gradient.",
        f"- {ENCODER_TRAINED}: the encoder learns too, so it runs forward and backward.",
        f"- {EVERY_OCCURRENCE}: no unique items; every occurrence of an item, padding left out, goes through the "
        "tokenizer, its losses, the noise and the soft embedding for itself.",
        "",
        *(line for lines_ in blocks for line in lines_),
        f"Data: {_data(stages, config)}. Preset `quickstart`, {config.recommender.model.kind} as it stands there and "
        f"tiger with the same sizes; rqvae {_codebooks(config)}, hidden {config.tokenizer.model.hidden}, latent "
        f"{config.tokenizer.model.latent_dim}, trained for {TOKENIZER_EPOCHS} epochs only, which changes no shape. "
        f"Seed {config.recommender.seed}. One thread; arms interleaved batch by batch, their order rotated.",
        "",
        f"Machine: {processor()}, {os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} "
        f"after. Python {platform.python_version()}, torch {torch.__version__}. Date: {date.today().isoformat()}. "
        f"Commit: {arguments.commit}. Command: `OMP_NUM_THREADS=1 python benchmarks/joint_step.py "
        f"--batches {count}`, {time.process_time() - started:.0f} CPU-seconds.",
    ]
    print("\n".join(lines))
    if not arguments.smoke:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n")


def _data(stages: Stages, config: PipelineConfig) -> str:
    events = int(stages.split.train["sequence"].list.len().sum())
    return (
        f"the {config.ingest.source.name} sample, {len(stages.split.train):,} customers, {stages.split.num_items:,} "
        f"items, {events:,} training events"
    )


def _codebooks(config: PipelineConfig) -> str:
    return " x ".join(str(size) for size in config.tokenizer.model.codebook_sizes)


if __name__ == "__main__":
    main()
