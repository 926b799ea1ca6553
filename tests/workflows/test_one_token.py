"""One token an item through the whole pipeline: codes that move, cold items, exact decoding of the served model."""

from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.pyfunc import load_model

from components.artifacts import EvaluationReport
from components.data.planted import plant
from tasks.home import home
from tasks.tracking import open_store
from workflows.config import PipelineConfig
from workflows.joint import joint

MODEL = {
    "kind": "intrr",
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "head_dim": 8,
    "hidden": 32,
    "uid_dim": 8,
    "text": True,
}
SETTINGS: dict[str, Any] = {
    "name": "one token",
    "split": {"cold_share": 0.1},
    "embedding": {"encoder": {"kind": "lsa", "dim": 16}},
    "tokenizer": {
        "model": {"kind": "rqvae", "codebook_sizes": [8, 8], "hidden": [32], "latent_dim": 8},
        "loop": {"epochs": 2, "validate_every": 1},
    },
    "sids": {"suffix_size": 120},
    "recommender": {
        "model": MODEL,
        "loop": {"epochs": 2},
        "validation": {"users": 50},
        "optim": {"warmup_steps": 5},
    },
    "evaluate": {"resamples": 100},
    "compare": {"resamples": 100},
}


@pytest.fixture(scope="module")
def folder(module_home):
    log, catalog = plant(num_users=120, num_items=60)
    names = log.events.join(log.users, on="user_id").join(
        catalog.items.select("item_id", item="raw_id"), on="item_id"
    )
    events = names.select(user_id="raw_id", item_id="item", timestamp="timestamp")
    events.write_csv(module_home / "events.csv")
    catalog.items.select(item_id="raw_id", title="title").write_csv(module_home / "items.csv")
    return module_home


@pytest.fixture(scope="module")
def ran(folder):
    """The joint workflow, run once: its comparison, and the run of the pipeline."""
    source = {
        "kind": "tabular",
        "interactions": {"path": str(folder / "events.csv")},
        "items": {"path": str(folder / "items.csv")},
    }
    config = PipelineConfig.model_validate(SETTINGS | {"ingest": {"source": source, "k_core": 0}})
    comparison = joint(config=config)
    client = open_store()
    experiment = client.get_experiment_by_name("one token").experiment_id
    runs = client.search_runs([experiment])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    return comparison, parent, {run.info.run_name: run for run in runs}


def test_codes_move_under_a_one_token_recommender_and_cold_items_stand_in_the_comparison(ran) -> None:
    comparison, parent, stages = ran
    assert parent.info.status == "FINISHED"
    assert {"two-stage", "joint"} <= set(comparison.metrics["method"])
    for stage in ("fit_recommender", "fit_jointly"):
        found = stages[stage].data.metrics
        wanted = {"items/distinct_paths", "items/agree_sid/level1", "items/uid_norm/rare", "train/alignment"}
        assert wanted <= set(found)
    assert stages["split"].data.metrics["cold_items"] == 6
    for method in ("two-stage", "joint", "popularity"):
        assert not comparison.metrics.filter(method=method, slice="cold", metric="R@10").is_empty()
    assert "joint/kept/cold/R_at_10" in stages["evaluate_recommender joint"].data.metrics


def test_a_report_states_what_the_beam_missed(ran, folder) -> None:
    _, _, stages = ran
    metrics = stages["evaluate_recommender two-stage"].data.metrics
    assert 0.8 < metrics["beam/kept/found"] <= 1 and "beam/excluded/R_at_10_exact" in metrics
    reports = [EvaluationReport.load(path) for path in (home() / "artifacts" / "EvaluationReport").iterdir()]
    lost = [row for report in reports for row in report.details.get("beam_loss", [])]
    assert {(row["method"], row["seen"]) for row in lost} == {
        (method, seen) for method in ("two-stage", "joint") for seen in ("kept", "excluded")
    }


def test_the_served_model_decodes_by_beam_or_exactly(ran, folder, monkeypatch) -> None:
    _, _, stages = ran
    run = stages["log_model joint"]
    client: MlflowClient = open_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    model = load_model(f"models:/{client.get_run(run.info.run_id).outputs.model_outputs[0].model_id}")
    items = pd.read_csv(folder / "items.csv")["item_id"].astype(str).tolist()
    histories = pd.DataFrame({"history": [items[:3], items[4:5]]})
    answers = [model.predict(histories, params={"k": 60, "decode": decode}) for decode in ("beam", "exact")]
    assert answers[0]["items"].tolist() == answers[1]["items"].tolist()
    for one, other in zip(*(answer["scores"] for answer in answers), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    with pytest.raises(Exception, match="decode must be one of beam, exact for this model"):
        model.predict(histories, params={"decode": "sampling"})
