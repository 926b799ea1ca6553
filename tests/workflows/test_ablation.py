"""The ablation workflow on planted data: one run of a small matrix answers most questions."""

from collections import Counter
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
from flytekit import FlyteContextManager
from flytekit.configuration import Image, ImageConfig, SerializationSettings

from components.artifacts import CollisionReport, RecommenderCheckpoint
from components.data.planted import plant
from components.metrics.report import evaluate_baselines
from components.metrics.sids import COLLAPSED_AT, CollapseError
from tasks.ablation import ArmRun, gather_ablation
from tasks.sasrec import evaluate_sasrec
from tasks.store import stored_at
from tasks.tracking import open_store
from workflows.ablation import ablation, run_arms
from workflows.config import AblationConfig

TWO_STAGE = {"name": "plain", "method": "two_stage"}
JOINT = {"name": "ste", "method": "joint", "settings": {"joint.exploration": {"kind": "ste"}}}
SEEDS = (0, 1)


def settings(folder: Path, arms: list[dict], **changes) -> AblationConfig:
    values = {
        "name": "matrix",
        "arms": arms,
        "seeds": SEEDS,
        "ingest": {
            "source": {
                "kind": "tabular",
                "interactions": {"path": str(folder / "events.parquet")},
                "items": {"path": str(folder / "items.csv")},
            },
            "k_core": 0,
        },
        "embedding": {"encoder": {"kind": "lsa", "dim": 16}},
        "tokenizer": {"model": {"kind": "rkmeans", "codebook_sizes": [8, 8]}},
        "sids": {"suffix_size": 40},
        "collisions": {"on_collapse": "report"},
        "recommender": {
            "model": {"kind": "causal", "dim": 32, "layers": 1, "heads": 2, "hidden": 64},
            "loop": {"epochs": 1},
            "validation": {"users": 20},
            "optim": {"warmup_steps": 5},
        },
        "joint": {"collapse": None},
        "sasrec": {"model": {"dim": 16, "hidden": 32}, "loop": {"epochs": 1}, "validation_users": 20},
        "evaluate": {"seen": ["kept"], "resamples": 100},
    }
    return AblationConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def data(module_home):
    """A planted log as a user would bring it."""
    log, catalog = plant(num_users=80, num_items=40)
    names = log.events.join(log.users, on="user_id").join(
        catalog.items.select("item_id", item="raw_id"), on="item_id"
    )
    events = names.select(user_id="raw_id", item_id="item", timestamp="timestamp")
    events.write_parquet(module_home / "events.parquet")
    catalog.items.select(item_id="raw_id", title="title").write_csv(module_home / "items.csv")
    return module_home


def pipelines():
    client = open_store()
    experiment = client.get_experiment_by_name("matrix").experiment_id
    runs = client.search_runs([experiment], order_by=["attributes.start_time ASC"])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


def children(run):
    query = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    return open_store().search_runs([run.info.experiment_id], query, max_results=200)


def stages(run) -> Counter[str]:
    return Counter(child.info.run_name for child in children(run))


def files(run, folder: str) -> set[str]:
    return {file.path for file in open_store().list_artifacts(run.info.run_id, folder)}


@pytest.fixture(scope="module")
def first(data):
    """Two arms and two seeds, run once: the result and its MLflow run."""
    result = ablation(config=settings(data, [TWO_STAGE, JOINT]))
    return result, pipelines()[0]


def test_every_stage_is_a_finished_child_of_one_run_and_equal_stages_are_made_once(first) -> None:
    _, parent = first
    assert parent.info.status == "FINISHED"
    assert {child.info.status for child in children(parent)} == {"FINISHED"}
    a_seed = [
        stage
        for seed in SEEDS
        for stage in (
            f"fit_tokenizer rkmeans of plain seed {seed}",
            f"assign_sids rkmeans of plain seed {seed}",
            f"analyze_collisions rkmeans of plain seed {seed}",
            f"fit_recommender plain seed {seed}",
            f"evaluate_recommender plain seed {seed}",
            f"fit_jointly ste seed {seed}",
            f"analyze_collisions ste seed {seed}",
            f"evaluate_recommender ste seed {seed}",
        )
    ]
    shared = ["ingest", "split", "fit_encoder", "embed_shard 0", "assemble_embeddings", "evaluate_baselines"]
    assert stages(parent) == Counter([*shared, *a_seed, "gather_ablation"])


def test_the_result_holds_arms_seeds_and_the_codes_that_were_evaluated(first, data) -> None:
    result, _ = first
    assert result.summary["arm"].unique(maintain_order=True).to_list() == [
        "popularity",
        "itemknn",
        "plain",
        "ste",
    ]
    assert result.seeds == list(SEEDS) and result.users == 80 and result.items == 40
    assert set(result.runs["seen"]) == {"kept"}
    assert result.tables.select("arm", "seed").rows() == [("plain", 0), ("ste", 0), ("plain", 1), ("ste", 1)]
    per_seed = result.runs.filter(metric="R@10", arm="plain")["value"]
    row = result.summary.filter(arm="plain", metric="R@10").row(0, named=True)
    assert row["mean"] == pytest.approx(per_seed.mean()) and row["against"] is None
    assert result.summary.filter(arm="ste")["against"].unique().to_list() == ["plain"]
    reports = [CollisionReport.load(path) for path in (data / "artifacts" / "CollisionReport").iterdir()]
    made = {report.fingerprint for report in reports}
    parents = result.provenance.parents
    assert {parents[f"CollisionReport {arm} seed {n}"] for arm in ("plain", "ste") for n in SEEDS} <= made


def test_figure_tables_and_deck_are_kept(first, data) -> None:
    result, parent = first
    (gathered,) = (child for child in children(parent) if child.info.run_name == "gather_ablation")
    assert files(gathered, "figures") == {"figures/ablation.png"}
    assert "ablation.md" in files(gathered, "") and "pages/ablation.html" in files(gathered, "pages")
    decks = [deck.read_text() for deck in data.parent.rglob("deck.html")]
    assert any("Semantic IDs" in deck and "data:image/png;base64" in deck for deck in decks)
    assert files(parent, "figures") == {"figures/comparison.png", "figures/lineage.png"}
    assert "| plain |" in parent.data.tags["mlflow.note.content"]
    mean = result.summary.filter(arm="ste", metric="N@10")["mean"].item()
    assert parent.data.metrics["ste/kept/N_at_10/mean"] == pytest.approx(mean)
    assert parent.data.params["seeds"] == "[0, 1]"


def test_a_second_run_trains_nothing_and_still_shows_the_result(first, data, capsys) -> None:
    result, _ = first
    again = ablation(config=settings(data, [TWO_STAGE, JOINT]))
    assert again.fingerprint == result.fingerprint
    parent = pipelines()[-1]
    assert stages(parent) == Counter(["ingest"])
    page = capsys.readouterr().out
    for words in ("popularity", "plain", "Δ N@10 ± 95 %", "Semantic IDs", "not adopted", parent.info.run_id):
        assert words in page


def test_a_new_arm_runs_alone_and_a_shared_tokenizer_is_not_trained_again(first, data) -> None:
    sasrec = {"name": "sasrec", "method": "sasrec"}
    other = {"name": "few", "method": "two_stage", "settings": {"sids.suffix_size": 30}}
    result = ablation(config=settings(data, [TWO_STAGE, JOINT, sasrec, other], seeds=[0]))
    assert stages(pipelines()[-1]) == Counter(
        [
            "ingest",
            "fit_sasrec sasrec seed 0",
            "evaluate_sasrec sasrec seed 0",
            "assign_sids rkmeans of few seed 0",
            "analyze_collisions rkmeans of few seed 0",
            "fit_recommender few seed 0",
            "evaluate_recommender few seed 0",
            "gather_ablation",
        ]
    )
    assert result.summary.filter(pl.col("adopted").is_not_null()).is_empty()
    assert set(result.tables["arm"]) == {"plain", "ste", "few"}


def test_a_collapsed_table_ends_the_run_where_collapse_is_no_result(first, data) -> None:
    strict = {"max_collision_rate": 0.01, "watch_collision_rate": 0.01}
    with pytest.raises(CollapseError, match="collapsed"):
        ablation(config=settings(data, [TWO_STAGE], seeds=[0], collisions=strict))
    failed = pipelines()[-1]
    assert failed.info.status == "FAILED" and "fit_recommender" not in stages(failed)
    told = strict | {"on_collapse": "report"}
    result = ablation(config=settings(data, [TWO_STAGE], seeds=[0], collisions=told))
    assert result.tables["verdict"].to_list() == ["collapsed"]
    assert pipelines()[-1].info.status == "FINISHED"


def test_arms_that_collapse_are_marked_on_every_pipeline_also_when_nothing_is_trained_again(
    first, data
) -> None:
    falls = {
        "name": "falls",
        "method": "joint",
        "settings": {
            "recommender.loop.epochs": 12,
            "joint.exploration": {"kind": "ste"},
            "joint.collapse": {"min_perplexity": 0.75},
            "joint.tokenizer_lr": 0.1,
            "joint.codebook_weight": 0,
            "joint.commitment_weight": 0,
            "joint.latent_reconstruction_weight": 0,
        },
    }
    config = settings(data, [falls])
    result = ablation(config=config)
    epochs = dict(result.tables.select("seed", "collapsed_at_epoch").iter_rows())
    for seed in SEEDS:
        digest = result.provenance.parents[f"RecommenderCheckpoint falls seed {seed}"]
        kept = RecommenderCheckpoint.load(stored_at("RecommenderCheckpoint", digest))
        assert kept.metrics[COLLAPSED_AT] == epochs[seed] > kept.epoch
    trained = pipelines()[-1]
    own = {run.info.run_name: run.data.tags.get("sidflow.collapsed", "") for run in children(trained)}
    marks = {f"sidflow.collapsed.fit_jointly falls seed {seed}": f"epoch {epochs[seed]}" for seed in SEEDS}
    for key, epoch in marks.items():
        assert own[key.removeprefix("sidflow.collapsed.")] == trained.data.tags[key]
        assert trained.data.tags[key].startswith(f"{epoch}: the codes of level")
    ablation(config=config)
    again = pipelines()[-1]
    assert stages(again) == Counter(["ingest"])
    assert {k: v for k, v in again.data.tags.items() if k.startswith("sidflow.collapsed")} == marks


def test_lists_that_do_not_fit_the_runs_are_refused(first) -> None:
    run = ArmRun(arm="plain", method="two_stage", seed=0)
    with pytest.raises(
        ValueError, match="1 runs, 1 of them with semantic IDs, but 0 reports, 0 collision reports"
    ):
        gather_ablation(runs=[run], reports=[], collisions=[], recommenders=[])


def graph(config: AblationConfig, tiny) -> dict[str, tuple[str, set[str]]]:
    """Compile the arms as a cluster does: node to its task and the nodes that it waits for."""
    image = Image(name="default", fqn="example/other", tag="0")
    serialization = SerializationSettings(
        project="p", domain="d", version="v", image_config=ImageConfig(image, [image])
    )
    context = FlyteContextManager.current_context().with_serialization_settings(serialization)
    with FlyteContextManager.with_context(context) as inside:
        spec = run_arms.compile_into_workflow(
            inside,
            run_arms.task_function,
            config=config,
            log=tiny.log,
            catalog=tiny.catalog,
            split=tiny.split,
            embeddings=tiny.embeddings,
            baselines=evaluate_baselines(tiny.split, config.evaluate),
            run_id="run",
        )
    return {
        node.id: (node.task_node.reference_id.name.rsplit(".", 1)[-1], set(node.upstream_node_ids))
        for node in spec.nodes
    }


def test_on_a_cluster_arms_run_side_by_side_and_share_the_nodes_that_are_equal(data, tiny) -> None:
    gumbel = JOINT | {"name": "gumbel", "settings": {}}
    sasrec = {"name": "sasrec", "method": "sasrec"}
    wide = {"name": "wide", "method": "two_stage", "settings": {"tokenizer.model.codebook_sizes": [16, 16]}}
    nodes = graph(settings(data, [TWO_STAGE, JOINT, gumbel, sasrec, wide]), tiny)
    assert Counter(task for task, _ in nodes.values()) == {
        "fit_tokenizer": 2 * 2,
        "assign_sids": 2 * 2,
        "analyze_collisions": 2 * (2 + 2),
        "fit_recommender": 2 * 2,
        "fit_jointly": 2 * 2,
        "evaluate_recommender": 2 * 4,
        "fit_sasrec": 2,
        "evaluate_sasrec": 2,
        "gather_ablation": 1,
    }
    for task, upstream in nodes.values():
        before = Counter(nodes[node][0] for node in upstream)
        match task:
            case "fit_tokenizer" | "fit_sasrec":
                assert not before
            case "fit_recommender":
                assert before == {"assign_sids": 1, "analyze_collisions": 1}
            case "fit_jointly":
                assert before == {"fit_tokenizer": 1, "assign_sids": 1, "analyze_collisions": 1}
            case "gather_ablation":
                assert before["evaluate_recommender"] == 8 and before["evaluate_sasrec"] == 2


def test_the_node_of_all_arms_has_no_time_limit_and_failure_is_recorded() -> None:
    assert run_arms.metadata.timeout == timedelta(0) < evaluate_sasrec.metadata.timeout
    ablation.compile()
    assert ablation.failure_node.flyte_entity.name.endswith("record_ablation_failure")
