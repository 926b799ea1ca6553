"""Show where a run's results came from and what came of them.

``python -m workflows.lineage RUN [--figure FILE.png]``

RUN is the id of an MLflow run, of a stage or of a whole pipeline.
"""

import argparse
import sys
from pathlib import Path

from mlflow.exceptions import MlflowException

from components.lineage import lineage_figure, lineage_tree
from tasks.lineage import lineage_of
from tasks.summary import screen

WIDTH = 1000
"""Columns of a file, where nothing is cut."""


def main(arguments: list[str]) -> int:
    """Write the tree to standard output; a mistake goes to standard error, exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m workflows.lineage", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("run", metavar="RUN", help="id of an MLflow run, of a stage or of a whole pipeline")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="also draw the lineage into this file, png or svg"
    )
    asked = parser.parse_args(arguments)
    try:
        lineage = lineage_of(asked.run)
        if asked.figure:
            lineage_figure(lineage).savefig(asked.figure, dpi=150)
    except (ValueError, OSError, MlflowException) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    screen(WIDTH).print(lineage_tree(lineage))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
