"""One line in the log when an engine begins to be served, and one when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lamina_kv import __version__
from lamina_kv.config import Config
from lamina_kv.plan import COMPUTED, RankReport
from lamina_kv.quantities import size_of, time_of
from lamina_kv.tiers.config import TierConfig


def opening(
    config: Config,
    chunk_tokens: int,
    reports: Sequence[RankReport],
    *,
    loads: bool,
    saves: bool,
    pushes: str = "",
) -> str:
    """That Lamina is there, how much it keeps and where, and what it does.

    Args:
        config: the whole tree.
        chunk_tokens: tokens of one chunk.
        reports: one from each rank.
        loads: whether anything is loaded from a tier.
        saves: whether anything is saved to one.
        pushes: the engine's part in pushes, in words; empty if it has none.
    """
    keeping = [report for report in reports if not report.follows]
    slots = min(report.near_slots for report in keeping)
    chunk = sum(report.chunk_bytes for report in keeping)
    ranks = f" on {len(keeping)} ranks" if len(keeping) > 1 else ""
    kept = [f"{size_of(slots * chunk)} of host memory{ranks} ({slots:,} chunks)"]
    kept += (_far(tier, number, keeping, chunk) for number, tier in enumerate(config.tiers))
    return "; ".join(
        [
            f"Lamina {__version__} keeps KV cache in " + ", ".join(kept),
            f"chunks of {chunk_tokens} tokens, {size_of(chunk)}",
            _does(loads=loads, saves=saves),
            f"load.when {config.load.when}, load.mode {config.load.mode}",
            *(["pushes: " + pushes] if pushes else []),
            *_written(config),
        ]
    )


def _far(tier: TierConfig, number: int, keeping: Sequence[RankReport], chunk: int) -> str:
    name = tier.name if tier.name == tier.kind else f"{tier.name} ({tier.kind})"
    reports = [report.tiers[number] for report in keeping]
    stored = [report.stored for report in reports if report.stored is not None]
    if not stored:
        return f"{name}, which finds chunks by key"
    slots = min(report.slots for report in reports)
    earlier = min(len(each.slots) for each in stored)
    return f"{name}, {size_of(slots * chunk)} ({slots:,} chunks, {earlier:,} from earlier runs)"


def _does(*, loads: bool, saves: bool) -> str:
    match loads, saves:
        case True, True:
            return "saves and loads"
        case True, False:
            return "loads, and SAVES NOTHING (kv_role)"
        case False, True:
            return "saves, and LOADS NOTHING (kv_role)"
    return "neither saves nor loads"


def _written(config: Config) -> Iterator[str]:
    for name, path in config.observe.files:
        yield f"observe.{name} {path}"


def closing(
    sources: Mapping[str, int], saved: float, *, stored: Mapping[str, int], lost: int
) -> str:
    """What Lamina was worth, and what it leaves.

    Args:
        sources: tokens of all prompts by where they came from.
        saved: seconds of prefill that were saved, as predicted.
        stored: chunks in each far tier that lists them, by its name.
        lost: chunks that were still to be written to a far tier.
    """
    prompt = sum(sources.values())
    found = {source: tokens for source, tokens in sources.items() if source != COMPUTED}
    brought = "".join(f", {tokens:,} from {source}" for source, tokens in found.items() if tokens)
    words = [f"Lamina ends: {prompt:,} prompt tokens{brought or ', none found'}"]
    if saved:
        words.append(f"{time_of(saved)} of prefill saved, as predicted")
    words += [f"{chunks:,} chunks stay in {tier}" for tier, chunks in stored.items()]
    if lost:
        words.append(
            f"{lost:,} chunks were not written any more: give the server more time to stop "
            "(--shutdown-timeout)"
        )
    return "; ".join(words)
