"""The MLflow store: how to reach it, and runs found by what they made and what they read."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from components.folders import Artifact
from components.lineage import Named
from tasks.home import home

BUNDLE = "sidflow.bundle"
"""Tag of a logged model and of a registered version: fingerprint of the Bundle in it."""
DIGEST = 16
"""Characters of a fingerprint that MLflow shows as the digest of a data set."""


def tracking_uri() -> str:
    """Return where runs are kept: ``MLFLOW_TRACKING_URI``, or a SQLite file in the local folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def without_secrets(text: str) -> str:
    """Blank user names and passwords of every URL in a text."""
    return re.sub(r"(\w+://)[^/\s@]+@", r"\1***@", text)


def open_store() -> MlflowClient:
    """Connect to the store; the first time on a machine this creates the SQLite file, for some seconds."""
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
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


def everywhere(client: MlflowClient) -> list[str]:
    """Return the ids of all experiments: equal content may have been made in any of them."""
    return [str(experiment.experiment_id) for experiment in client.search_experiments()]


def kinds(prefix: str, artifacts: Iterable[Artifact]) -> dict[str, str]:
    """Return fingerprints by ``<prefix>.<Kind>``; the second of a kind is ``<prefix>.<Kind>.2``."""
    tags: dict[str, str] = {}
    for artifact in artifacts:
        same = sum(key.split(".")[1] == artifact.kind() for key in tags)
        tags[f"{prefix}.{artifact.kind()}" + (f".{same + 1}" if same else "")] = artifact.fingerprint
    return tags


def tagged(tags: Mapping[str, str], prefix: str) -> Iterator[Named]:
    """Give the artefacts that tags ``<prefix>.<Kind>`` or ``<prefix>.<Kind>.<number>`` name."""
    for key, fingerprint in sorted(tags.items()):
        if key.startswith(f"{prefix}."):
            yield Named(key.split(".")[1], fingerprint)


def maker_of(client: MlflowClient, experiments: Sequence[str], artifact: Named) -> Run | None:
    """Return the latest run that finished with this artefact among its outputs."""
    query = f"tags.`output.{artifact.kind}` = '{artifact.fingerprint}' and attributes.status = 'FINISHED'"
    found = client.search_runs(
        list(experiments), query, max_results=1, order_by=["attributes.start_time DESC"]
    )
    return found[0] if found else None


def readers_of(client: MlflowClient, experiments: Sequence[str], artifact: Named) -> list[Run]:
    """Return the runs that finished and had read this artefact, the earliest first."""
    query = f"dataset.digest = '{artifact.fingerprint[:DIGEST]}' and attributes.status = 'FINISHED'"
    found = client.search_runs(list(experiments), query, order_by=["attributes.start_time ASC"])
    return [run for run in found if artifact in tagged(run.data.tags, "parent")]


def stages_of(client: MlflowClient, pipeline: Run) -> list[Run]:
    """Return the stages that ran inside the execution whose parent run this is, the earliest first."""
    query = f"tags.`mlflow.parentRunId` = '{pipeline.info.run_id}'"
    return list(
        client.search_runs(
            [pipeline.info.experiment_id], query, max_results=1000, order_by=["attributes.start_time ASC"]
        )
    )
