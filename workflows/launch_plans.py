"""When workflows run by themselves."""

from flytekit import CronSchedule, LaunchPlan

from components.config import load_preset
from workflows.config import PipelineConfig
from workflows.joint import joint

nightly = LaunchPlan.get_or_create(
    joint,
    name="nightly",
    fixed_inputs={"config": load_preset(PipelineConfig, "quickstart")},
    schedule=CronSchedule(schedule="0 2 * * *"),
)
"""The quickstart preset through the joint workflow at 02:00 UTC; its inputs cannot be changed at launch."""
