"""A finished run is run again by real processes, as ``make reproduce`` does."""

import json

import pytest

from tasks import origin
from tasks.home import home
from tasks.reproduce import VERSIONS, _differing_data, reproduce, summary
from tasks.runs import open_store
from tasks.tracking import start_pipeline, tracked
from workflows.reproduce import main
from workflows.two_stage import two_stage


@pytest.fixture(scope="module")
def original(planted_settings):
    """The two-stage workflow, run once: its MLflow runs by name."""
    two_stage(config=planted_settings())
    client = open_store()
    experiment = client.get_experiment_by_name("planted").experiment_id
    runs = client.search_runs([experiment])
    return {run.info.run_name.split()[0]: run.info.run_id for run in runs}


@pytest.fixture(scope="module")
def stage_again(original):
    """One stage, reproduced from what it had read."""
    return reproduce(original["assign_sids"], here=True)


def test_a_pipeline_is_reproduced_to_the_last_artefact_and_metric(original):
    result = reproduce(original["two_stage"], here=True)
    assert result.equal and result.verdict.startswith("Reproduced: ")
    assert len(result.artifacts) >= 12 and len(result.metrics) >= 12
    again = open_store().get_run(result.repetition)
    assert again.info.run_id != original["two_stage"]
    assert again.data.tags["sidflow.reproduces"] == original["two_stage"]
    names = [line.name for line in result.artifacts]
    assert (
        names.index("ingest.InteractionLog") < names.index("fit_tokenizer.TokenizerCheckpoint") < len(names)
    )


def test_a_stage_is_reproduced_from_what_it_had_read(original, stage_again):
    assert stage_again.repetition != original["assign_sids"]
    assert [line.name for line in stage_again.artifacts] == ["SidTable"]
    assert stage_again.equal


def test_changed_data_is_said_and_all_that_follows_from_it_is_different(original, planted_files, capsys):
    events = planted_files / "events.csv"
    before = events.read_text()
    header, *rows = before.splitlines(keepends=True)
    try:
        events.write_text(header + "".join(rows[: -len(rows) // 4]))
        assert main([original["two_stage"], "--here"]) == 1
    finally:
        events.write_text(before)
    shown = " ".join(capsys.readouterr().out.split())
    assert "The data changed: events.csv was " in shown
    assert "Not reproduced: " in shown
    assert "The first that differs is ingest.InteractionLog" in shown
    assert "ItemCatalog" in shown and "equal" in shown  # the items are as they were


def test_other_libraries_a_dirty_commit_and_other_code_are_said(original, stage_again, monkeypatch):
    monkeypatch.setattr("tasks.reproduce._execute", lambda command, tree: stage_again.repetition)
    client = open_store()
    run_id = original["assign_sids"]
    tags = client.get_run(run_id).data.tags
    noted = json.loads(tags[VERSIONS])
    changed = {
        VERSIONS: json.dumps(noted | {"torch": "1.0"}),
        "sidflow.git.dirty": "true",
        "mlflow.source.git.commit": "0" * 40,
    }
    try:
        for name, value in changed.items():
            client.set_tag(run_id, name, value)
        result = reproduce(run_id, here=True)
    finally:
        for name in changed:
            client.set_tag(run_id, name, tags[name])
    assert f"Another torch: 1.0 then, {noted['torch']} now." in result.remarks
    assert any("not committed on top of 000" in remark for remark in result.remarks)
    assert any(remark.startswith("Other code: commit 000") for remark in result.remarks)
    assert result.equal  # remarks are no difference


def test_the_code_is_checked_out_as_it_was(original, monkeypatch):
    """What runs is the commit that the run noted, not the files that stand here, nor what is installed."""
    client, run_id = open_store(), original["split"]
    head = origin.git("rev-parse", "HEAD")
    tags = client.get_run(run_id).data.tags
    monkeypatch.setattr("tasks.reproduce.code_tags", lambda: {"mlflow.source.git.commit": "other"})
    client.set_tag(run_id, "mlflow.source.git.commit", head)
    try:
        result = reproduce(run_id)
    finally:
        client.set_tag(run_id, "mlflow.source.git.commit", tags["mlflow.source.git.commit"])
    again = client.get_run(result.repetition).data.tags
    assert (again["mlflow.source.git.commit"], again["sidflow.git.dirty"]) == (head, "false")
    assert result.equal
    assert not list((home() / "code").iterdir())
    assert "sidflow/code" not in origin.git("worktree", "list")


def test_an_ingestion_of_other_days_in_between_does_not_hide_changed_data(original):
    """Only the files that the two runs stand on are compared."""

    def ingested(digest: str, parents=()) -> str:
        with tracked("ingest", None, "", parents) as run:
            run.dataset("events.csv", digest, "events.csv", "raw")
        return run.run_id

    before, now = ingested("1" * 64), ingested("3" * 64)
    ingested("2" * 64)
    assert _differing_data(before, now) == [f"The data changed: events.csv was {'1' * 16}, is {'3' * 16}."]


def test_a_commit_that_is_not_there_is_an_error_that_says_what_to_do(original, capsys):
    client, run_id = open_store(), original["split"]
    commit = client.get_run(run_id).data.tags["mlflow.source.git.commit"]
    client.set_tag(run_id, "mlflow.source.git.commit", "0" * 40)
    try:
        assert main([run_id]) == 2
    finally:
        client.set_tag(run_id, "mlflow.source.git.commit", commit)
    assert "fetch it, or take the code that stands here with --here" in capsys.readouterr().err


def test_a_run_that_did_not_finish_cannot_be_reproduced(original, planted_settings, capsys):
    unfinished = start_pipeline("two_stage", "planted", planted_settings())
    assert main([unfinished]) == 2
    assert "ended RUNNING: only a finished run can be compared with" in capsys.readouterr().err


def test_a_difference_stands_out_in_the_summary(original, capsys):
    from rich.console import Console

    from tasks.reproduce import Line, Reproduction

    lines = [
        Line("fit.TokenizerCheckpoint", "ab", "cd", equal=False),
        Line("ingest.Log", "ef", "ef", equal=True),
    ]
    result = Reproduction("a" * 32, "b" * 32, lines, [Line("R@10", "0.1", "0.1", equal=True)], [])
    Console(width=120).print(summary(result))
    shown = capsys.readouterr().out
    assert "different" in shown and "1 metrics" in shown
    assert (
        "Not reproduced: 1 of 2 artefacts and 1 of 1 metrics are equal. The first that differs is fit."
        in shown
    )
