import pytest

from components.artifacts import RecommenderCheckpoint
from components.config import Config
from components.folders import Artifact
from tasks.lineage import lineage_of
from tasks.runs import open_store
from tasks.tracking import finish_pipeline, start_pipeline, tracked
from workflows.lineage import main


class Settings(Config):
    """None."""


def made(stage: str, outputs: list[Artifact], parents: list[Artifact], run_id: str = "") -> str:
    with tracked(stage, None, run_id, parents) as run:
        if stage == "ingest":
            run.dataset("clicks.csv", "ab" * 32, "clicks.csv", "raw")
        if stage.startswith("evaluate"):
            run.metrics({"mine/kept/all/R@10": 0.25, "popularity/kept/all/R@10": 0.1})
        run.output(*outputs)
    return run.run_id


def recommender(sids: str, step: int = 0) -> RecommenderCheckpoint:
    return RecommenderCheckpoint(weights={}, config={}, sids=sids, step=step, epoch=0, metrics={})


@pytest.fixture
def pipeline(flyte_home, tiny):
    """A finished pipeline of four stages, and after it two that were run alone."""
    parent = start_pipeline("two_stage", "sidflow", Settings())
    model = recommender(tiny.sids.fingerprint)
    runs = {
        "ingest": made("ingest", [tiny.log, tiny.catalog], [], parent),
        "embed": made("embed", [tiny.embeddings], [tiny.catalog], parent),
        "fit": made("fit", [tiny.tokenizer], [tiny.embeddings], parent),
        "assign": made("assign", [tiny.sids], [tiny.tokenizer, tiny.embeddings], parent),
    }
    finish_pipeline(parent, [tiny.sids])
    runs["train"] = made("train", [model], [tiny.sids, tiny.split])
    runs["evaluate"] = made("evaluate_recommender mine", [], [model, tiny.sids])
    return runs | {"parent": parent}


def test_a_stage_knows_what_it_came_from_and_what_came_of_it(pipeline):
    lineage = lineage_of(pipeline["assign"])
    assert lineage.asked == {pipeline["assign"]}
    assert lineage.before() == {pipeline[name] for name in ("ingest", "embed", "fit")}
    assert lineage.after() == {pipeline[name] for name in ("train", "evaluate")}
    assert [raw.kind for raw in lineage.steps[pipeline["ingest"]].raw] == ["clicks.csv"]
    assert lineage.steps[pipeline["evaluate"]].note == "R@10 .2500"


def test_a_pipeline_asks_for_all_its_stages_and_sees_what_came_later(pipeline):
    lineage = lineage_of(pipeline["parent"])
    assert lineage.asked == {pipeline[name] for name in ("ingest", "embed", "fit", "assign")}
    assert lineage.after() == {pipeline[name] for name in ("train", "evaluate")}


def test_what_no_run_of_the_store_made_is_said(pipeline, tiny):
    lineage = lineage_of(pipeline["train"])
    read = lineage.steps[pipeline["train"]].read
    unknown = [artifact for artifact, maker in read.items() if not maker]
    assert unknown == [("SequenceSplit", tiny.split.fingerprint)]


def test_a_cause_is_the_run_that_was_read_not_one_that_made_the_same_later(pipeline, tiny):
    again = made("assign", [tiny.sids], [tiny.tokenizer, tiny.embeddings])
    lineage = lineage_of(pipeline["train"])
    assert pipeline["assign"] in lineage.before() and again not in lineage.steps
    assert lineage_of(again).after() == set()
    later = {pipeline["train"], pipeline["evaluate"], again}  # it reads what this pipeline had made
    assert lineage_of(pipeline["parent"]).after() == later


def test_a_stage_that_hands_on_what_it_read_is_not_its_maker(pipeline, tiny):
    """As matching does with a retrained tokenizer that happens to be the one in use."""
    made("match_names", [tiny.tokenizer, tiny.sids], [tiny.tokenizer, tiny.sids])
    later = made("train", [recommender(tiny.sids.fingerprint, 5)], [tiny.sids])
    assert {pipeline["assign"], pipeline["fit"]} <= lineage_of(later).before()


def test_stages_answered_from_the_cache_belong_to_the_pipeline(pipeline, tiny):
    again = start_pipeline("two_stage", "sidflow", Settings())
    finish_pipeline(again, [tiny.sids])
    assert lineage_of(again).asked == {pipeline[name] for name in ("ingest", "embed", "fit", "assign")}


def test_the_figure_stands_on_the_run_of_the_pipeline(pipeline):
    names = {file.path for file in open_store().list_artifacts(pipeline["parent"], "figures")}
    assert "figures/lineage.png" in names


def test_what_became_of_a_model_in_the_registry_is_shown(pipeline, tiny, monkeypatch, capsys):
    client = open_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)  # the registry looks for the model there
    with tracked("log_model mine", None, "", [tiny.sids]) as run:
        run.client.set_tag(run.run_id, "output.Bundle", "ab" * 32)
    model = client.create_logged_model(client.get_run(run.run_id).info.experiment_id, "m", run.run_id)
    client.create_registered_model("shop")
    version = client.create_model_version("shop", model.model_uri, run_id=run.run_id).version
    client.set_registered_model_alias("shop", "champion", version)
    capsys.readouterr()
    assert main([pipeline["fit"]]) == 0
    assert "shop version 1 @champion" in capsys.readouterr().out


def test_the_command_prints_the_tree_and_draws_the_figure(pipeline, tmp_path, capsys):
    capsys.readouterr()
    assert main([pipeline["fit"], "--figure", str(tmp_path / "lineage.svg")]) == 0
    shown = capsys.readouterr().out
    order = ["clicks.csv", "ingest", "embed", "fit", "assign", "train", "evaluate_recommender mine"]
    places = [shown.index(f"── {name}") for name in order]
    assert places == sorted(places)
    assert (tmp_path / "lineage.svg").read_text().lstrip().startswith("<?xml")


def test_a_run_that_is_not_there_is_an_error_in_one_line(flyte_home, capsys):
    assert main(["0" * 32]) == 2
    message = capsys.readouterr().err
    assert "is no run of sqlite" in message and message.count("\n") == 1
