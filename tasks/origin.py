"""Where a run came from: the commit of the code, the libraries and the Flyte execution."""

import os
import platform
import re
import socket
import subprocess
import uuid
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from flytekit import current_context

ROOT = Path(__file__).resolve().parent.parent
"""The folder of the code."""


@cache
def _this_process() -> str:
    """Name a local execution: Flyte calls every one of them ``local``."""
    return f"local-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def execution_tags(stage: str) -> dict[str, str]:
    """Return Flyte's names for this execution: id, project, domain and task."""
    context = current_context()
    execution = context.execution_id
    inside = execution is not None and execution.name and execution.name != "local"
    return {
        "flyte.execution_id": execution.name if inside else _this_process(),
        "flyte.project": execution.project if inside else "local",
        "flyte.domain": execution.domain if inside else "local",
        "flyte.task": os.environ.get("FLYTE_INTERNAL_TASK_NAME") or stage,
    }


def commit() -> str:
    """Return the commit of the code, or ``unknown``."""
    return code_tags()["mlflow.source.git.commit"]


@cache
def code_tags() -> dict[str, str]:
    """Return the commit of the code, and whether the working tree differs from it.

    In an image without a checkout the commit stands in the environment variable ``GIT_COMMIT``.
    """
    own = git("rev-parse", "--show-toplevel") == str(
        ROOT
    )  # not a checkout that this happens to be installed into
    head = os.environ.get("GIT_COMMIT") or (git("rev-parse", "HEAD") if own else "")
    if not head:
        return {"mlflow.source.git.commit": "unknown"}
    dirty = "unknown" if os.environ.get("GIT_COMMIT") else str(bool(git("status", "--porcelain"))).lower()
    return {"mlflow.source.git.commit": head, "sidflow.git.dirty": dirty}


LIBRARIES = (
    "torch",
    "numpy",
    "polars",
    "scikit-learn",
    "scipy",
    "faiss-cpu",
    "faiss-gpu",
    "flytekit",
    "mlflow",
)
"""Those whose version may change what comes out."""


@cache
def versions() -> dict[str, str]:
    """Return what results depend on besides code, data and settings: libraries, Python, processor and threads."""
    found = {
        "python": platform.python_version(),
        "machine": _machine(),
        "threads": str(torch.get_num_threads()),
    }
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _machine() -> str:
    """Name the processor as the system does, or its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else []
    return names[0] if names else platform.machine()


def git(*arguments: str) -> str:
    """Return what git says about this checkout, or nothing where there is no git, no checkout or an error."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
