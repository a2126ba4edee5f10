"""What ``deploy/`` starts: manifests of Kubernetes, values for a Helm chart, a systemd unit."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from documented import ROOT, blocks, commands
from lamina_kv.config import Config, load_config

KUBERNETES = ROOT / "deploy/kubernetes"
MANIFESTS = ("one-server.yaml", "prefill-decode.yaml", "shared-store.yaml")
MONITOR = KUBERNETES / "pod-monitor.yaml"
"""Of the Prometheus Operator, of which no schema is here."""
VALUES = KUBERNETES / "production-stack-values.yaml"
COMPOSITION = ROOT / "deploy/docker/compose.yaml"
UNIT = ROOT / "deploy/systemd/lamina-vllm.service"
PAGE = "docs/deploying.md"

POD_IP = "10.1.2.3"
"""What Kubernetes puts in place of ``$(POD_IP)``."""

RANDOM = "ab" * 32
"""What ``openssl rand -hex 32`` prints."""


@dataclass(frozen=True)
class Started:
    """A server as a deployment starts it.

    Attributes:
        where: the file, and the name of what starts it.
        words: the arguments of ``vllm serve``.
        configuration: what is in the file that ``LAMINA_CONFIG`` names; None without one.
    """

    where: str
    words: list[str]
    configuration: str | None = None

    def config(self, folder: Path) -> Config:
        """What Lamina makes of it.

        Args:
            folder: for the file.
        """
        given = json.loads(self.words[self.words.index("--kv-transfer-config") + 1])
        environ = {}
        if self.configuration is not None:
            environ["LAMINA_CONFIG"] = str(folder / "lamina.yaml")
            (folder / "lamina.yaml").write_text(self.configuration)
        return load_config(given.get("kv_connector_extra_config"), environ)


@cache
def documents(name: str) -> list[dict[str, Any]]:
    """The objects of a manifest."""
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def workloads(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those objects of a manifest that have pods: names, and what their pods are."""
    for document in documents(name):
        if "template" in document.get("spec", {}):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def secrets() -> dict[str, dict[str, str]]:
    """The secrets that the page tells people to create, by name and key."""
    found = {}
    for name, *options in commands(PAGE, "kubectl create secret generic"):
        pairs = (option.removeprefix("--from-literal=").split("=", 1) for option in options)
        found[name] = {key: _as_the_shell_has_it(value) for key, value in pairs}
    return found


def _as_the_shell_has_it(value: str) -> str:
    return value.replace("$(openssl rand -hex 32)", RANDOM).replace("$PASSWORD", RANDOM)


def servers() -> Iterator[Started]:
    """Every server that ``deploy/`` starts."""
    for name in MANIFESTS:
        for workload, pod in workloads(name):
            (container,) = pod["containers"]
            if container["command"] != ["vllm", "serve"]:
                continue
            words = [word.replace("$(POD_IP)", POD_IP) for word in container["args"]]
            variables = {each["name"] for each in container.get("env", [])}
            configured = "LAMINA_CONFIG" in variables
            given = secrets()["lamina-push"]["lamina.yaml"] if configured else None
            yield Started(f"{name}: {workload}", words, given)
    for model in yaml.safe_load(VALUES.read_text())["servingEngineSpec"]["modelSpec"]:
        yield Started(VALUES.name, [model["modelURL"], *model["vllmConfig"]["extraArgs"]])
    composed = yaml.safe_load(COMPOSITION.read_text())["services"]["vllm"]
    yield Started(COMPOSITION.name, composed["command"])
    for words in commands(PAGE, "docker run"):
        image = next(index for index, word in enumerate(words) if word.startswith("lamina-vllm:"))
        yield Started(f"{PAGE}: docker run", words[image + 1 :])
    (configured,) = blocks(PAGE, "yaml")
    variables = dict(re.findall(r"^(\w+)=(.*)$", "".join(blocks(PAGE)), re.MULTILINE))
    command = unit()["ExecStart"][0].replace("${MODEL}", variables["MODEL"])
    words = shlex.split(command.replace("$OPTIONS", variables["OPTIONS"]))
    yield Started(UNIT.name, words[2:], configured)


def unit() -> dict[str, list[str]]:
    """The settings of the systemd unit, whatever their section."""
    settings: dict[str, list[str]] = {}
    for line in UNIT.read_text().replace("\\\n", " ").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings.setdefault(name, []).append(value)
    return settings
