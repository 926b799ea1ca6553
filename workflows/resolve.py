"""Print a preset with its overrides, validated and with every default filled in; or explain all keys.

``python -m workflows.resolve [--ablation] PRESET [path.to.key=value ...]``
``python -m workflows.resolve --keys [SECTION]``

``--ablation`` reads a preset that has ``arms`` and ``seeds`` besides the sections of a pipeline.
"""

import sys

import yaml

from components.config import describe, load_preset
from workflows.config import AblationConfig, PipelineConfig


def main(arguments: list[str]) -> int:
    """Write to standard output; a mistake goes to standard error, exit status 2."""
    match arguments:
        case ["-h" | "--help"]:
            sys.stdout.write(__doc__ or "")
        case ["--keys", *sections]:
            lines = [
                line for line in describe(AblationConfig) if not sections or line.startswith(sections[0])
            ]
            sys.stdout.write("".join(f"{line}\n" for line in lines))
        case ["--ablation", preset, *overrides]:
            return _resolve(AblationConfig, preset, overrides)
        case [preset, *overrides] if not preset.startswith("--"):
            return _resolve(PipelineConfig, preset, overrides)
        case _:
            sys.stderr.write(__doc__ or "")
            return 2
    return 0


def _resolve(model: type[PipelineConfig], preset: str, overrides: list[str]) -> int:
    try:
        config = load_preset(model, preset, overrides)
    except (FileNotFoundError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
