"""Training pairs per CPU-second of a step, for SIDs of one length and of unequal length at one size of batch.

Every arm is the step that ``train_recommender`` hands to the training loop, taken from there and not rebuilt. All
arms learn from the same histories with the same model; their SIDs are random, since only lengths change what a step
does, and every step packs histories up to the same number of symbols. Arms take turns in one process on one thread.

    OMP_NUM_THREADS=1 python benchmarks/packing.py --batches 60
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path

import polars as pl
import torch
from joint_step import Arm, advance, stopped_at_the_loop
from machine import processor
from torch import Tensor

from components.artifacts import ContentEmbeddings, SequenceSplit, SidTable
from components.config import load_preset
from components.data.ingest import ingest
from components.data.splits import hold_out
from components.seams import SequenceBatch
from components.tokenizers.sids import symbol_counts, table_symbols
from components.training import recommender
from components.training.recommender import RecommenderStage, train_recommender
from workflows.config import PipelineConfig

BATCHES, SMOKE, WARM_UP, BATCH_TOKENS = 60, 2, 3, 2048
CODES, SUFFIXES, LEVELS = 256, 64, 5
RESULT = Path(__file__).parent / "results" / "packing.md"

FIVE, THREE, UNEQUAL = "5 codes each", "3 codes each", "1 to 5 codes, 2 on average"
LENGTHS: dict[str, list[float]] = {
    FIVE: [0.0, 0.0, 0.0, 0.0, 1.0],
    THREE: [0.0, 0.0, 1.0],
    UNEQUAL: [0.40, 0.35, 0.15, 0.06, 0.04],
}
"""Share of the items that have 1, 2, ... codes."""


@dataclass(kw_only=True)
class Packed:
    """One arm: its SIDs, its steps, and what they took."""

    arm: Arm
    counts: Tensor
    """(N,) long, symbols of each item."""
    rates: list[float] = field(default_factory=list)
    """Training pairs per CPU-second, batch by batch."""
    pairs: list[int] = field(default_factory=list)
    symbols: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def take(self, batch: SequenceBatch, clip_norm: float | None, *, timed: bool) -> None:
        """Train one step; remember what it took if it is timed."""
        before = time.process_time()
        advance(self.arm, batch, clip_norm)
        seconds = time.process_time() - before
        if not timed:
            return
        rows = row_lengths(batch, self.counts)
        self.pairs.append(training_pairs(batch))
        self.rates.append(self.pairs[-1] / seconds)
        self.symbols.append(int(rows.sum()))
        self.positions.append(len(rows) * int(rows.max()))


def training_pairs(batch: SequenceBatch) -> int:
    """Count the items that a batch predicts: of each window all but the first, its target included."""
    return int(batch.mask.sum())


def row_lengths(batch: SequenceBatch, counts: Tensor) -> Tensor:
    """Return the symbols of each row (B,), its target included, as the recommender lays them out."""
    counts = counts[batch.unique]
    return (counts[batch.items] * batch.mask).sum(dim=1) + counts[batch.target]


def random_sids(items: int, shares: list[float], generator: torch.Generator) -> SidTable:
    """Return random codes of one shared codebook; an item has k of them with the k-th share as probability."""
    lengths = torch.multinomial(torch.tensor(shares), items, replacement=True, generator=generator) + 1
    codes = torch.randint(CODES, (items, len(shares)), generator=generator)
    frame = pl.DataFrame({"codes": codes.numpy(), "length": lengths.numpy()}).select(
        item_id=pl.int_range(pl.len(), dtype=pl.UInt32),
        codes=pl.col("codes").arr.to_list().list.head(pl.col("length")).cast(pl.List(pl.UInt16)),
    )
    return SidTable(
        codes=frame.with_columns(suffix=pl.int_range(pl.len()).over("codes").cast(pl.UInt16)),
        codebook_sizes=[CODES] * len(shares),
        suffix_size=SUFFIXES,
        shared=True,
        tokenizer="",
    )


def build_arms(split: SequenceSplit, stage: RecommenderStage) -> dict[str, Packed]:
    """Return all arms by name, each before its first step."""
    # Recommenders that read symbols alone do not look at content vectors.
    embeddings = ContentEmbeddings(
        vectors={"vectors": torch.zeros(split.num_items, 1)},
        encoder="",
        revision="",
        normalised=False,
        catalog="",
    )
    arms = {}
    for name, shares in LENGTHS.items():
        sids = random_sids(split.num_items, shares, torch.Generator().manual_seed(0))
        arm = stopped_at_the_loop(
            recommender, lambda sids=sids: train_recommender(split, sids, embeddings, stage, _quiet)
        )
        arms[name] = Packed(arm=arm, counts=symbol_counts(table_symbols(sids)))
    return arms


def measure(arms: Mapping[str, Packed], count: int, clip_norm: float | None) -> None:
    """Take every arm through so many of its own batches, in turn; who comes first changes from turn to turn."""
    order = list(arms.values())
    drawn = [list(islice(packed.arm.batches(0), WARM_UP + count)) for packed in order]
    for number in range(min(map(len, drawn))):
        for place in range(len(order)):
            at = (number + place) % len(order)
            order[at].take(drawn[at][number], clip_norm, timed=number >= WARM_UP)


def _quiet(step: int, values: Mapping[str, float]) -> None:
    """Log nothing."""


def _row(name: str, packed: Packed, fixed: Packed) -> str:
    rates = sorted(packed.rates)
    middle, tenth = statistics.median(rates), len(rates) // 10
    return (
        f"| {name} | {float(packed.counts.double().mean()) - 1:.2f} | {middle:,.0f} "
        f"| {rates[tenth]:,.0f}-{rates[-1 - tenth]:,.0f} | {middle / statistics.median(fixed.rates):.2f} "
        f"| {statistics.mean(packed.pairs):.0f} | {sum(packed.symbols) / sum(packed.positions):.1%} |"
    )


def main() -> None:
    """Measure all arms, print the result and write it down."""
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

    config = load_preset(
        PipelineConfig, "quickstart", [f"recommender.batch_tokens={BATCH_TOKENS}", "recommender.device=cpu"]
    )
    stage, model = config.recommender, config.recommender.model
    split = hold_out(*ingest(config.ingest), config.split)
    arms = build_arms(split, stage)
    measure(arms, count, stage.loop.clip_norm)

    events = int(split.train["sequence"].list.len().sum())
    lines = [
        "# Training on packed histories: SIDs of one length and of unequal length",
        "",
        "A training pair is an item that is predicted from those before it. A step is loss, backward, clipping, "
        "optimiser, schedule and the running means of the log, as the training loop takes it; making the batch is left "
        "out for all.",
        "",
        f"| SIDs | mean codes | pairs per CPU-second, median | 10 to 90 % | to {FIVE} | pairs a step, mean "
        "| positions that are symbols |",
        "|---|---|---|---|---|---|---|",
        *(_row(name, packed, arms[FIVE]) for name, packed in arms.items()),
        "",
        f"Batches of up to {BATCH_TOKENS} symbols, suffixes and targets included, of histories of up to "
        f"{model.max_history} items. {len(arms[FIVE].rates)} batches an arm after {WARM_UP} of warm-up. Random codes "
        f"of one codebook of {CODES} that all levels share, {SUFFIXES} suffixes, seed 0; shares of 1 to {LEVELS} codes "
        f"in the last arm {', '.join(f'{share:.2f}' for share in LENGTHS[UNEQUAL])}. Model: {model.kind}, "
        f"d {model.dim}, layers {model.layers}, {model.heads} heads x {model.head_dim}, hidden {model.hidden}, "
        f"dropout {model.dropout}.",
        "",
        f"Data: the {config.ingest.source.name} sample, {len(split.train):,} customers, {split.num_items:,} items, "
        f"{events:,} training events. One thread; arms interleaved batch by batch, their order rotated; every arm its "
        "own batches, since equal symbols are unequal histories.",
        "",
        f"Machine: {processor()}, {os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} "
        f"after. Python {platform.python_version()}, torch {torch.__version__}. Date: {date.today().isoformat()}. "
        f"Commit: {arguments.commit}. Command: `OMP_NUM_THREADS=1 python benchmarks/packing.py "
        f"--batches {count}`, {time.process_time() - started:.0f} CPU-seconds.",
    ]
    print("\n".join(lines))
    if not arguments.smoke:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
