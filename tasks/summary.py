"""The last page of a run, in the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from components.artifacts import CollisionReport, Comparison
from components.metrics.compare import table, verdicts

WIDTH = 100
"""Columns of a log file, which has no width of its own."""


def screen(width: int = WIDTH, *, soft_wrap: bool = True) -> Console:
    """Return the terminal, or a page of so many columns where a log file has no width of its own."""
    found = Console(soft_wrap=soft_wrap, highlight=False)
    if not found.is_terminal:
        found.width = width
    return found


def show_summary(
    comparison: Comparison,
    collisions: Sequence[tuple[str, CollisionReport]],
    stages: Mapping[str, str],
    run_id: str,
) -> None:
    """Print methods, code usage, the MLflow runs behind them and how to open them.

    Parameters
    ----------
    comparison : Comparison
        The methods side by side.
    collisions : sequence of (str, CollisionReport)
        A name and the report of each SID table.
    stages : mapping of str to str
        Stage to MLflow run.
    run_id : str
        MLflow run of the pipeline.
    """
    console = screen()
    console.print(table(comparison))
    found = comparison.differences["seen"].unique().to_list()
    block = comparison.differences.filter(seen="kept" if "kept" in found else "excluded")
    for sentence in verdicts(replace(comparison, differences=block), ["N@10"]):
        console.print(sentence)
    for name, report in collisions:
        console.print(_levels(name, report))
    runs = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    runs.add_column("stage")
    runs.add_column("MLflow run")
    for stage, run in sorted(stages.items()):
        runs.add_row(stage, run)
    runs.add_row("the pipeline", run_id)
    console.print(runs)
    console.print("Open the runs in a browser: make ui")


def _levels(name: str, report: CollisionReport) -> Table:
    rate, largest = report.figures["collision_rate"], report.figures["largest_group"]
    view = Table(
        title=f"{name}: {rate:.1%} of the items share their codes, at most {largest:.0f} the same; {report.verdict}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    view.add_column("level")
    view.add_column("codes in use", justify="right")
    view.add_column("perplexity", justify="right")
    for row in report.levels.iter_rows(named=True):
        used = f"{row['codes_in_use']} of {row['codebook_size']}"
        view.add_row(str(row["level"]), used, f"{row['perplexity']:.1f}")
    return view
