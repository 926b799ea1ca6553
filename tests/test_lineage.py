from io import StringIO

import pytest
from rich.console import Console

from components.lineage import ALIKE, Lineage, Named, Step, lineage_figure, lineage_tree


def step(name: str, read: str = "", made: str = "", at: int = 0, **rest) -> Step:
    """A step whose run has its name's letters; artefacts are words, each of its own kind."""
    named = [tuple(Named(word, word * 3) for word in words.split()) for words in (read, made)]
    return Step(name.replace(" ", "-"), name, at, *named, **rest)


def of(*steps: Step, asked: tuple[str, ...] = (), strangers: tuple[str, ...] = ()) -> Lineage:
    return Lineage(
        {s.run_id: s for s in steps}, frozenset(asked), frozenset(Named(word, word * 3) for word in strangers)
    )


CHAIN = (
    step("ingest", "", "log catalog", 1, raw=(Named("clicks.csv", "ab" * 32),)),
    step("split", "log catalog", "parts", 2),
    step("embed", "catalog", "vectors", 3),
    step("fit", "vectors parts", "codebooks", 4),
    step("assign", "codebooks vectors", "table", 5),
    step("train", "parts table", "model", 6),
    step("evaluate", "model table parts", "report", 7, note="R@10 .1717"),
)


def shown(lineage: Lineage) -> list[str]:
    console = Console(file=StringIO(), width=200, highlight=False)
    console.print(lineage_tree(lineage))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_step_stands_on_those_that_made_what_it_read():
    lineage = of(*CHAIN, asked=("assign",))
    assert lineage.parents["fit"] == ("embed", "split")
    assert lineage.before() == {"ingest", "split", "embed", "fit"}
    assert lineage.after() == {"train", "evaluate"}


def test_depth_counts_the_longest_way():
    assert of(*CHAIN).depths() == {
        "ingest": 0, "split": 1, "embed": 1, "fit": 2, "assign": 3, "train": 4, "evaluate": 5,
    }  # fmt: skip


def test_a_step_hangs_below_the_deepest_and_names_only_what_is_not_above_it():
    lines = shown(of(*CHAIN, asked=("assign",)))
    depth = {line.split("→")[0].split()[-1]: line.index("→") for line in lines if "→" in line}
    assert "clicks.csv abababab" in lines[1]
    assert depth["ingest"] < depth["split"] == depth["embed"] + len("split") - len("embed") < depth["fit"]
    (fit,), (train,) = ([line for line in lines if f" {name} →" in line] for name in ("fit", "train"))
    assert fit.endswith("→ codebooks codebook  also reads split  fit")
    assert train.endswith("→ model modelmod  also reads split  train")
    assert any("R@10 .1717" in line for line in lines)


def test_every_step_is_shown_once():
    lines = shown(of(*CHAIN))
    for s in CHAIN:
        assert sum(line.endswith(f"  {s.run_id}") for line in lines) == 1


def test_what_was_given_by_hand_is_a_root():
    lines = shown(of(step("fit", "vectors", "codebooks"), strangers=("vectors",)))
    assert "vectors vectorsv" in lines[1] and "fit →" in lines[2]


def test_two_runs_that_made_the_same_are_not_both_a_parent():
    again = step("fit again", "vectors parts", "codebooks", 8)
    assert of(*CHAIN, again).parents["assign"] == ("fit-again", "embed")
    assert "fit" not in of(*CHAIN, again, asked=("fit",)).parents["assign"]


def test_many_readers_are_counted_and_those_that_were_asked_for_always_shown():
    readers = [step(f"score {n}", "table", f"answer{n}", 10 + n) for n in range(ALIKE + 5)]
    asked = readers[-1].run_id
    lines = shown(of(*CHAIN, *readers, asked=(asked,)))
    assert sum("score " in line and "→" in line for line in lines) == ALIKE + 1
    assert any(line.endswith(f"  {asked}") for line in lines)
    assert any("4 more score" in line for line in lines)


@pytest.mark.parametrize("asked", [(), ("assign",)])
def test_the_figure_draws_every_step_and_no_arrow_that_a_longer_way_implies(asked):
    axes = lineage_figure(of(*CHAIN, asked=asked)).axes[0]
    texts = {text.get_text() for text in axes.texts}
    assert {s.name for s in CHAIN} <= texts
    arrows = [patch for patch in axes.patches if type(patch).__name__ == "FancyArrowPatch"]
    # ingest-split, ingest-embed, split-fit, embed-fit, fit-assign, assign-train, train-evaluate.
    assert len(arrows) == 7
