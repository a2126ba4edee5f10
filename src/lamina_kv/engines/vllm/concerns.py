"""What an operator should know of a configuration that works, and may not do what it seems to say.

The connector logs each concern at its start, and ``lamina-kv doctor`` shows it. vLLM is not
imported here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from lamina_kv.config import Config, PushConfig
from lamina_kv.push.addresses import split_address

BOTH, PRODUCER, CONSUMER = "kv_both", "kv_producer", "kv_consumer"
"""vLLM's roles (``kv_role``)."""

RECOMPUTE = "recompute"
"""The ``kv_load_failure_policy`` under which a load that failed costs its request nothing else."""

_ONE_WAY = {
    PRODUCER: "prompts are saved to this engine's tiers, and never loaded from them",
    CONSUMER: "prompts are loaded from this engine's tiers, and never saved to them",
}


@dataclass(frozen=True, slots=True)
class Concern:
    """One thing to know.

    Attributes:
        subject: the key that it is about.
        found: what it says, and what that means for serving.
        advice: what to do.
    """

    subject: str
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.found}; {self.advice}"


def concerns(config: Config, role: str, policy: str) -> Iterator[Concern]:
    """Everything that there is to know.

    Args:
        config: Lamina's configuration.
        role: vLLM's ``kv_role``.
        policy: vLLM's ``kv_load_failure_policy``.
    """
    if (found := of_role(role)) is not None:
        yield found
    if config.push is not None:
        if policy != RECOMPUTE:
            yield Concern(
                "kv_load_failure_policy",
                f"{policy}: a request whose push fails (a prefill engine dies, refuses it or is "
                "late) ends with an error, and is not computed here",
                f'set "kv_load_failure_policy": "{RECOMPUTE}" (where a MultiConnector is used: for '
                "it and for this connector)",
            )
        if (found := of_token(config.push)) is not None:
            yield found


def of_role(role: str) -> Concern | None:
    """Whether a role switches tiers off. Pushes work with every role."""
    if role not in _ONE_WAY:
        return None
    return Concern(
        "kv_role",
        f"{role}: {_ONE_WAY[role]}",
        f'set "kv_role": "{BOTH}" unless that is meant; pushes work with every role',
    )


def of_token(push: PushConfig) -> Concern | None:
    """Whether an engine that asks nobody for a secret takes part in pushes with strangers: with
    those who reach its listener, or with whoever listens where a request says."""
    if push.token is not None:
        return None
    if push.listen is not None and not _is_loopback(push.listen):
        return Concern(
            "push.token",
            f"not set, and push.listen is {push.listen}: whoever can connect there takes part in "
            "pushes, and can have prompts written to where he likes",
            "set the same secret on every engine",
        )
    if push.peers and all(map(_is_loopback, push.peers)):
        return None
    named = ", ".join(push.peers) if push.peers else "any address (push.peers is not set)"
    return Concern(
        "push.token",
        f"not set, and requests may name {named:.200}: whoever listens there is told how to write "
        "to this engine's cache",
        "set the same secret on every engine; with engines on one machine alone, "
        'set push.peers to ["127.0.0.1"] instead',
    )


def _is_loopback(place: str) -> bool:
    """Whether an address, or a host alone, is this machine's own."""
    try:
        host, _ = split_address(place)
    except ValueError:
        host = place.removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
