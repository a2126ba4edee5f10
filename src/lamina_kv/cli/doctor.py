"""``lamina-kv doctor``: what will not work here, and what to do about it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamina_kv.cli import checks, device_checks
from lamina_kv.cli.checks import Finding, Verdict
from lamina_kv.cli.configured import TRANSFER_CONFIG, extra_of, parse_transfer_config
from lamina_kv.cli.shared_tiers import shared_tier
from lamina_kv.config import CONFIG_VARIABLE, Config, ConfigError, load_config
from lamina_kv.engines.vllm.concerns import BOTH, CONSUMER, PRODUCER, RECOMPUTE, of_role
from lamina_kv.tiers.config import SharedConfig
from lamina_kv.tiers.disk.config import DiskConfig

_CONNECTOR = "LaminaConnector"
_MODULE = "lamina_kv.engines.vllm"
_ROLES = (BOTH, PRODUCER, CONSUMER)
_STYLES = {Verdict.GOOD: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "bold red"}


def run(path: Path | None, config_file: Path | None, kv_transfer_config: str | None) -> int:
    """Check, print, and answer the exit code: 1 if something will not work.

    Args:
        path: a directory that is to hold a disk store; by default the configured ones.
        config_file: a configuration file; by default the one that ``LAMINA_CONFIG`` names.
        kv_transfer_config: what vLLM is given, as JSON.
    """
    console = Console()
    with console.status("looking at this machine ..."):
        findings = [*examine(path, config_file, kv_transfer_config)]
    _show(console, findings)
    failed = sum(finding.verdict is Verdict.FAILED for finding in findings)
    warnings = sum(finding.verdict is Verdict.WARNING for finding in findings)
    console.print(f"{failed} failed, {warnings} to look at")
    return 1 if failed else 0


def examine(
    path: Path | None, config_file: Path | None, kv_transfer_config: str | None
) -> Iterator[Finding]:
    """Every check, in the order in which the answers matter. Arguments as for :func:`run`."""
    yield from checks.software()
    yield from device_checks.device()
    extra: Mapping[str, object] = {}
    if kv_transfer_config is not None:
        try:
            document = parse_transfer_config(kv_transfer_config)
        except ConfigError as error:
            found, _, advice = str(error).removeprefix(f"{TRANSFER_CONFIG}: ").rpartition("; ")
            yield Finding(TRANSFER_CONFIG, Verdict.FAILED, found, advice)
        else:
            yield from transfer_config(document)
            extra = extra_of(document)
    environ = dict(os.environ)
    if config_file is not None:
        environ[CONFIG_VARIABLE] = str(config_file)
    try:
        config = load_config(extra, environ)
    except ConfigError as error:
        for problem_line in error.problems:
            yield Finding("configuration", Verdict.FAILED, problem_line, "see lamina-kv config")
        config = Config()
    else:
        source = environ.get(CONFIG_VARIABLE) or ("as given" if extra else "the defaults")
        yield Finding("configuration", Verdict.GOOD, source)
    yield checks.host_memory(config)
    yield device_checks.huge_pages()
    yield from checks.limits()
    disks = [tier for tier in config.tiers if isinstance(tier, DiskConfig)]
    if path is not None:
        yield from checks.disk(path.absolute(), disks[0] if disks else None)
    else:
        for disk in disks:
            yield from checks.disk(disk.path, disk)
    for tier in config.tiers:
        if isinstance(tier, SharedConfig):
            yield shared_tier(tier)
    if config.push is not None:
        yield from checks.push(config.push)


def transfer_config(document: Mapping[str, object]) -> Iterator[Finding]:
    """The keys of vLLM's ``--kv-transfer-config`` that Lamina depends on."""
    connector, module = document.get("kv_connector"), document.get("kv_connector_module_path")
    if connector != _CONNECTOR:
        yield _wrong("kv_connector", connector, f'"{_CONNECTOR}"')
    elif module not in (None, _MODULE):
        yield _wrong("kv_connector_module_path", module, f'"{_MODULE}", or left out')
    else:
        yield Finding("kv_connector", Verdict.GOOD, _CONNECTOR)
    role = document.get("kv_role")
    if role not in _ROLES:
        yield _wrong("kv_role", role, "one of " + ", ".join(f'"{known}"' for known in _ROLES))
    elif (known := of_role(str(role))) is not None:
        yield Finding("kv_role", Verdict.WARNING, known.found, known.advice)
    else:
        yield Finding("kv_role", Verdict.GOOD, f"{role}")
    yield _failure_policy(document.get("kv_load_failure_policy"))
    given = document.get("kv_connector_extra_config", {})
    if not isinstance(given, dict):
        yield _wrong("kv_connector_extra_config", given, "an object with Lamina's keys")


def _failure_policy(policy: object) -> Finding:
    subject, right = "kv_load_failure_policy", f'"{RECOMPUTE}"'
    if policy == RECOMPUTE:
        return Finding(subject, Verdict.GOOD, RECOMPUTE)
    if policy in (None, "fail"):
        return Finding(
            subject,
            Verdict.WARNING,
            "fail" if policy else "not set: vLLM takes it for fail",
            f"set it to {right}, or every load or push that fails takes its request down",
        )
    return _wrong(subject, policy, right)


def _wrong(key: str, value: object, right: str) -> Finding:
    found = "not set" if value is None else json.dumps(value)
    return Finding(key, Verdict.FAILED, found, f"must be {right}")


def _show(console: Console, findings: list[Finding]) -> None:
    if not console.is_terminal:
        for finding in findings:
            advice = f" -> {finding.advice}" if finding.advice else ""
            console.out(
                f"{finding.verdict.value:8}{finding.subject}: {finding.found}{advice}",
                highlight=False,
            )
        return
    table = Table("", "check", "found", "what to do")
    for finding in findings:
        style = _STYLES[finding.verdict]
        table.add_row(
            f"[{style}]{finding.verdict.value}[/]",
            *(escape(text) for text in (finding.subject, finding.found, finding.advice)),
        )
    console.print(table)
