"""Run a finished run again, from its settings, its data and its code, and say what came out equal.

Equal content has equal fingerprints, so artefacts are compared by them; metrics by their values.
"""

import json
import math
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from flytekit.core.context_manager import FlyteEntities
from flytekit.core.python_function_task import PythonFunctionTask
from mlflow import MlflowClient
from mlflow.entities import Run
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from components.config import Config
from components.folders import Artifact, ArtifactError
from components.lineage import Named
from tasks.home import home
from tasks.lineage import lineage_of
from tasks.origin import ROOT, code_tags, git, versions
from tasks.references import address_of
from tasks.runs import CHAMPION, everywhere, get_run, maker_of, open_store, tagged
from tasks.tracking import NAME, VERSIONS, terminable

REGISTRY = ("open_champion", "find_names", "promote")
"""Stages whose outcome depends on the registry."""
TIMES = re.compile("second|memory")
"""Metrics that no second run has alike."""
NAMED = re.compile(r"(?:MLflow run |mlflow:)([0-9a-f]{32})\b")
"""How a run says on the terminal what it is called."""


class Line(NamedTuple):
    """Something that both runs made."""

    name: str
    before: str
    now: str
    equal: bool


class Reproduction(NamedTuple):
    """A run and its repetition, side by side."""

    original: str
    repetition: str
    artifacts: list[Line]
    """In the order in which the original made them, fingerprints."""
    metrics: list[Line]
    remarks: list[str]
    """What differed before anything was run: data, code, libraries."""

    @property
    def equal(self) -> bool:
        """Whether everything came out equal, and there was something."""
        lines = [*self.artifacts, *self.metrics]
        return bool(lines) and all(line.equal for line in lines)

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        counts = [
            f"{sum(line.equal for line in lines)} of {len(lines)}" for lines in (self.artifacts, self.metrics)
        ]
        said = f"{counts[0]} artefacts and {counts[1]} metrics are equal"
        if self.equal:
            return f"Reproduced: {said}."
        first = next((line.name for line in self.artifacts if not line.equal), "")
        return f"Not reproduced: {said}." + (f" The first that differs is {first}." if first else "")


def reproduce(run_id: str, *, here: bool = False) -> Reproduction:
    """Run a finished run again and compare.

    Nothing is taken from Flyte's cache. The code is the commit that the run noted, checked out beside this one, unless
    that is what stands here.

    Parameters
    ----------
    run_id : str
        MLflow run, of a pipeline or of a stage.
    here : bool
        Take the code that stands here, whatever the run noted.

    Raises
    ------
    ValueError
        There is no such run, it did not finish, or what it read is gone.
    RuntimeError
        The repetition failed; its own message stands above.
    """
    client = open_store()
    run = get_run(client, run_id)
    if run.info.status != "FINISHED":
        raise ValueError(f"run {run_id} ended {run.info.status}: only a finished run can be compared with")
    if CHAMPION in run.data.tags:
        raise ValueError(
            f"run {run_id} looked for a champion (found: {run.data.tags[CHAMPION]}) and may have made another: what it "
            "does depends on the registry; reproduce its stages, which make lineage lists"
        )
    remarks = _differing_libraries(run)
    with _code_of(run, here, remarks) as tree, tempfile.TemporaryDirectory() as folder:
        command = _command(client, run, tree, Path(folder))
        repetition = _execute(command, tree)
    again = client.get_run(repetition)
    remarks += _differing_data(run_id, repetition)
    made = _made(client, run)
    result = Reproduction(
        run_id,
        repetition,
        _compare(made, _under_one_name(made, _made(client, again)), lambda a, b: a == b),
        _compare(_figures(run), _figures(again), lambda a, b: a == b or (math.isnan(a) and math.isnan(b))),
        remarks,
    )
    client.set_tag(repetition, "sidflow.reproduces", run_id)
    client.set_tag(repetition, "sidflow.reproduction", " ".join([result.verdict, *remarks])[:5000])
    return result


def _differing_libraries(run: Run) -> list[str]:
    noted = json.loads(run.data.tags.get(VERSIONS, "{}"))
    if not noted:
        return ["The run did not note its libraries."]
    now = versions()
    return [
        f"Another {name}: {noted.get(name, 'none')} then, {now.get(name, 'none')} now."
        for name in sorted(noted.keys() | now.keys())
        if noted.get(name) != now.get(name)
    ]


@contextmanager
def _code_of(run: Run, here: bool, remarks: list[str]) -> Iterator[Path]:
    """Give the folder with the code to run, and remark where it is not what the run noted."""
    commit, dirty = (run.data.tags.get(key) for key in ("mlflow.source.git.commit", "sidflow.git.dirty"))
    now = code_tags()
    if dirty == "true":
        remarks.append(
            f"The run had changes that were not committed on top of {commit}; nobody can restore them."
        )
    if here or (commit, "false") == (now["mlflow.source.git.commit"], now.get("sidflow.git.dirty")):
        if commit != now["mlflow.source.git.commit"]:
            remarks.append(f"Other code: commit {commit} then, {now['mlflow.source.git.commit']} now.")
        if now.get("sidflow.git.dirty") == "true":
            remarks.append("The code here has changes that are not committed.")
        yield ROOT
        return
    if not commit or not git("cat-file", "-t", commit) == "commit":
        raise ValueError(
            f"run {run.info.run_id} noted commit {commit}, which is not in {ROOT}: fetch it, or take the code that "
            "stands here with --here"
        )
    (home() / "code").mkdir(parents=True, exist_ok=True)
    # A tree of its own: another reproduction of the same commit removes its own.
    tree = Path(tempfile.mkdtemp(prefix=f"{commit[:12]}-", dir=home() / "code"))
    done = subprocess.run(
        ["git", "-C", str(ROOT), "worktree", "add", "--detach", "--force", str(tree), commit],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        if done.returncode:
            raise RuntimeError(f"commit {commit} could not be checked out: {done.stderr.strip()}")
        yield tree
    finally:
        git("worktree", "remove", "--force", str(tree))
        shutil.rmtree(tree, ignore_errors=True)


def _command(client: MlflowClient, run: Run, tree: Path, folder: Path) -> list[str]:
    """Return the command line that does again what the run did."""
    pyflyte = str(Path(sys.executable).with_name("pyflyte"))
    values = _config(client, run)
    workflow = run.data.tags.get("sidflow.workflow")
    if workflow:
        # What a backfill takes beside its settings stands among them.
        days = {key: values.pop(key) for key in ("first", "last", "every_days") if key in values}
        said = [part for key, value in days.items() for part in (f"--{key}", str(value).removesuffix("Z"))]
        path = folder / "config.json"
        path.write_text(json.dumps(values))
        script = str(tree / "workflows" / f"{workflow}.py")
        return [pyflyte, "run", script, workflow, "--config", str(path), *said]
    # Not the run's name, which people may change.
    stage, _, label = run.data.tags.get(NAME, run.info.run_name).partition(" ")
    task = _task(stage)
    options = []
    given = list(tagged(run.data.tags, "parent"))
    for name, hint in get_type_hints(task.task_function, include_extras=True).items():
        kind = _plain(hint)
        if name in ("return", "run_id"):
            continue
        if isinstance(kind, type) and issubclass(kind, Config):
            path = folder / f"{name}.json"
            path.write_text(json.dumps(_section(kind, values)))
            options += [f"--{name}", str(path)]
        elif kind is str and label:
            options += [f"--{name}", label]
        elif get_origin(kind) is list and issubclass(inner := _plain(get_args(kind)[0]), Artifact):
            options += [
                f"--{name}",
                json.dumps([_address(client, a) for a in given if a.kind == inner.kind()]),
            ]
        elif isinstance(kind, type) and issubclass(kind, Artifact):
            same = [artifact for artifact in given if artifact.kind == kind.kind()]
            if len(same) != 1:
                raise ValueError(
                    f"{stage} reads {len(same)} artefacts of the kind {kind.kind()} as {name!r}: its run does not say "
                    "which is which; reproduce the run of its pipeline"
                )
            options += [f"--{name}", _address(client, same[0])]
        elif kind is not str:
            raise ValueError(
                f"{stage} takes {name!r}, which its run does not note: reproduce the run of its pipeline"
            )
    file = Path(*task.task_function.__module__.split(".")).with_suffix(".py")
    return [pyflyte, "run", str(tree / file), stage, *options]


def _task(stage: str) -> PythonFunctionTask[Any]:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "pyfunc":  # that one is for MLflow to run
            import_module(f"tasks.{module.name}")
    stages = {
        entity.task_function.__name__: entity
        for entity in FlyteEntities.entities
        if isinstance(entity, PythonFunctionTask) and entity.task_function.__module__.startswith("tasks.")
    }
    if stage in REGISTRY:
        raise ValueError(
            f"{stage} reads or changes the model registry, which is not what it was: nothing to reproduce"
        )
    if stage not in stages:
        raise ValueError(f"{stage!r} is no stage of this sidflow; it has {', '.join(sorted(stages))}")
    return stages[stage]


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _section(kind: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of one kind: all that the run noted, or the one section of it that fits."""
    for section in [values, *values.values()]:
        if isinstance(section, dict) and section.keys() == kind.model_fields.keys():
            return section
    return values


def _config(client: MlflowClient, run: Run) -> dict[str, Any]:
    if not any(file.path == "config.json" for file in client.list_artifacts(run.info.run_id)):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        return dict(
            json.loads(Path(client.download_artifacts(run.info.run_id, "config.json", folder)).read_text())
        )


def _address(client: MlflowClient, artifact: Named) -> str:
    try:
        return address_of(artifact, maker_of(client, everywhere(client), artifact))
    except ArtifactError as error:
        raise ValueError(f"what the run read is gone: {error}") from error


def _execute(command: list[str], tree: Path) -> str:
    """Run a command without Flyte's cache, showing what it says, and return the run that it names."""
    environment = os.environ | {
        "FLYTE_LOCAL_CACHE_ENABLED": "0",
        "SIDFLOW_HOME": str(home()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    named = ""
    if tree != ROOT:
        environment.pop("GIT_COMMIT", None)  # an image's own; the tree knows its commit
    with (
        terminable(),
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                sys.stdout.write(line)
                if found := NAMED.search(line):
                    named = named or found[1]
        except BaseException:
            process.terminate()
            raise
    if process.returncode or not named:
        raise RuntimeError(
            f"the repetition failed with exit status {process.returncode}; what it said stands above"
        )
    return named


def _differing_data(before: str, now: str) -> list[str]:
    """Compare the raw files behind two runs."""
    then, again = _raw_files(before), _raw_files(now)
    return [
        f"The data changed: {name} was {then.get(name, 'not read')}, is {again.get(name, 'not read')}."
        for name in sorted(then.keys() | again.keys())
        if then.get(name) != again.get(name)
    ]


def _raw_files(run_id: str) -> dict[str, str]:
    """Return digests by name of the raw files that a run stands on, and not of what was read later."""
    lineage = lineage_of(run_id)
    files: dict[str, set[str]] = {}
    for run in lineage.asked | lineage.before():
        for raw in lineage.steps[run].raw:
            files.setdefault(raw.kind, set()).add(raw.fingerprint)
    return {name: ", ".join(sorted(digests)) for name, digests in files.items()}


def _made(client: MlflowClient, run: Run) -> dict[str, str]:
    """Return fingerprints by stage and kind, the earliest stage first."""
    prefix = "artifact." if "sidflow.workflow" in run.data.tags else "output."
    made = {key.removeprefix(prefix): value for key, value in run.data.tags.items() if key.startswith(prefix)}
    makers = {key: run.data.tags.get(f"produced_by.{key}", run.info.run_id) for key in made}
    started = {run_id: client.get_run(run_id).info.start_time for run_id in set(makers.values())}
    return {key: made[key] for key in sorted(made, key=lambda key: (started[makers[key]], key))}


def _under_one_name(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Give what the repetition made the names of the original.

    Of a stage that Flyte's cache answered, the run has the label of whoever ran it first.
    """

    def plain(key: str) -> str:
        stage, _, kind = key.partition(".")
        return f"{stage.split()[0]}.{kind}"

    lost = {(plain(key), value): key for key, value in before.items() if key not in now}
    return {
        lost.get((plain(key), value), key) if key not in before else key: value for key, value in now.items()
    }


def _figures(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.data.metrics.items() if not TIMES.search(name)}


def _compare(
    before: Mapping[str, Any], now: Mapping[str, Any], same: Callable[[Any, Any], bool]
) -> list[Line]:
    def text(value: Any) -> str:
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)[:16]

    return [
        Line(
            name,
            text(before.get(name)),
            text(now.get(name)),
            name in before and name in now and same(before[name], now[name]),
        )
        for name in dict.fromkeys([*before, *now])
    ]


def summary(result: Reproduction) -> Group:
    """Lay a reproduction out for a terminal: every artefact, the metrics that differ, remarks and verdict."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("artefact or metric", "then", "now", ""):
        view.add_column(column)
    different = [line for line in result.metrics if not line.equal]
    for line in [*result.artifacts, *different]:
        verdict = Text("equal", style="green") if line.equal else Text("different", style="bold red")
        view.add_row(line.name, line.before, line.now, verdict)
    alike = len(result.metrics) - len(different)
    if alike:
        view.add_row(f"{alike} metrics", "", "", Text("equal", style="green"))
    remarks = [Text(remark, style="yellow") for remark in result.remarks]
    return Group(view, *remarks, Text(result.verdict, style="bold"), Text(f"MLflow run {result.repetition}"))
