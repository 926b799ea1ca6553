"""How an artefact may be named by hand, wherever a stage takes one.

===============================  =====================================================================
a folder                         ``.sidflow/artifacts/SidTable/1f3a...``, ``file:///...``
a folder in a bucket             ``s3://...``, ``gs://...``
an output of a Flyte execution   ``flyte://v1/<project>/<domain>/<execution>/<node>/o/<output>``
a run                            ``mlflow:<run id>``, of a stage or of a whole pipeline
a registered model               ``mlflow:<model>@<alias>``, ``mlflow:<model>/<version>``
===============================  =====================================================================

A run or a model stands for the artefact of the wanted kind that it made or, failing that, that it came from: the
same name serves ``--tokenizer``, ``--embeddings`` and ``--split``.
"""

import re
from pathlib import Path
from typing import Any, get_type_hints

from flytekit.configuration import Config as FlyteConfig
from flytekit.models.literals import Literal
from flytekit.remote import FlyteRemote
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from components.artifacts import Bundle
from components.folders import Artifact, ArtifactError
from components.lineage import Named
from tasks.runs import (
    BUNDLE,
    answered_from_cache,
    everywhere,
    everywhere_one_store,
    get_run,
    open_store,
    sources_of,
    stages_of,
    tagged,
)
from tasks.store import is_remote, local, stored_at

MLFLOW = "mlflow:"
FLYTE = "flyte://"


def is_reference(name: str) -> bool:
    """Say whether a name has to be looked up, and is no address yet."""
    return name.startswith((MLFLOW, FLYTE))


def locate(name: str, kind: str) -> str:
    """Return the address, a folder or a URL, of the artefact that a name stands for.

    Parameters
    ----------
    name : str
        One of the names above.
    kind : str
        Kind that is wanted.

    Raises
    ------
    ArtifactError
        The name stands for no artefact of this kind, or for several; the message lists them.
    ValueError
        There is no such run or model, or the name is misspelt.
    """
    if name.startswith(FLYTE):
        return _in_flyte(name, kind)
    if not name.startswith(MLFLOW):
        return name
    client, named = open_store(), name.removeprefix(MLFLOW)
    if re.fullmatch("[0-9a-f]{32}", named):
        return _made_by(client, get_run(client, named), kind, name)
    version = _version(client, named)
    if folder := _part_of_bundle(version, kind):
        return str(folder)
    return _made_by(client, get_run(client, version.run_id), kind, name)


def _in_flyte(name: str, kind: str) -> str:
    remote = FlyteRemote(FlyteConfig.auto())
    found = remote.get(name)
    literals = [found] if isinstance(found, Literal) else getattr(found, "literals", {}).values()
    addresses = [
        literal.scalar.blob.uri
        for literal in literals
        if literal.scalar is not None
        and literal.scalar.blob is not None
        and literal.scalar.blob.metadata.type.format == kind
    ]
    if len(addresses) != 1:
        raise ArtifactError(
            f"{name}: {len(addresses) or 'no'} outputs of the kind {kind} at {remote.config.platform.endpoint}; "
            "name one output of one node: flyte://v1/<project>/<domain>/<execution>/<node>/o/<output>"
        )
    return str(addresses[0])


def _part_of_bundle(version: ModelVersion, kind: str) -> Path | None:
    """Return the folder of the Bundle that a version holds, or of a part of it: the registry has the files itself."""
    fields = {found.kind(): field for field, found in get_type_hints(Bundle).items() if _is_artifact(found)}
    if kind not in (Bundle.kind(), *fields) or BUNDLE not in version.tags:
        return None
    folder = stored_at(Bundle.kind(), version.tags[BUNDLE])
    if not folder.is_dir():
        uri = f"models:/{version.name}/{version.version}"
        try:
            with everywhere_one_store():
                folder = Path(download_artifacts(uri)) / "artifacts" / folder.name
        except MlflowException as error:
            raise ArtifactError(
                f"{uri}: its Bundle is not on this machine, and its files at {version.source} cannot be read "
                f"({error.message}): run the stage that logs the model again"
            ) from error
    return folder / fields[kind] if kind in fields else folder


def _is_artifact(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Artifact)


def _version(client: MlflowClient, named: str) -> ModelVersion:
    """Return a version of a registered model."""
    parts = re.fullmatch(r"([^@/]+)(?:@([^@/]+)|/(\d+))", named)
    if parts is None:
        raise ValueError(
            f"{MLFLOW}{named}: name a run by its 32 digits, mlflow:<run id>, or a model by alias or version, "
            "mlflow:<model>@<alias> or mlflow:<model>/<version>"
        )
    model, alias, version = parts.groups()
    try:
        if alias:
            return client.get_model_version_by_alias(model, alias)
        return client.get_model_version(model, version)
    except MlflowException as error:
        known = ", ".join(sorted(m.name for m in client.search_registered_models())) or "none"
        raise ValueError(
            f"{MLFLOW}{named}: no such registered model, alias or version ({error.message}); "
            f"registered models: {known}"
        ) from error


def _made_by(client: MlflowClient, run: Run, kind: str, name: str) -> str:
    """Go from a run to what it made, then to what it had read, then to those that made that, until the kind appears."""
    experiments = everywhere(client)
    level = {by.info.run_id: by for by in [run, *stages_of(client, run), *answered_from_cache(client, run)]}
    runs = dict(level)
    while level:
        made = {artifact: by for by in level.values() for artifact in tagged(by.data.tags, "output")}
        # A table that another stage here made a new one from, as joint training or matching does, is not the last word.
        replaced = {
            read
            for by in level.values()
            for read in tagged(by.data.tags, "parent")
            if read not in tagged(by.data.tags, "output")
            and read.kind in {own.kind for own in tagged(by.data.tags, "output")}
        }
        made = {artifact: by for artifact, by in made.items() if artifact not in replaced}
        sources = [sources_of(client, experiments, by) for by in level.values()]
        makers = {maker for read in sources for maker in read.values() if maker}
        level = {maker: get_run(client, maker) for maker in sorted(makers - runs.keys())}
        runs |= level
        taken = {artifact: runs.get(maker) for read in sources for artifact, maker in read.items()}
        for candidates in (made, taken):
            fitting = {artifact: by for artifact, by in candidates.items() if artifact.kind == kind}
            if len(fitting) == 1:
                ((artifact, by),) = fitting.items()
                return address_of(artifact, by)
            if fitting:
                names = "; ".join(
                    f"mlflow:{by.info.run_id} ({by.info.run_name})" if by else f"{artifact}, given by hand"
                    for artifact, by in fitting.items()
                )
                raise ArtifactError(
                    f"{name}: {len(fitting)} artefacts of the kind {kind}; name the stage: {names}"
                )
    raise ArtifactError(
        f"{name}: run {run.info.run_name!r} neither made an artefact of the kind {kind} nor came from one"
    )


def address_of(artifact: Named, maker: Run | None) -> str:
    """Return where an artefact lies: in the local store, or where the run that made it noted.

    Raises
    ------
    ArtifactError
        It is in neither place.
    """
    folder = stored_at(*artifact)
    if folder.is_dir():
        return str(folder)
    noted = maker.data.tags.get(f"stored.{artifact.kind}", "") if maker else ""
    if is_remote(noted) or (noted and local(noted).is_dir()):
        return noted
    left = (
        f"run {maker.info.run_id} left it in {noted or 'a place unknown'}"
        if maker
        else "no run is known to have made it"
    )
    raise ArtifactError(
        f"{artifact.kind} {artifact.fingerprint[:16]} is not on this machine; {left}: run the stage that makes it "
        "again, or give a folder"
    )
