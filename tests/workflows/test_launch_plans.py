import functools
import os
import subprocess
import sys
import tarfile
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgpack
import pytest
import yaml
from flyteidl.admin.launch_plan_pb2 import LaunchPlan as PlanProto
from flyteidl.core.types_pb2 import SimpleType
from flytekit import FlyteContextManager, LaunchPlan
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.models.core.execution import WorkflowExecutionPhase
from flytekit.remote.backfill import create_backfill_workflow
from flytekit.tools.translator import get_serializable

from components.config import load_preset
from tasks.runs import open_store
from workflows.backfill import backfill
from workflows.config import PipelineConfig
from workflows.embed_items import embed_items
from workflows.joint import joint
from workflows.launch_plans import Plans, name_new_items, notifications, plans, train_again
from workflows.new_items import new_items
from workflows.retrain import retrain
from workflows.schedules import Domain, Notify, Schedules, domain, load_schedules
from workflows.two_stage import two_stage

ROOT = Path(__file__).parents[2]
DOMAINS = list(Schedules.model_fields)
FAILED, TIMED_OUT, SUCCEEDED = (
    WorkflowExecutionPhase.FAILED,
    WorkflowExecutionPhase.TIMED_OUT,
    WorkflowExecutionPhase.SUCCEEDED,
)


def serialization(into: str = "d") -> SerializationSettings:
    image = Image(name="default", fqn="example/other", tag="0")
    return SerializationSettings(
        project="p", domain=into, version="v", image_config=ImageConfig(image, [image])
    )


def to_proto(entity):
    return get_serializable(OrderedDict(), serialization(), entity).to_flyte_idl()


def plans_of(settings: Domain) -> Plans:
    """Make the plans of a domain as in a process of their own: flytekit knows one plan of a name a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LaunchPlan, "CACHE", {})
        return plans(settings)


@functools.cache
def shipped(into: str) -> Plans:
    return plans_of(getattr(load_schedules(), into))


@functools.cache
def spec(into: str, name: str):
    return to_proto(getattr(shipped(into), name)).spec


def config_of(literal) -> PipelineConfig:
    return PipelineConfig.model_validate(msgpack.loads(literal.scalar.binary.value))


def defaults(spec) -> dict:
    return {name: parameter.default for name, parameter in spec.default_inputs.parameters.items()}


@pytest.mark.parametrize("into", DOMAINS)
@pytest.mark.parametrize(
    ("name", "cron", "flow", "inner"),
    [
        ("nightly", "0 2 * * *", name_new_items, new_items),
        ("weekly", "0 3 * * 0", train_again, retrain),
    ],
)
def test_a_schedule_runs_its_workflow_on_fixed_settings_with_the_data_of_the_hour_it_was_due(
    into, name, cron, flow, inner
):
    settings = getattr(load_schedules(), into)
    plan = spec(into, name)
    schedule = plan.entity_metadata.schedule
    assert (schedule.cron_schedule.schedule, schedule.kickoff_time_input_arg) == (cron, "until")
    assert plan.workflow_id.name == flow.name
    assert config_of(plan.fixed_inputs.literals["config"]) == getattr(settings, name).config
    (node,) = to_proto(flow).template.nodes
    assert node.workflow_node.sub_workflow_ref.name == inner.name
    assert {b.var: b.binding.promise.var for b in node.inputs} == {"config": "config", "until": "until"}


@pytest.mark.parametrize("name", ["nightly", "weekly"])
def test_flyte_takes_the_schedule_as_its_one_open_input_is_a_plain_datetime(name):
    # What Flyte checks when a plan is registered: nothing else is open, and the type is no union such as
    # ``datetime | None``.
    parameters = dict(spec("production", name).default_inputs.parameters)
    assert list(parameters) == ["until"]
    assert parameters["until"].required and parameters["until"].var.type.simple == SimpleType.DATETIME


def test_no_fixed_input_has_a_default_in_its_workflow():
    # ``pyflyte run`` of a plan lets the workflow's defaults win over what the plan says.
    for plan in shipped("production"):
        defaulted = {
            name
            for name, (_, value) in plan.python_interface.inputs_with_defaults.items()
            if value is not None
        }
        assert not defaulted & plan.fixed_inputs.literals.keys(), plan.name


@pytest.mark.parametrize("into", DOMAINS)
def test_a_backfill_has_fixed_settings_and_windows_that_may_be_changed_at_launch(into):
    settings = getattr(load_schedules(), into).backfill
    plan = spec(into, "backfill_weekly")
    assert plan.workflow_id.name == backfill.name and not plan.entity_metadata.HasField("schedule")
    assert config_of(plan.fixed_inputs.literals["config"]) == settings.config
    given = defaults(plan)
    assert set(given) == {"first", "last", "every_days"}
    days = [given[key].scalar.primitive.datetime.ToDatetime(UTC) for key in ("first", "last")]
    assert days == [settings.first, settings.last]
    assert given["every_days"].scalar.primitive.integer == 7


def test_the_quickstart_runs_on_demand_with_settings_that_may_be_changed_at_launch():
    plan = spec("development", "quickstart")
    assert plan.workflow_id.name == joint.name and not plan.entity_metadata.HasField("schedule")
    assert not plan.fixed_inputs.literals
    assert config_of(defaults(plan)["config"]) == load_preset(
        PipelineConfig, "quickstart", ["name=development"]
    )


def test_whoever_is_named_hears_of_failures_and_of_success_if_asked():
    everybody = Notify(
        email=["a@example.org", "b@example.org"],
        slack=["c@example.org"],
        pagerduty=["d@example.org"],
    )
    made = plans_of(load_schedules().production.model_copy(update={"notify": everybody}))
    for plan in made:
        told = to_proto(plan).spec.entity_metadata.notifications
        assert [note.WhichOneof("type") for note in told] == ["email", "slack", "pager_duty"]
        people = [list(getattr(note, note.WhichOneof("type")).recipients_email) for note in told]
        assert people == [["a@example.org", "b@example.org"], ["c@example.org"], ["d@example.org"]]
        assert [list(note.phases) for note in told] == [[FAILED, TIMED_OUT]] * 3
    (glad,) = notifications(Notify(email=["a@example.org"], success=True))
    assert list(glad.to_flyte_idl().phases) == [FAILED, TIMED_OUT, SUCCEEDED]
    assert notifications(Notify()) == [] and not spec("production", "weekly").entity_metadata.notifications


@pytest.mark.parametrize("into", DOMAINS)
def test_stages_at_a_time_and_what_is_switched_on_are_those_of_the_domain(into):
    settings = getattr(load_schedules(), into)
    weekly = settings.weekly.model_copy(update={"active": True})
    made = plans_of(settings.model_copy(update={"weekly": weekly}))
    for plan, section in zip(made, ("nightly", "weekly", "backfill", "quickstart"), strict=True):
        assert to_proto(plan).spec.max_parallelism == getattr(settings, section).max_parallelism
        assert plan.should_auto_activate is (section == "weekly")


def test_the_domain_is_the_one_that_is_registered_for(monkeypatch):
    monkeypatch.delenv("SIDFLOW_DOMAIN", raising=False)
    assert domain() == "development"
    monkeypatch.setenv("SIDFLOW_DOMAIN", "staging")
    assert domain() == "staging"
    registering = FlyteContextManager.current_context().with_serialization_settings(
        serialization("production")
    )
    with FlyteContextManager.with_context(registering):
        with pytest.raises(
            ValueError, match="SIDFLOW_DOMAIN=staging, and pyflyte register goes to --domain prod"
        ):
            domain()
        monkeypatch.delenv("SIDFLOW_DOMAIN")
        assert domain() == "production"
    monkeypatch.setenv("SIDFLOW_DOMAIN", "prod")
    with pytest.raises(
        ValueError, match="no schedules for the domain 'prod': name one of development, staging"
    ):
        domain()


@pytest.mark.parametrize("name", ["nightly", "weekly"])
def test_pyflyte_backfill_runs_a_schedule_once_for_every_time_it_was_due(name):
    plan = getattr(shipped("production"), name)
    first, last = datetime(2011, 10, 1), datetime(2011, 10, 15)
    flow, _, _ = create_backfill_workflow(first, last, plan)
    until = [
        binding.binding.value.value.datetime.replace(tzinfo=None)
        for node in flow.nodes
        for binding in node.bindings
        if binding.var == "until"
    ]
    hour, step = {"nightly": (2, 1), "weekly": (27, 7)}[name]
    wanted = [first + timedelta(hours=hour, days=k * step) for k in range(14 // step)]
    assert until == wanted


def test_a_plan_called_in_python_keeps_its_settings_and_reads_what_was_known_on_the_day(
    module_home, planted_settings
):
    preset = module_home / "planted.yaml"
    settings = planted_settings(evaluate={"resamples": 100, "seen": ["kept"]}, promote={"seen": "kept"})
    preset.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    scheduled = {"preset": str(preset), "overrides": ["name=operated"], "cron": "0 2 * * *"}
    windows = {"preset": str(preset), "first": "2020-10-01", "last": "2020-10-01"}
    sections = {"nightly": scheduled, "weekly": scheduled, "backfill": windows, "quickstart": {}}
    made = plans_of(Domain.model_validate(sections))
    made.weekly(until=datetime(2020, 10, 20))
    client = open_store()
    experiment = client.get_experiment_by_name("operated").experiment_id
    (run,) = client.search_runs([experiment], "tags.`sidflow.workflow` = 'retrain'")
    assert run.info.status == "FINISHED" and run.data.params["ingest.until"] == "2020-10-20T00:00:00Z"


@pytest.mark.parametrize("flow", [joint, two_stage], ids=lambda flow: flow.name)
def test_training_waits_for_the_gate_and_failure_is_recorded(flow):
    template = to_proto(flow).template
    nodes = {node.id: node for node in template.nodes}
    by_task = {node.task_node.reference_id.name.rsplit(".", 1)[-1]: node for node in nodes.values()}
    gates = [n.id for n in nodes.values() if n.task_node.reference_id.name.endswith("analyze_collisions")]
    trained = ["fit_recommender", "fit_jointly"] if flow is joint else ["fit_recommender"]
    for stage in trained:
        assert set(gates) & set(by_task[stage].upstream_node_ids), stage
    assert template.failure_node.task_node.reference_id.name.endswith("record_failure")
    assert any(n.workflow_node.sub_workflow_ref.name == embed_items.name for n in nodes.values())


def test_a_failed_backfill_is_recorded():
    node = to_proto(backfill).template.failure_node
    assert node.task_node.reference_id.name.endswith("record_backfill_failure")


def test_the_catalogue_is_embedded_by_a_map_task():
    nodes = to_proto(embed_items).template.nodes
    shards = next(node for node in nodes if node.HasField("array_node"))
    assert "map_embed_shard" in shards.array_node.node.task_node.reference_id.name


def test_a_changed_section_is_all_that_a_stage_sees():
    template = to_proto(two_stage).template
    node = next(n for n in template.nodes if n.task_node.reference_id.name.endswith("fit_tokenizer"))
    binding = next(b for b in node.inputs if b.var == "config").binding.promise
    assert [a.string_value for a in binding.attr_path] == ["tokenizer"]


def test_everything_packages_without_a_cluster_for_the_domain_that_is_named(tmp_path):
    command = [str(Path(sys.executable).with_name("pyflyte")), "--pkgs", "workflows,tasks", "package"]
    done = subprocess.run(
        [*command, "--source", ".", "-f", "-o", str(tmp_path / "flow.tgz")],
        cwd=ROOT,
        env=os.environ | {"SIDFLOW_DOMAIN": "production"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(tmp_path / "flow.tgz") as package:
        names = package.getnames()
        files = {name: package.extractfile(name).read() for name in names if name.endswith("_3.pb")}
    for entity in ("workflows.joint.joint_2", "workflows.two_stage.two_stage_2"):
        assert any(entity in name for name in names), (entity, names)
    packaged = {proto.id.name: proto.spec for proto in map(PlanProto.FromString, files.values())}
    production = load_schedules().production
    for name in ("nightly", "weekly"):
        assert config_of(packaged[name].fixed_inputs.literals["config"]) == getattr(production, name).config
        assert packaged[name].entity_metadata.schedule.kickoff_time_input_arg == "until"
    assert {"backfill_weekly", "quickstart"} <= packaged.keys()
