"""When workflows run by themselves, in each Flyte domain: the content of ``schedules.yaml``."""

import os
from pathlib import Path
from typing import Annotated

from flytekit import CronSchedule, FlyteContextManager
from pydantic import AfterValidator, Field, model_validator

from components.config import Config, load_named, load_preset
from components.data.times import Moment
from components.metrics.windows import moments
from workflows.config import PipelineConfig


def _cron(text: str) -> str:
    CronSchedule(schedule=text)  # flytekit knows what Flyte reads; its message names the rule
    return text


Cron = Annotated[str, AfterValidator(_cron)]
Address = Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")]


class Notify(Config):
    """Who hears of a run that ended. Flyte reaches Slack and PagerDuty by mail as well, at addresses that they give."""

    email: list[Address] = Field(default_factory=list)
    """People."""
    slack: list[Address] = Field(default_factory=list)
    """Mail addresses of Slack channels."""
    pagerduty: list[Address] = Field(default_factory=list)
    """Mail addresses of PagerDuty services."""
    success: bool = False
    """Say also that a run succeeded; that one failed or took too long is always said."""


class Launch(Config):
    """What a launch plan runs."""

    preset: str = "quickstart"
    """A YAML file, or the name of a preset."""
    overrides: list[str] = Field(default_factory=list)
    """Changes to it, as path.to.key=value."""
    max_parallelism: int = Field(4, ge=1)
    """Most stages of one run at a time; the shards of an embedding count as one."""

    @property
    def config(self) -> PipelineConfig:
        """The settings of the pipeline."""
        return load_preset(PipelineConfig, self.preset, self.overrides)


class Scheduled(Launch):
    """What runs by itself."""

    cron: Cron
    """When: minute, hour, day of month, month, day of week, in UTC."""
    active: bool = False
    """Registering switches the schedule on. Without it the plan is there, and waits for somebody to switch it on."""


class Windows(Launch):
    """What a backfill runs, and the windows it takes unless told otherwise at launch."""

    first: Moment
    """End of the first test window."""
    last: Moment
    """No test window ends after it."""
    every_days: int = 7
    """Days from one window to the next."""

    @model_validator(mode="after")
    def _fits(self) -> "Windows":
        moments(self.first, self.last, self.every_days)
        return self


class Domain(Config):
    """The launch plans of one Flyte domain."""

    notify: Notify = Notify()
    """Who hears of runs that end."""
    nightly: Scheduled
    """Give new items their SIDs."""
    weekly: Scheduled
    """Train again."""
    backfill: Windows
    """Run the pipeline as of many days; on demand."""
    quickstart: Launch
    """The joint workflow; on demand, with other settings if wanted."""


class Schedules(Config):
    """The content of ``schedules.yaml``: the three domains that a Flyte installation has."""

    development: Domain
    """Where everybody tries things."""
    staging: Domain
    """As production, on other data or other machines."""
    production: Domain
    """What counts."""


def load_schedules() -> Schedules:
    """Read ``schedules.yaml`` beside this file, or the file that ``SIDFLOW_SCHEDULES`` names.

    Raises
    ------
    FileNotFoundError
        ``SIDFLOW_SCHEDULES`` names no file.
    ValueError
        A setting does not fit; the message names file and key.
    """
    return load_named(Schedules, "SIDFLOW_SCHEDULES", Path(__file__).with_name("schedules.yaml"))


def domain() -> str:
    """Return the Flyte domain that is being registered for: ``SIDFLOW_DOMAIN``, or development.

    ``pyflyte register`` knows the domain itself; a package does not, and gets it from the variable.

    Raises
    ------
    ValueError
        The variable names no domain, or another than ``pyflyte register --domain``.
    """
    named = os.environ.get("SIDFLOW_DOMAIN")
    settings = FlyteContextManager.current_context().serialization_settings
    registered = settings.domain if settings else None
    if named and registered and named != registered:
        raise ValueError(
            f"SIDFLOW_DOMAIN={named}, and pyflyte register goes to --domain {registered}: plans of one domain do not "
            "belong in another; unset SIDFLOW_DOMAIN, or set both alike"
        )
    chosen = registered or named or "development"
    if chosen not in Schedules.model_fields:
        raise ValueError(
            f"no schedules for the domain {chosen!r}: name one of {', '.join(Schedules.model_fields)} with "
            "SIDFLOW_DOMAIN or --domain"
        )
    return chosen
