"""The model in use, opened through a real registry."""

from dataclasses import replace
from datetime import UTC, datetime

import polars as pl
import pytest
import torch

from components.artifacts import Bundle, ContentEmbeddings, ItemCatalog, RecommenderCheckpoint, SidTable
from components.data.ingest import IngestConfig
from components.embeddings import LsaConfig, fit_encoder
from components.metrics.promotion import PromoteConfig
from components.recommenders.causal import CausalConfig
from components.recommenders.serving import training_popularity
from components.tokenizers.sids import SidConfig
from components.training.recommender import RecommenderStage, train_recommender
from tasks.champion import find_names, in_use, open_champion, trained_table
from tasks.model import log_bundle
from tasks.new_items import extend_sids
from tasks.runs import BUNDLE, CHAMPION, UNTIL, everywhere_one_store, open_store
from tasks.tracking import start_pipeline, tracked

CONFIG = PromoteConfig()
DAY = datetime(2024, 5, 2, tzinfo=UTC)
READ = IngestConfig(until=DAY)
STAGE = RecommenderStage.model_validate(
    {
        "model": CausalConfig(dim=16, layers=1, heads=2, head_dim=8, hidden=32).model_dump(),
        "loop": {"epochs": 1},
    }
)


@pytest.fixture(scope="module")
def trained(tiny) -> RecommenderCheckpoint:
    return train_recommender(tiny.split, tiny.sids, tiny.embeddings, STAGE, lambda step, values: None)


def made(stage: str, *outputs) -> None:
    with tracked(stage) as run:
        run.output(*outputs)


def register(bundle: Bundle, *, alias: bool = True) -> None:
    """Add a version as promotion does, and give it the alias."""
    with tracked("promote") as run:
        uri = log_bundle(run, bundle)
        if not run.client.search_registered_models():
            run.client.create_registered_model(CONFIG.model)
        with everywhere_one_store():
            version = run.client.create_model_version(
                CONFIG.model, uri, run_id=run.run_id, tags={BUNDLE: bundle.fingerprint}
            )
        if alias:
            run.client.set_registered_model_alias(CONFIG.model, CONFIG.alias, version.version)


def bundle_of(tiny, recommender: RecommenderCheckpoint, **parts) -> Bundle:
    popularity = training_popularity(tiny.split, tiny.catalog)
    encoder = fit_encoder(tiny.catalog, LsaConfig(dim=16))
    own = {"catalog": tiny.catalog, "tokenizer": tiny.tokenizer, "sids": tiny.sids, "popularity": popularity}
    return Bundle(**(own | {"encoder": encoder, "recommender": recommender} | parts))


def grown(tiny, items: int) -> tuple[ItemCatalog, ContentEmbeddings]:
    """The planted catalogue with so many items, those behind the first 120 like the first ones."""
    more, n = items - tiny.catalog.num_items, tiny.catalog.num_items
    rows = tiny.catalog.items
    copies = rows.head(more).with_columns(pl.col("item_id") + n, raw_id=pl.lit("new ") + pl.col("raw_id"))
    catalog = ItemCatalog(items=pl.concat([rows, copies.cast(rows.schema)]))
    vectors = torch.cat([tiny.embeddings.matrix, tiny.embeddings.matrix[:more]])
    embeddings = replace(tiny.embeddings, vectors={"vectors": vectors}, catalog=catalog.fingerprint)
    return catalog, embeddings


def test_no_model_and_a_model_without_the_alias_are_no_champion(flyte_home, tiny, trained):
    assert in_use(open_store(), CONFIG) is None
    assert find_names(config=CONFIG, ingest=READ) == ([], [], "none", DAY.isoformat())
    register(bundle_of(tiny, trained), alias=False)
    assert in_use(open_store(), CONFIG) is None
    with pytest.raises(Exception, match="'sidflow' holds the alias 'champion': the first training makes it"):
        open_champion(config=CONFIG, ingest=READ)


def test_the_parts_of_the_champion_come_with_what_its_table_was_made_from(flyte_home, tiny, trained):
    made("assemble_embeddings", tiny.embeddings)
    made("assign_sids", tiny.sids)
    register(bundle_of(tiny, trained))
    pipeline = start_pipeline("new_items", "nights", CONFIG)
    found = open_champion(config=CONFIG, ingest=READ, run_id=pipeline)
    assert found.sids.fingerprint == found.trained_sids.fingerprint == tiny.sids.fingerprint
    assert found.embeddings.fingerprint == tiny.embeddings.fingerprint
    assert found.trained_catalog.fingerprint == found.catalog.fingerprint == tiny.catalog.fingerprint
    assert found.recommender.fingerprint == trained.fingerprint
    assert open_store().get_run(pipeline).data.tags[CHAMPION] == "mlflow:sidflow/1"
    names = find_names(config=CONFIG, ingest=READ)
    assert [table.fingerprint for table in names.sids] == [tiny.sids.fingerprint]
    assert [catalog.fingerprint for catalog in names.catalogs] == [tiny.catalog.fingerprint]


def test_a_run_of_an_earlier_day_than_the_champions_is_refused(flyte_home, tiny, trained):
    """It would serve older names again, and the champion may have been trained on what it is tested on."""
    made("assemble_embeddings", tiny.embeddings)
    made("assign_sids", tiny.sids)
    register(bundle_of(tiny, trained))
    client = open_store()
    client.set_model_version_tag("sidflow", "1", UNTIL, "2024-05-02T00:00:00+00:00")
    for opening in (open_champion, find_names):
        found = opening(config=CONFIG, ingest=READ)
        assert (found.version, found.until) == ("1", DAY.isoformat())
        opening(config=CONFIG, ingest=IngestConfig())  # without a day it is today
        with pytest.raises(
            Exception, match="version 1 of sidflow, which is in use, knows events until 2024-05-02"
        ):
            opening(config=CONFIG, ingest=IngestConfig(until=datetime(2024, 5, 1, tzinfo=UTC)))


def test_the_alias_is_read_anew_each_time(flyte_home, tiny, trained):
    bundle = bundle_of(tiny, trained)
    register(bundle)
    assert in_use(open_store(), CONFIG).version.version in (1, "1")
    rarer = bundle.popularity.with_columns(pl.lit(1, pl.UInt32).alias("events"))
    register(replace(bundle, popularity=rarer))
    champion = in_use(open_store(), CONFIG)
    assert str(champion.version.version) == "2" and champion.bundle.popularity.equals(rarer)


def test_a_table_goes_back_over_its_extensions_to_the_last_training(flyte_home, tiny, trained):
    """Two nights; the champion of the second knows what its training knew, and what its own table was made from."""
    made("assemble_embeddings", tiny.embeddings)
    made("assign_sids", tiny.sids)
    table, known, rule = tiny.sids, tiny.embeddings, SidConfig(suffix_size=32)
    for items in (130, 145):
        catalog, embeddings = grown(tiny, items)
        made("assemble_embeddings", embeddings)
        table = extend_sids(
            tokenizer=tiny.tokenizer, sids=table, known=known, embeddings=embeddings, config=rule
        )
        known = embeddings
        assert trained_table(open_store(), table).fingerprint == tiny.sids.fingerprint
    popularity = pl.DataFrame(
        {"item_id": range(145), "events": [1] * 145}, schema=Bundle.SCHEMAS["popularity"]
    )
    bound = replace(trained, sids=table.fingerprint)
    register(bundle_of(tiny, bound, catalog=catalog, sids=table, popularity=popularity))
    found = open_champion(config=CONFIG, ingest=READ)
    assert found.sids.num_items == 145 and found.trained_sids.fingerprint == tiny.sids.fingerprint
    assert found.embeddings.fingerprint == known.fingerprint
    assert found.trained_catalog.fingerprint == tiny.catalog.fingerprint


def test_a_table_of_unknown_making_is_refused(flyte_home, tiny):
    with pytest.raises(ValueError, match="no finished run is known to have made SidTable .* train again"):
        trained_table(open_store(), tiny.sids)


def test_extending_by_nothing_gives_the_table_that_there_was(flyte_home, tiny):
    """A run that had nothing to name does not claim to have made the table: who made it would be lost."""
    made("assign_sids", tiny.sids)
    same = extend_sids(
        tokenizer=tiny.tokenizer,
        sids=tiny.sids,
        known=tiny.embeddings,
        embeddings=tiny.embeddings,
        config=SidConfig(suffix_size=32),
    )
    assert isinstance(same, SidTable) and same.provenance.parents == tiny.sids.provenance.parents
    assert trained_table(open_store(), same).fingerprint == tiny.sids.fingerprint
