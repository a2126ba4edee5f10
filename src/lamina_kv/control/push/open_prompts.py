"""Prompts that leave as soon as it is known where to, although a step runs meanwhile.

Control opens a prompt when it plans the step that completes a prompt whose destination is not
known. An announcement that fits takes it, on the link's thread: the ranks are told at once, and
control when it looks. Either somebody takes an open prompt or control withdraws it, never both.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Protocol

from lamina_kv.control.push.fit import completes, misfit, pages_of, sendable
from lamina_kv.control.shape import ChunkShape
from lamina_kv.geometry import GroupKind
from lamina_kv.plan import Binding, PeerOrder, PushOrder, TransferId
from lamina_kv.push.cards import EngineCard, encode_card
from lamina_kv.push.messages import Announce


class RanksChannel(Protocol):
    """A way to the ranks of this engine beside its plans."""

    @property
    def is_open(self) -> bool:
        """Whether every rank is reached. Any thread may ask."""

    def send(self, binding: Binding) -> None:
        """Tell every rank. Returns at once; what does not arrive is in the next plan."""


@dataclass(frozen=True, slots=True)
class OpenPrompt:
    """A prompt of which the ranks keep what they compute.

    Attributes:
        transfer: what it is sent as.
        push: the router's id.
        owner: incarnation of the decode engine that alone may take it; empty for any.
        tokens: tokens of the prompt.
        digest: names the prompt and the weights that compute it.
        tables: per group, its block ids; of a recurrent one the block of its newest state.
        states: per group, tokens that this state stands behind; 0 in other groups.
    """

    transfer: TransferId
    push: str
    owner: str
    tokens: int
    digest: bytes
    tables: tuple[tuple[int, ...], ...]
    states: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """An open prompt that an announcement has taken.

    Attributes:
        announce: the announcement.
        binding: what the ranks were told.
    """

    announce: Announce
    binding: Binding

    @property
    def peer(self) -> str:
        """Incarnation of the decode engine."""
        return self.binding.order.peer


class OpenPrompts:
    """See the module. :meth:`take` is the link's; all else is the scheduler's.

    Args:
        shape: tokens and groups of chunks.
        patience: seconds that a decode engine is believed to wait at most.
        channel: to the ranks; None if there is none, and nothing is open.
    """

    def __init__(self, shape: ChunkShape, patience: float, channel: RanksChannel | None) -> None:
        self._shape = shape
        self._patience = patience
        self._channel = channel
        self._lock = threading.Lock()
        self._peers: dict[str, tuple[PeerOrder, int]] = {}
        self._open: dict[str, OpenPrompt] = {}
        self._taken: dict[str, Taken] = {}

    @property
    def reach_ranks(self) -> bool:
        """Whether a prompt that is taken leaves before the next plan."""
        return self._channel is not None and self._channel.is_open

    def publish(self, prompt: OpenPrompt) -> None:
        """Let an announcement take a prompt. A push has one at most."""
        with self._lock:
            self._open[prompt.push] = prompt

    def reserve(self, push: str, owner: str) -> None:
        """Let nobody but ``owner`` take a prompt, if it is open."""
        with self._lock:
            if (prompt := self._open.get(push)) is not None:
                self._open[push] = replace(prompt, owner=owner)

    def taken(self, push: str) -> Taken | None:
        """What has taken the push's prompt, once; None while nothing has."""
        with self._lock:
            return self._taken.pop(push, None)

    def withdraw(self, push: str) -> Taken | None:
        """Take the push's prompt back. If it has been taken, what has."""
        with self._lock:
            self._open.pop(push, None)
            return self._taken.pop(push, None)

    def admit(self, card: EngineCard) -> None:
        """A decode engine is connected that fits this one, and may take prompts."""
        blocks = min(rank.num_blocks for rank in card.ranks)
        with self._lock:
            self._peers[card.incarnation] = PeerOrder(card.incarnation, encode_card(card)), blocks

    def dismiss(self, peer: str) -> None:
        """It may not any more."""
        with self._lock:
            self._peers.pop(peer, None)

    def take(self, peer: str, announce: Announce) -> bool:
        """Take what an announcement asks for, if it is open.

        Args:
            peer: incarnation of the decode engine; control knows that this connection was made.
            announce: the announcement.

        Returns:
            Whether it leaves. Then control knows of the announcement, whatever becomes of the
            connection.
        """
        with self._lock:
            prompt = self._open.get(announce.attempt.push)
            if prompt is None or peer not in self._peers or prompt.owner not in ("", peer):
                return False
            card, blocks = self._peers[peer]
            order = self._order(prompt, peer, announce, blocks)
            if order is None:
                return False
            binding = Binding(card, order)
            del self._open[prompt.push]
            self._taken[prompt.push] = Taken(announce, binding)
        if self._channel is not None:
            self._channel.send(binding)
        return True

    def _order(
        self, prompt: OpenPrompt, peer: str, announce: Announce, num_blocks: int
    ) -> PushOrder | None:
        if not announce.patience > 0:
            return None
        if misfit(self._shape, prompt.tokens, prompt.digest, announce, num_blocks):
            return None  # control says why

        def blocks(group: int) -> tuple[int, ...]:
            stale = (
                self._shape.groups[group].kind is GroupKind.STATE
                and prompt.states[group] != announce.end
            )
            return () if stale else prompt.tables[group]

        sent = [table.first for table in announce.tables]
        parts = sendable(self._shape, announce, sent, prompt.tokens, blocks)
        fallen = any(self._shape.null_block in part.sources for part in parts)
        if fallen or not completes(announce, sent, parts):
            return None
        return PushOrder(
            prompt.transfer,
            peer,
            announce.attempt.epoch,
            pages_of(parts),
            computed=False,
            last=True,
            patience=min(announce.patience, self._patience),
        )
