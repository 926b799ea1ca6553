"""What came from what: the steps behind an artefact and those that it went into, as a tree and as a figure.

A step is one run of a stage. One step stands on another if it read something that the other made.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from rich.text import Text
from rich.tree import Tree

DIGITS = 8
"""Characters of a fingerprint that people compare by eye."""
ALIKE = 8
"""Most steps of one stage that a tree shows below one step."""


class Named(NamedTuple):
    """An artefact by what it is and what it holds."""

    kind: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.kind} {self.fingerprint[:DIGITS]}"


@dataclass(frozen=True)
class Step:
    """One run of a stage."""

    run_id: str
    """MLflow run."""
    name: str
    """Name of that run; its first word is the stage."""
    started: int
    """Milliseconds since 1970."""
    read: Mapping[Named, str] = field(default_factory=dict)
    """Artefacts that it took, each with the run that had made it, "" where none is known."""
    made: tuple[Named, ...] = ()
    """Artefacts that came out."""
    raw: tuple[Named, ...] = ()
    """Raw files that it read, by name and digest."""
    note: str = ""
    """A figure, or what became of it outside of the pipeline."""


@dataclass(frozen=True)
class Lineage:
    """Steps that stand on one another, and those among them that were asked for."""

    steps: Mapping[str, Step]
    """By run."""
    asked: frozenset[str] = frozenset()
    """Runs that were asked for."""
    parents: Mapping[str, tuple[str, ...]] = field(init=False)
    """Run to the runs whose artefacts it read, in the order in which it names them. None began later than the run, so
    nothing stands on itself."""

    def __post_init__(self) -> None:
        order = {step.run_id: place for place, step in enumerate(self.in_order())}
        parents = {
            run: tuple(p for p in dict.fromkeys(step.read.values()) if order.get(p, len(order)) < order[run])
            for run, step in self.steps.items()
        }
        object.__setattr__(self, "parents", parents)

    def in_order(self) -> list[Step]:
        """Return the steps in the order of time, each behind those that it stands on."""
        return sorted(self.steps.values(), key=lambda step: (step.started, step.run_id))

    def before(self) -> set[str]:
        """Return the runs that what was asked for stands on."""
        return self._reach(self.parents)

    def after(self) -> set[str]:
        """Return the runs that stand on what was asked for."""
        children: dict[str, list[str]] = {}
        for run, parents in self.parents.items():
            for parent in parents:
                children.setdefault(parent, []).append(run)
        return self._reach(children)

    def _reach(self, edges: Mapping[str, Iterable[str]]) -> set[str]:
        found: set[str] = set()
        waiting = list(self.asked)
        while waiting:
            for run in edges.get(waiting.pop(), ()):
                if run not in found:
                    found.add(run)
                    waiting.append(run)
        return found - self.asked

    def depths(self) -> dict[str, int]:
        """Return how many steps stand below each at most: 0 for one that reads no artefact of another."""
        depths: dict[str, int] = {}
        for step in self.in_order():
            depths[step.run_id] = 1 + max((depths[p] for p in self.parents[step.run_id]), default=-1)
        return depths

    def ancestors(self) -> dict[str, set[str]]:
        """Return all steps that each stands on, directly or not."""
        above: dict[str, set[str]] = {}
        for step in self.in_order():
            parents = self.parents[step.run_id]
            above[step.run_id] = set(parents).union(*(above[parent] for parent in parents))
        return above


def lineage_tree(lineage: Lineage) -> Tree:
    """Lay a lineage out for a terminal, from the raw files down.

    A step that stands on several others hangs below the deepest of them and names those that are not above it.
    What was asked for is bold, what came of it green.
    """
    depths, after, before = lineage.depths(), lineage.after(), lineage.before()
    view = Tree(Text("what it came from and what came of it", style="dim"), guide_style="dim")
    roots: dict[tuple[Named, ...], Tree] = {}
    nodes: dict[str, Tree] = {}
    above_of: dict[str, set[str]] = {}
    shown: Counter[tuple[str, str]] = Counter()
    hidden: dict[str, tuple[str, str]] = {}
    chain = lineage.asked | before
    for step in lineage.in_order():
        parents = lineage.parents[step.run_id]
        if parents:
            deepest = max(parents, key=lambda run: depths[run])
            alike = hidden.get(deepest, (deepest, step.name.split()[0]))
            if deepest in hidden or (shown[alike] >= ALIKE and step.run_id not in chain):
                hidden[step.run_id] = alike
                continue
            shown[alike] += 1
            branch, above = nodes[deepest], above_of[deepest] | {deepest}
        else:
            given = step.raw or tuple(artifact for artifact, maker in step.read.items() if not maker)
            if given not in roots:
                title = ", ".join(map(str, given)) or "nothing known"
                roots[given] = view.add(Text(title, style="cyan"))
            branch, above = roots[given], set[str]()
        above_of[step.run_id] = above
        others = [lineage.steps[run].name for run in parents if run not in above]
        style = "bold" if step.run_id in lineage.asked else "green" if step.run_id in after else ""
        nodes[step.run_id] = branch.add(_line(step, others, style))
    for (run, stage), count in Counter(hidden.values()).items():
        nodes[run].add(Text(f"{count} more: {stage} and what came of it", style="dim"))
    return view


def _line(step: Step, others: list[str], style: str) -> Text:
    text = Text(step.name, style=style)
    if step.made:
        text.append(" → " + ", ".join(map(str, step.made)), style="not bold")
    if step.note:
        text.append(f"  {step.note}", style="not bold yellow")
    if others:
        text.append(f"  also reads {', '.join(others)}", style="not bold dim")
    return text.append(f"  {step.run_id}", style="not bold dim")


BOX = (0.84, 0.72)
"""Width and height of a step in a figure, in columns and rows."""


def lineage_figure(lineage: Lineage) -> Figure:
    """Draw the steps from left to right, each in the column behind the last that it stands on.

    An arrow that a longer way implies is left out: of a table, its tokenizer and their embeddings one line is drawn.

    Raises
    ------
    ValueError
        There is no step to draw.
    """
    if not lineage.steps:
        raise ValueError("nothing to draw: no stage of this run finished")
    depths, after, above = lineage.depths(), lineage.after(), lineage.ancestors()
    columns: dict[int, list[Step]] = {}
    for step in lineage.in_order():
        columns.setdefault(depths[step.run_id], []).append(step)
    tallest = max(map(len, columns.values()))
    figure = Figure(figsize=(1.95 * len(columns), 0.95 * tallest), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.05, len(columns) - 1 + BOX[0] + 0.05), ylim=(-tallest + 0.5, 0.5))
    axes.axis("off")
    places = {}
    for column, steps in columns.items():
        for row, step in enumerate(steps):
            x, y = places[step.run_id] = (float(column), -(row + (tallest - len(steps)) / 2))
            _draw(axes, x, y, step, _colour(step, lineage, after))
    for run, parents in lineage.parents.items():
        implied = set().union(*(above[parent] for parent in parents))
        for parent in parents:
            if parent not in implied:
                (x, y), end = places[parent], places[run]
                arrow = FancyArrowPatch(
                    (x + BOX[0], y),
                    end,
                    arrowstyle="-|>",
                    mutation_scale=7,
                    color="#8d96a3",
                    lw=0.8,
                    zorder=0,
                )
                axes.add_patch(arrow)
    return figure


def _draw(axes: Axes, x: float, y: float, step: Step, colour: str) -> None:
    width, height = BOX
    shape = "round,pad=0,rounding_size=0.05"
    axes.add_patch(
        FancyBboxPatch((x, y - height / 2), width, height, boxstyle=shape, fc=colour, ec="#5b6472", lw=0.7)
    )
    stage, _, which = step.name.partition(" ")
    lines = [*map(str, step.raw), *map(str, step.made)][:4]
    lines.insert(0, f"{which}  {step.note}".strip()) if which or step.note else None
    axes.text(x + 0.03, y + height / 2 - 0.05, stage, fontsize=7, weight="bold", va="top")
    text = "\n".join(_short(line) for line in lines)
    axes.text(
        x + 0.03, y + height / 2 - 0.23, text, fontsize=5.5, color="#39424e", va="top", linespacing=1.25
    )


def _colour(step: Step, lineage: Lineage, after: set[str]) -> str:
    if step.run_id in lineage.asked:
        return "#d7e8ff"
    return "#dcf3e2" if step.run_id in after else "#f3f4f6"


def _short(text: str, most: int = 34) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
