"""Print a preset with its overrides, validated and with every default filled in; or explain all keys.

``python -m workflows.resolve PRESET [path.to.key=value ...]``
``python -m workflows.resolve --keys [SECTION]``
"""

import sys

import yaml

from components.config import describe, load_preset
from workflows.config import PipelineConfig


def main(arguments: list[str]) -> int:
    """Write to standard output; a mistake goes to standard error, exit status 2."""
    match arguments:
        case ["-h" | "--help"]:
            sys.stdout.write(__doc__ or "")
        case ["--keys", *sections]:
            lines = [
                line for line in describe(PipelineConfig) if not sections or line.startswith(sections[0])
            ]
            sys.stdout.write("".join(f"{line}\n" for line in lines))
        case [preset, *overrides]:
            try:
                config = load_preset(PipelineConfig, preset, overrides)
            except (FileNotFoundError, ValueError) as error:
                sys.stderr.write(f"{error}\n")
                return 2
            sys.stdout.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        case _:
            sys.stderr.write(__doc__ or "")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
