"""Stages show a page in their Flyte deck, and keep the same page in their MLflow run."""

import importlib
import inspect
import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from flytekit import FlyteContextManager, PythonFunctionTask, task, workflow

import tasks
from components.data.splits import SplitConfig
from components.metrics.sids import CollapseError, CollisionConfig
from components.pages.html import Html, tag
from components.pages.page import document, page
from components.pages.sids import sids_page
from components.tokenizers.sids import SidConfig
from tasks import runtime
from tasks.data import split
from tasks.decks import show
from tasks.tokenizer import analyze_collisions, assign_sids
from tasks.tracking import open_store, start_pipeline, tracked

NO_PAGE = {
    "set_aside": "says whom it left out in a mark",
    "fit_encoder": "shown by what it encodes",
    "plan_shards": "a list of numbers",
    "embed_shard": "a part of what assemble_embeddings shows",
    "extend_sids": "shown by analyze_collisions and report_drift",
    "extend_recommender": "nothing is trained",
    "evaluate_baselines": "stand beside every other method",
    "evaluate_sasrec": "stands in the comparison",
    "log_model": "has MLflow's page of a model",
    "promote": "has MLflow's page of a version",
    "score_histories": "a file",
    "open_champion": "what it opens has pages",
    "find_names": "what it opens has pages",
    "survey_windows": "printed",
}
"""Stages without a page, and why."""


def stages() -> list:
    """Every stage there is."""
    names = [module.name for module in pkgutil.iter_modules(tasks.__path__) if module.name != "pyfunc"]
    modules = [importlib.import_module(f"tasks.{name}") for name in names]
    found = {
        value.name: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, PythonFunctionTask) and value.task_function.__module__ == module.__name__
    }
    return list(found.values())


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
def test_every_stage_shows_a_page_in_a_deck_but_for_those_that_have_none(stage) -> None:
    name = stage.name.rpartition(".")[2]
    source = inspect.getsource(stage.task_function)
    shows = "show(run" in source or re.search(r"_tell_\w+\(run", source) is not None
    assert stage.enable_deck == shows == (name not in NO_PAGE)


def test_no_exception_is_out_of_date() -> None:
    assert {stage.name.rpartition(".")[2] for stage in stages()} >= NO_PAGE.keys()


@task(**runtime.CPU, **runtime.DECK)
def first(run_id: str = "") -> str:
    with tracked("first", None, run_id) as run:
        show(run, "Other", page, "One", [], "first & only")
    return run_id


@task(**runtime.CPU, **runtime.DECK)
def second(run_id: str) -> None:
    with tracked("second", None, run_id) as run:
        show(run, "Mine", page, "Two", [])
        show(run, "Mine too", lambda: Html(tag("p", "Three")))


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


@task(**runtime.CPU, **runtime.DECK)
def torn(run_id: str = "") -> str:
    def page_of(what: str) -> Html:
        raise ValueError(f"no page\nof {what}")

    with tracked("torn", None, run_id) as run:
        show(run, "Broken", page_of, "this")
        show(run, "Whole", page, "Two", [])
    return "the result"


def test_a_page_that_cannot_be_made_costs_no_result_and_is_marked(flyte_home) -> None:
    pipeline = start_pipeline("two_stage", "torn", SplitConfig())
    assert torn(run_id=pipeline) == "the result"
    client = open_store()
    (run,) = client.search_runs(
        [client.get_experiment_by_name("torn").experiment_id], "tags.`sidflow.stage` = 'torn'"
    )
    assert run.info.status == "FINISHED"
    assert run.data.tags["sidflow.page_failed"] == "Broken: ValueError: no page of this"
    assert (
        client.get_run(pipeline).data.tags["sidflow.page_failed.torn"]
        == "Broken: ValueError: no page of this"
    )
    assert tabs(decks()[0])[0] == "Whole" and len(kept("whole")) == 1


def test_what_a_stage_made_is_stored_before_its_page_is(tiny, flyte_home, monkeypatch) -> None:
    """Also when the page and all that shows it break down."""

    def breaks(*_, **__) -> None:
        raise MemoryError

    monkeypatch.setattr("tasks.tokenizer.show", breaks)
    inputs = {"tokenizer": tiny.tokenizer, "embeddings": tiny.embeddings, "split": tiny.split}
    with pytest.raises(MemoryError):
        assign_sids(**inputs, catalog=tiny.catalog, config=SidConfig(suffix_size=33))
    client = open_store()
    (run,) = client.search_runs([client.get_experiment_by_name("stages").experiment_id])
    assert run.info.status == "FAILED" and "output.SidTable" in run.data.tags


@pytest.mark.parametrize("stage", stages(), ids=lambda stage: stage.name)
def test_every_stage_puts_out_before_it_shows(stage) -> None:
    source = inspect.getsource(stage.task_function)
    shown = re.search(r"show\(run|_tell_\w+\(run", source)
    assert shown is None or 0 < source.find("run.output(") < shown.start()


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
