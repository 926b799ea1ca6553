"""Training on a planted catalogue: the first, and one after a night of new items, each run once."""

import pytest

from components.artifacts import Bundle, Comparison
from components.metrics.promotion import PromoteConfig
from tasks.champion import in_use
from tasks.lineage import lineage_of
from tasks.promotion import DECISION, REASON
from tasks.runs import CHAMPION, open_store, stages_of
from workflows.new_items import new_items
from workflows.retrain import retrain

from .conftest import NEXT, QUIET, TRAINED, latest_pipeline


def stages(run) -> dict:
    return {stage.info.run_name: stage for stage in stages_of(open_store(), run)}


def champion() -> Bundle:
    return in_use(open_store(), PromoteConfig()).bundle


@pytest.fixture(scope="module")
def trainings(growing_settings):
    """The run of each training, and the model in use after it; between them a night with new items."""
    config = growing_settings()
    assert isinstance(retrain(config=config, until=TRAINED), Comparison)
    first = latest_pipeline(), champion()
    new_items(config=config, until=NEXT)
    night = latest_pipeline(), champion()
    retrain(config=config, until=QUIET)
    return first, night, (latest_pipeline(), champion())


def test_the_first_training_needs_no_model_and_makes_one(trainings):
    run, bundle = trainings[0]
    assert run.info.status == "FINISHED" and run.data.tags[CHAMPION] == "none"
    ran = stages(run)
    assert "ingest" in ran and not {"ingest_onto", "match_names"} & ran.keys()
    version = open_store().get_model_version("sidflow", "1")
    assert version.tags[DECISION] == "promoted" and "there was no champion" in version.tags[REASON]
    assert version.tags["sidflow.bundle"] == bundle.fingerprint


def test_a_retraining_keeps_ids_and_learns_everything_else_anew(trainings):
    _, (_, before), (run, after) = trainings
    assert after.catalog.items.equals(before.catalog.items) and run.data.tags[CHAMPION] == "mlflow:sidflow/2"
    for part in ("encoder", "tokenizer", "sids", "recommender"):
        assert getattr(after, part).fingerprint != getattr(before, part).fingerprint, part
    ran = stages(run)
    assert "ingest_onto" in ran and "cold_items" in ran["split"].data.metrics
    assert ran["split"].data.metrics["cold_items"] == 0


def test_names_stay_where_they_can_and_the_churn_is_told(trainings):
    _, (_, before), (run, after) = trainings
    figures = stages(run)["match_names"].data.metrics
    assert figures["churn/SID/after"] < figures["churn/SID/before"]
    joined = before.sids.codes.join(after.sids.codes, on=["item_id", "codes", "suffix"])
    assert 1 - len(joined) / before.sids.num_items == pytest.approx(figures["churn/SID/after"])
    assert "Of 60 items that had names, training renames" in run.data.tags["mlflow.note.content"]


def test_the_better_model_is_promoted_and_says_why(trainings):
    version = open_store().get_model_version_by_alias("sidflow", "champion")
    assert str(version.version) == "3" and version.tags[REASON].startswith("promoted: ")
    assert "of version 2" in version.tags[REASON]
    assert version.tags[REASON] in trainings[2][0].data.tags["mlflow.note.content"]


def test_the_last_model_goes_back_to_the_first_raw_file_over_the_extension(trainings):
    lineage = lineage_of(stages(trainings[2][0])["log_model two-stage"].info.run_id)
    before = [lineage.steps[run] for run in lineage.before()]
    names = {step.name for step in before}
    assert {"ingest", "ingest_onto", "extend_sids", "match_names", "assign_sids", "fit_recommender"} <= names
    first = stages(trainings[0][0])["ingest"].info.run_id
    (ingest,) = [step for step in before if step.run_id == first]
    assert "growing.csv" in {raw.kind for raw in ingest.raw}
    made = {artifact for step in lineage.steps.values() for artifact in step.made}
    assert {artifact for step in before for artifact in step.read} <= made


def test_training_again_on_equal_data_renames_nothing_and_keeps_the_champion(
    trainings, growing_settings, capsys
):
    retrain(config=growing_settings(), until=QUIET)
    page = " ".join(capsys.readouterr().out.split())
    for words in (
        "Of 60 items that had names, training renames",
        "and matching leaves 0.0%",
        "share of items whose ... changed",
        "kept: version 3",
    ):
        assert words in page, words
    assert champion().fingerprint == trainings[2][1].fingerprint


def test_a_failure_in_the_middle_leaves_the_champion(trainings, growing_settings):
    strict = growing_settings(collisions={"max_collision_rate": 0.01, "watch_collision_rate": 0.01})
    with pytest.raises(Exception, match="collapsed"):
        retrain(config=strict, until=QUIET)
    run = latest_pipeline()
    assert run.info.status == "FAILED" and not {"fit_recommender", "promote"} & stages(run).keys()
    assert champion().fingerprint == trainings[2][1].fingerprint


def test_codes_of_another_form_are_trained_on_without_the_old_names(trainings, growing_settings):
    """Otherwise nobody could ever add a level."""
    retrain(
        config=growing_settings(tokenizer={"model": {"kind": "rkmeans", "codebook_sizes": [8, 8, 4]}}),
        until=QUIET,
    )
    run = latest_pipeline()
    assert run.info.status == "FINISHED" and "match_names" not in stages(run)
    assert "have 2 and 3 levels" in run.data.tags["sidflow.names_lost.match_names"]
