"""Stages show a page in their Flyte deck, and keep the same page in their MLflow run."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from flytekit import FlyteContextManager, task, workflow

from components.data.splits import SplitConfig
from components.metrics.sids import CollapseError, CollisionConfig
from components.pages.html import Html, tag
from components.pages.page import document, page
from components.pages.sids import sids_page
from components.tokenizers.sids import SidConfig
from tasks import data, evaluation, joint, recommender, runtime, tokenizer
from tasks.data import split
from tasks.decks import show
from tasks.tokenizer import analyze_collisions, assign_sids
from tasks.tracking import open_store, tracked


def stages() -> Callable[[], list]:
    names = (
        (data, "ingest ingest_onto split split_newcomers assemble_embeddings"),
        (tokenizer, "fit_tokenizer assign_sids analyze_collisions"),
        (recommender, "fit_recommender"),
        (joint, "fit_jointly"),
        (evaluation, "evaluate_recommender compare_reports"),
    )
    return [getattr(module, name) for module, several in names for name in several.split()]


def decks() -> list[str]:
    """The decks that flytekit has written, the latest last."""
    sandbox = Path(FlyteContextManager.current_context().file_access.local_sandbox_dir)
    files = sorted(sandbox.parent.rglob("deck.html"), key=lambda file: file.stat().st_mtime_ns)
    return [file.read_text() for file in files]


def tabs(deck: str) -> list[str]:
    return re.findall(r'<li onclick="handleLinkClick\(this\)">([^<]*)</li>', deck)


def kept(name: str) -> list[str]:
    """What runs hold under ``pages/<name>.html``, the latest run first."""
    client = open_store()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    path = f"pages/{name}.html"
    held = [
        run.info.run_id
        for run in runs
        if path in [file.path for file in client.list_artifacts(run.info.run_id, "pages")]
    ]
    return [Path(client.download_artifacts(run, path)).read_text() for run in held]


@pytest.mark.parametrize("stage", stages(), ids=lambda stage: stage.name)
def test_stages_with_a_page_have_a_deck(stage) -> None:
    assert stage.enable_deck


@task(**runtime.CPU, **runtime.DECK)
def first(run_id: str = "") -> str:
    with tracked("first", None, run_id) as run:
        show(run, "Other", page("One", [], "first & only"))
    return run_id


@task(**runtime.CPU, **runtime.DECK)
def second(run_id: str) -> None:
    with tracked("second", None, run_id) as run:
        show(run, "Mine", page("Two", []))
        show(run, "Mine too", Html(tag("p", "Three")))


@workflow
def both() -> None:
    second(run_id=first())


def test_each_stage_shows_its_own_pages_first_and_keeps_them_whole(flyte_home) -> None:
    both()
    one, two = decks()
    assert tabs(one) == ["Other", "Timeline", "Input", "Output"]
    assert tabs(two) == ["Mine", "Mine too", "Timeline", "Input", "Output"]
    assert page("One", [], "first & only") in one and "One" not in two
    assert kept("other") == [document("Other", page("One", [], "first & only"))]
    assert kept("mine") == [document("Mine", page("Two", []))]


def test_a_stage_shows_and_keeps_the_page_of_what_it_made(tiny, flyte_home) -> None:
    inputs = {"tokenizer": tiny.tokenizer, "embeddings": tiny.embeddings, "split": tiny.split}
    table = assign_sids(**inputs, catalog=tiny.catalog, config=SidConfig(suffix_size=32))
    expected = sids_page(table, tiny.catalog, tiny.split)
    (deck,) = decks()
    assert tabs(deck)[0] == "SIDs" and expected in deck
    assert kept("sids") == [document("SIDs", expected)]
    # From the cache there is neither a run nor a deck.
    assign_sids(**inputs, catalog=tiny.catalog, config=SidConfig(suffix_size=32))
    assert len(decks()) == len(kept("sids")) == 1


def test_the_split_has_a_page(tiny, flyte_home) -> None:
    split(log=tiny.log, catalog=tiny.catalog, config=SplitConfig())
    assert "Training sequences" in kept("split")[0] and tabs(decks()[0])[0] == "Split"


def test_a_table_that_the_gate_stops_has_its_page_still(tiny, flyte_home) -> None:
    codes = tiny.sids.codes.with_columns(
        codes=pl.concat_list(pl.lit(0, pl.UInt16)), suffix=pl.int_range(pl.len(), dtype=pl.UInt16)
    )
    collapsed = replace(tiny.sids, codes=codes, suffix_size=tiny.catalog.num_items)
    parts = {name: getattr(tiny, name) for name in ("tokenizer", "catalog", "embeddings", "log")}
    with pytest.raises(CollapseError):
        analyze_collisions(name="mine", **parts, sids=collapsed, config=CollisionConfig())
    assert "collapsed</span>" in kept("collisions")[0]
