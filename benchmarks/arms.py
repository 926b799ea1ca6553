"""What the arms of an ablation cost to train, and what they reach for it.

Every arm's step is the one that its training hands to the loop; the arms take turns in one process on one thread. Cost
is CPU-seconds: pairs of the whole training over the median rate of pairs. With the folder of the finished Ablation
the figure of accuracy against cost is drawn too.

    OMP_NUM_THREADS=1 python benchmarks/arms.py recommenders --batches 40 --ablation .sidflow/artifacts/Ablation/<id>
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from joint_step import Arm, stopped_at_the_loop
from machine import processor
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from recommenders import WARM_UP, Spent, time_training

from components.artifacts import Ablation
from components.config import load_preset
from components.data.ingest import ingest
from components.data.splits import hold_out
from components.embeddings import encode_items
from components.metrics.labels import label_points
from components.metrics.report import BASELINES
from components.tokenizers.sids import assign
from components.training import recommender, sasrec
from components.training.recommender import train_recommender
from components.training.sasrec import train_sasrec
from components.training.tokenizer import train_tokenizer
from workflows.config import AblationConfig

BATCHES = 40
RESULTS = Path(__file__).parent / "results"
METRIC = "R@10"


class Training(NamedTuple):
    """One arm, stopped before its first step."""

    arm: Arm
    parameters: int
    pairs: int
    """Items that the whole training predicts."""
    clip_norm: float | None
    seen: Spent


def build_arms(config: AblationConfig) -> dict[str, Training]:
    """Prepare every arm that trains on frozen SIDs, or without any, at the first seed."""
    log, catalog = ingest(config.ingest)
    split = hold_out(log, catalog, config.split)
    embeddings = encode_items(catalog, config.embedding.encoder)
    named, found = {}, {}
    for each in config.arms:
        recipe = config.resolve(each, config.seeds[0])
        if each.method == "joint":
            continue
        if each.method == "sasrec":
            stage, name = recipe.sasrec, "sasrec"
            arm = stopped_at_the_loop(sasrec, lambda stage=stage: train_sasrec(split, stage, _quiet))
        else:
            key = recipe.tokenizer.model_dump_json() + recipe.sids.model_dump_json()
            if key not in named:
                tokenizer = train_tokenizer(embeddings, recipe.tokenizer, split=split)
                named[key] = assign(tokenizer, embeddings, recipe.sids, split=split)
            stage, sids, name = recipe.recommender, named[key], "recommender"
            arm = stopped_at_the_loop(
                recommender,
                lambda stage=stage, sids=sids: train_recommender(split, sids, embeddings, stage, _quiet),
            )
        found[each.name] = Training(
            arm,
            sum(p.numel() for p in arm.modules[name].parameters()),
            stage.loop.epochs * split.num_training_targets,
            stage.loop.clip_norm,
            Spent(),
        )
    return found


def measure(arms: dict[str, Training], count: int) -> dict[str, Training]:
    """Take every arm through so many of its own batches, in turn; return the arms with what they spent."""
    spent = time_training(
        {name: each.arm for name, each in arms.items()},
        count,
        {name: each.clip_norm for name, each in arms.items()},
    )
    return {name: each._replace(seen=spent[name]) for name, each in arms.items()}


def cost(each: Training) -> float:
    """Return the CPU-seconds of the whole training."""
    return each.pairs / each.seen.rate()


def table(arms: dict[str, Training], reached: dict[str, tuple[float, float | None]]) -> list[str]:
    """Lay out cost and, where known, what was reached for it."""
    base = next(iter(arms))
    lines = [
        f"| arm | parameters | pairs per CPU-second | / {base} | CPU-seconds of training | {METRIC} ± SE |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, each in arms.items():
        value, error = reached.get(name, (None, None))
        shown = "" if value is None else f"{value:.4f}".lstrip("0")
        shown += "" if error is None else f" ± {error:.4f}".replace("0.", ".")
        rate = each.seen.rate()
        ratio = rate / arms[base].seen.rate()
        lines.append(
            f"| {name} | {each.parameters:,} | {rate:,.0f} | {ratio:.2f} | {cost(each):.0f} | {shown} |"
        )
    return lines


def draw(arms: dict[str, Training], reached: dict[str, tuple[float, float | None]], title: str) -> Figure:
    """Draw accuracy against cost, an arm a mark with its standard error over seeds."""
    figure = Figure(figsize=(9.6, 6.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for name, each in arms.items():
        if name in reached:
            value, error = reached[name]
            ax.errorbar(cost(each), value, yerr=error or 0.0, fmt="o", color="#1f5a96", capsize=3, label=name)
    lines = []
    for name in BASELINES:
        if name in reached:
            height = reached[name][0]
            lines.append(ax.axhline(height, color="#999", linewidth=1, linestyle="--"))
            across = ax.get_yaxis_transform()
            ax.text(0.005, height, name, transform=across, va="bottom", color="#555", fontsize=9)
    ax.set_xlim(left=0)
    ax.set_xlabel("CPU-seconds of training, one thread")
    ax.set_ylabel(f"{METRIC}, seen items kept")
    ax.set_title(title, loc="left", fontsize=11)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    figure.draw_without_rendering()
    label_points(ax, [], lines)
    return figure


def main() -> None:
    """Measure the arms of a preset, print the table and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help="an ablation's preset, such as recommenders")
    parser.add_argument("settings", nargs="*", help="changes, such as ingest.source.name=movietweetings")
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"steps of each arm (default {BATCHES})")
    parser.add_argument("--ablation", type=Path, help="folder of the finished Ablation")
    parser.add_argument("--name", help="name of the result files; by default nothing is written")
    parser.add_argument("--commit", default="not given", help="commit to name in the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_preset(AblationConfig, arguments.preset, [*arguments.settings, "recommender.device=cpu"])
    arms = build_arms(config)
    arms = measure(arms, arguments.batches)
    reached = {}
    if arguments.ablation:
        rows = Ablation.load(arguments.ablation).summary.filter(metric=METRIC, seen="kept")
        reached = {row["arm"]: (row["mean"], row["standard_error"]) for row in rows.iter_rows(named=True)}
    title = f"{METRIC} against the cost of training: {arguments.name or arguments.preset}"
    lines = [
        f"# {title}",
        "",
        *table(arms, reached),
        "",
        f"Medians of {arguments.batches} steps after {WARM_UP}, arms in turn, one thread. {processor()}; torch "
        f"{torch.__version__}; commit {arguments.commit}. A pair is an item that is predicted.",
    ]
    print("\n".join(lines))
    if arguments.name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{arguments.name}.md").write_text("\n".join(lines) + "\n")
        if reached:
            draw(arms, reached, title).savefig(RESULTS / f"{arguments.name}.png")


def _quiet(step: int, values: object) -> None:
    """Drop the log."""


if __name__ == "__main__":
    main()
