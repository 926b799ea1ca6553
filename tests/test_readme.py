"""The README does what it says: its csv example runs as written, and what it points to is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.artifacts import SidTable

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDED = ("components", "tasks", "workflows", "pyproject.toml")
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
COMMAND = re.compile(r"(?:^|`|\$ )make ([a-z]+)\b", re.MULTILINE)


def section(title: str) -> str:
    """Return what stands under a heading of the README."""
    text = PAGES[0].read_text()
    assert f"\n## {title}\n" in text, f"README.md has no section {title!r}"
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The parts of a clone that the example needs, without anything that runs have left."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def run_block(title: str, checkout: Path, empty_store: Path) -> tuple[str, Path]:
    """Run the one bash block of a section as written; return what it printed and the local store."""
    (block,) = BLOCK.findall(section(title))
    assert ".venv/bin/pyflyte" in block
    store = checkout / ".sidflow"
    store.mkdir()
    shutil.copy(empty_store, store / "mlflow.db")
    private = {
        "HOME": str(checkout),
        "TMPDIR": str(checkout),
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
    }
    kept = {n: v for n, v in os.environ.items() if n not in ("MLFLOW_TRACKING_URI", "SIDFLOW_HOME")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.replace(".venv/bin/", f"{Path(sys.executable).parent}/")],
        cwd=checkout,
        env=kept | private,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, store


def test_the_csv_example_runs_as_written(checkout: Path, empty_store: Path) -> None:
    printed, store = run_block("Your own data", checkout, empty_store)
    rows = [line.split()[:2] for line in printed.splitlines()]
    for method in ("popularity", "itemknn", "two-stage", "joint"):
        assert [method, "kept"] in rows and [method, "excluded"] in rows, printed[-4000:]
    assert "Open the runs in a browser: make ui" in printed
    assert any((store / "artifacts" / "Bundle").iterdir())


def test_stages_rerun_on_new_data_as_written(checkout: Path, empty_store: Path) -> None:
    printed, store = run_block("Rerun one stage", checkout, empty_store)
    (folder,) = (store / "artifacts" / "SidTable").iterdir()
    assert SidTable.load(folder).num_items == 2414
    assert f"SidTable {folder.name}" in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_lead_to_files(page: Path) -> None:
    targets = [t for t in LINK.findall(FENCED.sub("", page.read_text())) if "://" not in t and t[0] != "#"]
    gone = [t for t in targets if not (page.parent / t.split("#", 1)[0]).exists()]
    assert not gone, f"{page.relative_to(ROOT)} points to {gone}"


def test_the_readme_points_somewhere() -> None:
    assert {"docs/images/pipeline.svg", "workflows/presets/quickstart.yaml"} <= set(
        LINK.findall(PAGES[0].read_text())
    )


def test_every_make_command_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in COMMAND.findall(page.read_text())}
    assert {"run", "test", "ui"} <= named <= targets
