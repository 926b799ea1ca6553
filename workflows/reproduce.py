"""Run a finished run again and say what came out equal.

``python -m workflows.reproduce RUN [--here]``

RUN is the id of an MLflow run, of a stage or of a whole pipeline. Exit status 0: all equal; 1: something differs.
"""

import argparse
import sys

from mlflow.exceptions import MlflowException
from rich.console import Console

from tasks.reproduce import reproduce, summary


def main(arguments: list[str]) -> int:
    """Write the comparison to standard output; a mistake goes to standard error, exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m workflows.reproduce",
        description="Run a finished run again and say what came out equal.",
    )
    parser.add_argument("run", metavar="RUN", help="id of an MLflow run, of a stage or of a whole pipeline")
    parser.add_argument(
        "--here",
        action="store_true",
        help="take the code that stands here, not the commit that the run noted",
    )
    asked = parser.parse_args(arguments)
    try:
        result = reproduce(asked.run, here=asked.here)
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError, MlflowException) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    Console(highlight=False, soft_wrap=True).print(summary(result))
    return 0 if result.equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
