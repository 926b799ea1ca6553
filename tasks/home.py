"""Where everything local lives: artefacts, Flyte's local cache, the MLflow store."""

import os
from pathlib import Path


def home() -> Path:
    """Return the folder of all local state: ``SIDFLOW_HOME``, or ``.sidflow`` in the current folder."""
    return Path(os.environ.get("SIDFLOW_HOME") or ".sidflow").resolve()
