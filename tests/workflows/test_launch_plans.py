import subprocess
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path

import msgpack
import pytest
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.tools.translator import get_serializable

from components.config import load_preset
from workflows.config import PipelineConfig
from workflows.embed_items import embed_items
from workflows.joint import joint
from workflows.launch_plans import nightly
from workflows.two_stage import two_stage

ROOT = Path(__file__).parents[2]


def to_proto(entity):
    image = Image(name="default", fqn="example/other", tag="0")
    settings = SerializationSettings(
        project="p", domain="d", version="v", image_config=ImageConfig(image, [image])
    )
    return get_serializable(OrderedDict(), settings, entity).to_flyte_idl()


def test_the_nightly_plan_runs_the_joint_workflow_at_two_with_the_quickstart():
    spec = to_proto(nightly).spec
    assert spec.entity_metadata.schedule.cron_schedule.schedule == "0 2 * * *"
    assert spec.workflow_id.name == joint.name
    fixed = spec.fixed_inputs.literals["config"].scalar.binary.value
    assert PipelineConfig.model_validate(msgpack.loads(fixed)) == load_preset(PipelineConfig, "quickstart")


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


def test_the_catalogue_is_embedded_by_a_map_task():
    nodes = to_proto(embed_items).template.nodes
    shards = next(node for node in nodes if node.HasField("array_node"))
    assert "map_embed_shard" in shards.array_node.node.task_node.reference_id.name


def test_a_changed_section_is_all_that_a_stage_sees():
    template = to_proto(two_stage).template
    node = next(n for n in template.nodes if n.task_node.reference_id.name.endswith("fit_tokenizer"))
    binding = next(b for b in node.inputs if b.var == "config").binding.promise
    assert [a.string_value for a in binding.attr_path] == ["tokenizer"]


def test_everything_packages_without_a_cluster(tmp_path):
    command = [str(Path(sys.executable).with_name("pyflyte")), "--pkgs", "workflows,tasks", "package"]
    done = subprocess.run(
        [*command, "--source", ".", "-f", "-o", str(tmp_path / "flow.tgz")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(tmp_path / "flow.tgz") as package:
        names = package.getnames()
    for entity in ("workflows.joint.joint_2", "workflows.two_stage.two_stage_2", "nightly_3"):
        assert any(entity in name for name in names), (entity, names)
