"""What recommenders cost at equal width and layers: training, memory, and latency of a request.

Training is the step that ``train_recommender`` hands to its loop, taken from there and not rebuilt; peak memory is that
of a fresh process which takes a number of them. A request is one call of ``Recommender.rank``: histories are encoded
once, keys and values of a user are projected once, and all recommenders search the same tree. Recommenders take turns
in one process on one thread. SIDs, histories of requests and weights that rank are random: costs are of shapes alone.

    OMP_NUM_THREADS=1 python benchmarks/recommenders.py --batches 60 --repetitions 30
"""

import argparse
import itertools
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from joint_step import Arm, advance, stopped_at_the_loop
from machine import processor
from sinkhorn import alone

from components.artifacts import ContentEmbeddings, SequenceSplit, SidTable
from components.config import load_preset
from components.data.ingest import ingest
from components.data.splits import hold_out
from components.recommenders.backbones import StackConfig
from components.recommenders.build import RecommenderConfig, build_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.exact import exact_ranker
from components.recommenders.intrr import IntrrConfig
from components.recommenders.tiger import TigerConfig
from components.seams import Ranker, Ranking, SequenceBatch
from components.tokenizers.sids import space_of, table_symbols
from components.tokenizers.trie import build_trie
from components.training import recommender
from components.training.recommender import RecommenderStage, item_facts, train_recommender
from workflows.config import PipelineConfig

BATCHES, REPETITIONS, WARM_UP, SMOKE = 60, 30, 3, 2
CODES, LEVELS, SUFFIXES = 64, 3, 128
USERS, HISTORIES, BEAMS = (1, 32), (8, 32, 128), (10, 20, 50)
TRAINED_ON = 32
"""Items of a history in training, at most."""
PUBLISHED = StackConfig(dim=256, layers=4, heads=6, head_dim=64, hidden=1024, dropout=0.15)
"""The stack of IntRR (arXiv 2602.20704), but for its feed-forward layer of three linears."""
RESULTS = Path(__file__).parent / "results"

KINDS = {"causal": CausalConfig, "tiger": TigerConfig, "intrr": IntrrConfig}
BASE, EXACT = "causal", "intrr exact"

Decoder = Callable[[SequenceBatch, int], Ranking]


class Request(NamedTuple):
    """The shape of a request."""

    users: int
    history: int
    beams: int


class Peak(NamedTuple):
    """Largest resident memory of a process, in bytes from its start."""

    before: int
    """Ready for the first step: interpreter, torch, data, weights."""
    after: int
    """When the last step is done."""


@dataclass
class Spent:
    """What calls took, in seconds; what they got done, in pairs or users."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def time(self, call: Callable[[], object], done: int) -> None:
        """Time one call."""
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        self.done.append(done)

    def rate(self) -> float:
        """Return what a CPU-second gets done, median over the calls."""
        return statistics.median(done / cpu for done, cpu in zip(self.done, self.cpu, strict=True))

    def milliseconds(self, quantile: float) -> float:
        """Return a quantile of the time on the clock."""
        return 1e3 * float(np.quantile(self.wall, quantile))


def models(like: StackConfig, max_history: int) -> dict[str, RecommenderConfig]:
    """Return every kind of recommender, as large as a stack; the RAN's hidden layer is twice as wide as the model, as
    published, where the model is as wide as published, and else as by default.
    """
    sizes = {name: getattr(like, name) for name in StackConfig.model_fields}
    published = {"intrr": {"ran_hidden": 512, "uid_dim": 512}} if like.dim == PUBLISHED.dim else {}
    return {
        name: kind(**sizes, max_history=max_history, **published.get(name, {}))
        for name, kind in KINDS.items()
    }


def random_sids(items: int) -> SidTable:
    """Return random codes, ``LEVELS`` of them an item, seed 0."""
    codes = torch.randint(CODES, (items, LEVELS), generator=torch.Generator().manual_seed(0))
    frame = pl.DataFrame({"codes": codes.numpy()}).select(
        item_id=pl.int_range(pl.len(), dtype=pl.UInt32), codes=pl.col("codes").cast(pl.List(pl.UInt16))
    )
    return SidTable(
        codes=frame.with_columns(suffix=pl.int_range(pl.len()).over("codes").cast(pl.UInt16)),
        codebook_sizes=[CODES] * LEVELS,
        suffix_size=SUFFIXES,
        shared=False,
        tokenizer="",
    )


def no_text(items: int) -> ContentEmbeddings:
    """Return content vectors that no recommender here reads."""
    vectors = {"vectors": torch.zeros(items, 1)}
    return ContentEmbeddings(vectors=vectors, encoder="", revision="", normalised=False, catalog="")


def training_arm(
    split: SequenceSplit, sids: SidTable, model: RecommenderConfig, stage: RecommenderStage
) -> Arm:
    """Return the training of a recommender, stopped before its first step."""
    stage = stage.model_copy(update={"model": model})
    embeddings = no_text(split.num_items)
    return stopped_at_the_loop(recommender, lambda: train_recommender(split, sids, embeddings, stage, _quiet))


def training_pairs(arm: Arm, batch: SequenceBatch) -> int:
    """Count the items that a batch predicts: one a row, or all of a window but the first."""
    recommender = arm.modules.get("recommender")  # SASRec has another name, and predicts all of a window
    every = recommender is None or recommender.positions == "all"
    return int(batch.mask.sum()) if every else len(batch.target)


def time_training(
    arms: Mapping[str, Arm], count: int, clip_norms: Mapping[str, float | None]
) -> dict[str, Spent]:
    """Take every arm through so many of its own batches, in turn; who comes first changes from turn to turn."""
    drawn = {name: list(itertools.islice(arm.batches(0), WARM_UP + count)) for name, arm in arms.items()}
    spent = {name: Spent() for name in arms}
    for number in range(min(map(len, drawn.values()))):
        for name in _rotated(list(arms), number):
            arm, batch = arms[name], drawn[name][number]
            into = spent[name] if number >= WARM_UP else Spent()
            clip_norm = clip_norms[name]
            into.time(
                lambda arm=arm, batch=batch, clip_norm=clip_norm: advance(arm, batch, clip_norm),
                training_pairs(arm, batch),
            )
    return spent


def peak_of_training(
    split: SequenceSplit, sids: SidTable, model: RecommenderConfig, stage: RecommenderStage, count: int
) -> Peak:
    """Take so many steps; to be called in a process that has done nothing else."""
    torch.set_num_threads(1)
    arm = training_arm(split, sids, model, stage)
    before = _peak_memory()
    for batch in itertools.islice(arm.batches(0), count):
        advance(arm, batch, stage.loop.clip_norm)
    return Peak(before, _peak_memory())


def _peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux's ru_maxrss starts at that of the process which started this one; VmHWM is of this one alone.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def decoders(
    split: SequenceSplit, sids: SidTable, configs: Mapping[str, RecommenderConfig]
) -> dict[str, Decoder]:
    """Return how each recommender ranks, fresh weights, and how an ``intrr`` does by scoring all items."""
    torch.manual_seed(0)
    space, symbols = space_of(sids), table_symbols(sids)
    trie, facts = build_trie(symbols), item_facts(split, no_text(split.num_items))
    found: dict[str, Decoder] = {}
    with torch.inference_mode():
        for name, config in configs.items():
            model = build_recommender(config, space, facts).eval()
            catalogue = model.catalogue(symbols, trie)
            rankers: dict[str, Ranker] = {name: model}
            if (exact := exact_ranker(model, catalogue)) is not None:
                rankers[EXACT] = exact
            for which, ranker in rankers.items():
                found[which] = lambda batch, beams, ranker=ranker, catalogue=catalogue: ranker.rank(
                    batch, catalogue, beams, exclude_seen=False
                )
    return found


def random_batch(request: Request, items: int) -> SequenceBatch:
    """Return full histories of random items, seed 0."""
    drawn = torch.randint(items, (request.users, request.history), generator=torch.Generator().manual_seed(0))
    unique, inverse = torch.unique(drawn, return_inverse=True)
    return SequenceBatch(unique, inverse, torch.ones_like(drawn, dtype=torch.bool), inverse[:, 0])


@torch.inference_mode()
def time_decoding(
    arms: Mapping[str, Decoder], requests: Sequence[Request], items: int, repetitions: int
) -> dict[Request, dict[str, Spent]]:
    """Rank every request so many times with every recommender, in turn."""
    spent: dict[Request, dict[str, Spent]] = {}
    for request in requests:
        batch = random_batch(request, items)
        spent[request] = {name: Spent() for name in arms}
        for number in range(WARM_UP + repetitions):
            for name in _rotated(list(arms), number):
                into = spent[request][name] if number >= WARM_UP else Spent()
                into.time(
                    lambda rank=arms[name], batch=batch, beams=request.beams: rank(batch, beams),
                    request.users,
                )
    return spent


def _rotated(names: list[str], number: int) -> list[str]:
    turn = number % len(names)
    return names[turn:] + names[:turn]


def _quiet(step: int, values: Mapping[str, float]) -> None:
    """Log nothing."""


def table(
    trained: Mapping[str, Spent],
    peaks: Mapping[str, Peak],
    decoded: Mapping[Request, Mapping[str, Spent]],
) -> list[str]:
    """Return the rows of the table: what each recommender takes, then the ratio to ``BASE``."""
    names = list(next(iter(decoded.values())))
    others = [name for name in names if name != BASE]

    def row(what: str, texts: Mapping[str, str], values: Mapping[str, float]) -> str:
        ratios = [f"{values[name] / values[BASE]:.2f}" if name in values else "-" for name in others]
        return f"| {what} | {' | '.join([texts.get(name, '-') for name in names] + ratios)} |"

    rates = {name: spent.rate() for name, spent in trained.items()}
    peak = {name: p.after / 2**20 for name, p in peaks.items()}
    added = {name: (p.after - p.before) / 2**20 for name, p in peaks.items()}
    lines = [
        f"| | {' | '.join([*names, *(f'{name} / {BASE}' for name in others)])} |",
        f"|---|{'---|' * (len(names) + len(others))}",
        row("training, pairs per CPU-second", {n: f"{rate:,.0f}" for n, rate in rates.items()}, rates),
        row("training, peak memory MiB", {n: f"{mib:.0f}" for n, mib in peak.items()}, peak),
        row("of it added by the steps", {n: f"{mib:.0f}" for n, mib in added.items()}, added),
    ]
    for request, arms in decoded.items():
        middle = {name: spent.milliseconds(0.5) for name, spent in arms.items()}
        texts = {name: f"{middle[name]:.1f} / {arms[name].milliseconds(0.95):.1f}" for name in arms}
        lines.append(row(f"ms p50 / p95, {_words(request)}", texts, middle))
    for request, arms in decoded.items():
        users = {name: spent.rate() for name, spent in arms.items()}
        texts = {name: f"{rate:,.0f}" for name, rate in users.items()}
        lines.append(row(f"users per CPU-second, {_words(request)}", texts, users))
    return lines


def _words(request: Request) -> str:
    users = f"{request.users} user{'s' if request.users > 1 else ''}"
    return f"{users}, {request.history} items, {request.beams} beams"


def main() -> None:
    """Measure all recommenders, print the table and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"training steps (default {BATCHES})")
    parser.add_argument(
        "--repetitions", type=int, default=REPETITIONS, help=f"times a request (default {REPETITIONS})"
    )
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE} of each, one request, no file")
    parser.add_argument("--published", action="store_true", help="d 256 and 4 layers, into a file of its own")
    parser.add_argument("--commit", default="not given", help="commit to name in the result file")
    arguments = parser.parse_args()
    count, repetitions = (SMOKE, SMOKE) if arguments.smoke else (arguments.batches, arguments.repetitions)
    torch.set_num_threads(1)
    load, started = os.getloadavg()[0], time.process_time()

    config = load_preset(PipelineConfig, "quickstart", ["recommender.device=cpu"])
    stage, size = config.recommender, PUBLISHED if arguments.published else config.recommender.model
    split = hold_out(*ingest(config.ingest), config.split)
    sids = random_sids(split.num_items)
    learning = models(size, TRAINED_ON)
    arms = {name: training_arm(split, sids, model, stage) for name, model in learning.items()}
    trained = time_training(arms, count, dict.fromkeys(arms, stage.loop.clip_norm))
    peaks = {
        name: alone(peak_of_training, split, sids, model, stage, count) for name, model in learning.items()
    }
    requests = [Request(*shape) for shape in itertools.product(USERS, HISTORIES, BEAMS)]
    requests = requests[:1] if arguments.smoke else requests
    ranking = decoders(split, sids, models(size, max(HISTORIES)))
    decoded = time_decoding(ranking, requests, split.num_items, repetitions)

    weights = ", ".join(
        f"{name} {sum(p.numel() for p in arm.modules['recommender'].parameters()):,}"
        for name, arm in arms.items()
    )
    pairs = ", ".join(f"{name} {statistics.mean(spent.done):.0f}" for name, spent in trained.items())
    events = int(split.train["sequence"].list.len().sum())
    flag = " --published" if arguments.published else ""
    lines = [
        "# Cost of recommenders at equal width and layers",
        "",
        *table(trained, peaks, decoded),
        "",
        "A training pair is an item that is predicted from those before it; a step is loss, backward, clipping, "
        "optimiser, schedule and the running means of the log, as the training loop takes it. Ratios of times and "
        "rates are of medians. A request is one call of `rank`, histories encoded once and item tokens, where a "
        f"recommender has them, made before; `{EXACT}` replaces its beam search by exact scores of the catalogue, so "
        "beams are the length of its list alone.",
        "",
        f"Training: {stage.batch_size} rows a step of histories of up to {TRAINED_ON} items, {count} steps after "
        f"{WARM_UP} of warm-up; pairs a step, mean: {pairs}. Peak memory is of a fresh process that takes {count} "
        f"steps, resident, interpreter, torch and data included. Requests: full histories of random items, "
        f"{repetitions} times each after {WARM_UP} of warm-up; models of max_history {max(HISTORIES)}.",
        "",
        f"Models: d {size.dim}, layers {size.layers} (tiger {size.layers}+{size.layers}), {size.heads} heads x "
        f"{size.head_dim}, hidden {size.hidden}, dropout {size.dropout}; else as by default. Parameters: {weights}. "
        f"SIDs: {LEVELS} levels of {CODES} random codes and a suffix, seed 0. Fresh weights, seed 0.",
        "",
        f"Data: the {config.ingest.source.name} sample, {len(split.train):,} customers, {split.num_items:,} items, "
        f"{events:,} training events. One thread; recommenders interleaved call by call, their order rotated.",
        "",
        f"Machine: {processor()}, {os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} "
        f"after. Python {platform.python_version()}, torch {torch.__version__}. Date: {date.today().isoformat()}. "
        f"Commit: {arguments.commit}. Command: `OMP_NUM_THREADS=1 python benchmarks/recommenders.py "
        f"--batches {count} --repetitions {repetitions}{flag}`, {time.process_time() - started:.0f} CPU-seconds.",
    ]
    print("\n".join(lines))
    if not arguments.smoke:
        RESULTS.mkdir(exist_ok=True)
        name = "recommenders-published.md" if arguments.published else "recommenders.md"
        (RESULTS / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
