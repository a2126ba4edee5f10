"""What ``lamina-kv doctor`` finds in vLLM's ``--kv-transfer-config``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lamina_kv.cli.checks import Finding, Verdict
from lamina_kv.cli.configured import TRANSFER_CONFIG, extra_of, parse_transfer_config
from lamina_kv.config import ConfigError
from lamina_kv.engines.vllm.concerns import BOTH, CONSUMER, PRODUCER, RECOMPUTE, of_role

CONNECTOR, MULTI = "LaminaConnector", "MultiConnector"
MODULE = "lamina_kv.engines.vllm"
ROLES = (BOTH, PRODUCER, CONSUMER)
USUAL = {"kv_connector": CONNECTOR, "kv_role": BOTH, "kv_load_failure_policy": RECOMPUTE}
"""What is taken for granted where nothing is given."""


@dataclass(frozen=True, slots=True)
class Given:
    """What vLLM is given, as far as Lamina depends on it.

    Attributes:
        extra: Lamina's own keys.
        role: ``kv_role``.
        policy: ``kv_load_failure_policy``.
        beside: other connectors of a ``MultiConnector``.
        findings: what there is to say of it.
    """

    extra: Mapping[str, object] = field(default_factory=dict)
    role: str = BOTH
    policy: str = RECOMPUTE
    beside: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def read(text: str) -> Given:
    """Read what vLLM is given.

    Args:
        text: JSON, as on the command line.
    """
    try:
        document = parse_transfer_config(text)
    except ConfigError as error:
        reason, _, advice = str(error).removeprefix(f"{TRANSFER_CONFIG}: ").rpartition("; ")
        return Given(findings=(Finding(TRANSFER_CONFIG, Verdict.FAILED, reason, advice),))
    beside: tuple[str, ...] = ()
    findings: list[Finding] = []
    ours: Mapping[str, object] = document
    if document.get("kv_connector") == MULTI:
        found = _within(document)
        if isinstance(found, Finding):
            return Given(findings=(found,))
        ours, beside = found
        findings.append(Finding("kv_connector", Verdict.GOOD, f"{CONNECTOR} in a {MULTI}"))
        if (policy := document.get("kv_load_failure_policy")) != RECOMPUTE:
            finding = failure_policy(policy)
            findings.append(
                Finding(
                    f"{MULTI}'s {finding.subject}", finding.verdict, finding.found, finding.advice
                )
            )
    findings += transfer_config(ours)
    if beside:
        findings = [f for f in findings if (f.subject, f.found) != ("kv_connector", CONNECTOR)]
    return Given(
        extra_of(ours),
        str(ours.get("kv_role")),
        str(ours.get("kv_load_failure_policy") or "fail"),
        beside,
        tuple(findings),
    )


def _within(
    document: Mapping[str, object],
) -> tuple[Mapping[str, object], tuple[str, ...]] | Finding:
    """Lamina's own part of what a ``MultiConnector`` is given, and the names of its others; or why
    there is no one part."""
    inner = extra_of(document).get("connectors")
    each = [part for part in inner if isinstance(part, dict)] if isinstance(inner, list) else []
    ours = [part for part in each if part.get("kv_connector") == CONNECTOR]
    if len(ours) == 1:
        others = (str(part.get("kv_connector")) for part in each if part is not ours[0])
        return ours[0], tuple(others)
    found = f"a {MULTI} that names {CONNECTOR} {'twice' if ours else 'nowhere'}"
    return Finding(
        "kv_connector",
        Verdict.FAILED,
        found,
        f'name "{CONNECTOR}" once in kv_connector_extra_config.connectors, with all of its tiers',
    )


def transfer_config(document: Mapping[str, object]) -> Iterator[Finding]:
    """The keys that Lamina depends on."""
    connector, module = document.get("kv_connector"), document.get("kv_connector_module_path")
    if connector != CONNECTOR:
        yield _wrong("kv_connector", connector, f'"{CONNECTOR}"')
    elif module not in (None, MODULE):
        yield _wrong("kv_connector_module_path", module, f'"{MODULE}", or left out')
    else:
        yield Finding("kv_connector", Verdict.GOOD, CONNECTOR)
    role = document.get("kv_role")
    if role not in ROLES:
        yield _wrong("kv_role", role, "one of " + ", ".join(f'"{known}"' for known in ROLES))
    elif (known := of_role(str(role))) is not None:
        yield Finding("kv_role", Verdict.WARNING, known.found, known.advice)
    else:
        yield Finding("kv_role", Verdict.GOOD, f"{role}")
    yield failure_policy(document.get("kv_load_failure_policy"))
    given = document.get("kv_connector_extra_config", {})
    if not isinstance(given, dict):
        yield _wrong("kv_connector_extra_config", given, "an object with Lamina's keys")


def failure_policy(policy: object) -> Finding:
    """What becomes of requests whose load fails."""
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
