"""Print a preset with its overrides, validated and with every default filled in.

``python -m workflows.resolve PRESET [path.to.key=value ...]``
"""

import sys

import yaml

from components.config import load_preset
from workflows.config import PipelineConfig


def main(arguments: list[str]) -> int:
    """Write the settings as YAML to standard output; a mistake goes to standard error, exit status 2."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(__doc__ or "")
        return 0
    try:
        config = load_preset(PipelineConfig, arguments[0], arguments[1:])
    except (FileNotFoundError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
