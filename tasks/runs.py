"""The MLflow store: how to reach it, and runs found by what they made and what they read."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.folders import Artifact
from components.lineage import Named
from tasks.home import home

CHAMPION = "sidflow.champion"
"""Tag of a run that opened the model in use: which version it was."""
UNTIL = "sidflow.until"
"""Tag of a registered version: the moment up to which it knows events."""
BUNDLE = "sidflow.bundle"
"""Tag of a logged model and of a registered version: fingerprint of the Bundle in it."""
DIGEST = 16
"""Characters of a fingerprint that MLflow shows as the digest of a data set."""


def tracking_uri() -> str:
    """Return where runs are kept: ``MLFLOW_TRACKING_URI``, or a SQLite file in the local folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def without_secrets(text: str) -> str:
    """Blank user names and passwords of every URL in a text, and signatures and tokens in its query."""
    text = re.sub(r"(\w+://)[^\s/?#\"']*@", r"\1***@", text)
    return re.sub(
        r"(?i)([?&][\w-]*(?:signature|sig|token|key|secret|password|credential)=)[^&\s\"']+", r"\1***", text
    )


def open_store() -> MlflowClient:
    """Connect to the store; the first time on a machine this creates the SQLite file, for some seconds."""
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        home().mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=tracking_uri())


def get_run(client: MlflowClient, run_id: str) -> Run:
    """Return a run.

    Raises
    ------
    ValueError
        The store has no such run; the message names the store.
    """
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        place = without_secrets(tracking_uri())
        raise ValueError(f"run_id {run_id!r} is no run of {place}: {error.message}") from error


@contextmanager
def everywhere_one_store() -> Iterator[None]:
    """Tell the parts of MLflow that ask no client, as its registry does, where runs are kept; undo it afterwards."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(tracking_uri())
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def all_pages(search: Callable[..., Any], *arguments: object, **options: object) -> Iterator[Any]:
    """Give all that a search finds, a page as it is needed: MLflow cuts at 1,000 and says nothing."""
    token = None
    while True:
        page = search(*arguments, page_token=token, **options)
        yield from page
        if not (token := page.token):
            return


def everywhere(client: MlflowClient) -> list[str]:
    """Return the ids of all experiments: equal content may have been made in any of them."""
    return [str(experiment.experiment_id) for experiment in all_pages(client.search_experiments)]


def kinds(prefix: str, artifacts: Iterable[Artifact]) -> dict[str, str]:
    """Return fingerprints by ``<prefix>.<Kind>``; the second of a kind is ``<prefix>.<Kind>.2``."""
    tags: dict[str, str] = {}
    for artifact in artifacts:
        same = sum(key.split(".")[1] == artifact.kind() for key in tags)
        tags[f"{prefix}.{artifact.kind()}" + (f".{same + 1}" if same else "")] = artifact.fingerprint
    return tags


def tagged(tags: Mapping[str, str], prefix: str) -> Iterator[Named]:
    """Give the artefacts that tags ``<prefix>.<Kind>[.<number>]`` name, by kind and number."""
    for key in _keys(tags, prefix):
        yield Named(key.split(".")[1], tags[key])


def _keys(tags: Mapping[str, str], prefix: str) -> list[str]:
    def place(key: str) -> tuple[str, int]:
        kind, _, number = key.removeprefix(f"{prefix}.").partition(".")
        return kind, int(number or 1)

    return sorted((key for key in tags if key.startswith(f"{prefix}.")), key=place)


def version_in_use(client: MlflowClient, model: str, alias: str) -> ModelVersion | None:
    """Return the version of a registered model that holds an alias, or None where there is no model or no alias."""
    try:
        return client.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, no alias
            return None
        raise


def maker_of(
    client: MlflowClient, experiments: Sequence[str], artifact: Named, reader: Run | None = None
) -> Run | None:
    """Return the latest run that finished with this artefact among its outputs, and did not just hand it on.

    Parameters
    ----------
    client : MlflowClient
        The store.
    experiments : sequence of str
        Where to look.
    artifact : Named
        What was made.
    reader : Run, optional
        Who read it: the maker had ended before this run began.
    """
    query = f"tags.`output.{artifact.kind}` = '{artifact.fingerprint}' and attributes.status = 'FINISHED'"
    if reader is not None:
        query += f" and attributes.end_time <= {reader.info.start_time}"
    order = ["attributes.start_time DESC"]
    for run in all_pages(client.search_runs, list(experiments), query, order_by=order, max_results=10):
        if artifact not in tagged(run.data.tags, "parent"):
            return run
    return None


def sources_of(client: MlflowClient, experiments: Sequence[str], run: Run) -> dict[Named, str]:
    """Return what a run read, each artefact with the run that had made it; "" where none is known.

    The run noted them when it read. Equal content may have been made again since: that is no cause of this run.
    """
    tags, sources = run.data.tags, {}
    for key in _keys(tags, "parent"):
        artifact = Named(key.split(".")[1], tags[key])
        noted = tags.get(key.replace("parent.", "read_from.", 1))
        if noted is None:
            maker = maker_of(client, experiments, artifact, run)
            noted = maker.info.run_id if maker else ""
        sources[artifact] = noted
    return sources


def readers_of(client: MlflowClient, experiments: Sequence[str], artifact: Named) -> list[Run]:
    """Return the runs that finished and had read this artefact, the earliest first."""
    query = f"dataset.digest = '{artifact.fingerprint[:DIGEST]}' and attributes.status = 'FINISHED'"
    found = all_pages(client.search_runs, list(experiments), query, order_by=["attributes.start_time ASC"])
    return [run for run in found if artifact in tagged(run.data.tags, "parent")]


def answered_from_cache(client: MlflowClient, pipeline: Run) -> list[Run]:
    """Return the earlier runs of stages that left none in this execution, as the pipeline's run names them.

    What started from a champion names the stages of other executions too, which are no answers of the cache.
    """
    if CHAMPION in pipeline.data.tags:
        return []
    named = {run for key, run in pipeline.data.tags.items() if key.startswith("produced_by.")}
    own = {run.info.run_id for run in stages_of(client, pipeline)}
    return [get_run(client, run_id) for run_id in sorted(named - own)]


def stages_of(client: MlflowClient, pipeline: Run) -> list[Run]:
    """Return the stages that finished inside the execution whose parent run this is, the earliest first."""
    query = f"tags.`mlflow.parentRunId` = '{pipeline.info.run_id}' and attributes.status = 'FINISHED'"
    order = ["attributes.start_time ASC"]
    return list(all_pages(client.search_runs, [pipeline.info.experiment_id], query, order_by=order))
