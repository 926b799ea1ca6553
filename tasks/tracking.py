"""MLflow: one parent run for a pipeline, one child for each stage, also when stages are processes apart.

Every call names its run, nothing is "active": several stages may run in one process, and any process
that knows a run's id may add to it.
"""

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import mlflow
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from rich.console import Console
from rich.text import Text

from components.config import Config
from components.folders import Artifact
from components.lineage import Named, lineage_figure
from components.metrics.figures import loss_curves
from tasks.home import home
from tasks.lineage import trace
from tasks.origin import code_tags, execution_tags, versions
from tasks.runs import (
    DIGEST,
    all_pages,
    everywhere,
    everywhere_one_store,
    get_run,
    kinds,
    maker_of,
    open_store,
    tracking_uri,
    without_secrets,
)
from tasks.store import publish

STANDALONE = "stages"
"""Experiment of stages that are run alone."""

NAME = "sidflow.name"
"""Tag that holds the name of a stage's run as it was given; people may change the name itself."""
VERSIONS = "sidflow.versions"
"""Tag that holds, as JSON, what results depend on besides code, data and settings."""

_BATCH = 500
_SECONDS = 10.0
_LONGEST_PARAM = 6000
_LONGEST_TAG = 5000

_ERROR_TAGS = {"error.stage", "error.message", "mlflow.note.content"}

# No markup: what is shown are names and messages of others, and square brackets are part of them.
_console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextmanager
def fluent(run: "StageRun") -> Iterator[None]:
    """Make a run the active one, for the parts of MLflow that know no other way, and undo it afterwards."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    with everywhere_one_store(), mlflow.start_run(run_id=run.run_id):
        yield


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = not os.environ.get("MLFLOW_TRACKING_URI")
    return str(client.create_experiment(name, (home() / "mlartifacts").as_uri() if local else None))


def allowed(name: str) -> str:
    """Spell a name as MLflow takes it: ``R@10`` becomes ``R_at_10``."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, (value if isinstance(value, str) else json.dumps(value))[:_LONGEST_PARAM]


def _log_config(client: MlflowClient, run_id: str, config: Config) -> None:
    params = [Param(allowed(name), value) for name, value in _flat(config.model_dump(mode="json"))]
    for param in params:
        if without_secrets(param.value) != param.value:
            raise ValueError(
                f"{param.key} holds a password, key or token, and settings are kept in MLflow as they are: give it "
                "through the environment of the storage, and a plain address here"
            )
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])
    client.log_dict(run_id, config.model_dump(mode="json"), "config.json")


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    told = [RunTag(allowed(key), without_secrets(value)[:_LONGEST_TAG]) for key, value in tags.items()]
    for start in range(0, len(told), 100):
        client.log_batch(run_id, tags=told[start : start + 100])


def _mark(word: str, stage: str) -> str:
    """Return the tag in which the run of a pipeline keeps the mark of one of its stages."""
    return allowed(f"sidflow.{word}.{stage}")


class StageRun:
    """The MLflow run of one stage; ``log`` is what components call with their numbers."""

    def __init__(self, client: MlflowClient, run_id: str, stage: str, pipeline: str = "") -> None:
        self.client = client
        self.run_id = run_id
        self.stage = stage
        self.pipeline = pipeline
        self.history: list[tuple[int, dict[str, float]]] = []
        self._pending: list[Metric] = []
        self._flushed = time.monotonic()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers at a step; those of an epoch are also shown as a line of progress.

        They are sent in batches. A store that does not answer is tried again with the next batch, so that
        training outlives a restart of the server.
        """
        self.history.append((step, dict(values)))
        now = int(time.time() * 1000)
        self._pending += [Metric(allowed(name), float(value), now, step) for name, value in values.items()]
        if "epoch" in values:
            self._show(values)
        if len(self._pending) >= _BATCH or time.monotonic() - self._flushed > _SECONDS:
            try:
                self.flush()
            except MlflowException as error:
                _console.print(f"MLflow does not take metrics, will try again: {without_secrets(str(error))}")
                self._flushed = time.monotonic()

    def _show(self, values: Mapping[str, float]) -> None:
        # Figures of a level, a part or a slice carry a slash: they are for the plots, not for this line.
        plain = {name: value for name, value in values.items() if name != "epoch" and "/" not in name}
        figures = "  ".join(f"{name} {value:.4g}" for name, value in plain.items())
        self.say(f"epoch {values['epoch']:>3.0f}  {figures}")

    def metrics(self, values: Mapping[str, float]) -> None:
        """Record final figures of the stage."""
        now = int(time.time() * 1000)
        self._pending += [Metric(allowed(name), float(value), now, 0) for name, value in values.items()]

    def say(self, text: str | Text) -> None:
        """Show a line of progress below the name of the stage."""
        _console.print(Text("    ").append(text))

    def mark(self, word: str, text: str) -> None:
        """Tag this run, and that of its pipeline, with something that whoever looks must not miss.

        The tag is ``sidflow.<word>`` here and ``sidflow.<word>.<name of this run>`` on the pipeline's run, where
        several stages may have something to say.
        """
        self.say(Text(word, style="bold red").append(f": {text}", style="not bold default"))
        _set_tags(self.client, self.run_id, {f"sidflow.{word}": text})
        if self.pipeline:
            _set_tags(self.client, self.pipeline, {_mark(word, self.stage): text})

    def flush(self) -> None:
        """Send what is waiting."""
        while self._pending:
            self.client.log_batch(self.run_id, metrics=self._pending[:1000])
            del self._pending[:1000]
        self._flushed = time.monotonic()

    def finish_training(self, figures: Mapping[str, float]) -> None:
        """Record the figures of the kept epoch as ``kept/<name>``, and draw the curves of all that was logged."""
        self.metrics({f"kept/{name}": value for name, value in figures.items()})
        if self.history:
            self.figure("curves", loss_curves(self.history))

    def figure(self, name: str, figure: Figure) -> None:
        """Keep a figure as ``figures/<name>.png``."""
        self.client.log_figure(self.run_id, figure, f"figures/{name}.png")

    def text(self, name: str, text: str) -> None:
        """Keep a text file."""
        self.client.log_text(self.run_id, text, name)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Record a data set that the stage read, by digest and source; credentials are blanked."""
        uri = json.dumps({"uri": without_secrets(source)})
        scheme = re.match(r"(\w+)://", source)
        kind = scheme.group(1) if scheme else "local"
        dataset = Dataset(name=name, digest=digest[:DIGEST], source_type=kind, source=uri)
        self.client.log_inputs(
            self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        )

    def output(self, *artifacts: Artifact) -> None:
        """Store what the stage made, tag the run with fingerprints and addresses, and keep each small manifest.

        Raises
        ------
        ValueError
            Two artefacts of one kind: nobody could tell which of them a run stands for.
        """
        if len({artifact.kind() for artifact in artifacts}) < len(artifacts):
            raise ValueError(f"{self.stage} made {artifacts}: at most one of a kind")
        addresses = {f"stored.{artifact.kind()}": publish(artifact) for artifact in artifacts}
        _set_tags(self.client, self.run_id, kinds("output", artifacts) | addresses)
        for artifact in artifacts:
            self.client.log_dict(self.run_id, artifact.manifest, f"artifacts/{artifact.kind()}.json")
            self.say(f"{artifact.kind()} {artifact.fingerprint[:16]}")


@contextmanager
def tracked(
    stage: str, config: Config | None = None, run_id: str = "", parents: Sequence[Artifact] = ()
) -> Iterator[StageRun]:
    """Open the run of a stage, and close it FINISHED, FAILED or KILLED, whatever happens inside.

    Parameters
    ----------
    stage : str
        Name of the run. Its first word is the stage proper, which goes into tags that runs are grouped by; what
        follows tells several runs of the stage apart: ``fit_jointly gumbel seed 0``.
    config : Config, optional
        Logged as parameters, nested keys with dots.
    run_id : str
        Run of the pipeline, which becomes the parent; empty for a stage that runs alone.
    parents : sequence of Artifact
        What the stage reads; their fingerprints become tags and data sets of the run.

    Raises
    ------
    ValueError
        ``run_id`` names no run of the store.
    """
    client = open_store()
    kind, *_ = stage.split()
    tags = (
        execution_tags(kind)
        | code_tags()
        | {VERSIONS: json.dumps(versions())}
        | kinds("parent", parents)
        | {
            "sidflow.stage": kind,
            NAME: stage,
            "mlflow.source.name": kind,
        }
    )
    experiment = _experiment(client, STANDALONE) if not run_id else ""
    if run_id:
        experiment = _revive(client, run_id).info.experiment_id
        tags |= {"mlflow.parentRunId": run_id, "sidflow.pipeline": run_id}
    run = StageRun(
        client, client.create_run(experiment, tags=tags, run_name=stage).info.run_id, stage, run_id
    )
    _console.print(stage)
    began = time.monotonic()
    try:
        if config is not None:
            _log_config(client, run.run_id, config)
        _link(run, parents)
        with terminable():
            yield run
        run.flush()
        client.set_terminated(run.run_id, "FINISHED")
        run.say(f"done in {time.monotonic() - began:.1f} s" + ("" if run_id else f"  mlflow:{run.run_id}"))
    except BaseException as error:
        _close_broken(run, run_id, error)
        raise


def _link(run: StageRun, parents: Sequence[Artifact]) -> None:
    """Record what a stage reads as data sets of its run, and name the runs that made it."""
    experiments = everywhere(run.client) if parents else []
    makers = {}
    for key, parent in zip(kinds("read_from", parents), parents, strict=True):
        artifact = Named(parent.kind(), parent.fingerprint)
        maker = maker_of(run.client, experiments, artifact)
        if maker is not None:
            makers[key] = maker
        # What was given by hand is kept too: so the run can be reproduced, and its name stands for what it read.
        place = maker.data.tags.get(f"stored.{artifact.kind}") if maker else None
        run.dataset(artifact.kind, artifact.fingerprint, place or publish(parent), run.stage.split()[0])
    links = {
        made.info.run_id: f"[{made.info.run_name}](#/experiments/{made.info.experiment_id}/runs/{made.info.run_id})"
        for made in makers.values()
    }
    tags = {key: made.info.run_id for key, made in makers.items()}
    if links:
        tags["mlflow.note.content"] = f"Reads what {', '.join(links.values())} made."
    _set_tags(run.client, run.run_id, tags)


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into an exit, so that a stage that is asked to stop closes its run on the way out."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _revive(client: MlflowClient, run_id: str) -> Run:
    """Return the run of a pipeline, set back to RUNNING if an earlier attempt at a stage had failed or killed it."""
    run = get_run(client, run_id)
    if run.info.status in ("FAILED", "KILLED"):
        client.update_run(run_id, status="RUNNING")
        for tag in _ERROR_TAGS & run.data.tags.keys():
            client.delete_tag(run_id, tag)
    return run


def _close_broken(run: StageRun, pipeline: str, error: BaseException) -> None:
    # Flytekit turns Ctrl-C into an exit.
    status = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
    stage, text = run.stage, f"{type(error).__name__}: {error}"
    if status == "KILLED":
        run.say("interrupted; finished stages are cached, run again to go on")
    try:
        for run_id in filter(None, (run.run_id, pipeline)):
            _close(run.client, run_id, status, stage, text)
        run.flush()
    except MlflowException as unreachable:
        error.add_note(
            f"MLflow could not be told that {stage} ended {status}: {without_secrets(str(unreachable))}"
        )


def _close(client: MlflowClient, run_id: str, status: str, stage: str, text: str) -> None:
    note = f"**{stage} {status.lower()}**\n\n```\n{text}\n```"
    _set_tags(client, run_id, {"error.stage": stage, "error.message": text, "mlflow.note.content": note})
    client.set_terminated(run_id, status)


def start_pipeline(workflow: str, experiment: str, config: Config) -> str:
    """Open the parent run of one execution of a workflow and return its id.

    Parameters
    ----------
    workflow : str
        Name of the workflow.
    experiment : str
        MLflow experiment, made if it is new.
    config : Config
        Settings of all stages.
    """
    client = open_store()
    tags = (
        execution_tags(workflow)
        | code_tags()
        | {VERSIONS: json.dumps(versions())}
        | {"sidflow.workflow": workflow, "mlflow.source.name": workflow}
    )
    name = f"{workflow} {datetime.now():%Y-%m-%d %H:%M:%S}"
    run_id = str(client.create_run(_experiment(client, experiment), tags=tags, run_name=name).info.run_id)
    _set_tags(client, run_id, {"sidflow.pipeline": run_id})
    _log_config(client, run_id, config)
    _console.print(f"MLflow run {run_id} in experiment {experiment!r} of {without_secrets(tracking_uri())}")
    return run_id


def record_result(run_id: str, figures: Mapping[str, float], note: str, figure: Figure) -> None:
    """Put a pipeline's result on its own run, where people look first: figures, a picture and a description.

    Parameters
    ----------
    run_id : str
        The parent run; empty does nothing.
    figures : mapping of str to float
        Headline metrics.
    note : str
        Markdown, shown as the run's description.
    figure : Figure
        Kept as ``figures/comparison.png``.
    """
    if not run_id:
        return
    run = StageRun(open_store(), run_id, "pipeline")
    run.metrics(figures)
    run.flush()
    run.figure("comparison", figure)
    _set_tags(run.client, run_id, {"mlflow.note.content": note})


def mark_pipeline(run_id: str, word: str, texts: Mapping[str, str]) -> None:
    """Mark the parent run on behalf of stages that were answered from Flyte's cache and never ran.

    Parameters
    ----------
    run_id : str
        The parent run; empty does nothing.
    word : str
        As in ``StageRun.mark``.
    texts : mapping of str to str
        Name of the stage's run to what there is to say. What a stage has said itself in this execution stays.
    """
    if not run_id:
        return
    client = open_store()
    said = get_run(client, run_id).data.tags
    marks = {_mark(word, stage): text for stage, text in texts.items()}
    _set_tags(client, run_id, {key: text for key, text in marks.items() if key not in said})


def finish_pipeline(run_id: str, artifacts: Sequence[Artifact]) -> dict[str, str]:
    """Name on the parent run everything that the given artefacts came from, draw it, and close the run.

    A stage whose result came from Flyte's cache has no run in this execution: it is found by the
    fingerprint of what it made, and so on upwards through what that run had read.

    Parameters
    ----------
    run_id : str
        The parent run; empty does nothing.
    artifacts : sequence of Artifact
        Last results of the workflow.

    Returns
    -------
    dict of str to str
        Stage to the id of the run that did the work, here or in an earlier execution.
    """
    if not run_id:
        return {}
    client = open_store()
    get_run(client, run_id)
    ends = [Named(artifact.kind(), artifact.fingerprint) for artifact in artifacts]
    lineage = trace(client, ends)
    steps = lineage.steps.values()
    makers = {made: step.run_id for step in lineage.in_order() for made in step.made if made in ends}
    for step in steps:
        makers |= step.read
    tags: dict[str, str] = {}
    stages: dict[str, str] = {}
    for artifact in dict.fromkeys([*ends, *makers]):
        maker = lineage.steps.get(makers.get(artifact, ""))
        stage = allowed(maker.name) if maker else "unknown"
        same = sum(key.startswith(f"artifact.{stage}.{artifact.kind}") for key in tags)
        number = f".{same + 1}" if same else ""
        tags[f"artifact.{stage}.{artifact.kind}{number}"] = artifact.fingerprint
        if maker is not None:
            tags[f"produced_by.{stage}.{artifact.kind}{number}"] = maker.run_id
            held = lineage.steps.get(stages.get(stage, ""))
            if held is None or held.started < maker.started:
                stages[stage] = maker.run_id
    _set_tags(client, run_id, tags)
    run = StageRun(client, run_id, "pipeline")
    for step in steps:
        for raw in step.raw:
            run.dataset(raw.kind, raw.fingerprint, f"runs:/{step.run_id}", "raw")
    if steps:
        run.figure("lineage", lineage_figure(lineage))
    client.set_terminated(run_id, "FINISHED")
    return stages


def fail_execution(error: str) -> list[str]:
    """Close every run of this Flyte execution that still says RUNNING as FAILED, and return their ids.

    For the failure node of a workflow: a stage that lost its machine could not say so itself.
    """
    client = open_store()
    execution = execution_tags("")["flyte.execution_id"]
    query = f"tags.`flyte.execution_id` = '{execution}' and attributes.status = 'RUNNING'"
    runs = list(all_pages(client.search_runs, everywhere(client), query))  # closing them changes the pages
    for run in runs:
        _close(client, run.info.run_id, "FAILED", run.info.run_name, error)
    return [run.info.run_id for run in runs]
