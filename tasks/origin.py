"""Where a run came from: the commit of the code and the Flyte execution."""

import os
import socket
import subprocess
import uuid
from functools import cache
from pathlib import Path

from flytekit import current_context


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
    head = os.environ.get("GIT_COMMIT") or _git("rev-parse", "HEAD")
    if not head:
        return {"mlflow.source.git.commit": "unknown"}
    dirty = "unknown" if os.environ.get("GIT_COMMIT") else str(bool(_git("status", "--porcelain"))).lower()
    return {"mlflow.source.git.commit": head, "sidflow.git.dirty": dirty}


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
