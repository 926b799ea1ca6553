"""The layers hold: workflows on tasks on components, and components know neither Flyte nor MLflow."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_import_contracts() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_components_run_without_flyte_and_mlflow() -> None:
    code = (
        "import sys, pkgutil, importlib, components\n"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(components.__path__, 'components.')]\n"
        "print(sorted({'flytekit', 'mlflow', 'faiss', 'sentence_transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
