"""Lineage as MLflow holds it: steps are runs, tied together by the fingerprints of what they read and made."""

import re
from collections.abc import Iterable, Sequence

from mlflow import MlflowClient
from mlflow.entities import Run

from components.lineage import Lineage, Named, Step
from components.metrics.compare import short
from components.metrics.report import BASELINES
from tasks.runs import (
    answered_from_cache,
    everywhere,
    get_run,
    maker_of,
    open_store,
    readers_of,
    sources_of,
    stages_of,
    tagged,
)

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
    return _with_readers(client, trace(client, _produced(run), stages_of(client, run), pipeline=run))


def trace(
    client: MlflowClient, artifacts: Iterable[Named], asked: Iterable[Run] = (), pipeline: Run | None = None
) -> Lineage:
    """Follow artefacts, and what runs read, back to the raw files.

    Parameters
    ----------
    client : MlflowClient
        The store.
    artifacts : iterable of Named
        Where to start: what the asked runs made, or what the latest runs of the store did.
    asked : iterable of Run
        Stages that the lineage is asked for; they belong to it whatever they made.
    pipeline : Run, optional
        The run of an execution: earlier stages whose results it took from Flyte's cache are asked for as well.
    """
    experiments = everywhere(client)
    waiting = [*asked]
    if pipeline is not None:
        waiting += answered_from_cache(client, pipeline)
    own = {run.info.run_id for run in waiting}
    made = {artifact for run in waiting for artifact in tagged(run.data.tags, "output")}
    waiting += [run for a in artifacts if a not in made and (run := maker_of(client, experiments, a))]
    steps: dict[str, Step] = {}
    while waiting:
        run = waiting.pop()
        if run.info.run_id not in steps:
            step = steps[run.info.run_id] = _step(client, experiments, run)
            waiting += [get_run(client, maker) for maker in set(step.read.values()) - steps.keys() if maker]
    return Lineage(steps, frozenset(own))


def _with_readers(client: MlflowClient, before: Lineage) -> Lineage:
    """Add everything that came of what was asked for."""
    experiments, steps = everywhere(client), dict(before.steps)
    waiting = list(before.asked)
    while waiting:
        maker = waiting.pop()
        for artifact in steps[maker].made:
            for reader in readers_of(client, experiments, artifact):
                if reader.info.run_id in steps:
                    continue
                step = _step(client, experiments, reader)
                if step.read[artifact] == maker:
                    steps[step.run_id] = step
                    waiting.append(step.run_id)
    return Lineage(steps, before.asked)


def _produced(pipeline: Run) -> list[Named]:
    """Return the artefacts that the run of a pipeline says it stands on."""
    named = (
        (re.fullmatch(r"artifact\..+?\.([A-Z]\w+)(\.\d+)?", key), value)
        for key, value in pipeline.data.tags.items()
    )
    return [Named(found[1], value) for found, value in named if found]


def _step(client: MlflowClient, experiments: Sequence[str], run: Run) -> Step:
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
        read=sources_of(client, experiments, run),
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
