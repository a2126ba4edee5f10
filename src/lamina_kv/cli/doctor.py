"""``lamina-kv doctor``: what will not work here, what to do about it, and what a server will do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lamina_kv.cli import checks, device_checks, server_checks, shared_tiers, transfer_checks
from lamina_kv.cli.checks import Finding, Verdict
from lamina_kv.cli.plain_words import plain_words
from lamina_kv.cli.transfer_checks import Given
from lamina_kv.config import CONFIG_VARIABLE, Config, ConfigError, load_config
from lamina_kv.engines.vllm.concerns import PRODUCER
from lamina_kv.tiers.config import SharedConfig
from lamina_kv.tiers.disk.config import DiskConfig

_STYLES = {Verdict.GOOD: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "bold red"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be looked at.

    Attributes:
        path: a directory that is to hold a disk store; by default the configured ones.
        config_file: a configuration file; by default the one that ``LAMINA_CONFIG`` names.
        kv_transfer_config: what vLLM is given, as JSON.
        speed: whether shared stores are written to, to see how fast they are.
        url: a server that runs, to be looked at in place of this machine.
    """

    path: Path | None = None
    config_file: Path | None = None
    kv_transfer_config: str | None = None
    speed: bool = False
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found.

    Attributes:
        findings: every check, in the order in which the answers matter.
        will: what a server will do with the configuration, in sentences; none if it will not start,
            or if none was given.
    """

    findings: tuple[Finding, ...]
    will: tuple[str, ...]

    def count(self, verdict: Verdict) -> int:
        """How many checks ended like that."""
        return sum(finding.verdict is verdict for finding in self.findings)

    def as_json(self) -> str:
        """All of it, for a program."""
        document = {
            "failed": self.count(Verdict.FAILED),
            "warnings": self.count(Verdict.WARNING),
            "findings": [
                {
                    "check": finding.subject,
                    "verdict": finding.verdict.value,
                    "found": finding.found,
                    "advice": finding.advice,
                }
                for finding in self.findings
            ],
            "will": list(self.will),
        }
        return json.dumps(document, indent=2)


def run(asked: Asked, *, as_json: bool = False) -> int:
    """Check, print, and answer the exit code: 1 if something will not work.

    Args:
        asked: what is to be looked at.
        as_json: print one JSON object, for programs.
    """
    console = Console()
    if as_json:
        diagnosis = diagnose(asked)
        console.out(diagnosis.as_json(), highlight=False)
    else:
        with console.status(f"looking at {asked.url or 'this machine'} ..."):
            diagnosis = diagnose(asked)
        _show(console, diagnosis.findings)
        if diagnosis.will:
            console.print("\nWhat a server will do with this configuration:", style="bold")
            for sentence in diagnosis.will:
                console.out(f"- {sentence}", highlight=False)
            console.print()
        failed, warnings = (diagnosis.count(v) for v in (Verdict.FAILED, Verdict.WARNING))
        console.print(f"{failed} failed, {warnings} warning{'' if warnings == 1 else 's'}")
    return 1 if diagnosis.count(Verdict.FAILED) else 0


def diagnose(asked: Asked) -> Diagnosis:
    """Look at everything, or at a server alone."""
    if asked.url is not None:
        return Diagnosis(tuple(server_checks.server(asked.url)), ())
    text = asked.kv_transfer_config
    given = Given() if text is None else transfer_checks.read(text)
    environ = dict(os.environ)
    if asked.config_file is not None:
        environ[CONFIG_VARIABLE] = str(asked.config_file)
    config, wrong = Config(), False
    try:
        config = load_config(given.extra, environ)
    except ConfigError as error:
        wrong = True
        about = [
            Finding("configuration", Verdict.FAILED, line, f"see lamina-kv config{_section(line)}")
            for line in error.problems
        ]
    else:
        source = environ.get(CONFIG_VARIABLE) or ("as given" if given.extra else "the defaults")
        about = [Finding("configuration", Verdict.GOOD, source)]
    findings = [*checks.software(), *device_checks.device(), *given.findings, *about]
    findings += _machine(asked, config, given)
    wrong |= any(finding.verdict is Verdict.FAILED for finding in given.findings)
    will: tuple[str, ...] = ()
    if not wrong and (text is not None or environ.get(CONFIG_VARIABLE)):
        will = tuple(plain_words(config, given.role, given.policy, given.beside))
    return Diagnosis(tuple(findings), will)


def _section(problem: str) -> str:
    """The section that a problem is in, behind a space; empty if it is in none."""
    name = re.split(r"[.\[:]", problem, maxsplit=1)[0]
    return f" {name}" if name in Config.model_fields else ""


def _machine(asked: Asked, config: Config, given: Given) -> Iterator[Finding]:
    """Whether what a configuration wants can be had here."""
    yield checks.host_memory(config)
    yield device_checks.huge_pages()
    yield device_checks.nodes()
    yield from checks.limits()
    disks = [tier for tier in config.tiers if isinstance(tier, DiskConfig)]
    if asked.path is not None:
        if not asked.path.is_absolute():
            yield Finding(
                "--path",
                Verdict.WARNING,
                f"{asked.path} is relative",
                f"the configuration wants an absolute path: {asked.path.absolute()}",
            )
        yield from checks.disk(asked.path.absolute(), disks[0] if disks else None)
    else:
        for disk in disks:
            yield from checks.disk(disk.path, disk)
    for tier in config.tiers:
        if isinstance(tier, SharedConfig):
            yield shared_tiers.shared_tier(tier, speed=asked.speed)
    if config.push is not None:
        yield from checks.push(config.push, prefills_only=given.role == PRODUCER)
    yield from checks.observed(config.observe)


def _show(console: Console, findings: tuple[Finding, ...]) -> None:
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
