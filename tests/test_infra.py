"""The files under infra/ keep their own rules and agree with each other and with the code."""

import copy
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.runtime import Runtime

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
DOMAINS = ("development", "staging", "production")
SECRET = re.compile(r"password|passwd|token|secret|credential|private_?key|api_?key", re.IGNORECASE)
UNITS = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class Infra:
    """All files of infra/, parsed; a test may damage its own copy."""

    def __init__(self) -> None:
        self.manifests = list(yaml.safe_load_all((ROOT / "infra/kubernetes/mlflow.yaml").read_text()))
        self.values = yaml.safe_load((ROOT / "infra/flyte-values.yaml").read_text())
        self.dockerfile = (ROOT / "infra/Dockerfile").read_text().replace("\\\n", " ")
        self.context = (ROOT / "infra/Dockerfile.dockerignore").read_text()
        self.runtime = Runtime(**yaml.safe_load((ROOT / "tasks/resources.yaml").read_text()))

    def one(self, kind: str) -> dict[str, Any]:
        (found,) = (m for m in self.manifests if m["kind"] == kind)
        return found

    @property
    def pod(self) -> dict[str, Any]:
        return self.one("Deployment")["spec"]["template"]["spec"]

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.pod["containers"]
        return container

    @property
    def options(self) -> dict[str, str]:
        return dict(argument.removeprefix("--").split("=", 1) for argument in self.container["args"])

    @property
    def flyte(self) -> dict[str, Any]:
        return self.values["configuration"]["inline"]

    @property
    def environment(self) -> dict[str, str]:
        return {k: v for pair in self.flyte["plugins"]["k8s"]["default-env-vars"] for k, v in pair.items()}


@pytest.fixture
def infra() -> Infra:
    return copy.deepcopy(Infra())


def amount(quantity: object) -> float:
    """Read a Kubernetes quantity: 250m, 8Gi, "2"."""
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(quantity)).groups()
    return float(number) * (UNITS[unit] if unit else 1)


def leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    match value:
        case dict():
            for name, inner in value.items():
                yield from leaves(inner, str(name))
        case list():
            for inner in value:
                yield from leaves(inner, key)
        case _:
            yield key, value


def exposure(infra: Infra) -> Iterator[str]:
    kinds = [m["kind"] for m in infra.manifests]
    yield from (f"{kind}: opens the cluster" for kind in kinds if kind in ("Ingress", "Gateway", "HTTPRoute"))
    service = infra.one("Service")["spec"]
    if service.get("type") != "ClusterIP":
        yield f"Service is {service.get('type')}"
    if "externalIPs" in service or any("nodePort" in port for port in service["ports"]):
        yield "Service has an address outside of the cluster"
    if any(infra.pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")) or any(
        "hostPort" in port for port in infra.container["ports"]
    ):
        yield "pod uses the host's network"
    policy = infra.one("NetworkPolicy")["spec"]
    labels = infra.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    if not policy["podSelector"].get("matchLabels", {}).items() <= labels.items():
        yield "NetworkPolicy misses the pod"
    if "Ingress" not in policy["policyTypes"] or not all(rule.get("from") for rule in policy["ingress"]):
        yield "NetworkPolicy lets everybody in"
    if any("ipBlock" in peer for rule in policy["ingress"] for peer in rule.get("from", [])):
        yield "NetworkPolicy lets addresses in, not namespaces"
    for host in infra.options["allowed-hosts"].split(","):
        if "*" in host or not host.endswith(f":{infra.options['port']}"):
            yield f"allowed host {host}: a name with port 5000 is wanted"


def wiring(infra: Infra) -> Iterator[str]:
    spec, service = infra.one("Deployment")["spec"], infra.one("Service")
    labels = spec["template"]["metadata"]["labels"]
    if spec["selector"]["matchLabels"] != labels or service["spec"]["selector"] != labels:
        yield "selectors do not match the pod's labels"
    namespaces = {m["metadata"].get("namespace") for m in infra.manifests if m["kind"] != "Namespace"}
    if namespaces != {infra.one("Namespace")["metadata"]["name"]}:
        yield f"objects lie in {namespaces}"
    ports = {port["name"]: port["containerPort"] for port in infra.container["ports"]}
    (public,) = service["spec"]["ports"]
    if ports.get(public["targetPort"]) != int(infra.options["port"]):
        yield "Service does not lead to the port that the server listens on"
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        if infra.container.get(name, {}).get("httpGet") != {"path": "/health", "port": public["targetPort"]}:
            yield f"{name} does not ask /health"
    mounts = {mount["name"]: mount["mountPath"] for mount in infra.container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in infra.pod["volumes"]}
    if mounts.keys() != volumes.keys():
        yield "mounts and volumes differ"
    claim = infra.one("PersistentVolumeClaim")["metadata"]["name"]
    kept = [
        mounts.get(name)
        for name, volume in volumes.items()
        if volume.get("persistentVolumeClaim", {}).get("claimName") == claim
    ]
    for option in ("backend-store-uri", "artifacts-destination"):
        place = infra.options[option].removeprefix("sqlite:///")
        if not any(place.startswith(f"{folder}/") for folder in kept):
            yield f"{option} {place} is not on the volume"
    if spec["replicas"] != 1 or spec["strategy"] != {"type": "Recreate"}:
        yield "two servers would open one SQLite file"


def hardening(infra: Infra) -> Iterator[str]:
    pod, own = infra.pod["securityContext"], infra.container["securityContext"]
    if pod.get("runAsNonRoot") is not True or pod.get("runAsUser", 0) == 0:
        yield "runs as root"
    if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield "may gain privileges"
    if own.get("readOnlyRootFilesystem") is not True or own.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities or a writable image"
    if infra.pod.get("automountServiceAccountToken") is not False:
        yield "holds a token of the cluster"
    resources = infra.container["resources"]
    for name in ("cpu", "memory"):
        request, limit = (resources.get(part, {}).get(name) for part in ("requests", "limits"))
        if request is None or limit is None or amount(request) > amount(limit):
            yield f"{name}: request {request}, limit {limit}"
    if infra.container["image"].rpartition(":")[2] != VERSION:
        yield f"image {infra.container['image']} is not that of version {VERSION}"


def secrets(infra: Infra) -> Iterator[str]:
    if any(m["kind"] == "Secret" for m in infra.manifests):
        yield "a Secret stands in a file"
    for variable in infra.container["env"]:
        if SECRET.search(variable["name"]) and "value" in variable:
            yield f"{variable['name']} has its value in a file"
    for name, value in infra.environment.items():
        if SECRET.search(name):
            yield f"{name}={value} stands in a file"
    for name, value in leaves([infra.manifests, infra.values]):
        if isinstance(value, str) and re.search(r"://[^/\s]+:[^/\s]+@", value):
            yield f"{name}: a URL with a password"
    for name in re.findall(r"^(?:ARG|ENV)\s+(\w+)", infra.dockerfile, re.MULTILINE):
        if SECRET.search(name):
            yield f"Dockerfile: {name} would stay in the image"


def agreement(infra: Infra) -> Iterator[str]:
    service = infra.one("Service")
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    address = f"{name}.{namespace}.svc.cluster.local:{service['spec']['ports'][0]['port']}"
    if infra.environment.get("MLFLOW_TRACKING_URI") != f"http://{address}":
        yield f"stages look for MLflow at {infra.environment.get('MLFLOW_TRACKING_URI')}, it is at {address}"
    if address not in infra.options["allowed-hosts"].split(","):
        yield f"the server refuses requests for {address}"
    limits = infra.flyte["task_resources"]["limits"]
    for tier, wanted in (("cpu", infra.runtime.cpu), ("gpu", infra.runtime.gpu)):
        for resource in ("cpu", "memory", "gpu"):
            if amount(getattr(wanted, resource)) > amount(limits[resource]):
                yield f"tier {tier} asks for {resource} {getattr(wanted, resource)} of {limits[resource]}"
    tolerated = {k for pair in infra.flyte["plugins"]["k8s"]["resource-tolerations"] for k in pair}
    if infra.runtime.gpu.gpu and "nvidia.com/gpu" not in tolerated:
        yield "GPU stages may not go to GPU nodes"
    projects = infra.values["flyte-core-components"]["admin"]["seedProjects"]
    (rule,) = infra.one("NetworkPolicy")["spec"]["ingress"]
    (names,) = rule["from"][0]["namespaceSelector"]["matchExpressions"]
    if set(names["values"]) != {f"{project}-{domain}" for project in projects for domain in DOMAINS}:
        yield f"NetworkPolicy lets {names['values']} in, the projects are {projects}"


def image(infra: Infra) -> Iterator[str]:
    lines = infra.dockerfile.splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    if not users or users[-1].partition(":")[0] != str(infra.pod["securityContext"]["runAsUser"]):
        yield f"image runs as {users}, the pod as another user"
    for line in lines:
        if line.startswith("FROM ") and not re.match(r"FROM python:3\.1[12][\w.]*-slim", line):
            yield f"{line}: not a pinned slim Python"
        if line.startswith("ADD "):
            yield f"{line}: COPY is enough"
    copied = {
        name
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    allowed = set(re.findall(r"^!(.+)$", infra.context, re.MULTILINE))
    if copied != allowed or not infra.context.count("\n*\n"):
        yield f"the context allows {sorted(allowed)}, the image copies {sorted(copied)}"
    yield from (f"{name} does not exist" for name in sorted(copied) if not (ROOT / name).exists())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    default = re.search(r"^ARG FAISS=(\w+)$", infra.dockerfile, re.MULTILINE)
    if default is None or default[1] not in extras or "--constraint constraints.txt" not in infra.dockerfile:
        yield "the install does not follow pyproject.toml and constraints.txt"


LAWS = (exposure, wiring, hardening, secrets, agreement, image)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_infra_keeps_its_rules(infra: Infra, law: Callable[[Infra], Iterator[str]]) -> None:
    assert list(law(infra)) == []


def _put(path: str, value: object) -> Callable[[Infra], None]:
    """Return a defect: set what stands at a dotted path below an attribute of ``Infra``; None removes it."""

    def plant(infra: Infra) -> None:
        first, *way, last = path.split("/")
        place = infra.one(first) if first[0].isupper() else getattr(infra, first)
        for step in way:
            place = place[int(step) if isinstance(place, list) else step]
        if value is None:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return plant


def _replace(attribute: str, old: str, new: str) -> Callable[[Infra], None]:
    def plant(infra: Infra) -> None:
        text = getattr(infra, attribute)
        assert old in text
        setattr(infra, attribute, text.replace(old, new))

    return plant


DEFECTS = {
    "load balancer": (exposure, _put("Service/spec/type", "LoadBalancer")),
    "node port": (exposure, _put("Service/spec/ports/0/nodePort", 30500)),
    "host network": (exposure, _put("pod/hostNetwork", True)),
    "open policy": (exposure, _put("NetworkPolicy/spec/ingress/0/from", [])),
    "policy for another pod": (exposure, _put("NetworkPolicy/spec/podSelector/matchLabels/app", "x")),
    "the whole internet": (
        exposure,
        _put("NetworkPolicy/spec/ingress/0/from/0", {"ipBlock": {"cidr": "0.0.0.0/0"}}),
    ),
    "any host": (exposure, _put("container/args/5", "--allowed-hosts=*")),
    "wrong label": (wiring, _put("Service/spec/selector", {"app": "mlflow"})),
    "other namespace": (wiring, _put("Service/metadata/namespace", "default")),
    "other port": (wiring, _put("container/ports/0/containerPort", 8080)),
    "no readiness": (wiring, _put("container/readinessProbe", None)),
    "probe of another page": (wiring, _put("container/livenessProbe/httpGet/path", "/")),
    "database off the volume": (wiring, _put("container/volumeMounts/0/mountPath", "/elsewhere")),
    "two replicas": (wiring, _put("Deployment/spec/replicas", 2)),
    "root": (hardening, _put("pod/securityContext/runAsUser", 0)),
    "no memory limit": (hardening, _put("container/resources/limits/memory", None)),
    "request above limit": (hardening, _put("container/resources/requests/memory", "3Gi")),
    "moving tag": (hardening, _put("container/image", "registry.example.org/sidflow:latest")),
    "capabilities": (hardening, _put("container/securityContext/capabilities", None)),
    "literal secret": (secrets, _put("container/env/0", {"name": "DB_PASSWORD", "value": "x"})),
    "password in a URL": (secrets, _put("container/args/3", "--backend-store-uri=postgresql://u:p@db/m")),
    "token in the values": (
        secrets,
        _put("flyte/plugins/k8s/default-env-vars/0", {"MLFLOW_TRACKING_TOKEN": "x"}),
    ),
    "token in the image": (secrets, _replace("dockerfile", "ARG FAISS", "ARG INDEX_TOKEN=x\nARG FAISS")),
    "other service name": (agreement, _put("Service/metadata/name", "tracking")),
    "host not allowed": (agreement, _put("container/args/5", "--allowed-hosts=localhost:5000")),
    "too small a limit": (agreement, _put("flyte/task_resources/limits/memory", "8Gi")),
    "no toleration": (agreement, _put("flyte/plugins/k8s/resource-tolerations", [])),
    "other project": (agreement, _put("values/flyte-core-components/admin/seedProjects", ["flytesnacks"])),
    "image as root": (image, _replace("dockerfile", "USER 10001:10001", "USER root")),
    "image from latest": (image, _replace("dockerfile", "python:3.11-slim-bookworm", "python:latest")),
    "tests in the image": (image, _replace("dockerfile", "COPY tasks tasks", "COPY tasks tests ./")),
    "unpinned install": (image, _replace("dockerfile", "--constraint constraints.txt", "")),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_one_planted_defect_is_found(infra: Infra, name: str) -> None:
    law, plant = DEFECTS[name]
    plant(infra)
    assert list(law(infra))


def test_the_pinned_mlflow_has_the_options_of_the_manifest(infra: Infra) -> None:
    from mlflow.cli import server

    known = {name.lstrip("-") for option in server.params for name in option.opts}
    assert infra.container["command"] == ["mlflow", "server"]
    assert infra.options.keys() <= known
