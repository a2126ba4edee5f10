"""Promise 7: a mistake in the configuration is an error at the start of the engine that names
the key and says what would be right. The engine exits; it does not hang and it does not serve.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.driver import SMALL, Ask, Engine, EngineSpec, EngineStartError, Fleet, Start
from engine.workload import CHUNK, prompt

pytestmark = pytest.mark.engine

CHUNK_BYTES = CHUNK * 4 * 2 * 2 * 32 * 4

LOADS_WEIGHTS = "Starting to load model"
"""What vLLM says right before it does."""


def refusal(fleet: Fleet, spec: EngineSpec) -> str:
    """The last line that the engine says before it exits."""
    with pytest.raises(EngineStartError) as error:
        Engine(spec, fleet.next_log())
    assert error.value.code == 1
    return str(error.value).strip().splitlines()[-1]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "x"])
def test_load_ahead(llama: Path, fleet: Fleet, value: object) -> None:
    said = refusal(fleet, EngineSpec(llama, {"load": {"load_ahead": value}}))
    assert "load.load_ahead: must be" in said
    assert "an integer of at least 1" in said
    assert json.dumps(value) in said.replace("True", "true").replace("'", '"')


@pytest.mark.parametrize(
    ("lamina", "words"),
    [
        ({"hots": {}}, ["hots: unknown key", "host"]),
        ({"load": {"ahead": 2}}, ["load.ahead: unknown key", "load.load_ahead"]),
        ({"load": {"mode": "fast"}}, ["load.mode: must be", '"layerwise"', "'fast'"]),
        ({"host": {"capacity": "4GB"}}, ["host.capacity: must be", "4GiB"]),
        ({"host": {"capacity": CHUNK_BYTES - 1}}, ["host.capacity:", "less than one chunk"]),
        ({"tiers": [{"kind": "disk", "path": "/tmp"}]}, ["tiers[0].capacity (disk): is required"]),
        (
            {"tiers": [{"kind": "disk", "path": "store", "capacity": 1}]},
            ["tiers[0].path (disk): must be an absolute path"],
        ),
        ({"disk": {"path": "/s", "capacity": 1}}, ["disk: is an entry of the list `tiers` now"]),
        ({"save": {"max_inflight": 1}}, ["save.max_inflight:", "less than one chunk"]),
    ],
)
def test_a_key_that_is_wrong(
    llama: Path, fleet: Fleet, lamina: Mapping[str, object], words: list[str]
) -> None:
    said = refusal(fleet, EngineSpec(llama, lamina))
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize("in_a_multi_connector", [False, True])
def test_a_mistake_is_found_before_the_weights_are_loaded(
    llama: Path, fleet: Fleet, in_a_multi_connector: bool
) -> None:
    """But for what depends on the model."""
    mistake, too_small = {"host": {"capacity": "4GB"}}, {"host": {"capacity": 1}}
    logs = []
    for lamina in (mistake, too_small):
        spec = EngineSpec(llama, lamina)
        if in_a_multi_connector:
            inner = spec.transfer_config()
            outer = {"kv_connector": "MultiConnector", "kv_connector_module_path": None}
            extra = {"kv_connector_extra_config": {"connectors": [inner]}}
            spec = EngineSpec(llama, lamina, transfer=outer | extra)
        with pytest.raises(EngineStartError, match=r"host\.capacity"):
            Engine(spec, log := fleet.next_log())
        logs.append(log.read_text())
    assert [LOADS_WEIGHTS in text for text in logs] == [False, True]


def test_a_key_that_is_given_twice(llama: Path, fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "lamina.yaml"
    file.write_text("host:\n  capacity: 1GiB\n")
    environment = {"LAMINA_CONFIG": str(file)}
    spec = EngineSpec(llama, {"host": {"capacity": "2GiB"}}, environment=environment)
    assert "host.capacity: given both" in refusal(fleet, spec)


def test_a_file_is_as_good(llama: Path, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "lamina.yaml"
    file.write_text("host:\n  capacity: 8MiB\n")
    engine = start(EngineSpec(llama, {}, environment={"LAMINA_CONFIG": str(file)}))
    engine.ask(Ask(prompt(1, CHUNK)))
    capacity = engine.metrics().total("lamina_tier_capacity_bytes", tier="host")
    assert 0.9 * (8 << 20) < capacity <= 8 << 20


class TestDisk:
    """Disk paths that cannot be used."""

    def lamina(self, path: Path, capacity: object = "8MiB") -> Mapping[str, object]:
        return {**SMALL, "tiers": [{"kind": "disk", "path": str(path), "capacity": capacity}]}

    def test_unwritable(self, llama: Path, fleet: Fleet) -> None:
        # Not even root can make a directory there.
        said = refusal(fleet, EngineSpec(llama, self.lamina(Path("/proc/lamina"))))
        assert "tiers.disk.path: cannot make a store in /proc/lamina" in said
        assert "choose a directory" in said

    def test_a_file(self, llama: Path, fleet: Fleet, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        assert "tiers.disk.path: " in refusal(fleet, EngineSpec(llama, self.lamina(file)))

    def test_too_small(self, llama: Path, fleet: Fleet, tmp_path: Path) -> None:
        said = refusal(fleet, EngineSpec(llama, self.lamina(tmp_path / "s", CHUNK_BYTES - 1)))
        assert "tiers.disk.capacity: " in said
        assert "less than one chunk" in said

    def test_too_large(self, llama: Path, fleet: Fleet, tmp_path: Path) -> None:
        said = refusal(fleet, EngineSpec(llama, self.lamina(tmp_path / "store", "1000TiB")))
        assert "tiers.disk.capacity: " in said
        assert "choose another path" in said

    def test_another_format_version(
        self, llama: Path, fleet: Fleet, start: Start, tmp_path: Path
    ) -> None:
        store = tmp_path / "store"
        start(EngineSpec(llama, self.lamina(store))).close()
        file = store / "lamina-store.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "version": 999}))
        content = sorted(os.walk(store))
        said = refusal(fleet, EngineSpec(llama, self.lamina(store)))
        assert "tiers.disk.path: " in said
        assert "format version 999" in said
        assert "lamina-kv clear" in said
        assert sorted(os.walk(store)) == content, "nothing is lost"

    def test_a_directory_of_somebody_else(self, llama: Path, fleet: Fleet, tmp_path: Path) -> None:
        (tmp_path / "lamina-store.json").write_text("[]")
        said = refusal(fleet, EngineSpec(llama, self.lamina(tmp_path)))
        assert "tiers.disk.path: " in said
        assert "not a Lamina store" in said

    def test_two_servers(self, llama: Path, fleet: Fleet, start: Start, tmp_path: Path) -> None:
        spec = EngineSpec(llama, self.lamina(tmp_path / "store"))
        ask = Ask(prompt(2, 2 * CHUNK + 1))
        first = start(spec)
        answer = first.ask(ask)
        said = refusal(fleet, spec)
        assert "tiers.disk.path: " in said
        assert f"in use by process {first.process.pid}" in said
        first.forget()
        again = first.ask(ask)
        assert (again.samples, again.cached) == (answer.samples, 2 * CHUNK), "it still serves"
        first.kill()
        assert start(spec).ask(ask).cached == 2 * CHUNK, "a dead server holds nothing"
