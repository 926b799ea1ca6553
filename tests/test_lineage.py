from io import StringIO

import pytest
from rich.console import Console

from components.lineage import ALIKE, Lineage, Named, Step, lineage_figure, lineage_tree


def named(word: str) -> Named:
    return Named(word, word * 3)


def step(name: str, read: str = "", made: str = "", at: int = 0, **rest) -> Step:
    """A step whose run has its name's letters; artefacts are words, each of its own kind, read as ``word<run``."""
    taken = {named(word): run for word, _, run in (each.partition("<") for each in read.split())}
    return Step(name.replace(" ", "-"), name, at, taken, tuple(map(named, made.split())), **rest)


def of(*steps: Step, asked: tuple[str, ...] = ()) -> Lineage:
    return Lineage({s.run_id: s for s in steps}, frozenset(asked))


CHAIN = (
    step("ingest", "", "log catalog", 1, raw=(Named("clicks.csv", "ab" * 32),)),
    step("split", "log<ingest catalog<ingest", "parts", 2),
    step("embed", "catalog<ingest", "vectors", 3),
    step("fit", "vectors<embed parts<split", "codebooks", 4),
    step("assign", "codebooks<fit vectors<embed", "table", 5),
    step("train", "parts<split table<assign", "model", 6),
    step("evaluate", "model<train table<assign parts<split", "report", 7, note="R@10 .1717"),
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
    lines = shown(of(step("fit", "vectors", "codebooks")))
    assert "vectors vectorsv" in lines[1] and "fit →" in lines[2]


def test_equal_content_that_is_made_again_later_is_no_parent():
    again = step("fit again", "vectors<embed parts<split", "codebooks", 8)
    lineage = of(*CHAIN, again, asked=("fit-again",))
    assert lineage.parents["assign"] == ("fit", "embed")
    assert lineage.after() == set()


def test_nothing_stands_on_itself_even_if_runs_say_so():
    """Runs that name each other, as clocks that differ could make it look: the later one stands on the earlier."""
    one, other = step("one", "b<other", "a", 1), step("other", "a<one", "b", 2)
    lineage = of(one, other, asked=("one",))
    assert lineage.parents == {"one": (), "other": ("one",)}
    assert len(shown(lineage)) == 4


def test_without_a_step_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="no stage of this run finished"):
        lineage_figure(of())


def test_many_readers_are_counted_and_those_that_were_asked_for_always_shown():
    readers = [step(f"score {n}", "table<assign", f"answer{n}", 10 + n) for n in range(ALIKE + 5)]
    below = step("mail", f"answer{ALIKE + 1}<score-{ALIKE + 1}", "mails", 99)
    asked = readers[-1].run_id
    lines = shown(of(*CHAIN, *readers, below, asked=(asked,)))
    assert sum("score " in line and "→" in line for line in lines) == ALIKE + 1
    assert any(line.endswith(f"  {asked}") for line in lines)
    assert any("5 more: score and what came of it" in line for line in lines)


@pytest.mark.parametrize("asked", [(), ("assign",)])
def test_the_figure_draws_every_step_and_no_arrow_that_a_longer_way_implies(asked):
    axes = lineage_figure(of(*CHAIN, asked=asked)).axes[0]
    texts = {text.get_text() for text in axes.texts}
    assert {s.name for s in CHAIN} <= texts
    arrows = [patch for patch in axes.patches if type(patch).__name__ == "FancyArrowPatch"]
    # ingest-split, ingest-embed, split-fit, embed-fit, fit-assign, assign-train, train-evaluate.
    assert len(arrows) == 7
