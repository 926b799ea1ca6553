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


def run_script(script: str, checkout: Path, empty_store: Path) -> tuple[str, Path]:
    """Run shell commands of the README in a clone; return what they printed and the local store."""
    store = checkout / ".sidflow"
    if not store.exists():
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
        ["bash", "-euo", "pipefail", "-c", script.replace(".venv/bin/", f"{Path(sys.executable).parent}/")],
        cwd=checkout,
        env=kept | private,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr, store


def blocks(title: str) -> list[str]:
    return BLOCK.findall(section(title))


def test_the_csv_example_runs_as_written(checkout: Path, empty_store: Path) -> None:
    (block,) = blocks("Your own data")
    printed, store = run_script(block, checkout, empty_store)
    rows = [line.split()[:2] for line in printed.splitlines()]
    for method in ("popularity", "itemknn", "two-stage", "joint"):
        assert [method, "kept"] in rows and [method, "excluded"] in rows, printed[-4000:]
    assert "Open the runs in a browser: make ui" in printed
    assert any((store / "artifacts" / "Bundle").iterdir())


SMALL = (
    "recommender.loop.epochs=1 recommender.model.dim=16 recommender.model.layers=1 recommender.model.heads=2 "
    "recommender.model.head_dim=8 recommender.model.hidden=32 evaluate.resamples=100 compare.resamples=100 "
    "'tokenizer.model={kind: rkmeans, codebook_sizes: [64, 64, 64]}'"
)


def test_stages_run_again_on_other_data_as_written_and_so_does_the_lineage(
    checkout: Path, empty_store: Path
) -> None:
    """The training is that of the README with a smaller model; all else is as it stands there."""
    train, again = blocks("Rerun one stage on other data")
    made = re.fullmatch(r"make run WORKFLOW=(\w+) UNTIL=(\S+)\n", train)
    assert made is not None
    small = (
        f".venv/bin/python -m workflows.resolve quickstart {SMALL} > config.yaml\n"
        f".venv/bin/pyflyte run workflows/{made[1]}.py {made[1]} --config config.yaml --until {made[2]}\n"
    )
    printed, store = run_script(small + again, checkout, empty_store)
    names = [SidTable.load(folder).num_items for folder in (store / "artifacts" / "SidTable").iterdir()]
    assert sorted(names) == [2414, 2524]  # films, and the shop as it was
    assert "seen items kept: R@10 " in printed.split("evaluate_recommender old")[1]
    old = re.findall(r"mlflow:([0-9a-f]{32})", printed)[-1]
    tree, _ = run_script(f".venv/bin/python -m workflows.lineage {old}", checkout, empty_store)
    for stage in ("ingest →", "fit_recommender →", "ingest_onto →", "evaluate_recommender old →"):
        assert f"── {stage}" in tree


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
