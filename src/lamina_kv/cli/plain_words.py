"""What a server will do with a configuration, in sentences for whoever is about to start it."""

from __future__ import annotations

from collections.abc import Iterator

from lamina_kv.config import Config
from lamina_kv.engines.vllm.concerns import CONSUMER, PRODUCER, RECOMPUTE
from lamina_kv.quantities import size_of
from lamina_kv.tiers.config import SharedConfig, TierConfig
from lamina_kv.tiers.disk.config import DiskConfig


def plain_words(config: Config, role: str, policy: str, beside: tuple[str, ...]) -> Iterator[str]:
    """The sentences.

    Args:
        config: Lamina's configuration.
        role: vLLM's ``kv_role``.
        policy: vLLM's ``kv_load_failure_policy``.
        beside: other connectors of a ``MultiConnector``.
    """
    if beside:
        yield (
            f"{', '.join(beside)} works beside it: for each request the connector that is named "
            "first and has something of it loads it, and all of them save."
        )
    yield from _saving(config, role)
    yield from _loading(config, role)
    yield _failing(policy)
    yield from _pushing(config)
    yield (
        "CUDA graphs stay as vLLM chooses them. A step that is replayed as one full graph begins "
        "when all that it loads is there; other steps load ahead of each layer."
    )
    for name, path in config.observe.files:
        yield f"It writes observe.{name} to {path}."


def _saving(config: Config, role: str) -> Iterator[str]:
    memory = size_of(config.host.capacity_bytes(ranks=1))
    most = "up to " if config.host.capacity == "auto" else ""
    yield f"It takes {most}{memory} of host memory on each rank, at the start, beside vLLM's own."
    if role == CONSUMER:
        yield f"It saves nothing, because kv_role is {role}."
        return
    what = "prompts and answers" if config.save.tokens == "all" else "prompts"
    yield f"It saves {what} to host memory, in whole chunks; a forward pass waits for no save."
    yield from map(_keeping, config.tiers)


def _keeping(tier: TierConfig) -> str:
    where = f"tier {tier.name}" + ("" if tier.name == tier.kind else f" ({tier.kind})")
    if isinstance(tier, DiskConfig):
        where += f", {size_of(tier.capacity)} on each rank in {tier.path}"
    match tier.keep:
        case "nothing":
            return f"It writes nothing to {where}: that is only read."
        case "shared":
            said = f"It writes what a second request has used to {where}."
        case _:
            said = f"It writes everything that is saved to {where}."
    if isinstance(tier, SharedConfig):
        return f"{said} Other servers with the same model and settings find it there."
    return f"{said} It is found again after a restart."


def _loading(config: Config, role: str) -> Iterator[str]:
    if role == PRODUCER:
        yield f"It loads nothing from its tiers, because kv_role is {role}."
        return
    load = config.load
    if load.when == "always":
        yield "A prompt that begins with saved chunks is loaded, however long that takes."
    else:
        yield (
            "A prompt that begins with saved chunks is loaded as far as that is predicted to be "
            "faster than computing it."
        )
    yield f"No request waits for that longer than {load.deadline:g} s (load.deadline)."
    if load.mode != "auto":
        how = "between steps" if load.mode == "parked" else "within the step, ahead of each layer"
        yield f"Loads run {how} (load.mode {load.mode})."


def _failing(policy: str) -> str:
    if policy == RECOMPUTE:
        return "A request whose load fails is computed instead, with the same answer."
    return f"A request whose load fails ends with an error (kv_load_failure_policy {policy})."


def _pushing(config: Config) -> Iterator[str]:
    push = config.push
    if push is None:
        return
    if push.listen is not None:
        yield f"It listens at {push.listen} for decode engines, and pushes what they ask it for."
    else:
        yield "It listens nowhere, so it can only receive what prefill engines push."
    yield (
        f"Where a router names a prefill engine, the prompt is waited for up to "
        f"{push.deadline:g} s, and then computed here."
    )
    who = "only engines with the same token" if push.token else "engines without any token"
    named = f" at {', '.join(push.peers)}" if push.peers else ""
    yield f"It pushes with {who}{named}."
