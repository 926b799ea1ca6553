"""The model in use, opened when a workflow runs: its alias moves, so registration cannot know which it will be."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, NamedTuple, TypeVar

from flytekit import task
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput
from mlflow.entities.model_registry import ModelVersion

from components.artifacts import (
    Bundle,
    ContentEmbeddings,
    ContentEncoder,
    ItemCatalog,
    RecommenderCheckpoint,
    SidTable,
    TokenizerCheckpoint,
)
from components.data.ingest import IngestConfig
from components.folders import Artifact, ArtifactError, Provenance
from components.lineage import Named
from components.metrics.promotion import PromoteConfig
from tasks import runtime
from tasks.flyte_types import by_content
from tasks.promotion import NOBODY
from tasks.references import MLFLOW, address_of, locate
from tasks.runs import CHAMPION, UNTIL, everywhere, maker_of, open_store, version_in_use
from tasks.store import fetch
from tasks.tracking import StageRun, tracked

Kind = TypeVar("Kind", bound=Artifact)


class Champion(NamedTuple):
    """The parts of the model in use, and what its last training knew."""

    catalog: Annotated[ItemCatalog, by_content]
    encoder: Annotated[ContentEncoder, by_content]
    tokenizer: Annotated[TokenizerCheckpoint, by_content]
    sids: Annotated[SidTable, by_content]
    recommender: Annotated[RecommenderCheckpoint, by_content]
    embeddings: Annotated[ContentEmbeddings, by_content]
    """Of the catalogue: what the table was made from."""
    trained_catalog: Annotated[ItemCatalog, by_content]
    trained_sids: Annotated[SidTable, by_content]
    """As the last training left it, before any item was added."""
    version: str
    """Its number, the base of what is built on it."""
    until: str
    """Moment up to which this run reads events."""


class Names(NamedTuple):
    """Items and names of the model in use: one of each, or none where no model was promoted yet."""

    catalogs: list[Annotated[ItemCatalog, by_content]]
    sids: list[Annotated[SidTable, by_content]]
    version: str
    """Its number, or none."""
    until: str
    """Moment up to which this run reads events."""


class InUse(NamedTuple):
    """A version of a registered model, and what is in it."""

    version: ModelVersion
    bundle: Bundle


@task(**runtime.CPU)
def open_champion(config: PromoteConfig, ingest: IngestConfig, run_id: str = "") -> Champion:
    """Open the model that holds the alias. Not cached: the alias moves.

    Args:
        config: Registered model and alias, a YAML file or JSON. Keys: make keys SECTION=promote.
        ingest: What will be read onto it, which must not end before what it knows. Keys: make keys SECTION=ingest.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    client = open_store()
    champion = in_use(client, config)
    if champion is None:
        raise ValueError(
            f"no version of the model {config.model!r} holds the alias {config.alias!r}: the first training makes it "
            "(pyflyte run workflows/retrain.py retrain --config ...), or promote a bundle by hand "
            "(pyflyte run tasks/promotion.py promote ...)"
        )
    bundle = champion.bundle
    with tracked("open_champion", config, run_id, [bundle]) as run:
        day = read_until(champion.version, ingest)
        _read(run, champion.version)
        source = bundle.sids.provenance.parents.get("ContentEmbeddings", bundle.tokenizer.embeddings)
        trained = trained_table(client, bundle.sids)
        run.metrics({"items": bundle.sids.num_items, "trained_items": trained.num_items})
        # Nothing is put out: its parts were made by the runs that made them.
        return Champion(
            bundle.catalog,
            bundle.encoder,
            bundle.tokenizer,
            bundle.sids,
            bundle.recommender,
            _load(client, ContentEmbeddings, source),
            _first(bundle.catalog, trained.num_items),
            trained,
            str(champion.version.version),
            day,
        )


@task(**runtime.CPU)
def find_names(config: PromoteConfig, ingest: IngestConfig, run_id: str = "") -> Names:
    """Open items and names of the model that holds the alias, if there is one. Not cached: the alias moves.

    Args:
        config: Registered model and alias, a YAML file or JSON. Keys: make keys SECTION=promote.
        ingest: What will be read onto it, which must not end before what it knows. Keys: make keys SECTION=ingest.
        run_id: MLflow run of the pipeline; leave it out to run the stage alone.
    """
    champion = in_use(open_store(), config)
    with tracked("find_names", config, run_id, [champion.bundle] if champion else []) as run:
        if champion is None:
            _note(run, NOBODY)
            return Names([], [], NOBODY, read_until(None, ingest))
        day = read_until(champion.version, ingest)
        _read(run, champion.version)
        return Names([champion.bundle.catalog], [champion.bundle.sids], str(champion.version.version), day)


def read_until(version: ModelVersion | None, ingest: IngestConfig) -> str:
    """Return the moment up to which a run reads events, in ISO form; without ``ingest.until`` that is now.

    Raises
    ------
    ValueError
        The version in use knows later events: among them may be what this run would test it on.
    """
    day = ingest.until or datetime.now(UTC)
    known = version.tags.get(UNTIL) if version else None
    if version and known and day < datetime.fromisoformat(known):
        raise ValueError(
            f"version {version.version} of {version.name}, which is in use, knows events until {known}, this run would "
            f"read those until {day.isoformat()}: it would go back in time, and be compared with a model that may know "
            "its test targets; run it as of a later day, or give the alias to an older version by hand first"
        )
    return day.isoformat()


def in_use(client: MlflowClient, config: PromoteConfig) -> InUse | None:
    """Return the version that holds the alias with its bundle, or None where there is no model or no alias.

    Raises
    ------
    ArtifactError
        Its bundle is neither on this machine nor in the registry.
    """
    version = version_in_use(client, config.model, config.alias)
    if version is None:
        return None
    return InUse(version, Bundle.load(fetch(locate(_reference(version), Bundle.kind()))))


def trained_table(client: MlflowClient, sids: SidTable) -> SidTable:
    """Go back from a table to that of the last training, over the extensions that MLflow knows of.

    Drift adds up since then, and so do the items that training never met.

    Raises
    ------
    ArtifactError
        No run is known to have made the table or one on the way, or its folder is gone.
    """
    experiments, table, way = everywhere(client), Named(SidTable.kind(), sids.fingerprint), set[Named]()
    while table not in way:
        way.add(table)
        maker = maker_of(client, experiments, table)
        if maker is not None and maker.data.tags["sidflow.stage"] != "extend_sids":
            return SidTable.load(fetch(address_of(table, maker)))
        if maker is not None:
            table = Named(SidTable.kind(), maker.data.tags[f"parent.{SidTable.kind()}"])
    raise ArtifactError(
        f"no finished run is known to have made {table}, so nobody can say which training the names of "
        f"{sids.num_items} items go back to: train again (workflows/retrain.py)"
    )


def _load(client: MlflowClient, kind: type[Kind], fingerprint: str) -> Kind:
    artifact = Named(kind.kind(), fingerprint)
    return kind.load(fetch(address_of(artifact, maker_of(client, everywhere(client), artifact))))


def _first(catalog: ItemCatalog, items: int) -> ItemCatalog:
    """Return the catalogue as it was with so many items: what is ingested onto one follows behind it."""
    if items == catalog.num_items:
        return catalog
    parents = {ItemCatalog.kind(): catalog.fingerprint}
    return replace(catalog, items=catalog.items.head(items), provenance=Provenance(parents=parents))


def _reference(version: ModelVersion) -> str:
    return f"{MLFLOW}{version.name}/{version.version}"


def _note(run: StageRun, opened: str) -> None:
    """Say what was opened, in this run and in that of its pipeline, which another day would start elsewhere."""
    for run_id in filter(None, (run.run_id, run.pipeline)):
        run.client.set_tag(run_id, CHAMPION, opened)
    run.say(f"champion: {opened}")


def _read(run: StageRun, version: ModelVersion) -> None:
    """Note a version, in MLflow's own terms as a model that the run reads."""
    model_id = str(version.source).removeprefix("models:/")
    run.client.log_inputs(run.run_id, models=[LoggedModelInput(model_id)])
    _note(run, _reference(version))
