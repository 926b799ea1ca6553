"""The README does what it says: its csv example runs as written, and what it points to is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_csv_example_runs_as_written(checkout: Path, empty_store: Path, tmp_path: Path) -> None:
    blocks = BLOCK.findall(section("Your own data"))
    assert len(blocks) == 1 and ".venv/bin/pyflyte" in blocks[0]
    script = blocks[0].replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(empty_store, home / "mlflow.db")
    private = {
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "SIDFLOW_HOME": str(home),
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
    }
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout,
        env=kept | private,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    for method in ("popularity", "itemknn", "two-stage", "joint"):
        assert [method, "kept"] in rows and [method, "excluded"] in rows, done.stdout[-4000:]
    assert "Open the runs in a browser: make ui" in done.stdout
    assert any((home / "artifacts" / "Bundle").iterdir())


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
