"""What stages ask of Flyte: image, resources, retries, timeouts and caching. The one place for them."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from flytekit import Cache, ImageSpec, Resources
from flytekit.core import local_cache
from flytekit.deck import DeckField
from pydantic import Field

from components.config import Config, load_named
from tasks.home import home


class Container(Config):
    """An image that was built and pushed already."""

    kind: Literal["container"] = "container"
    """Selects a ready image."""
    name: str = Field("sidflow:0.1.0", min_length=1)
    """Name with tag."""


class BuiltImage(Config):
    """An image that flytekit builds when the workflows are registered."""

    kind: Literal["built"] = "built"
    """Selects flytekit's image builder."""
    name: str = Field("sidflow", min_length=1)
    """Name without tag; the tag is a hash of the content."""
    registry: str | None = None
    """Registry to push to; null: the builder's default."""
    python_version: str = "3.11"
    """Python of the image, 3.11 or 3.12."""
    packages: list[str] = Field(default_factory=list)
    """Requirements to install, as pip reads them."""


class Tier(Config):
    """What a stage of one tier gets."""

    cpu: str = "2"
    """CPUs, as Kubernetes reads them."""
    memory: str = "8Gi"
    """Memory, as Kubernetes reads it."""
    gpu: int = Field(0, ge=0)
    """GPUs."""
    retries: int = Field(1, ge=0)
    """How often a stage is tried again that lost its machine; an error of the stage itself is final."""
    timeout_minutes: int = Field(120, ge=1)
    """Longest run of a stage."""


class Runtime(Config):
    """The content of ``resources.yaml``."""

    image: Annotated[Container | BuiltImage, Field(discriminator="kind")] = Container()
    """Image that stages run in."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every stage."""
    cpu: Tier = Tier()
    """Stages that parse, split and report."""
    gpu: Tier = Tier(gpu=1)
    """Stages that train and rank."""


def load_runtime() -> Runtime:
    """Read ``resources.yaml`` beside this file, or the file that ``SIDFLOW_RESOURCES`` names.

    Raises
    ------
    FileNotFoundError
        ``SIDFLOW_RESOURCES`` names no file.
    ValueError
        A setting does not fit; the message names file and key.
    """
    return load_named(Runtime, "SIDFLOW_RESOURCES", Path(__file__).with_name("resources.yaml"))


def task_options(runtime: Runtime, tier: Tier) -> dict[str, Any]:
    """Return the keyword arguments of ``@task`` for a tier."""
    gpu = str(tier.gpu) if tier.gpu else None
    wanted = Resources(cpu=tier.cpu, mem=tier.memory, gpu=gpu)
    return {
        "container_image": _image(runtime.image),
        "environment": dict(runtime.environment),
        "requests": wanted,
        "limits": wanted,
        "retries": tier.retries,
        "timeout": timedelta(minutes=tier.timeout_minutes),
    }


def _image(image: Container | BuiltImage) -> str | ImageSpec:
    match image:
        case Container():
            return image.name
        case BuiltImage():
            return ImageSpec(
                name=image.name,
                registry=image.registry,
                python_version=image.python_version,
                packages=list(image.packages),
            )


def cached(version: str, *labels: str) -> Cache:
    """Cache a stage by the content of its inputs; ``run_id`` names the MLflow run and must not matter.

    Parameters
    ----------
    version : str
        Raise it when the stage's code changes what comes out.
    *labels : str
        Further inputs that only say what to call the stage's run.
    """
    return Cache(version=version, ignored_inputs=("run_id", *labels), serialize=True)


_RUNTIME = load_runtime()

CPU = task_options(_RUNTIME, _RUNTIME.cpu)
"""``@task(**runtime.CPU)``: a stage that parses, splits or reports."""

GPU = task_options(_RUNTIME, _RUNTIME.gpu)
"""``@task(**runtime.GPU)``: a stage that trains or ranks; it uses the CPU where there is no GPU."""

DECK = {"enable_deck": True, "deck_fields": (DeckField.INPUT, DeckField.OUTPUT, DeckField.TIMELINE)}
"""A stage that shows something. Flytekit's default fields list every installed package, for seconds."""

# Flytekit has no setting for this. Cached results name folders under home(): both live and die together.
local_cache.CACHE_LOCATION = str(home() / "flyte-cache")
