"""The settings of a pipeline as they would have been on a day: whatever happened later is not read."""

from datetime import datetime
from typing import Any

from flytekit import task
from pydantic import TypeAdapter

from components.data.times import Moment
from tasks import runtime
from workflows.config import PipelineConfig


@task(**runtime.CPU)
def as_of(config: PipelineConfig, until: datetime | None = None) -> PipelineConfig:
    """Cut the data off at a moment; without one, change nothing.

    Args:
        config: Settings of all stages, a YAML file or JSON, without an ingest.until and split.until of their own.
        until: Events at or after it are not read, and with protocol by_time the test window ends there. A date is its
            midnight; without a time zone, UTC.
    """
    return config if until is None else cut(config, until)


def cut(config: PipelineConfig, until: datetime) -> PipelineConfig:
    """Return settings whose data end at a moment: ``ingest.until``, and with protocol by_time ``split.until``.

    Raises
    ------
    ValueError
        The settings name another moment already.
    """
    end = TypeAdapter[datetime](Moment).validate_python(until)
    values: dict[str, Any] = config.model_dump()
    for section in ["ingest"] + ["split"] * (config.split.protocol == "by_time"):
        if values[section]["until"] not in (None, end):
            raise ValueError(
                f"{section}.until is {values[section]['until']}, and this run is as of {end}: leave {section}.until "
                "out of the settings, or run without until"
            )
        values[section]["until"] = end
    return PipelineConfig.model_validate(values)
