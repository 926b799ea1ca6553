import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from flytekit import task
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.core import local_cache
from flytekit.tools.translator import get_serializable

from tasks import runtime
from tasks.runtime import BuiltImage, Runtime, Tier, load_runtime, task_options


def to_proto(entity):
    image = Image(name="default", fqn="example/other", tag="0")
    settings = SerializationSettings(
        project="p", domain="d", version="v", image_config=ImageConfig(image, [image])
    )
    return get_serializable(OrderedDict(), settings, entity).to_flyte_idl()


def resources(container):
    names = {1: "cpu", 2: "gpu", 3: "memory"}
    return {names[entry.name]: entry.value for entry in container.resources.requests}


@task(**runtime.GPU, cache=runtime.cached("7"))
def train(x: int, run_id: str = "") -> int:
    return x


@task(**runtime.CPU, **runtime.DECK)
def show(x: int) -> int:
    return x


def test_a_training_stage_asks_for_its_gpu_image_retries_and_timeout():
    template = to_proto(train).template
    assert resources(template.container) == {"cpu": "4", "memory": "16Gi", "gpu": "1"}
    assert template.container.image == "sidflow:0.1.0"
    assert template.metadata.retries.retries == 1
    assert template.metadata.timeout.seconds == 1440 * 60


def test_the_cache_is_versioned_serialised_and_blind_to_the_run():
    metadata = to_proto(train).template.metadata
    assert metadata.discoverable and metadata.discovery_version == "7" and metadata.cache_serializable
    assert list(metadata.cache_ignore_input_vars) == ["run_id"]


def test_other_stages_ask_for_no_gpu_and_show_no_package_list():
    template = to_proto(show).template
    assert resources(template.container) == {"cpu": "2", "memory": "8Gi"}
    assert template.metadata.generates_deck.value
    assert "Dependencies" not in [field.value for field in show.deck_fields]


def test_resources_come_from_the_file_that_the_environment_names(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("gpu: {gpu: 4, memory: 64Gi}\nenvironment: {MLFLOW_TRACKING_URI: https://m.example}\n")
    monkeypatch.setenv("SIDFLOW_RESOURCES", str(path))
    options = task_options(load_runtime(), load_runtime().gpu)
    assert (options["requests"].gpu, options["limits"].mem) == ("4", "64Gi")
    assert options["environment"] == {"MLFLOW_TRACKING_URI": "https://m.example"}


def test_a_misspelt_resource_names_file_and_key(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("gpu: {gpus: 4}\n")
    monkeypatch.setenv("SIDFLOW_RESOURCES", str(path))
    with pytest.raises(ValueError, match=r"mine\.yaml.*\n.*gpu\.gpus"):
        load_runtime()


def test_a_missing_resource_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDFLOW_RESOURCES", str(tmp_path / "none.yaml"))
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_runtime()


def test_flytekit_may_build_the_image():
    built = Runtime(image=BuiltImage(registry="example.org/team", packages=["polars"]))
    spec = task_options(built, Tier())["container_image"]
    assert spec.image_name().startswith("example.org/team/sidflow:")


def test_the_local_cache_lies_beside_the_artefacts_before_anything_runs(tmp_path):
    script = (
        "import tasks.runtime\n"
        "from flytekit.core import local_cache\n"
        "assert not local_cache.LocalTaskCache._initialized\n"
        "print(local_cache.CACHE_LOCATION)"
    )
    environment = dict(os.environ) | {"SIDFLOW_HOME": str(tmp_path / "here")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == tmp_path / "here" / "flyte-cache", done.stderr
    assert local_cache.CACHE_LOCATION.endswith("flyte-cache")
