"""Both workflows on planted data; one run of the joint workflow answers most questions."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from components.artifacts import (
    Comparison,
    EvaluationReport,
    RecommenderCheckpoint,
    SidTable,
)
from components.metrics.compare import CompareConfig
from components.metrics.sids import CollapseError
from tasks.evaluation import compare_reports
from tasks.home import home
from tasks.origin import commit
from tasks.tracking import open_store
from workflows.config import PipelineConfig
from workflows.joint import joint
from workflows.two_stage import two_stage

ROOT = Path(__file__).parents[2]
MODEL = {"kind": "causal", "dim": 32, "layers": 1, "heads": 2, "hidden": 64}
RECIPE = {
    "model": MODEL,
    "loop": {"epochs": 2},
    "validation": {"users": 50},
    "optim": {"warmup_steps": 5},
}


def settings(folder: Path, **changes) -> PipelineConfig:
    source = {
        "kind": "tabular",
        "interactions": {"path": str(folder / "events.csv")},
        "items": {"path": str(folder / "items.csv")},
    }
    values = {
        "name": "planted",
        "ingest": {"source": source, "k_core": 0},
        "embedding": {"encoder": {"kind": "lsa", "dim": 16}, "shards": 2},
        "tokenizer": {
            "model": {"kind": "rqvae", "codebook_sizes": [8, 8], "hidden": [32], "latent_dim": 8},
            "loop": {"epochs": 2, "validate_every": 1},
        },
        "sids": {"suffix_size": 120},
        "recommender": RECIPE,
        "evaluate": {"resamples": 100},
        "compare": {"resamples": 100},
    }
    return PipelineConfig.model_validate(values | changes)


def children(client: MlflowClient, run_id: str):
    run = client.get_run(run_id)
    return client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=100
    )


def pipelines(client: MlflowClient):
    experiment = client.get_experiment_by_name("planted").experiment_id
    runs = client.search_runs([experiment], order_by=["attributes.start_time ASC"])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


def stages(client: MlflowClient, run_id: str) -> Counter[str]:
    return Counter(run.info.run_name for run in children(client, run_id))


@pytest.fixture(scope="module")
def data(planted_files):
    """A planted log as a user would bring it: two csv files."""
    return planted_files


@pytest.fixture(scope="module")
def first(data):
    """The joint workflow, run once: its comparison and its MLflow run."""
    comparison = joint(config=settings(data))
    return comparison, pipelines(open_store())[0]


def test_the_joint_workflow_compares_four_methods(first):
    comparison, _ = first
    assert isinstance(comparison, Comparison)
    assert set(comparison.metrics["method"]) == {"popularity", "itemknn", "two-stage", "joint"}


def test_every_stage_is_a_finished_child_of_one_run(first):
    client = open_store()
    _, parent = first
    assert parent.info.status == "FINISHED"
    assert all(run.info.status == "FINISHED" for run in children(client, parent.info.run_id))
    assert stages(client, parent.info.run_id) == Counter(
        [
            "ingest",
            "split",
            "fit_encoder",
            "embed_shard 0",
            "embed_shard 1",
            "assemble_embeddings",
            "fit_tokenizer",
            "assign_sids",
            "analyze_collisions two-stage",
            "fit_recommender",
            "evaluate_baselines",
            "evaluate_recommender two-stage",
            "fit_jointly",
            "analyze_collisions joint",
            "evaluate_recommender joint",
            "compare_reports",
            "log_model joint",
        ]
    )


def test_the_run_holds_losses_curves_figures_and_settings(first):
    client = open_store()
    _, parent = first
    assert parent.data.params["tokenizer.model.codebook_sizes"] == "[8, 8]"
    runs = {run.info.run_name: run for run in children(client, parent.info.run_id)}
    for name in ("fit_tokenizer", "fit_recommender", "fit_jointly"):
        run = runs[name]
        assert len(client.get_metric_history(run.info.run_id, "epoch")) >= 2
        assert "figures/curves.png" in [f.path for f in client.list_artifacts(run.info.run_id, "figures")]
    assert "joint/kept/all/R_at_10" in runs["evaluate_recommender joint"].data.metrics
    assert "popularity/kept/all/R_at_10" not in runs["evaluate_recommender joint"].data.metrics
    analysis = runs["analyze_collisions joint"]
    figures = [f.path for f in client.list_artifacts(analysis.info.run_id, "figures")]
    assert figures == ["figures/code_usage.png", "figures/collisions.png", "figures/prefix_errors.png"]
    raw = {d.dataset.name: d.dataset for d in runs["ingest"].inputs.dataset_inputs}
    assert set(raw) == {"events.csv", "items.csv"}
    assert str(raw["events.csv"].source).count("events.csv")


def test_what_a_stage_read_is_what_another_made(first):
    client = open_store()
    _, parent = first
    runs = children(client, parent.info.run_id)
    made = {v for run in runs for k, v in run.data.tags.items() if k.startswith("output.")}
    read = {v for run in runs for k, v in run.data.tags.items() if k.startswith("parent.")}
    assert read and read <= made
    named = {v for k, v in parent.data.tags.items() if k.startswith("artifact.")}
    assert named == made


def test_the_joint_results_are_of_one_epoch(first, data):
    store = data / "artifacts"
    recommenders = [RecommenderCheckpoint.load(p) for p in (store / "RecommenderCheckpoint").iterdir()]
    tables = {t.fingerprint: t for t in map(SidTable.load, (store / "SidTable").iterdir())}
    assert len(recommenders) == len(tables) == 2
    assert {r.sids for r in recommenders} == set(tables)


def test_a_rerun_trains_nothing_and_still_knows_who_made_what(first, data):
    client = open_store()
    before, parent = first
    assert joint(config=settings(data)).fingerprint == before.fingerprint
    again = pipelines(client)[-1]
    assert stages(client, again.info.run_id) == Counter(["ingest"])
    makers = {k: v for k, v in parent.data.tags.items() if k.startswith("produced_by.fit_")}
    assert makers and makers.items() <= again.data.tags.items()


def test_a_changed_recommender_setting_retrains_the_recommender_alone(first, data):
    client = open_store()
    changed = settings(data, recommender=RECIPE | {"seed": 1})
    two_stage(config=changed)
    assert stages(client, pipelines(client)[-1].info.run_id) == Counter(
        [
            "ingest",
            "fit_recommender",
            "evaluate_recommender two-stage",
            "compare_reports",
            "log_model two-stage",
        ]
    )


def test_a_collapsed_table_fails_the_run_and_says_so(first, data):
    client = open_store()
    strict = settings(data, collisions={"max_collision_rate": 0.01, "watch_collision_rate": 0.01})
    with pytest.raises(CollapseError, match="collapsed"):
        two_stage(config=strict)
    parent = pipelines(client)[-1]
    assert parent.info.status == "FAILED" and "collapsed" in parent.data.tags["error.message"]
    broken = [run for run in children(client, parent.info.run_id) if run.info.status != "FINISHED"]
    assert [(run.info.run_name, run.info.status) for run in broken] == [
        ("analyze_collisions two-stage", "FAILED")
    ]
    assert "fit_recommender" not in stages(client, parent.info.run_id)


def test_a_failure_between_stages_closes_the_run_too(data):
    client = open_store()
    missing = settings(data, ingest={"source": {"kind": "tabular", "interactions": {"path": "/none.csv"}}})
    with pytest.raises(FileNotFoundError, match="none.csv"):
        two_stage(config=missing)
    assert pipelines(client)[-1].info.status == "FAILED"
    experiments = [e.experiment_id for e in client.search_experiments()]
    assert not client.search_runs(experiments, "attributes.status = 'RUNNING'")


def test_the_page_at_the_end_shows_methods_levels_and_runs(first, data, capsys):
    joint(config=settings(data))
    page = capsys.readouterr().out
    for word in ("popularity", "itemknn", "two-stage", "joint", "perplexity", "fit_jointly", "make ui"):
        assert word in page
    assert pipelines(open_store())[-1].info.run_id in page


def test_the_model_answers_in_a_fresh_process_far_from_the_checkout(first, data, tmp_path):
    client = open_store()
    _, parent = first
    run = next(r for r in children(client, parent.info.run_id) if r.info.run_name == "log_model joint")
    model = f"models:/{run.outputs.model_outputs[0].model_id}"
    items = pl.read_csv(data / "items.csv")["item_id"].head(3).to_list()
    script = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path = [p for p in sys.path if p]
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
items = json.loads(sys.argv[2])
histories = pd.DataFrame({"history": [items, ["unknown", items[0]], ["unknown"]]})
out = model.predict(histories, params={"k": 4})
import components
try:
    model.predict(pd.DataFrame({"history": [items, [7]]}))
    refusal = ""
except Exception as error:
    refusal = str(error)
print(json.dumps([out.to_dict("list"), components.__file__, "tasks" in sys.modules, refusal]))
"""
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{data / 'mlflow.db'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script, model, json.dumps(items)],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out, code, with_tasks, refusal = json.loads(done.stdout.splitlines()[-1])
    assert str(data) in code and not with_tasks
    assert [len(row) for row in out["items"]] == [4, 4, 4]
    assert out["warning"][:2] == ["", "ignored 1 unknown item: 'unknown'"] and "popular" in out["warning"][2]
    assert not set(items) & set(out["items"][0])
    assert all(row == sorted(row, reverse=True) for row in out["scores"])
    assert out["titles"][0][0]
    assert "row 1" in refusal

    from mlflow.pyfunc import load_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
        here = load_model(model).unwrap_python_model()
        import pandas as pd

        histories = pd.DataFrame({"history": [items, ["unknown", items[0]], ["unknown"]]})
        answer = here.predict(None, histories, {"k": 4})
    assert answer["items"].to_list() == out["items"]
    for mine, theirs in zip(answer["scores"], out["scores"], strict=True):
        assert mine == pytest.approx(theirs)


def one_of(data: Path, kind: str) -> str:
    return str(next((data / "artifacts" / kind).iterdir()))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(RECIPE | {"seed": 5}))
    return path


def test_a_stage_runs_alone_in_its_own_process(first, data, recipe):
    script = str(Path(sys.executable).with_name("pyflyte"))
    stage = [script, "run", "tasks/recommender.py", "fit_recommender", "--config", str(recipe)]
    folders = ["--split", one_of(data, "SequenceSplit"), "--sids", one_of(data, "SidTable")]
    folders += ["--embeddings", one_of(data, "ContentEmbeddings")]
    done = subprocess.run([*stage, *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RecommenderCheckpoint(fingerprint=" in done.stdout
    client = open_store()
    alone = client.search_runs([client.get_experiment_by_name("stages").experiment_id])
    assert [(run.info.run_name, run.info.status) for run in alone] == [("fit_recommender", "FINISHED")]


def test_a_folder_of_another_kind_is_refused_with_both_named(first, data, recipe, monkeypatch):
    from flytekit.clis.sdk_in_container.pyflyte import main as pyflyte

    monkeypatch.chdir(ROOT)
    folders = ["--split", one_of(data, "SidTable"), "--sids", one_of(data, "SidTable")]
    folders += ["--embeddings", one_of(data, "ContentEmbeddings")]
    stage = ["run", "tasks/recommender.py", "fit_recommender", "--config", str(recipe)]
    refused = CliRunner().invoke(pyflyte, [*stage, *folders])
    shown = " ".join(refused.output.replace("│", " ").split())
    assert refused.exit_code != 0 and "holds the kind SidTable, the kind SequenceSplit is wanted" in shown


def test_a_list_of_folders_is_taken_from_the_command_line(first, data, monkeypatch):
    from flytekit.clis.sdk_in_container.pyflyte import main as pyflyte

    monkeypatch.chdir(ROOT)
    folder = next(
        str(path)
        for path in (data / "artifacts" / "EvaluationReport").iterdir()
        if "joint" in set(EvaluationReport.load(path).ranks["method"])
    )
    config = '{"resamples": 100}'
    stage = ["run", "tasks/evaluation.py", "compare_reports", "--config", config]
    done = CliRunner().invoke(pyflyte, [*stage, "--reports", json.dumps([folder])])
    assert done.exit_code == 0, done.output
    assert "Comparison(fingerprint=" in done.output


def test_reports_of_earlier_runs_are_compared_by_hand(first, data):
    folders = list((data / "artifacts" / "EvaluationReport").iterdir())
    methods = {str(f): set(EvaluationReport.load(f).ranks["method"]) for f in folders}
    picked = [next(f for f, found in methods.items() if name in found) for name in ("two-stage", "joint")]
    by_hand = compare_reports(reports=picked, config=CompareConfig(resamples=100))
    assert set(by_hand.metrics["method"]) == {"popularity", "itemknn", "two-stage", "joint"}


def test_artefacts_say_which_commit_made_them(first, data):
    assert SidTable.load(Path(one_of(data, "SidTable"))).provenance.git == commit()


def test_the_result_stands_on_the_run_that_people_open_first(first):
    comparison, parent = first
    run = open_store().get_run(parent.info.run_id)
    wanted = comparison.metrics.filter(method="joint", seen="kept", slice="all", metric="R@10")[
        "value"
    ].item()
    assert run.data.metrics["joint/kept/R_at_10"] == wanted
    assert "| joint | kept |" in run.data.tags["mlflow.note.content"]
    assert "figures/comparison.png" in [
        f.path for f in open_store().list_artifacts(parent.info.run_id, "figures")
    ]


def test_two_processes_with_one_seed_give_the_same_bytes(first, data, tmp_path, empty_store):
    """A second machine of the same kind: nothing cached, nothing shared but the files and the settings."""
    comparison, _ = first
    config = tmp_path / "config.json"
    config.write_text(settings(data).model_dump_json())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(empty_store, elsewhere / "mlflow.db")
    command = [str(Path(sys.executable).with_name("pyflyte")), "run", "workflows/joint.py", "joint"]
    done = subprocess.run(
        [*command, "--config", str(config)],
        cwd=ROOT,
        env=os.environ | {"SIDFLOW_HOME": str(elsewhere), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    here = home() / "artifacts"
    for kind in ("SidTable", "RecommenderCheckpoint", "TokenizerCheckpoint", "Comparison"):
        names = {folder.name for folder in (elsewhere / "artifacts" / kind).iterdir()}
        assert names and names <= {folder.name for folder in (here / kind).iterdir()}, kind
    assert comparison.fingerprint[:16] in {f.name for f in (elsewhere / "artifacts" / "Comparison").iterdir()}


def test_names_of_unequal_length_go_through_the_whole_pipeline_and_serve(data) -> None:
    import mlflow
    import pandas as pd

    tokenizer = {
        "model": {
            "kind": "dvae",
            "vocabulary": 12,
            "positions": 3,
            "price": 12.0,
            "hidden": 16,
            "decoder_hidden": 16,
        },
        "loop": {"epochs": 60, "validate_every": 60},
        "batch_size": 32,
    }
    recipe = RECIPE | {"model": MODEL | {"max_tokens": 24, "length_penalty": 0.2}, "batch_tokens": 400}
    config = settings(
        data,
        tokenizer=tokenizer,
        recommender=recipe,
        sids={"suffix_size": 60, "suffix_order": "popularity"},
    )
    comparison = two_stage(config=config)
    assert set(comparison.metrics["method"]) == {"popularity", "itemknn", "two-stage"}
    client, parent = open_store(), pipelines(open_store())[-1]
    runs = {run.info.run_name: run for run in children(client, parent.info.run_id)}
    fitted = runs["fit_tokenizer"].data.metrics
    assert 1 < fitted["length/item"] < 3 and "length/rule_draw" in fitted and fitted["price"] == 12
    analysis = runs["analyze_collisions two-stage"]
    figures = {f.path for f in client.list_artifacts(analysis.info.run_id, "figures")}
    assert {"figures/length_by_popularity.png", "figures/prefix_errors.png"} <= figures
    assert analysis.data.metrics["codes_per_item"] == pytest.approx(fitted["length/item"])
    assert analysis.data.metrics["events_in_budget"] >= analysis.data.metrics["events_in_budget_full_length"]

    logged = client.search_logged_models([parent.info.experiment_id])
    newest = max(logged, key=lambda model: model.creation_timestamp)
    mlflow.set_tracking_uri(f"sqlite:///{home() / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model(newest.model_uri)
    names = pl.read_csv(data / "items.csv")["item_id"].cast(pl.String).to_list()
    answer = model.predict(pd.DataFrame({"history": [names[:4], names[5:6]]}), params={"k": 5})
    assert all(len(set(items)) == 5 and set(items) <= set(names) for items in answer["items"])
