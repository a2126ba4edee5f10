"""Guards `lamina-kv doctor`: what will not work is a failure with exit code 1 and words on what to
do, what merely may hurt is a warning, and no input makes it stumble."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lamina_kv.bench.ports import free_port
from lamina_kv.cli import checks, device_checks
from lamina_kv.cli.checks import Finding, Verdict
from lamina_kv.cli.doctor import Asked, diagnose
from lamina_kv.cli.main import app
from lamina_kv.cli.transfer_checks import transfer_config
from lamina_kv.config import CONFIG_VARIABLE, Config, load_config
from lamina_kv.data import numa
from lamina_kv.data.movers import driver
from lamina_kv.engines.vllm.concerns import concerns
from lamina_kv.tiers.audit import Part
from lamina_kv.tiers.contract import Fate
from lamina_kv.tiers.directory.store import DirectoryStore
from lamina_kv.tiers.disk import directory, file_system
from lamina_kv.tiers.disk.audit import DiskAudit
from lamina_kv.tiers.disk.config import DiskConfig

RIGHT: dict[str, object] = {
    "kv_connector": "LaminaConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"host": {"capacity": "64MiB"}},
}
USUAL = ("kv_both", "recompute")


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the import of torch."""
    monkeypatch.setattr(checks, "software", lambda: iter(()))
    monkeypatch.setattr(device_checks, "device", lambda: iter(()))


def examine(path: Path | None, config: Path | None, transfer: str | None) -> tuple[Finding, ...]:
    return diagnose(Asked(path, config, transfer)).findings


def subjects(findings: Iterable[Finding], verdict: Verdict) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings if finding.verdict is verdict}


def failed(
    path: Path | None = None, config: Path | None = None, transfer: object = None
) -> dict[str, Finding]:
    text = transfer if isinstance(transfer, str) or transfer is None else json.dumps(transfer)
    return subjects([*examine(path, config, text)], Verdict.FAILED)


def test_a_right_configuration_on_this_machine_fails_nothing(quick: None, tmp_path: Path) -> None:
    assert failed(path=tmp_path, transfer=RIGHT) == {}


@pytest.mark.parametrize(
    ("body", "verdicts"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", [Verdict.FAILED]),
        ("", []),
        (None, []),
    ],
)
def test_a_torchvision_for_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str | None, verdicts: list[Verdict]
) -> None:
    """It keeps vLLM from starting, with a traceback that names neither package nor remedy."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    if body is not None:
        (tmp_path / "torchvision.py").write_text(body)
    findings = [*device_checks.torchvision()]
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert [finding.verdict for finding in findings] == verdicts
    assert all("nms" in each.found and "pip uninstall" in each.advice for each in findings)


def test_exit_code_and_advice_of_a_failure(quick: None) -> None:
    result = CliRunner().invoke(app, ["doctor", "--kv-transfer-config", "{}"])
    assert result.exit_code == 1
    assert 'must be "LaminaConnector"' in result.output
    assert "2 failed" in result.output


def test_exit_code_without_a_failure(quick: None) -> None:
    result = CliRunner().invoke(app, ["doctor", "--kv-transfer-config", json.dumps(RIGHT)])
    assert result.exit_code == 0
    assert "0 failed" in result.output


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "{'kv_connector': 'x'}", "\0"])
def test_transfer_config_that_is_no_json_object(quick: None, text: str) -> None:
    finding = failed(transfer=text)["--kv-transfer-config"]
    assert finding.advice


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv_connector", "OffloadingConnector"),
        ("kv_connector", None),
        ("kv_connector", ["LaminaConnector"]),
        ("kv_connector_module_path", "lamina_kv.engines"),
        ("kv_role", "both"),
        ("kv_role", None),
        ("kv_load_failure_policy", "retry"),
        ("kv_load_failure_policy", {}),
        ("kv_connector_extra_config", []),
        ("kv_connector_extra_config", None),
    ],
)
def test_a_wrong_key_is_named_with_what_is_right(quick: None, key: str, value: object) -> None:
    finding = failed(transfer={**RIGHT, key: value})[key]
    assert finding.advice.startswith("must be ")


@pytest.mark.parametrize("policy", [{}, {"kv_load_failure_policy": "fail"}])
def test_failing_requests_is_a_warning(policy: dict[str, object]) -> None:
    document = {name: RIGHT[name] for name in ("kv_connector", "kv_role")} | policy
    warnings = subjects([*transfer_config(document)], Verdict.WARNING)
    assert "recompute" in warnings["kv_load_failure_policy"].advice


def test_the_connector_may_be_named_with_its_module() -> None:
    document = {**RIGHT, "kv_connector_module_path": "lamina_kv.engines.vllm"}
    assert subjects([*transfer_config(document)], Verdict.FAILED) == {}


def test_every_mistake_in_the_extra_config_is_told(quick: None) -> None:
    wrong = {"host": {"capacity": "lots"}, "dsk": {}}
    findings = [*examine(None, None, json.dumps({**RIGHT, "kv_connector_extra_config": wrong}))]
    told = [f.found for f in findings if f.subject == "configuration"]
    assert len(told) == 2
    assert any("host.capacity" in line for line in told)
    assert any("dsk" in line for line in told)


@pytest.mark.parametrize("content", ["load: {load_ahead: 0}", "- a list", "load: [", "\x00", None])
def test_a_wrong_configuration_file(quick: None, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "lamina.yaml"
    if content is not None:
        file.write_text(content)
    assert "configuration" in failed(config=file)


def test_the_configuration_file_is_named_and_used(quick: None, tmp_path: Path) -> None:
    file = tmp_path / "lamina.yaml"
    store = tmp_path / "store"
    file.write_text(
        f"tiers: [{{kind: disk, path: {store}, capacity: 1TiB}}]\nhost: {{capacity: 900TiB}}\n"
    )
    findings = [*examine(None, file, None)]
    assert str(file) in subjects(findings, Verdict.GOOD)["configuration"].found
    failed = subjects(findings, Verdict.FAILED)
    assert set(failed) == {"memory", "disk space"}
    assert "tiers.disk.capacity" in failed["disk space"].advice


def test_every_disk_of_the_configuration_is_looked_at(quick: None, tmp_path: Path) -> None:
    file = tmp_path / "lamina.yaml"
    file.write_text(
        f"tiers: [{{kind: disk, path: {tmp_path}, capacity: 1MiB}},"
        f" {{kind: disk, name: spare, path: {tmp_path}/spare, capacity: 9000TiB}}]\n"
    )
    findings = [finding for finding in examine(None, file, None) if finding.subject == "disk space"]
    assert [finding.verdict for finding in findings] == [Verdict.GOOD, Verdict.FAILED]
    assert "tiers.spare.capacity" in findings[1].advice


def test_a_shared_tier_is_asked(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "lamina.yaml"
    share = tmp_path / "share"
    tiers = [{"kind": "directory", "path": str(share)}]
    tiers.append({"kind": "directory", "name": "gone", "path": str(tmp_path / "mnt" / "share")})
    config.write_text(json.dumps({"tiers": tiers}))

    def found() -> dict[str, Finding]:
        return {finding.subject: finding for finding in examine(None, config, None)}

    assert found()["tier directory"].verdict is not Verdict.FAILED  # perhaps it is the own disk
    assert found()["tier directory"].found.startswith("directory, answers in ")
    assert [file.name for file in share.iterdir()] == ["lamina-directory.json"]
    assert found()["tier gone"].verdict is Verdict.FAILED
    assert "tiers.gone.path" in found()["tier gone"].found
    monkeypatch.setattr(DirectoryStore, "find", lambda *_: None)
    assert found()["tier directory"].verdict is Verdict.WARNING
    assert "no answer in 2 s" in found()["tier directory"].found


def test_a_shared_tier_is_written_to_if_somebody_wants_to_know_how_fast_it_is(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "lamina.yaml"
    config.write_text(json.dumps({"tiers": [{"kind": "directory", "path": str(tmp_path / "s")}]}))

    def found() -> str:
        findings = diagnose(Asked(config_file=config, speed=True)).findings
        return next(f.found for f in findings if f.subject == "tier directory")

    assert re.search(r"16 MiB were written at \S+ .iB/s and were read at \S+ .iB/s", found())
    monkeypatch.setattr(DirectoryStore, "read", lambda *_: [Fate.DOWN])
    assert "could not be read (down)" in found()


@pytest.mark.parametrize("name", ["trace", "timeline"])
def test_what_lamina_writes_about_itself(quick: None, tmp_path: Path, name: str) -> None:
    def told(path: Path) -> Finding:
        extra = {"observe": {name: str(path)}}
        findings = examine(None, None, json.dumps({**RIGHT, "kv_connector_extra_config": extra}))
        return next(finding for finding in findings if finding.subject == f"observe.{name}")

    assert told(tmp_path / "t.json").verdict is Verdict.GOOD
    for wrong in (tmp_path / "gone" / "t.json", tmp_path, Path("/proc/t.json")):
        finding = told(wrong)
        assert finding.verdict is Verdict.WARNING
        assert str(wrong) in finding.found
    assert [*tmp_path.iterdir()] == []


def test_how_much_memory_may_be_locked() -> None:
    assert checks.locked_memory(-1).found == "unlimited"
    finding = checks.locked_memory(8 << 20)
    assert "8 MiB" in finding.found
    assert "memlock" in finding.advice


@pytest.mark.parametrize(("count", "advises"), [(1, False), (2, True)])
def test_nodes_of_memory(tmp_path: Path, count: int, advises: bool) -> None:
    for node in range(count):
        (tmp_path / f"node{node}").mkdir()
    finding = device_checks.nodes(tmp_path)
    assert finding.verdict is Verdict.GOOD
    assert bool(finding.advice) is advises


def test_memory_that_is_there_but_taken_is_a_warning() -> None:
    capacity = Config().host.capacity_bytes(ranks=1)
    assert checks.host_memory(Config(), available=capacity).verdict is Verdict.GOOD
    assert checks.host_memory(Config(), available=capacity - 1).verdict is Verdict.WARNING


@pytest.mark.parametrize("deleted", [False, True])
def test_what_is_gone_does_not_hide_that_the_disk_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    place = tmp_path / "store" / "old"
    place.mkdir(parents=True)
    (place / "dangling").symlink_to("nowhere")
    if deleted:
        listed = [*os.walk(place.parent)]
        shutil.rmtree(place)
        monkeypatch.setattr(os, "walk", lambda top: listed)  # it was there when it was listed
    settings = DiskConfig(path=place.parent, capacity=1 << 60)
    failed = subjects([*checks.disk(place.parent, settings)], Verdict.FAILED)
    assert "room for" in failed["disk space"].found
    assert "room for" in settings.impossible()


@pytest.mark.parametrize(
    ("make", "subject"),
    [(Path.touch, "disk store"), (lambda path: path.symlink_to("nowhere"), None)],
)
def test_a_path_that_is_no_directory(
    tmp_path: Path, make: Callable[[Path], None], subject: str | None
) -> None:
    path = tmp_path / "store"
    make(path)
    found = subjects([*checks.disk(path, None)], Verdict.FAILED)
    assert set(found) == ({subject} if subject else set())


def test_a_directory_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    found = subjects([*checks.disk(tmp_path / "store", None)], Verdict.FAILED)
    assert str(tmp_path) in found["disk store"].found


def test_a_store_that_exists_counts_as_room_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slab").write_bytes(os.urandom(64 << 20))
    stat = os.statvfs(tmp_path)  # asked once: others write to the same disk
    monkeypatch.setattr(os, "statvfs", lambda path: stat)
    free = stat.f_bavail * stat.f_frsize
    for more, enough in ((63 << 20, True), (65 << 20, False)):
        settings = DiskConfig(path=tmp_path, capacity=free + more)
        failed = subjects([*checks.disk(tmp_path, settings)], Verdict.FAILED)
        assert ("disk space" not in failed) is enough


def test_a_network_file_system_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "file system" not in subjects([*checks.disk(tmp_path / "store", None)], Verdict.WARNING)
    monkeypatch.setattr(file_system, "_type", lambda directory: 0x6969)
    found = subjects([*checks.disk(tmp_path / "store", None)], Verdict.WARNING)["file system"]
    assert "NFS" in found.found
    assert "tier's path" in found.advice


@pytest.mark.parametrize(("direct", "verdict"), [("auto", Verdict.WARNING), (True, Verdict.FAILED)])
def test_no_direct_io(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    direct: bool | str,
    verdict: Verdict,
) -> None:
    def refuse(directory: Path) -> tuple[float, float]:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(checks, "_write_and_read_direct", refuse)
    settings = DiskConfig.model_validate({"path": tmp_path, "capacity": 4096, "direct": direct})
    found = subjects([*checks.disk(tmp_path, settings)], verdict)
    assert "Invalid argument" in found["direct I/O"].found


def test_direct_io_says_how_fast_it_is_and_leaves_no_file_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "SAMPLE", 8 << 20)
    good = subjects([*checks.disk(tmp_path, None)], Verdict.GOOD)
    assert re.search(r"8 MiB were written at \S+ .iB/s and read at ", good["direct I/O"].found)
    assert [*tmp_path.iterdir()] == []


def test_a_place_where_no_file_can_be_made(quick: None) -> None:
    """Root may write to it, says the system, and cannot."""
    assert "/proc" in failed(path=Path("/proc/lamina"))["disk store"].found


def test_a_relative_path_is_not_what_the_configuration_wants(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finding = subjects(examine(Path("store"), None, None), Verdict.WARNING)["--path"]
    assert str(tmp_path / "store") in finding.advice


def test_a_store_that_is_there_and_who_uses_it(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.prepare(tmp_path)
    assert "disk store" not in {finding.subject for finding in checks.disk(tmp_path, None)}
    part = Part("ab" * 16, {}, 0, 20, 0, 20 << 20)
    monkeypatch.setattr(DiskAudit, "parts", lambda self: [part])
    there = subjects([*checks.disk(tmp_path, None)], Verdict.GOOD)["disk store"]
    assert "holds 20 chunks, 20 MiB" in there.found
    monkeypatch.setattr(DiskAudit, "parts", lambda self: [replace(part, user="pid 7")])
    used = subjects([*checks.disk(tmp_path, None)], Verdict.WARNING)["disk store"]
    assert "in use by pid 7" in used.found
    (tmp_path / "lamina-store.json").write_text('{"format": "lamina disk store", "version": 99}')
    assert "99" in subjects([*checks.disk(tmp_path, None)], Verdict.FAILED)["disk store"].found


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    assert checks.shared_memory(tmp_path / "shm").verdict is Verdict.FAILED


def test_shared_memory_that_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MIN_SHARED_MEMORY", 1 << 62)
    assert checks.shared_memory(tmp_path).verdict is Verdict.WARNING


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0", "1.32.0", "0.3.2"])
def test_another_vllm_fails(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert checks.vllm_version("vllm").verdict is Verdict.FAILED


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7+cpu", "0.32.1.post1", "0.33.0"])
def test_the_supported_vllm(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert checks.vllm_version("vllm").verdict is Verdict.GOOD


def test_no_vllm_fails_and_says_how_to_install_it() -> None:
    finding = checks.vllm_version(None)
    assert finding.verdict is Verdict.FAILED
    assert "pip install" in finding.advice


@pytest.mark.parametrize(
    ("registered", "allowed", "verdict"),
    [
        (True, None, Verdict.GOOD),
        (True, "lora,lamina", Verdict.GOOD),
        (True, "lora", Verdict.FAILED),
        (True, "", Verdict.FAILED),
        (False, None, Verdict.WARNING),
    ],
)
def test_the_plugin(
    monkeypatch: pytest.MonkeyPatch, registered: bool, allowed: str | None, verdict: Verdict
) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **match: ["lamina"] * registered)
    finding = checks.plugin(allowed)
    assert finding.verdict is verdict
    assert bool(finding.advice) is (verdict is not Verdict.GOOD)


# -- pushes ------------------------------------------------------------------------------------


def pushing(**push: object) -> dict[str, object]:
    """What vLLM is given by an engine that takes part in pushes."""
    return {**RIGHT, "kv_connector_extra_config": {"push": push}}


@pytest.fixture
def with_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library, which takes seconds to load."""
    monkeypatch.setattr(checks, "nixl", lambda: Finding("NIXL", Verdict.GOOD, "1.5"))


def told(verdict: Verdict, document: object) -> dict[str, Finding]:
    return subjects([*examine(None, None, json.dumps(document))], verdict)


def test_without_a_push_section_nothing_is_said_of_pushes(quick: None) -> None:
    findings = [*examine(None, None, json.dumps(RIGHT))]
    assert not {"NIXL", "push.listen", "push.token"} & {f.subject for f in findings}


@pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost"])
def test_pushes_that_work(quick: None, with_nixl: None, host: str | None) -> None:
    document = pushing(listen=host and f"{host}:{free_port()}", token="secret")
    good = told(Verdict.GOOD, document)
    assert {"NIXL", "push.listen"} <= good.keys()
    assert not told(Verdict.WARNING, document)
    assert not told(Verdict.FAILED, document)


def test_a_file_may_have_the_push_section(quick: None, with_nixl: None, tmp_path: Path) -> None:
    file = tmp_path / "lamina.yaml"
    file.write_text(f"push: {{listen: '127.0.0.1:{free_port()}'}}\n")
    assert "push.listen" in subjects([*examine(None, file, None)], Verdict.GOOD)


def test_pushes_without_nixl(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    finding = told(Verdict.FAILED, pushing())["NIXL"]
    assert "lamina-kv[push]" in finding.advice


def test_nixl_as_it_is_installed(quick: None) -> None:
    pytest.importorskip("nixl")
    assert told(Verdict.GOOD, pushing())["NIXL"].found[0].isdigit()


@pytest.mark.parametrize("listen", ["192.0.2.1:9300", "nobody.invalid:9300"])
def test_an_address_of_another_machine(quick: None, with_nixl: None, listen: str) -> None:
    assert listen in told(Verdict.FAILED, pushing(listen=listen))["push.listen"].found


def test_an_address_where_somebody_listens(quick: None, with_nixl: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = f"127.0.0.1:{server.getsockname()[1]}"
        assert listen in told(Verdict.WARNING, pushing(listen=listen))["push.listen"].found


LOOPBACK = ["127.0.0.1", "[::1]", "localhost:9300"]


@pytest.mark.parametrize(
    ("host", "token", "peers", "warned"),
    [
        ("0.0.0.0", None, LOOPBACK, True),
        ("[::]", None, LOOPBACK, True),
        ("host.invalid", None, LOOPBACK, True),
        ("0.0.0.0", "secret", [], False),
        ("127.0.0.1", None, LOOPBACK, False),
        ("[::1]", None, LOOPBACK, False),
        ("localhost", None, LOOPBACK, False),
        (None, None, LOOPBACK, False),
        (None, None, [*LOOPBACK, "10.0.0.1"], True),
        (None, None, ["prefill.local:9300"], True),
        ("127.0.0.1", None, [], True),
        (None, None, [], True),
        (None, "secret", [], False),
    ],
)
def test_an_engine_that_asks_nobody_for_a_secret(
    quick: None,
    with_nixl: None,
    host: str | None,
    token: str | None,
    peers: list[str],
    warned: bool,
) -> None:
    """Strangers may reach its listener, or listen where a request says."""
    push = {"listen": host and f"{host}:{free_port()}", "token": token, "peers": peers}
    found = told(Verdict.WARNING, pushing(**push))
    assert ("push.token" in found) is warned
    said = [*concerns(load_config({"push": push}, {}), *USUAL)]
    assert [concern.subject for concern in said] == ["push.token"] * warned


@pytest.mark.parametrize(("role", "lost"), [("kv_producer", "loaded"), ("kv_consumer", "saved")])
def test_a_role_that_switches_tiers_off(quick: None, role: str, lost: str) -> None:
    finding = told(Verdict.WARNING, {**RIGHT, "kv_role": role})["kv_role"]
    assert f"never {lost}" in finding.found
    assert "kv_both" in finding.advice
    (concern,) = concerns(load_config({}, {}), role, "recompute")
    assert (concern.found, concern.advice) == (finding.found, finding.advice)


def test_a_policy_that_fails_requests_whose_push_fails() -> None:
    pushes = load_config({"push": {"token": "secret"}}, {})
    (concern,) = concerns(pushes, "kv_both", "fail")
    assert "ends with an error" in str(concern)
    assert '"kv_load_failure_policy": "recompute"' in str(concern)
    assert not [*concerns(load_config({}, {}), "kv_both", "fail")]
    assert not [*concerns(pushes, *USUAL)]


def test_a_prefill_engine_that_listens_nowhere(quick: None, with_nixl: None) -> None:
    document = {**pushing(token="secret"), "kv_role": "kv_producer"}
    assert "no decode engine can reach" in told(Verdict.WARNING, document)["push.listen"].found
    assert "push.listen" in told(Verdict.GOOD, pushing(token="secret"))


def test_prefill_engines_that_requests_may_name_are_called(quick: None, with_nixl: None) -> None:
    away = f"127.0.0.1:{free_port()}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"127.0.0.1:{server.getsockname()[1]}"
        document = pushing(token="secret", peers=[here, away, "prefill.local"])
        findings = [
            f for f in examine(None, None, json.dumps(document)) if f.subject == "push.peers"
        ]
    assert [finding.found.split()[0].rstrip(",") for finding in findings] == [
        here,
        away,
        "prefill.local",
    ]
    assert [finding.verdict for finding in findings] == [
        Verdict.GOOD,
        Verdict.WARNING,
        Verdict.GOOD,
    ]
    assert "cannot be reached" in findings[1].found


# -- several connectors --------------------------------------------------------------------------


def multi(*inner: object, **outer: object) -> dict[str, object]:
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": list(inner)},
        **outer,
    }


NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}


def test_a_multi_connector_is_looked_into(quick: None) -> None:
    assert not told(Verdict.FAILED, multi(NIXL, RIGHT))
    wrong = {**RIGHT, "kv_connector_extra_config": {"host": {"capacity": "4GB"}}, "kv_role": "x"}
    failed = told(Verdict.FAILED, multi(wrong, NIXL))
    assert set(failed) == {"configuration", "kv_role"}
    assert "host.capacity" in failed["configuration"].found


def test_the_policy_of_a_multi_connector_counts_too(quick: None) -> None:
    warned = told(Verdict.WARNING, multi(NIXL, RIGHT, kv_load_failure_policy="fail"))
    assert set(warned) == {"MultiConnector's kv_load_failure_policy"}


@pytest.mark.parametrize(
    ("inner", "words"), [([], "nowhere"), ([NIXL], "nowhere"), ([RIGHT] * 2, "twice")]
)
def test_lamina_is_named_once_in_a_multi_connector(
    quick: None, inner: list[object], words: str
) -> None:
    assert words in told(Verdict.FAILED, multi(*inner))["kv_connector"].found


# -- what a server will do, and programs ---------------------------------------------------------


def words(extra: object, **given: object) -> str:
    document = {**RIGHT, "kv_connector_extra_config": extra, **given}
    return " ".join(diagnose(Asked(kv_transfer_config=json.dumps(document))).will)


def test_what_a_server_will_do(quick: None, tmp_path: Path) -> None:
    said = words(
        {
            "host": {"capacity": "64MiB"},
            "tiers": [
                {"kind": "disk", "path": str(tmp_path), "capacity": "1MiB"},
                {"kind": "directory", "name": "nfs", "path": str(tmp_path), "keep": "shared"},
            ],
            "observe": {"trace": str(tmp_path / "t.jsonl")},
        }
    )
    for part in (
        "takes 64 MiB of host memory on each rank",
        f"everything that is saved to tier disk, 1 MiB on each rank in {tmp_path}",
        "what a second request has used to tier nfs (directory). Other servers",
        "predicted to be faster than computing it",
        "computed instead, with the same answer",
        "CUDA graphs stay",
        f"observe.trace to {tmp_path}/t.jsonl",
    ):
        assert part in said
    assert "push" not in said


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"kv_role": "kv_producer"}, "loads nothing from its tiers"),
        ({"kv_role": "kv_consumer"}, "saves nothing"),
        ({"kv_load_failure_policy": "fail"}, "ends with an error"),
    ],
)
def test_what_a_server_will_not_do(quick: None, given: dict[str, object], part: str) -> None:
    assert part in words({}, **given)
    assert part not in words({})


def test_what_a_server_will_do_with_pushes(quick: None, with_nixl: None) -> None:
    listen = f"127.0.0.1:{free_port()}"
    assert f"listens at {listen}" in words({"push": {"listen": listen, "token": "SECRET"}})
    said = words({"push": {"token": "SECRET", "peers": ["10.0.0.1"]}})
    assert "can only receive" in said
    assert "only engines with the same token at 10.0.0.1" in said
    assert "SECRET" not in said


def test_nothing_is_foretold_of_a_server_that_will_not_start(quick: None) -> None:
    assert not words({"hots": {}})
    assert not words({}, kv_role="x")
    assert not diagnose(Asked()).will, "nothing was given"


def test_programs_get_one_json_object(quick: None) -> None:
    document = {**RIGHT, "kv_role": "kv_producer"}
    arguments = ["doctor", "--json", "--kv-transfer-config", json.dumps(document)]
    result = CliRunner().invoke(app, arguments)
    said = json.loads(result.output)
    assert (result.exit_code, said["failed"]) == (0, 0)
    (role,) = [finding for finding in said["findings"] if finding["check"] == "kv_role"]
    assert role["verdict"] == "warning"
    assert role["advice"]
    assert said["warnings"] == sum(each["verdict"] == "warning" for each in said["findings"])
    assert any("loads nothing" in sentence for sentence in said["will"])
    result = CliRunner().invoke(app, ["doctor", "--json", "--kv-transfer-config", "{}"])
    assert result.exit_code == 1
    assert json.loads(result.output)["will"] == []


# -- devices and host memory ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enabled", "shmem", "verdict", "advice"),
    [
        ("always [madvise] never", "always [advise] never", Verdict.GOOD, ""),
        ("[always] madvise never", "advise [never] deny", Verdict.GOOD, "MLA"),
        ("always madvise [never]", "advise [never] deny", Verdict.WARNING, "echo madvise"),
        (None, None, Verdict.WARNING, "echo madvise"),
    ],
)
def test_huge_pages_are_named_as_they_are(
    tmp_path: Path, enabled: str | None, shmem: str | None, verdict: Verdict, advice: str
) -> None:
    if enabled is not None and shmem is not None:
        (tmp_path / "enabled").write_text(enabled)
        (tmp_path / "shmem_enabled").write_text(shmem)
    finding = device_checks.huge_pages(tmp_path)
    assert finding.verdict is verdict
    assert advice in finding.advice
    assert bool(finding.advice) is bool(advice)


@pytest.mark.parametrize(
    ("refused", "reachable", "verdict", "said"),
    [
        (False, False, Verdict.GOOD, "comes from its node, 1"),
        (True, True, Verdict.GOOD, "touch it first"),
        (True, False, Verdict.WARNING, "between sockets"),
    ],
)
def test_memory_far_from_the_gpu_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, refused: bool, reachable: bool, verdict: Verdict, said: str
) -> None:
    def prefer(address: int, length: int, node: int) -> None:
        assert (length, node) == (mmap.PAGESIZE, 1)
        if refused:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(numa, "prefer", prefer)
    finding = device_checks.numa_node(0, 1, reachable)
    assert finding.verdict is verdict
    assert said in finding.found


class FakeDriver:
    """A driver that says what the test wants."""

    pci_address = "0000:00:00.0"
    shares_addresses = True
    engines: object | None = object()

    def __init__(self, ordinal: int) -> None:
        assert ordinal == 3

    def batched_copy(self) -> object | None:
        return self.engines


@pytest.mark.parametrize(
    ("shares", "engines", "verdict", "said"),
    [
        (True, True, Verdict.GOOD, "copy engines"),
        (True, False, Verdict.WARNING, "cuMemcpyBatchAsync"),
        (False, True, Verdict.FAILED, "WSL"),
    ],
)
def test_how_a_gpu_reaches_host_memory(
    monkeypatch: pytest.MonkeyPatch, shares: bool, engines: bool, verdict: Verdict, said: str
) -> None:
    monkeypatch.setattr(driver, "Driver", FakeDriver)
    monkeypatch.setattr(FakeDriver, "shares_addresses", shares)
    monkeypatch.setattr(FakeDriver, "engines", object() if engines else None)
    (finding,) = device_checks.bus(3)
    assert finding.verdict is verdict
    assert said in finding.found


@pytest.mark.parametrize("code", [0, 2])
def test_pinning_is_tried_as_lamina_does_it(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    import torch

    asked: list[str] = []

    def check(code: int) -> None:
        if code:
            raise RuntimeError("out of memory")

    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: asked.append("register") or code,
        cudaHostUnregister=lambda address: asked.append("unregister") or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    finding = device_checks.pinned_memory()
    assert finding.verdict is (Verdict.FAILED if code else Verdict.GOOD)
    assert asked == (["register"] if code else ["register", "unregister"])
