"""Whether an announcement fits a prompt, and which of its pages can be sent.

Functions of their arguments alone. The scheduler's thread and the link's thread call them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import GroupKind
from lamina_kv.plan import PushPages
from lamina_kv.push.messages import NO_BLOCK, Announce


@dataclass(frozen=True, slots=True)
class Sendable:
    """Pages of one group that can be sent.

    Attributes:
        group: the group.
        upto: index in the prompt of the first block that is not among them.
        sources: block ids here.
        targets: block ids there.
    """

    group: int
    upto: int
    sources: tuple[int, ...]
    targets: tuple[int, ...]


def misfit(
    shape: ChunkShape, prompt: int, digest: bytes, announce: Announce, num_blocks: int
) -> str:
    """Why an announcement does not fit a prompt; empty if it does.

    Args:
        shape: tokens and groups of chunks.
        prompt: tokens of the prompt.
        digest: names the prompt and the weights that compute it.
        announce: the announcement.
        num_blocks: blocks of each rank of the decode engine, at least.
    """
    if shape.in_place:
        # A decode engine may keep its states otherwise, and has nothing against this one.
        return (
            "the next step overwrites a recurrent state here before it is sent: serve the "
            "prefill engine with --enable-prefix-caching, too"
        )
    if digest != announce.digest:
        return (
            "the engines were given different prompts, or compute them with different "
            "weights: check that both have the same tokenizer, chat template, adapter and "
            "salt, and that weights changed at run time have the same name on both"
        )
    if not 0 <= announce.start <= announce.end <= prompt or announce.end == 0:
        return f"tokens {announce.start}..{announce.end} of a prompt of {prompt}"
    if len(announce.tables) != len(shape.groups):
        return f"{len(announce.tables)} tables for {len(shape.groups)} groups"
    for group, table in zip(shape.groups, announce.tables, strict=True):
        upto = table.first + len(table.blocks)
        fits = table.first >= 0 and upto == -(-announce.end // group.block_tokens)
        if group.kind is GroupKind.STATE:
            fits = fits and len(table.blocks) == 1 and announce.end % group.block_tokens == 0
        if not fits:
            return f"a table of blocks {table.first}..{upto} for tokens up to {announce.end}"
        if not all(block == NO_BLOCK or 0 <= block < num_blocks for block in table.blocks):
            return f"block ids beyond the decode engine's {num_blocks}"
    return ""


def sendable(
    shape: ChunkShape,
    announce: Announce,
    sent: Sequence[int],
    reached: int,
    blocks: Callable[[int], Sequence[int]],
) -> list[Sendable]:
    """What can be sent of the first tokens of a prompt.

    Args:
        shape: tokens and groups of chunks.
        announce: where the pages go; it fits the prompt.
        sent: per group, index in the prompt of the first block that was not ordered.
        reached: tokens that are computed.
        blocks: gives the prompt's blocks of a group; of a recurrent one the block of the state
            behind ``announce.end``, or none.
    """
    found = []
    for group, (kind, table) in enumerate(zip(shape.groups, announce.tables, strict=True)):
        first, end = sent[group], table.first + len(table.blocks)
        if kind.kind is GroupKind.STATE:
            upto = end if reached >= announce.end else first
            sources = blocks(group) if upto > first else ()
        else:
            upto = end if reached >= announce.end else min(end, reached // kind.block_tokens)
            sources = blocks(group)[first:upto]
        if upto <= first or len(sources) < upto - first:
            continue
        targets = table.blocks[first - table.first : upto - table.first]
        pairs = [p for p in zip(sources, targets, strict=True) if p[1] != NO_BLOCK]
        found.append(Sendable(group, upto, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)))
    return found


def completes(announce: Announce, sent: Sequence[int], parts: Sequence[Sendable]) -> bool:
    """Whether these parts are all that was left to be sent."""
    reached = {part.group: part.upto for part in parts}
    return all(
        reached.get(group, sent[group]) >= table.first + len(table.blocks)
        for group, table in enumerate(announce.tables)
    )


def pages_of(parts: Sequence[Sendable]) -> tuple[PushPages, ...]:
    """The pages of an order."""
    return tuple(
        PushPages(part.group, part.sources, part.targets) for part in parts if part.sources
    )
