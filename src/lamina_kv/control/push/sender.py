"""Sends what is computed of prompts that have a destination, and holds the blocks that are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf

from lamina_kv.config import PushConfig
from lamina_kv.control.books import Books
from lamina_kv.control.push.fit import Sendable, completes, pages_of, sendable
from lamina_kv.control.push.open_prompts import OpenPrompt, Taken
from lamina_kv.control.push.outbound import Outbound
from lamina_kv.control.transfers import Kind, Transfer
from lamina_kv.geometry import GroupKind
from lamina_kv.plan import TORN, Binding, PushOrder, PushPages, TransferId
from lamina_kv.push.cards import EngineCard


class PushSender:
    """See the module.

    Args:
        config: the ``push`` section.
        books: what the parts of the planner share.
        card: this engine.

    Attributes:
        orders: pages for the next plan.
        gathers: prompts without a destination whose rows the next plan has the ranks keep.
        bindings: destinations of such prompts, for the next plan.
        drops: such prompts that get none, for the next plan.
        backlog: bytes on their way, by decode engine.
    """

    def __init__(self, config: PushConfig, books: Books, card: EngineCard) -> None:
        self.orders: list[PushOrder] = []
        self.gathers: list[TransferId] = []
        self.bindings: list[Binding] = []
        self.drops: list[TransferId] = []
        self.backlog: Counter[str] = Counter()
        self._silence = config.silence
        self._shape = shape = books.shape
        self._transfers = books.transfers
        self._leases = books.leases
        self._clock = books.clock
        self._of_transfer: dict[TransferId, Outbound] = {}
        self._page_bytes = [
            sum(row.page_bytes for rank in card.ranks for row in rank.rows if group in row.groups)
            for group in range(len(shape.groups))
        ]
        token_bytes = sum(self._page_bytes[g] / shape.groups[g].block_tokens for g in shape.paged)
        self._part_tokens = max(
            *(group.block_tokens for group in shape.groups),
            int(config.max_inflight * len(card.ranks) // max(1.0, token_bytes)),
        )

    def order(self, out: Outbound) -> str:
        """Order what can be sent of a bound push.

        Args:
            out: the push.

        Returns:
            Why nothing of it can be sent any more; empty if that is not so.
        """
        if self._lacks_state(out):
            return "the state at the end was not kept"
        progress = out.progress
        reaches = [(reached, True) for reached in self._parts(out, progress.computed)]
        for reached, computed in (*reaches, (progress.planned, False)):
            if not out.ordered:
                problem = self._send(out, self._due(out, reached), computed=computed)
                if problem:
                    return problem
        return ""

    def gather(self, out: Outbound) -> OpenPrompt:
        """Have the ranks keep the rows of a prompt that the step completes.

        Args:
            out: its push, which has no destination.

        Returns:
            What somebody may take of it. Its blocks are leased until that is sent or withdrawn.
        """
        assert out.record is not None
        prompt = out.record.view.num_prompt_tokens
        tables: list[tuple[int, ...]] = []
        states: list[int] = []
        for group, shape in enumerate(self._shape.groups):
            if shape.kind is GroupKind.STATE:
                end, block, _ = out.states.get(group, (0, self._shape.null_block, None))
                tables.append((block,))
                states.append(end)
            else:
                used = -(-prompt // shape.block_tokens)
                tables.append(tuple(out.record.view.blocks(group)[:used]))
                states.append(0)
        null = self._shape.null_block
        held = tuple(block for table in tables for block in table if block != null)
        transfer = self._open(out, held, 0)
        out.offer, out.offered = transfer.id, 0
        self.gathers.append(transfer.id)
        digest = out.record.prompt_digest()
        return OpenPrompt(
            transfer.id, out.push, out.peer, prompt, digest, tuple(tables), tuple(states)
        )

    def adopt(self, out: Outbound, taken: Taken) -> None:
        """Somebody has taken what is gathered of a prompt. That is all of it."""
        assert out.offer is not None
        transfer = self._transfers.get(out.offer)
        assert transfer is not None
        size = self._size_of(taken.binding.order.pages)
        self._transfers.resize(transfer, size)
        self.backlog[out.peer] += size
        out.moving.add(transfer.id)
        out.offer = None
        out.sent = [table.first + len(table.blocks) for table in taken.announce.tables]
        out.ordered = True
        out.let_go()
        self.bindings.append(taken.binding)

    def drop(self, out: Outbound) -> str:
        """Nobody has taken what is gathered of a prompt, and nobody will.

        Returns:
            Why nothing of it may be believed, if a rank has said so; else empty.
        """
        assert out.offer is not None
        transfer = self._transfers.get(out.offer)
        assert transfer is not None
        assert transfer.lease is not None
        transfer.lease.release()
        self._transfers.close(transfer)
        del self._of_transfer[transfer.id]
        out.offer = None
        self.drops.append(transfer.id)
        return transfer.reason or "the step failed" if transfer.failed else ""

    def owner(self, transfer: Transfer) -> Outbound:
        """The push that a transfer is a part of."""
        return self._of_transfer[transfer.id]

    def settle(self, transfer: Transfer) -> Outbound:
        """A part of a push has ended on every rank.

        Returns:
            The push.
        """
        self._transfers.close(transfer)
        out = self._of_transfer.pop(transfer.id)
        out.moving.discard(transfer.id)
        self.backlog[out.peer] -= transfer.size
        out.torn |= transfer.reason == TORN
        return out

    def sent_since(self, step: int) -> set[str]:
        """Pushes of which something is on its way that was ordered in ``step`` or later."""
        return {
            self._of_transfer[transfer.id].push
            for transfer in self._transfers.live()
            if transfer.kind is Kind.PUSH and transfer.step >= step
        }

    def let_go(self, out: Outbound) -> None:
        """Of a push that nobody will believe, do not hold the blocks for ever that a peer which is
        stopped keeps from draining."""
        if out.let_go_at == inf:
            out.let_go_at = self._clock.now + self._silence
        if self._clock.now < out.let_go_at:
            return
        for transfer_id in out.moving:
            transfer = self._transfers.get(transfer_id)
            assert transfer is not None
            assert transfer.lease is not None
            transfer.lease.release()
            transfer.overdue = True

    def _parts(self, out: Outbound, reached: int) -> Iterable[int]:
        """Ends of parts of the first ``reached`` tokens: blocks come back part by part, and not
        when all of a long prompt has drained."""
        sent = zip(self._shape.groups, out.sent, strict=True)
        first = min((group.block_tokens * index for group, index in sent), default=0)
        return (*range(first + self._part_tokens, reached, self._part_tokens), reached)

    def _due(self, out: Outbound, reached: int) -> list[Sendable]:
        """What was not ordered yet of the first ``reached`` tokens."""
        assert out.announce is not None
        return sendable(
            self._shape, out.announce, out.sent, reached, lambda group: self._blocks(out, group)
        )

    def _send(self, out: Outbound, due: list[Sendable], *, computed: bool) -> str:
        announce = out.announce
        assert announce is not None
        sources = tuple(source for part in due for source in part.sources)
        if self._shape.null_block in sources:
            return "a block that is wanted has fallen out of its window"
        complete = completes(announce, out.sent, due)
        if not (sources or complete):
            return ""
        pages = pages_of(due)
        size = self._size_of(pages)
        transfer = self._open(out, sources, size)
        out.moving.add(transfer.id)
        self.backlog[out.peer] += size
        self.orders.append(
            PushOrder(
                transfer.id,
                out.peer,
                announce.attempt.epoch,
                pages,
                computed,
                complete,
                max(0.0, out.expires - self._clock.now),
            )
        )
        for part in due:
            out.sent[part.group] = part.upto
        if complete:
            out.ordered = True
            out.let_go()
        return ""

    def _open(self, out: Outbound, sources: tuple[int, ...], size: int) -> Transfer:
        transfer = self._transfers.open(
            Transfer(
                Kind.PUSH,
                out.push,
                step=self._clock.step,
                expires=inf,
                size=size,
                lease=self._leases.take(sources),
            )
        )
        self._of_transfer[transfer.id] = out
        return transfer

    def _size_of(self, pages: Iterable[PushPages]) -> int:
        """Bytes of pages, over all ranks."""
        return sum(len(part.sources) * self._page_bytes[part.group] for part in pages)

    def _blocks(self, out: Outbound, group: int) -> Sequence[int]:
        """The blocks of a prompt; of a recurrent group that of the state at the announced end."""
        if self._shape.groups[group].kind is GroupKind.STATE:
            return self._state_blocks(out, group)
        if out.tables is not None:
            return out.tables[group]
        return () if out.record is None else out.record.view.blocks(group)

    def _state_blocks(self, out: Outbound, group: int) -> Sequence[int]:
        assert out.announce is not None
        end, block, _ = out.states.get(group, (0, 0, None))
        return (block,) if end == out.announce.end else ()

    def _lacks_state(self, out: Outbound) -> bool:
        """Whether a state that is wanted has been passed by."""
        announce = out.announce
        assert announce is not None
        return out.progress.computed >= announce.end and any(
            out.sent[group] <= announce.tables[group].first and not self._state_blocks(out, group)
            for group in self._shape.recurrent
        )
