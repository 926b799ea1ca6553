"""The stages that read newer data: as tasks, in a workflow, and from the command line."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from flytekit import workflow

from components.artifacts import InteractionLog, ItemCatalog, SequenceSplit
from components.config import Config
from components.data.ingest import IngestConfig
from components.data.splits import SplitConfig
from components.embeddings import LsaConfig, encode_shard, fit_encoder
from tasks.data import ingest, ingest_onto, set_aside, split_newcomers
from tasks.tracking import open_store, start_pipeline

OCTOBER = IngestConfig(until="2011-10-01")
WEEKS = SplitConfig(protocol="by_time", until="2011-12-01", test_days=28)


class Recipe(Config):
    """What the workflow below reads."""

    before: IngestConfig = OCTOBER
    """The log as it was."""
    now: IngestConfig = IngestConfig()
    """The log as it is."""
    split: SplitConfig = WEEKS
    """Windows."""


@workflow
def grow(config: Recipe) -> tuple[InteractionLog, ItemCatalog, ItemCatalog, SequenceSplit]:
    _, known = ingest(config=config.before)
    log, catalog = ingest_onto(catalog=known, config=config.now)
    return log, catalog, known, split_newcomers(log=log, catalog=catalog, known=known, config=config.split)


def stage(name: str):
    client = open_store()
    experiment = client.get_experiment_by_name("stages").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`sidflow.stage` = '{name}'")
    return run


def test_a_workflow_grows_a_catalogue_and_holds_its_newcomers_out(flyte_home: Path) -> None:
    log, catalog, known, split = grow(config=Recipe())
    assert (known.num_items, catalog.num_items, len(split.cold)) == (2_333, 2_718, 385)
    assert catalog.items.head(known.num_items).equals(known.items)
    assert catalog.provenance.parents == {"ItemCatalog": known.fingerprint}
    assert SplitConfig.model_validate(split.provenance.config) == WEEKS
    assert (split.log, split.catalog) == (log.fingerprint, catalog.fingerprint)
    read = stage("ingest_onto").data
    assert read.tags["parent.ItemCatalog"] == known.fingerprint
    assert read.tags["output.ItemCatalog"] == catalog.fingerprint
    assert read.metrics["new_items"] == 385
    parted = stage("split_newcomers").data
    assert parted.params["until"] == "2011-12-01T00:00:00Z"
    assert (parted.metrics["cold_items"], parted.metrics["test_users"]) == (385, len(split.test))


def test_a_catalogue_that_did_not_grow_is_no_new_output(flyte_home: Path) -> None:
    _, known = ingest(config=OCTOBER)
    log, catalog = ingest_onto(catalog=known, config=IngestConfig(newcomers="drop"))
    assert catalog.fingerprint == known.fingerprint
    tags = stage("ingest_onto").data.tags
    assert tags["output.InteractionLog"] == log.fingerprint and "output.ItemCatalog" not in tags


def test_a_newcomer_that_the_encoder_cannot_read_waits_and_nobody_else_does(flyte_home: Path) -> None:
    """The necklace of St Tropez: no other article of October had one of these words."""
    _, known = ingest(config=OCTOBER)
    encoder = fit_encoder(known, LsaConfig(dim=16))
    log, catalog = ingest_onto(catalog=known, config=IngestConfig())
    pipeline = start_pipeline("new_items", "nights", OCTOBER)
    kept = set_aside(log=log, catalog=catalog, known=known, encoder=encoder, run_id=pipeline)
    (gone,) = set(catalog.items["raw_id"]) - set(kept.catalog.items["raw_id"])
    assert gone == "90158" and kept.catalog.num_items == catalog.num_items - 1
    assert kept.log.statistics["items_set_aside"] == 1
    encode_shard(encoder, kept.catalog, 0, 1)
    said = open_store().get_run(pipeline).data.tags["sidflow.set_aside.set_aside"]
    assert "1 new items whose text the encoder cannot read: 90158 (ST TROPEZ NECKLACE); they come" in said
    # Once more: there is nothing to set aside, so nothing is made and nothing is said.
    again = set_aside(log=kept.log, catalog=kept.catalog, known=known, encoder=encoder)
    assert again.log.fingerprint == kept.log.fingerprint
    assert again.catalog.fingerprint == kept.catalog.fingerprint
    tags = stage("set_aside").data.tags
    assert "sidflow.set_aside" not in tags and "output.InteractionLog" not in tags


@pytest.mark.parametrize("line", ["until: 2011-10-01", "until: 2011-10-01T00:00:00", "until: '2011-10-01'"])
def test_the_command_line_reads_a_day_as_yaml_spells_it(flyte_home: Path, tmp_path: Path, line: str) -> None:
    from flytekit.clis.sdk_in_container.pyflyte import main as pyflyte

    known = ingest(config=IngestConfig(until="2011-06-01")).catalog
    known.save(tmp_path / "catalog")
    (tmp_path / "mine.yaml").write_text(line)
    script = str(Path(__file__).parents[2] / "tasks" / "data.py")
    arguments = ["--catalog", str(tmp_path / "catalog"), "--config", str(tmp_path / "mine.yaml")]
    done = CliRunner().invoke(pyflyte, ["run", script, "ingest_onto", *arguments])
    assert done.exit_code == 0, done.output
    assert stage("ingest_onto").data.params["until"] == "2011-10-01T00:00:00Z"
