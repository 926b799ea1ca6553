"""The launch plans of the domain that is registered: two schedules, a backfill and the quickstart.

Tried with ``pyflyte run workflows/launch_plans.py weekly --until 2011-10-01``, a plan loses every input for which its
workflow has a default of its own. No fixed input has one; ``every_days`` has, so give it, or call the plan in Python:
``backfill_weekly(first=..., last=...)``.
"""

from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from flytekit import CronSchedule, Email, LaunchPlan, PagerDuty, Slack, workflow
from flytekit.core.notification import Notification
from flytekit.models.core.execution import WorkflowExecutionPhase

from workflows.backfill import backfill
from workflows.config import PipelineConfig
from workflows.joint import joint
from workflows.new_items import new_items
from workflows.retrain import retrain
from workflows.schedules import Domain, Notify, Scheduled, domain, load_schedules

TROUBLE = [WorkflowExecutionPhase.FAILED, WorkflowExecutionPhase.TIMED_OUT]
"""How a run may end that is always told."""

# Flyte admits as the input that a schedule fills in a plain datetime alone, not an optional one: hence these two.


@workflow
def name_new_items(config: PipelineConfig, until: datetime) -> None:
    """Give the items that came up to a moment their SIDs.

    Args:
        config: Settings of all stages.
        until: When the run was due; nothing later is read.
    """
    new_items(config=config, until=until)


@workflow
def train_again(config: PipelineConfig, until: datetime) -> None:
    """Train on what is known up to a moment.

    Args:
        config: Settings of all stages.
        until: When the run was due; nothing later is read.
    """
    retrain(config=config, until=until)


class Plans(NamedTuple):
    """All launch plans of a domain."""

    nightly: LaunchPlan
    weekly: LaunchPlan
    backfill_weekly: LaunchPlan
    quickstart: LaunchPlan


def plans(settings: Domain) -> Plans:
    """Make the launch plans of a domain.

    What a plan does is fixed: nobody trains something else under its name. When a schedule runs for, the windows of a
    backfill, and the settings of the quickstart are given at launch.
    """
    told = notifications(settings.notify)

    def scheduled(name: str, flow: Callable[..., None], plan: Scheduled) -> LaunchPlan:
        return LaunchPlan.get_or_create(
            flow,
            name=name,
            fixed_inputs={"config": plan.config},
            # The data of its own day, also when it runs late or is made up for by `pyflyte backfill`.
            schedule=CronSchedule(schedule=plan.cron, kickoff_time_input_arg="until"),
            notifications=told,
            max_parallelism=plan.max_parallelism,
            auto_activate=plan.active,
        )

    windows, quick = settings.backfill, settings.quickstart
    return Plans(
        scheduled("nightly", name_new_items, settings.nightly),
        scheduled("weekly", train_again, settings.weekly),
        LaunchPlan.get_or_create(
            backfill,
            name="backfill_weekly",
            fixed_inputs={"config": windows.config},
            default_inputs={
                "first": windows.first,
                "last": windows.last,
                "every_days": windows.every_days,
            },
            notifications=told,
            max_parallelism=windows.max_parallelism,
        ),
        LaunchPlan.get_or_create(
            joint,
            name="quickstart",
            default_inputs={"config": quick.config},
            notifications=told,
            max_parallelism=quick.max_parallelism,
        ),
    )


def notifications(notify: Notify) -> list[Notification]:
    """Return whom Flyte tells how a run ended: one for each channel that has somebody."""
    phases = [*TROUBLE, *[WorkflowExecutionPhase.SUCCEEDED] * notify.success]
    channels = ((Email, notify.email), (Slack, notify.slack), (PagerDuty, notify.pagerduty))
    return [channel(phases=phases, recipients_email=people) for channel, people in channels if people]


nightly, weekly, backfill_weekly, quickstart = plans(getattr(load_schedules(), domain()))
