import signal
import sqlite3
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components.artifacts import ContentEmbeddings
from components.config import Config
from tasks import tracking
from tasks.tracking import fail_execution, finish_pipeline, mark_pipeline, start_pipeline, tracked


class Optim(Config):
    """A section."""

    lr: float = 0.1
    """Rate."""


class Settings(Config):
    """Settings with a section."""

    optim: Optim = Optim()
    """Section."""
    words: list[str] = ["a", "b"]
    """A list."""


@pytest.fixture
def client(flyte_home):
    return tracking.open_store()


def vectors(seed: int = 0) -> ContentEmbeddings:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    return ContentEmbeddings(vectors={"vectors": x}, encoder="e", revision="r", normalised=False, catalog="c")


def run_of(client: MlflowClient, run_id: str):
    return client.get_run(run_id)


def test_settings_become_parameters_with_dotted_names(client):
    with tracked("fit", Settings()) as run:
        pass
    assert run_of(client, run.run_id).data.params == {"optim.lr": "0.1", "words": '["a", "b"]'}


@pytest.mark.parametrize(
    "address", ["https://me:hunter2@shop.example/clicks.csv", "s3://logs/clicks.csv?X-Amz-Signature=abc"]
)
def test_settings_that_hold_a_secret_are_refused_before_anything_is_kept(client, address):
    with (
        pytest.raises(ValueError, match="words holds a password, key or token"),
        tracked("fit", Settings(words=[address])) as run,
    ):
        pass
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert not run.data.params and "hunter2" not in str(run.data.tags) and "abc" not in str(run.data.tags)


def test_two_of_a_kind_from_one_stage_are_refused(client):
    with pytest.raises(ValueError, match="at most one of a kind"), tracked("fit") as run:
        run.output(vectors(0), vectors(1))


def test_a_very_long_setting_does_not_break_the_run(client):
    with tracked("fit", Settings(words=["x" * 9000])) as run:
        pass
    assert len(run_of(client, run.run_id).data.params["words"]) == 6000


def test_numbers_arrive_in_order_and_in_batches(client, monkeypatch):
    sent = []
    real = MlflowClient.log_batch

    def counting(self, run_id, metrics=(), **rest):
        sent.append(len(metrics))
        return real(self, run_id, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", counting)
    with tracked("fit") as run:
        for step in range(1200):
            run.log(step, {"train/loss": 1 / (step + 1), "R@10": 0.5})
    found = client.get_metric_history(run.run_id, "train/loss")
    assert [m.value for m in sorted(found, key=lambda m: m.step)] == [1 / (s + 1) for s in range(1200)]
    assert client.get_run(run.run_id).data.metrics["R_at_10"] == 0.5
    assert len([n for n in sent if n]) < 10


def test_an_epoch_is_shown_and_a_step_is_not(client, capsys):
    with tracked("fit_tokenizer") as run:
        assert capsys.readouterr().out == "fit_tokenizer\n"
        run.log(10, {"train/loss": 1.5})
        assert capsys.readouterr().out == ""
        run.log(20, {"epoch": 2, "R@10": 0.123456, "codes_in_use/1": 12})
        assert capsys.readouterr().out.split() == ["epoch", "2", "R@10", "0.1235"]
    assert capsys.readouterr().out.startswith("    done in ")


def test_a_store_that_is_away_for_a_while_costs_no_numbers(client, monkeypatch, capsys):
    real = MlflowClient.log_batch
    monkeypatch.setattr(tracking, "_BATCH", 1)
    with tracked("fit") as run:

        def away(*_, **__):
            raise MlflowException("connection to https://me:hunter2@mlflow.example refused")

        monkeypatch.setattr(MlflowClient, "log_batch", away)
        run.log(1, {"loss": 3.0})
        monkeypatch.setattr(MlflowClient, "log_batch", real)
        run.log(2, {"loss": 2.0})
    assert [m.value for m in client.get_metric_history(run.run_id, "loss")] == [3.0, 2.0]
    shown = capsys.readouterr().out
    assert "will try again" in shown and "hunter2" not in shown


def test_stages_are_children_of_the_pipeline_also_from_another_process(client):
    parent = start_pipeline("joint", "beauty", Settings())
    with tracked("near", None, parent) as near:
        pass
    script = (
        "import sys; from tasks.tracking import tracked\n"
        "with tracked('far', None, sys.argv[1]) as run: run.log(1, {'loss': 2.0})\n"
        "print(run.run_id)"
    )
    done = subprocess.run([sys.executable, "-c", script, parent], capture_output=True, text=True, check=True)
    far = done.stdout.split()[-1]
    for child in (near.run_id, far):
        run = run_of(client, child)
        assert run.data.tags["mlflow.parentRunId"] == run.data.tags["sidflow.pipeline"] == parent
        assert run.info.experiment_id == run_of(client, parent).info.experiment_id
        assert run.info.status == "FINISHED"
    assert run_of(client, parent).data.params["optim.lr"] == "0.1"
    assert run_of(client, far).data.metrics["loss"] == 2.0


def test_a_stage_alone_is_a_run_of_its_own(client):
    with tracked("fit") as run:
        pass
    found = run_of(client, run.run_id)
    assert "mlflow.parentRunId" not in found.data.tags
    assert client.get_experiment(found.info.experiment_id).name == "stages"


def test_runs_of_one_stage_differ_by_name_and_share_the_tags_to_group_them_by(client):
    with tracked("fit_jointly an arm seed 0") as one, tracked("fit_jointly other seed 1") as other:
        pass
    names = {run_of(client, run.run_id).info.run_name for run in (one, other)}
    assert names == {"fit_jointly an arm seed 0", "fit_jointly other seed 1"}
    for tag in ("sidflow.stage", "mlflow.source.name", "flyte.task"):
        assert {run_of(client, run.run_id).data.tags[tag] for run in (one, other)} == {"fit_jointly"}


def test_what_several_stages_mark_stands_side_by_side_on_the_pipeline(client, capsys):
    parent = start_pipeline("ablation", "beauty", Settings())
    texts = {"fit a seed 0": "level 2 fell to [3.1] :cat: [/]", "fit [b] seed 0": "[bold]level 3"}
    for stage, text in texts.items():
        with tracked(stage, None, parent) as run:
            run.mark("collapsed", text)
        assert run_of(client, run.run_id).data.tags["sidflow.collapsed"] == text
    tags = run_of(client, parent).data.tags
    assert {key: value for key, value in tags.items() if "collapsed" in key} == {
        "sidflow.collapsed.fit a seed 0": texts["fit a seed 0"],
        "sidflow.collapsed.fit _b_ seed 0": texts["fit [b] seed 0"],
    }
    shown = capsys.readouterr().out.splitlines()
    assert set(texts) <= set(shown)
    assert [line.strip() for line in shown if "collapsed" in line] == [
        f"collapsed: {text}" for text in texts.values()
    ]


def test_a_mark_on_behalf_of_a_cached_stage_does_not_replace_what_a_stage_has_said(client):
    parent = start_pipeline("ablation", "beauty", Settings())
    with tracked("fit a", None, parent) as run:
        run.mark("collapsed", "epoch 5: level 2")
    mark_pipeline(parent, "collapsed", {"fit a": "epoch 5", "fit b": "epoch 7"})
    tags = run_of(client, parent).data.tags
    assert (tags["sidflow.collapsed.fit a"], tags["sidflow.collapsed.fit b"]) == (
        "epoch 5: level 2",
        "epoch 7",
    )
    mark_pipeline("", "collapsed", {"fit a": "epoch 5"})  # stages run alone have no pipeline


def test_a_run_says_where_it_came_from(client):
    with tracked("fit", parents=[vectors(0), vectors(1)]) as run:
        run.output(vectors(2))
        run.dataset("reviews.json.gz", "ab" * 32, "s3://key:secret@bucket/reviews.json.gz", "raw")
    found = run_of(client, run.run_id)
    tags = found.data.tags
    assert tags["parent.ContentEmbeddings"] == vectors(0).fingerprint
    assert tags["parent.ContentEmbeddings.2"] == vectors(1).fingerprint
    assert tags["output.ContentEmbeddings"] == vectors(2).fingerprint
    assert tags["flyte.execution_id"].startswith("local-") and tags["flyte.task"] == "fit"
    assert {"flyte.project", "flyte.domain", "mlflow.source.git.commit"} <= tags.keys()
    datasets = {d.dataset.name: d.dataset for d in found.inputs.dataset_inputs}
    assert datasets["reviews.json.gz"].digest == "ab" * 8
    assert "bucket/reviews.json.gz" in datasets["reviews.json.gz"].source
    assert "secret" not in datasets["reviews.json.gz"].source
    assert datasets["ContentEmbeddings"].digest in datasets["ContentEmbeddings"].source
    assert "artifacts/ContentEmbeddings.json" in [
        f.path for f in client.list_artifacts(run.run_id, "artifacts")
    ]


def test_figures_are_kept(client):
    with tracked("fit") as run:
        run.figure("loss", Figure())
    assert [f.path for f in client.list_artifacts(run.run_id, "figures")] == ["figures/loss.png"]


@pytest.mark.parametrize(
    ("raised", "status"),
    [(ValueError("too few items"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "KILLED")],
)
def test_a_broken_stage_closes_itself_and_its_pipeline(client, raised, status):
    parent = start_pipeline("joint", "beauty", Settings())
    with pytest.raises(type(raised)), tracked("fit", None, parent) as run:
        run.log(1, {"loss": 1.0})
        raise raised
    for run_id in (run.run_id, parent):
        found = run_of(client, run_id)
        assert found.info.status == status and found.info.end_time is not None
        assert found.data.tags["error.message"] == f"{type(raised).__name__}: {raised}"
        assert found.data.tags["error.stage"] == "fit"
        assert type(raised).__name__ in found.data.tags["mlflow.note.content"]
    assert run_of(client, run.run_id).data.metrics == {"loss": 1.0}


def test_a_retried_stage_revives_its_pipeline(client):
    parent = start_pipeline("joint", "beauty", Settings())
    with pytest.raises(OSError), tracked("fit", None, parent):
        raise OSError("node lost")
    with tracked("fit", None, parent):
        assert run_of(client, parent).info.status == "RUNNING"
    finish_pipeline(parent, [])
    found = run_of(client, parent)
    assert found.info.status == "FINISHED"
    assert "error.message" not in found.data.tags


def test_no_password_reaches_the_store(client, flyte_home):
    with pytest.raises(ValueError), tracked("fit"):
        raise ValueError("cannot reach postgres://me:hunter2@db.example/x")
    with sqlite3.connect(flyte_home / "mlflow.db") as database:
        assert "hunter2" not in "\n".join(database.iterdump())


def test_a_run_id_of_another_store_is_refused(client):
    with (
        pytest.raises(ValueError, match=r"run_id '0+' is no run of sqlite:///"),
        tracked("fit", None, "0" * 32),
    ):
        pass


def test_the_pipeline_knows_who_made_what_although_a_stage_came_from_the_cache(client):
    first = start_pipeline("joint", "beauty", Settings())
    with tracked("embed", None, first) as embed:
        embed.output(vectors(0))
    finish_pipeline(first, [vectors(0)])

    second = start_pipeline("joint", "beauty", Settings())  # embed is cached and leaves no run here
    with tracked("fit", None, second, parents=[vectors(0)]) as fit:
        fit.output(vectors(1))
    stages = finish_pipeline(second, [vectors(1)])
    assert stages == {"embed": embed.run_id, "fit": fit.run_id}
    tags = run_of(client, second).data.tags
    assert tags["artifact.fit.ContentEmbeddings"] == vectors(1).fingerprint
    assert tags["artifact.embed.ContentEmbeddings"] == vectors(0).fingerprint
    assert tags["produced_by.embed.ContentEmbeddings"] == embed.run_id


def test_a_failed_attempt_is_not_named_as_the_maker(client):
    parent = start_pipeline("joint", "beauty", Settings())
    with tracked("fit", None, parent) as good:
        good.output(vectors(0))
    with pytest.raises(OSError), tracked("fit", None, parent) as bad:
        bad.output(vectors(0))
        raise OSError("disk full")
    assert finish_pipeline(parent, [vectors(0)]) == {"fit": good.run_id}


def test_the_failure_node_closes_what_a_lost_machine_left_running(client):
    closed = start_pipeline("joint", "beauty", Settings())
    finish_pipeline(closed, [])
    lost = start_pipeline("joint", "beauty", Settings())
    assert lost in fail_execution("pod was evicted")
    assert run_of(client, lost).info.status == "FAILED"
    assert run_of(client, lost).data.tags["error.message"] == "pod was evicted"
    assert run_of(client, closed).info.status == "FINISHED"


def test_another_executions_runs_are_left_alone(client, monkeypatch):
    lost = start_pipeline("joint", "beauty", Settings())
    monkeypatch.setattr(tracking, "execution_tags", lambda stage: {"flyte.execution_id": "other"})
    assert fail_execution("pod was evicted") == []
    assert run_of(client, lost).info.status == "RUNNING"


def test_the_store_and_its_files_lie_in_the_local_folder(client, flyte_home):
    with tracked("fit", Settings()) as run:
        pass
    assert run_of(client, run.run_id).info.artifact_uri.startswith((flyte_home / "mlartifacts").as_uri())
    assert list((flyte_home / "mlartifacts").rglob("config.json"))


def test_the_environment_names_another_store(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@mlflow.example")
    assert tracking.tracking_uri() == "https://me:hunter2@mlflow.example"
    assert tracking.without_secrets(tracking.tracking_uri()) == "https://***@mlflow.example"


def test_a_stage_that_is_terminated_leaves_no_run_running(client, flyte_home):
    script = (
        "import os, signal, time\n"
        "from tasks.tracking import tracked\n"
        "with tracked('fit'):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "interrupted; finished stages are cached" in done.stdout
    (run,) = client.search_runs([client.get_experiment_by_name("stages").experiment_id])
    assert run.info.status == "KILLED" and run.data.tags["error.message"] == "SystemExit: 143"
