"""Time and memory of balancing a whole catalogue: blocks of rows against whole float64 matrices.

Both sides quantise the same latents level by level and must give the same codes. Every case runs in a process
of its own, on one thread, so that its peak memory is its own: interpreter, torch and latents included.

    python benchmarks/sinkhorn.py --items 1000000 --compared 100000
"""

import argparse
import math
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import processor
from torch import Tensor

from components.tokenizers.quantize import residual_codes, sinkhorn, sinkhorn_codes, squared_distances

CODES, LEVELS, EPSILON, ITERATIONS = 256, 3, 0.003, 50
COMPONENTS, SPREAD, SAMPLE = 1000, 0.5, 8192
BATCH_ROWS, BATCH_CODES, BATCH_WIDTH = 256, 64, 64
LIMIT = 8e9
RESULT = Path(__file__).parent / "results" / "sinkhorn.md"


class Measured(NamedTuple):
    """One case."""

    wall: float
    """Seconds on the clock, assignment only."""
    cpu: float
    """Seconds of the processor, assignment only."""
    peak: int
    """Largest resident memory of the process, bytes, from its start."""
    codes: np.ndarray[Any, Any]
    """(N, L)."""


def mixture(items: int, width: int) -> Tensor:
    """Return latents (N, Z) float32 around ``COMPONENTS`` centres, seed 0."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(COMPONENTS, width, generator=generator)
    latents = torch.randn(items, width, generator=generator).mul_(SPREAD)
    for rows in latents.split(1 << 16):
        rows += centres[torch.randint(COMPONENTS, (len(rows),), generator=generator)]
    return latents


def sampled_codebooks(latents: Tensor) -> list[Tensor]:
    """Return one (K, Z) a level: rows of a sample, then of what nearest codes leave of it; seed 1."""
    generator = torch.Generator().manual_seed(1)
    residual = latents[torch.randint(len(latents), (SAMPLE,), generator=generator)]
    codebooks = []
    for _ in range(LEVELS):
        codebook = residual[torch.randperm(SAMPLE, generator=generator)[:CODES]]
        residual = residual - codebook[residual_codes(residual, [codebook])[:, 0]]
        codebooks.append(codebook)
    return codebooks


def whole_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """Return squared distances (N, K), a new matrix for every term."""
    return x.square().sum(1, keepdim=True) - 2 * (x @ codebook.T) + codebook.square().sum(1)


def whole_sinkhorn(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return the balanced codes (N,) by the book: two log-sum-exps a round over whole float64 matrices."""
    d = distances.double()
    high, low = d.max(), d.min()
    plan = -(d - (high + low) / 2) / ((high - low) / 2 + 1e-5) / epsilon
    row, column = torch.zeros_like(plan[:, :1]), torch.zeros_like(plan[0])
    for _ in range(iterations):
        row = -torch.logsumexp(plan + column, dim=1, keepdim=True)
        column = math.log(len(d) / len(column)) - torch.logsumexp(plan + row, dim=0)
    return (plan + row + column).argmax(1)


@torch.no_grad()
def whole_codes(z: Tensor, codebooks: Sequence[Tensor], epsilon: float, iterations: int) -> Tensor:
    """Return the codes (N, L) of ``sinkhorn_codes``, from whole matrices."""
    residual, codes = z, []
    for codebook in codebooks:
        codes.append(whole_sinkhorn(whole_distances(residual, codebook), epsilon, iterations))
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes, dim=1)


def measure(assign: Callable[..., Tensor], items: int, width: int) -> Measured:
    """Make the inputs and assign them once."""
    torch.set_num_threads(1)
    latents = mixture(items, width)
    codebooks = sampled_codebooks(latents)
    wall, cpu = time.perf_counter(), time.process_time()
    codes = assign(latents, codebooks, EPSILON, ITERATIONS)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Measured(wall, cpu, peak, codes.to(torch.int16).numpy())


def measure_batch(assign: Callable[..., Tensor], calls: int) -> float:
    """Return the median CPU seconds of balancing one level of a training batch."""
    torch.set_num_threads(1)
    latents = mixture(BATCH_ROWS, BATCH_WIDTH)
    distances = squared_distances(latents, latents[:BATCH_CODES] + 0.1)
    seconds = []
    for _ in range(calls):
        before = time.process_time()
        assign(distances, EPSILON, ITERATIONS)
        seconds.append(time.process_time() - before)
    return statistics.median(seconds)


def alone(case: Callable[..., Any], *arguments: Any) -> Any:
    """Run a case in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(case, arguments)


def _row(name: str, items: int, case: Measured) -> str:
    return f"| {name} | {items:,} | {case.wall:.1f} | {case.cpu:.1f} | {case.peak / 1e9:.2f} |"


def main() -> None:
    """Run every case, check that both sides agree, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1_000_000, help="the catalogue (default 1000000)")
    parser.add_argument("--compared", type=int, default=100_000, help="items both sides do (default 100000)")
    parser.add_argument("--width", type=int, default=256, help="width of the latents (default 256)")
    parser.add_argument("--calls", type=int, default=200, help="training batches balanced (default 200)")
    parser.add_argument("--commit", default="not given", help="commit to name in the result file")
    arguments = parser.parse_args()

    whole_batch = alone(measure_batch, whole_sinkhorn, arguments.calls)
    block_batch = alone(measure_batch, sinkhorn, arguments.calls)
    whole = alone(measure, whole_codes, arguments.compared, arguments.width)
    blocks = alone(measure, sinkhorn_codes, arguments.compared, arguments.width)
    same = float((whole.codes == blocks.codes).mean())
    if same < 1:
        raise SystemExit(f"the two sides disagree: {same:.4%} of {blocks.codes.size:,} codes are equal")
    catalogue = alone(measure, sinkhorn_codes, arguments.items, arguments.width)
    holds = "holds" if catalogue.peak <= LIMIT else "does not hold"

    lines = [
        "# Balanced assignment of a whole catalogue",
        "",
        "| side | items | wall s | CPU s | peak memory GB |",
        "|---|---|---|---|---|",
        _row("whole float64 matrices", arguments.compared, whole),
        _row("`sinkhorn_codes`, blocks of rows", arguments.compared, blocks),
        _row("`sinkhorn_codes`, blocks of rows", arguments.items, catalogue),
        "",
        f"At {arguments.compared:,} items both sides give the same {blocks.codes.size:,} codes, and blocks take "
        f"**1/{whole.cpu / blocks.cpu:.1f}** of the CPU time (1/{whole.wall / blocks.wall:.1f} of wall time) and "
        f"1/{whole.peak / blocks.peak:.1f} of the memory. "
        f"At {arguments.items:,} items a limit of {LIMIT / 1e9:.0f} GB **{holds}**.",
        "",
        f"A training batch, {BATCH_ROWS} x {BATCH_CODES}, one level: {1e3 * block_batch:.2f} ms of CPU time in "
        f"blocks, {1e3 * whole_batch:.2f} ms whole, medians of {arguments.calls} calls.",
        "",
        f"Shape: {LEVELS} levels of {CODES} codes, {ITERATIONS} iterations, epsilon {EPSILON}; latents of width "
        f"{arguments.width}, float32, drawn around {COMPONENTS} Gaussian centres of standard deviation 1 with "
        f"standard deviation {SPREAD}, seed 0; codebooks are rows of a sample of {SAMPLE:,}. One thread; each "
        "case once, in a process of its own; times are of the assignment alone, peak resident memory is of the "
        "process from its start.",
        "",
        f"Machine: {processor()}. Python {platform.python_version()}, torch {torch.__version__}. "
        f"Date: {date.today().isoformat()}. Commit: {arguments.commit}. Command: `python benchmarks/sinkhorn.py "
        f"--items {arguments.items} --compared {arguments.compared} --width {arguments.width} "
        f"--calls {arguments.calls}`.",
    ]
    print("\n".join(lines))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
