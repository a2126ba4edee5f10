"""Engines, the connections between them, and everything that can happen next.

A history is a sequence of events. *Normal* events are what happens if nothing goes wrong, in any
order; *faults* are what goes wrong, as often as the options allow; time passes when nothing else
can happen. Every event is atomic, and what a message, a write or a notice does is an event of its
own, so that every interleaving is a history.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Generic, TypeVar

from lamina.plan import TORN
from lamina.push.cards import SenderCard
from lamina.push.letters import Fate, Letter, Lost, Opened
from lamina.push.messages import Announce, Delivered, LinkMessage, Welcome
from protocol.decode import Decode
from protocol.engine import (
    PATIENCE,
    QUARANTINE,
    SETTLE,
    SILENCE,
    Options,
    ProtocolViolationError,
    card_of,
    dump,
)
from protocol.prefill import Prefill, Write

Event = tuple[str | int, ...]
"""What happens, and to whom."""

FAULTS = frozenset(
    {
        "break_prefill",
        "break_decode",
        "silent",
        "crash_prefill",
        "crash_decode",
        "preempt",
        "abort_prefill",
        "abort_decode",
        "never_prefill",
        "never_decode",
        "leave_prefill",
        "write_fails",
        "deadline",
        "patience",
        "second",
    }
)
"""Everything that may go wrong."""


Engine = TypeVar("Engine", Prefill, Decode)


class Engines(Generic[Engine]):
    """Engines of one kind. A copy of a history wakes those that something happens to; the others
    stay as they were.

    Args:
        engines: the first ones; none for a copy.
    """

    def __init__(self, engines: Sequence[Engine] = ()) -> None:
        self._awake: dict[int, Engine] = dict(enumerate(engines))
        self._asleep: list[tuple[bytes, bytes]] = [(b"", b"")] * len(engines)

    def __len__(self) -> int:
        return len(self._asleep)

    def __getitem__(self, index: int) -> Engine:
        if index not in self._awake:
            self._awake[index] = pickle.loads(self._asleep[index][0])
        return self._awake[index]

    def __setitem__(self, index: int, engine: Engine) -> None:
        self._awake[index] = engine

    def __iter__(self) -> Iterator[Engine]:
        return (self[index] for index in range(len(self)))

    def awake(self) -> Iterator[Engine]:
        """Those to which something may have happened since the copy was made."""
        return iter(list(self._awake.values()))

    def keys(self) -> tuple[bytes, ...]:
        """Equal for equal engines."""
        return tuple(
            dump(self._awake[index], compare=True) if index in self._awake else key
            for index, (_, key) in enumerate(self._asleep)
        )

    def copy(self) -> list[tuple[bytes, bytes]]:
        """What :meth:`of` makes the same engines of."""
        return [
            (dump(self._awake[i]) if i in self._awake else self._asleep[i][0], key)
            for i, key in enumerate(self.keys())
        ]

    @classmethod
    def of(cls, asleep: list[tuple[bytes, bytes]]) -> Engines[Engine]:
        engines: Engines[Engine] = cls()
        engines._asleep = list(asleep)
        return engines


@dataclass
class Connection:
    """One connection, from its first dial to its last byte.

    Attributes:
        decode: index of the dialling engine, and its incarnation.
        prefill: index of the engine that listens.
        opened: whether the dialling side has been welcomed.
        decode_up: whether the dialling side has it.
        prefill_up: whether the listening side takes it for the present one.
        reader: incarnation of the listening side that still reads from it; empty for none.
        queued: messages that wait for the welcome.
    """

    decode: int
    name: str
    prefill: int
    opened: bool = False
    decode_up: bool = True
    prefill_up: bool = False
    reader: str = ""
    queued: list[LinkMessage] = field(default_factory=list)
    to_prefill: deque[LinkMessage] = field(default_factory=deque)
    to_decode: deque[LinkMessage] = field(default_factory=deque)

    @property
    def address(self) -> str:
        return address_of(self.prefill)

    @property
    def over(self) -> bool:
        return not (self.decode_up or self.prefill_up or self.to_prefill)


def address_of(prefill: int) -> str:
    return f"prefill:{prefill}"


@dataclass
class Orphan:
    """A write that may still arrive.

    Attributes:
        prefill: index of the engine that it is of.
        name: incarnation and epoch that it is for.
        until: the clock of the decode engine when no network holds it back any longer.
    """

    prefill: int
    name: tuple[str, int]
    write: Write
    until: float


Copy = tuple[Options, list[tuple[bytes, bytes]], list[tuple[bytes, bytes]], bytes]
"""A history at one moment."""


class World:
    """See the module.

    Args:
        options: what there is.

    Attributes:
        budget: faults that may still happen.
        orphans: writes that their engine can do nothing about, because they have failed, or it has
            crashed and is not started again.
        notices: on their way: who says it, the rank that is meant, what is said.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.budget = options.budget
        cases = options.cases
        self.prefills = Engines(
            [Prefill(i, 0, options) for i in range(1 + max(c.prefill for c in cases))]
        )
        self.decodes = Engines(
            [Decode(i, 0, options) for i in range(1 + max(c.decode for c in cases))]
        )
        self.to_arrive_prefill = list(range(len(cases)))
        self.to_arrive_decode = list(range(len(cases)))
        self.down: list[int] = []
        self.connections: list[Connection] = []
        self.orphans: list[Orphan] = []
        self.notices: list[tuple[str, int, Delivered]] = []

    # -- copies ------------------------------------------------------------------------------

    def copy(self) -> Copy:
        """All of it; :meth:`of` makes another one of that."""
        return self.options, self.prefills.copy(), self.decodes.copy(), dump(self._rest())

    @staticmethod
    def of(copy: Copy) -> World:
        options, prefills, decodes, rest = copy
        world = World.__new__(World)
        world.options = options
        world.prefills = Engines.of(prefills)
        world.decodes = Engines.of(decodes)
        (
            world.budget,
            world.to_arrive_prefill,
            world.to_arrive_decode,
            world.down,
            world.connections,
            world.orphans,
            world.notices,
        ) = pickle.loads(rest)
        return world

    def key(self) -> int:
        """Equal for histories that have come to the same."""
        rest = dump(self._rest(), compare=True)
        return hash((self.prefills.keys(), self.decodes.keys(), rest))

    def _rest(self) -> tuple[object, ...]:
        return (
            self.budget,
            self.to_arrive_prefill,
            self.to_arrive_decode,
            self.down,
            self.connections,
            self.orphans,
            self.notices,
        )

    # -- what can happen ---------------------------------------------------------------------

    def normal(self) -> Iterator[Event]:
        """What may happen although nothing goes wrong."""
        posting = [d.index for d in self.decodes if d.outbox]
        if posting:
            # Until a message is with the link only what happens to connections can matter.
            yield from (("post", index) for index in posting)
            yield from self._link_events()
            return
        yield from self._link_events()
        for index in self.down:
            yield "restart", index
        for prefill in self._living():
            for rank in prefill.ranks:
                for number in range(len(rank.writes())):
                    yield "land", prefill.index, rank.rank, number
        for number in range(len(self.notices)):
            yield "notice", number
        for prefill in self._living():
            yield "step_prefill", prefill.index
            for push, request in prefill.requests.items():
                if request.stage == "loading":
                    yield "loaded", prefill.index, push
                if request.stage == "preempted":
                    yield "readmit", prefill.index, push
                if request.stage == "running" and request.computed == request.case.tokens:
                    yield "end_prefill", prefill.index, push
        for decode in self.decodes:
            yield "step_decode", decode.index
            for push, request_there in decode.requests.items():
                if request_there.stage != "parked":
                    yield "end_decode", decode.index, push
        yield from self._arrivals()

    def late(self) -> Iterator[Event]:
        """What may happen at any time, or never."""
        for number in range(len(self.orphans)):
            yield "land_orphan", number

    def _arrivals(self) -> Iterator[Event]:
        for case in self.to_arrive_prefill:
            if self.options.cases[case].prefill not in self.down:
                yield "arrive_prefill", case
        for case in self.to_arrive_decode:
            yield "arrive_decode", case

    def _link_events(self) -> Iterator[Event]:
        for number, link in enumerate(self.connections):
            alive = link.prefill not in self.down
            if link.decode_up and not link.opened and not link.reader and alive:
                yield "accept", number
            if link.to_prefill and link.reader and self._reads(link):
                yield "read_prefill", number
            if link.to_decode and link.decode_up:
                yield "read_decode", number
            if link.prefill_up and not link.decode_up:
                yield "break_prefill", number
            if link.decode_up and not link.to_decode and self._unreachable(link):
                yield "break_decode", number

    def _reads(self, link: Connection) -> bool:
        return (
            link.prefill not in self.down and self.prefills[link.prefill].incarnation == link.reader
        )

    def _unreachable(self, link: Connection) -> bool:
        """Whether the dialling side will find that nobody is there."""
        if not link.reader:
            return link.prefill in self.down
        return not link.prefill_up

    def faults(self) -> Iterator[Event]:
        """What may go wrong."""
        if self.budget:
            yield from (event for event in self._possible_faults() if event[0] in self._kinds)

    @property
    def _kinds(self) -> frozenset[str]:
        return self.options.faults

    def _possible_faults(self) -> Iterator[Event]:
        for number, link in enumerate(self.connections):
            if link.prefill_up and link.decode_up:
                yield "break_prefill", number
            if link.decode_up and (link.to_decode or not self._unreachable(link)):
                yield "break_decode", number
                yield "silent", number
        if any(decode.outbox for decode in self.decodes):
            return
        for prefill in self._living():
            yield "crash_prefill", prefill.index
            if prefill.source._outbound:
                yield "patience", prefill.index
            for push, request in prefill.requests.items():
                if request.stage == "running":
                    yield "preempt", prefill.index, push
                if request.stage != "running" or request.computed < request.case.tokens:
                    yield "abort_prefill", prefill.index, push
            for rank in prefill.ranks:
                for number in range(len(rank.writes())):
                    yield "write_fails", prefill.index, rank.rank, number
        for decode in self.decodes:
            if any(inbound.until < inf for inbound in decode.target._inbound.values()):
                yield "second", decode.index
            yield "crash_decode", decode.index
            for push, request_there in decode.requests.items():
                if request_there.stage == "parked":
                    yield "abort_decode", decode.index, push
            for epoch in decode.expected:
                yield "deadline", decode.index, epoch
        for case in self.to_arrive_prefill:
            yield "never_prefill", case
            if self.options.cases[case].prefill not in self.down:
                yield "leave_prefill", case
        for case in self.to_arrive_decode:
            yield "never_decode", case

    def time(self) -> list[Event]:
        """What happens when nothing else does: the next thing that somebody waits for."""
        return list(islice(self._waits(), 1))

    def _waits(self) -> Iterator[Event]:
        for decode in self.decodes:
            target = decode.target
            if any(inbound.until <= decode.now + SETTLE for inbound in target._inbound.values()):
                yield "pass_decode", decode.index, int(SETTLE)
            if target._asks:
                yield "pass_decode", decode.index, int(SILENCE)
        for prefill in self._living():
            if prefill.source._outbound:
                yield "pass_prefill", prefill.index
        for decode in self.decodes:
            for epoch in decode.expected:
                yield "run_out", decode.index, epoch
            if decode.target._inbound or any(o.name[0] == decode.incarnation for o in self.orphans):
                yield "pass_decode", decode.index, int(QUARANTINE)

    def _living(self) -> list[Prefill]:
        return [prefill for prefill in self.prefills if prefill.index not in self.down]

    # -- what happens ------------------------------------------------------------------------

    def run(self, event: Event, *, fault: bool = False) -> None:
        """Let something happen.

        Raises:
            ProtocolViolationError: if it must not have.
        """
        if fault:
            self.budget -= 1
        action: Callable[..., None] = getattr(self, f"_{event[0]}")
        action(*event[1:])
        for prefill in self.prefills.awake():
            if prefill.index in self.down:
                continue
            letters, prefill.letters = prefill.letters, []
            for letter in letters:
                self._post_prefill(prefill, letter)
            prefill.check_sources()
            for rank in prefill.ranks:
                self.notices += rank.notices
                rank.notices.clear()
        self.connections = [link for link in self.connections if not link.over]

    def _arrive_prefill(self, case: int) -> None:
        self.to_arrive_prefill.remove(case)
        push = self.options.cases[case]
        self.prefills[push.prefill].arrive(f"push{case}", push)

    def _arrive_decode(self, case: int) -> None:
        self.to_arrive_decode.remove(case)
        push = self.options.cases[case]
        self.decodes[push.decode].arrive(f"push{case}", push, address_of(push.prefill))

    def _never_prefill(self, case: int) -> None:
        self.to_arrive_prefill.remove(case)

    def _leave_prefill(self, case: int) -> None:
        self.to_arrive_prefill.remove(case)
        self.prefills[self.options.cases[case].prefill].leave(f"push{case}")

    def _never_decode(self, case: int) -> None:
        self.to_arrive_decode.remove(case)

    def _step_prefill(self, index: int) -> None:
        self.prefills[index].step()

    def _loaded(self, index: int, push: str) -> None:
        self.prefills[index].loaded(push)

    def _preempt(self, index: int, push: str) -> None:
        self.prefills[index].preempt(push)

    def _readmit(self, index: int, push: str) -> None:
        self.prefills[index].readmit(push)

    def _end_prefill(self, index: int, push: str) -> None:
        self.prefills[index].end(push)

    _abort_prefill = _end_prefill

    def _patience(self, index: int) -> None:
        self.prefills[index].now += PATIENCE
        self.prefills[index].step()

    _pass_prefill = _patience

    def _step_decode(self, index: int) -> None:
        self.decodes[index].step()

    def _end_decode(self, index: int, push: str) -> None:
        self.decodes[index].end(push)

    _abort_decode = _end_decode

    def _deadline(self, index: int, epoch: int) -> None:
        self.decodes[index].run_out(epoch)

    _run_out = _deadline

    def _second(self, index: int) -> None:
        self._pass_decode(index, int(SETTLE))

    def _pass_decode(self, index: int, seconds: int) -> None:
        decode = self.decodes[index]
        decode.now += seconds
        self.orphans = [
            orphan
            for orphan in self.orphans
            if orphan.name[0] != decode.incarnation or decode.now < orphan.until
        ]
        decode.step()

    # -- writes and notices ------------------------------------------------------------------

    def _land(self, index: int, rank_index: int, number: int) -> None:
        prefill = self.prefills[index]
        rank = prefill.ranks[rank_index]
        name, _, sending, write = rank.writes()[number]
        self._arrives(prefill, name, write)
        sending.writes.remove(write)
        rank.settle(name)

    def _write_fails(self, index: int, rank_index: int, number: int) -> None:
        rank = self.prefills[index].ranks[rank_index]
        name, stream, sending, write = rank.writes()[number]
        stream.failure = TORN
        sending.writes.remove(write)
        rank.settle(name)
        self._orphan(index, name, write)

    def _orphan(self, index: int, name: tuple[str, int], write: Write) -> None:
        decode = self._decode_of(name[0])
        if decode is not None:
            self.orphans.append(Orphan(index, name, write, decode.now + QUARANTINE))

    def _land_orphan(self, number: int) -> None:
        orphan = self.orphans.pop(number)
        self._arrives(self.prefills[orphan.prefill], orphan.name, orphan.write)

    def _arrives(self, prefill: Prefill, name: tuple[str, int], write: Write) -> None:
        decode = self._decode_of(name[0])
        if decode is not None:
            decode.land(write.route.rank, name[1], write, prefill.content)

    def _decode_of(self, incarnation: str) -> Decode | None:
        decode = self.decodes[int(incarnation[1:].partition(".")[0])]
        return decode if decode.incarnation == incarnation else None

    def _notice(self, number: int) -> None:
        end, rank, message = self.notices.pop(number)
        # The wire does not know who lives there now; the ranks must.
        self.decodes[int(message.incarnation[1:].partition(".")[0])].notice(end, rank, message)

    # -- crashes -----------------------------------------------------------------------------

    def _crash_prefill(self, index: int) -> None:
        prefill = self.prefills[index]
        self.down.append(index)
        for rank in prefill.ranks:
            for name, _, _, write in rank.writes():
                self._orphan(index, name, write)
        for link in self.connections:
            if link.prefill == index and link.reader:
                link.prefill_up = False
                link.to_prefill.clear()

    def _restart(self, index: int) -> None:
        # Whoever could have written is gone: the address is in use by another process.
        self.orphans = [orphan for orphan in self.orphans if orphan.prefill != index]
        self.down.remove(index)
        self.prefills[index] = Prefill(index, self.prefills[index].life + 1, self.options)

    def _crash_decode(self, index: int) -> None:
        decode = self.decodes[index]
        self.decodes[index] = Decode(index, decode.life + 1, self.options)
        for link in self.connections:
            if link.decode == index:
                link.decode_up = False
                link.to_decode.clear()
        # Its memory is gone: nothing can land there.
        for prefill in self.prefills:
            for rank in prefill.ranks:
                for name, stream, sending, write in rank.writes():
                    if name[0] == decode.incarnation:
                        stream.failure = TORN
                        sending.writes.remove(write)
                        rank.settle(name)
        self.orphans = [orphan for orphan in self.orphans if orphan.name[0] != decode.incarnation]

    # -- the link ----------------------------------------------------------------------------

    def _post(self, index: int) -> None:
        decode = self.decodes[index]
        outbox, decode.outbox = decode.outbox, []
        for letter in outbox:
            link = next(
                (
                    c
                    for c in self.connections
                    if c.name == decode.incarnation and c.address == letter.peer and c.decode_up
                ),
                None,
            )
            if link is None:
                prefill = int(letter.peer.partition(":")[2])
                link = Connection(index, decode.incarnation, prefill)
                self.connections.append(link)
            if not link.opened:
                link.queued.append(letter.message)
            elif link.prefill_up:
                link.to_prefill.append(letter.message)

    def _post_prefill(self, prefill: Prefill, letter: Letter) -> None:
        for link in self.connections:
            if link.prefill == prefill.index and link.name == letter.peer and link.prefill_up:
                if link.decode_up:
                    link.to_decode.append(letter.message)
                return

    def _accept(self, number: int) -> None:
        link = self.connections[number]
        prefill = self.prefills[link.prefill]
        for former in self.connections:
            if former.name == link.name and former.prefill == link.prefill and former.prefill_up:
                former.prefill_up = False  # what it had sent may still be read
                prefill.news.append(Lost(link.name, "anew", was_open=True, fate=Fate.CLOSED))
        link.prefill_up = True
        link.reader = prefill.incarnation
        ranks, heads = (
            self.options.decode_ranks,
            max(self.options.prefill_ranks, self.options.decode_ranks),
        )
        card = card_of(
            link.name, ranks, len(self.options.groups), heads, replicated=self.options.replicated
        )
        prefill.news.append(Opened(link.name, link.name, card))
        prefill.exchange()
        ends = tuple(rank.end for rank in prefill.ranks)
        link.to_decode.append(
            Welcome(SenderCard(prefill.incarnation, self.options.replicated, ends))
        )

    def _read_prefill(self, number: int) -> None:
        link = self.connections[number]
        message = link.to_prefill.popleft()
        self.prefills[link.prefill].news.append(Letter(link.name, message))
        self.prefills[link.prefill].exchange()

    def _read_decode(self, number: int) -> None:
        link = self.connections[number]
        decode = self.decodes[link.decode]
        message = link.to_decode.popleft()
        if isinstance(message, Welcome):
            link.opened = True
            decode.news.append(Opened(link.address, message.card.incarnation, message.card))
            queued, link.queued = link.queued, []
            if link.prefill_up:
                link.to_prefill.extend(queued)
        else:
            decode.news.append(Letter(link.address, message))
        decode.exchange()

    def _break_decode(self, number: int, fate: Fate = Fate.CLOSED) -> None:
        link = self.connections[number]
        link.decode_up = False
        link.to_decode.clear()
        unsent = tuple(m.attempt for m in link.queued if isinstance(m, Announce))
        lost = Lost(link.address, "lost", link.opened, fate, unsent)
        self.decodes[link.decode].news.append(lost)

    def _silent(self, number: int) -> None:
        self._break_decode(number, Fate.SILENT)

    def _break_prefill(self, number: int) -> None:
        link = self.connections[number]
        link.prefill_up = False
        link.to_prefill.clear()
        prefill = self.prefills[link.prefill]
        prefill.news.append(Lost(link.name, "lost", was_open=True, fate=Fate.CLOSED))
        prefill.exchange()

    # -- the end -----------------------------------------------------------------------------

    def check_clean(self) -> None:
        """Everything has ended, and nothing is left.

        Raises:
            ProtocolViolationError: if not.
        """
        for prefill in self._living():
            prefill.check_clean()
            if prefill.requests:
                raise ProtocolViolationError(f"requests never end on {prefill.incarnation}")
        for decode in self.decodes:
            decode.check_clean()
        if self.notices or self.orphans or self.to_arrive_decode or self.to_arrive_prefill:
            raise ProtocolViolationError("the history does not end")


def settle(world: World, limit: int = 2000) -> World:
    """Let everything go well from here on, until nothing happens any more.

    Raises:
        ProtocolViolationError: if something never ends, or is left.
    """
    before, key = world.copy(), world.key()
    for _ in range(limit):
        for event in (*world.normal(), *world.time()):
            world.run(event)
            if (after := world.key()) != key:
                before, key = world.copy(), after
                break
            world = World.of(before)
        else:
            world.check_clean()
            return world
    raise ProtocolViolationError("it never ends")
