"""Lineage as MLflow holds it: steps are runs, tied together by the fingerprints of what they read and made."""

import re
from collections.abc import Iterable

from mlflow import MlflowClient
from mlflow.entities import Run

from components.lineage import Lineage, Named, Step
from components.metrics.compare import short
from components.metrics.report import BASELINES
from tasks.runs import everywhere, get_run, maker_of, open_store, readers_of, stages_of, tagged

RAW = "raw"
"""Context in which the run of an ingestion names its raw files."""


def lineage_of(run_id: str) -> Lineage:
    """Return what a run, of a stage or of a whole pipeline, came from and what came of it.

    Raises
    ------
    ValueError
        The store has no such run.
    """
    client = open_store()
    run = get_run(client, run_id)
    if "sidflow.workflow" not in run.data.tags:
        return _with_readers(client, trace(client, [], [run]))
    finished = [stage for stage in stages_of(client, run) if stage.info.status == "FINISHED"]
    return _with_readers(client, trace(client, _produced(run), finished, pipeline=run))


def trace(
    client: MlflowClient, artifacts: Iterable[Named], asked: Iterable[Run] = (), pipeline: Run | None = None
) -> Lineage:
    """Follow artefacts back to the raw files.

    Parameters
    ----------
    client : MlflowClient
        The store.
    artifacts : iterable of Named
        Where to start.
    asked : iterable of Run
        Stages that the lineage is asked for; they belong to it whatever they made.
    pipeline : Run, optional
        The run of an execution: earlier stages whose results it took from Flyte's cache are asked for as well.
    """
    experiments = everywhere(client)
    runs = {run.info.run_id: run for run in asked}
    waiting = [*artifacts, *(read for run in runs.values() for read in tagged(run.data.tags, "parent"))]
    known = {made for run in runs.values() for made in tagged(run.data.tags, "output")}
    strangers: set[Named] = set()
    while waiting:
        artifact = waiting.pop()
        if artifact in known or artifact in strangers:
            continue
        maker = maker_of(client, experiments, artifact)
        if maker is None:
            strangers.add(artifact)
            continue
        runs[maker.info.run_id] = maker
        known |= {artifact, *tagged(maker.data.tags, "output")}
        waiting += tagged(maker.data.tags, "parent")
    own = {run.info.run_id for run in asked}
    if pipeline is not None:
        own |= {
            run for key, run in pipeline.data.tags.items() if key.startswith("produced_by.")
        } & runs.keys()
    return _lineage(client, runs.values(), own, strangers)


def _with_readers(client: MlflowClient, before: Lineage) -> Lineage:
    """Add everything that came of what was asked for."""
    experiments, steps = everywhere(client), dict(before.steps)
    waiting = [made for run in before.asked for made in steps[run].made]
    seen: set[Named] = set()
    while waiting:
        artifact = waiting.pop()
        if artifact in seen:
            continue
        seen.add(artifact)
        for reader in readers_of(client, experiments, artifact):
            if reader.info.run_id not in steps:
                steps[reader.info.run_id] = _step(client, reader)
                waiting += steps[reader.info.run_id].made
    return Lineage(steps, before.asked, before.strangers)


def _lineage(
    client: MlflowClient, runs: Iterable[Run], asked: Iterable[str], strangers: Iterable[Named]
) -> Lineage:
    steps = {run.info.run_id: _step(client, run) for run in runs}
    return Lineage(steps, frozenset(asked), frozenset(strangers))


def _produced(pipeline: Run) -> list[Named]:
    """Return the artefacts that the run of a pipeline says it stands on."""
    named = (
        (re.fullmatch(r"artifact\..+?\.([A-Z]\w+)(\.\d+)?", key), value)
        for key, value in pipeline.data.tags.items()
    )
    return [Named(found[1], value) for found, value in named if found]


def _step(client: MlflowClient, run: Run) -> Step:
    datasets = run.inputs.dataset_inputs if run.inputs else []
    raw = [
        Named(entry.dataset.name, entry.dataset.digest)
        for entry in datasets
        if any(tag.value == RAW for tag in entry.tags)
    ]
    return Step(
        run_id=run.info.run_id,
        name=run.info.run_name,
        started=run.info.start_time,
        read=tuple(tagged(run.data.tags, "parent")),
        made=tuple(tagged(run.data.tags, "output")),
        raw=tuple(raw),
        note=_note(client, run),
    )


def _note(client: MlflowClient, run: Run) -> str:
    """Say the one thing that a reader of the lineage wants to know of a step."""
    for name, value in run.data.metrics.items():
        method, _, rest = name.partition("/")
        if rest == "kept/all/R_at_10" and method not in BASELINES:
            return f"R@10 {short(value)}"
    if any(made.kind == "Bundle" for made in tagged(run.data.tags, "output")):
        found = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        # A search leaves the aliases out.
        versions = [client.get_model_version(version.name, version.version) for version in found]
        return ", ".join(
            f"{v.name} version {v.version}" + "".join(f" @{alias}" for alias in v.aliases) for v in versions
        )
    return ""
