"""The machine that a benchmark ran on, for its result file."""

import platform
from pathlib import Path


def processor() -> str:
    """Name the processor; ``platform.processor()`` is empty on most Linux systems."""
    info = Path("/proc/cpuinfo")
    models = [s for s in info.read_text().splitlines() if s.startswith("model name")] if info.exists() else []
    name = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    return f"{name}, {platform.system()}"
