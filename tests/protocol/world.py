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
from itertools import count, islice
from math import inf
from typing import Generic, TypeVar

from lamina_kv.control.push.inbound import Inbound, Stage
from lamina_kv.control.push.outbound import Stage as SourceStage
from lamina_kv.plan import TORN
from lamina_kv.push.cards import SenderCard
from lamina_kv.push.inbox import Mailbox
from lamina_kv.push.letters import Fate, Letter, Lost, Opened
from lamina_kv.push.messages import (
    NO_EPOCH,
    Announce,
    Delivered,
    Fenced,
    Goodbye,
    LinkMessage,
    Welcome,
)
from protocol.decode import Arrived, Decode
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
        "close_prefill",
        "crash_decode",
        "preempt",
        "abort_prefill",
        "abort_decode",
        "never_prefill",
        "never_decode",
        "withdraw",
        "write_fails",
        "deadline",
        "lag",
        "tarry",
        "stop_prefill",
        "hang_prefill",
        "deaf",
    }
)
"""Everything that may go wrong."""

HURRIES = frozenset({"patience", "moment", "second", "silence"})
"""How time may pass although something else could happen: a day and some seconds for a prefill
engine, a second and some for a decode engine."""

EXCUSES = frozenset({"hang_prefill", "crash_prefill"})
"""After one of these a decode engine may wait to its deadline; otherwise somebody must say why not.
"""

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

    def copy(self, keys: tuple[bytes, ...]) -> list[tuple[bytes, bytes]]:
        """What :meth:`of` makes the same engines of.

        Args:
            keys: what :meth:`keys` says of them now.
        """
        return [
            (dump(self._awake[i]) if i in self._awake else self._asleep[i][0], key)
            for i, key in enumerate(keys)
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
        address: where it was dialled.
        accepted: whether the listening side has taken it up.
        opened: whether the dialling side has been welcomed.
        decode_up: whether the dialling side has it.
        prefill_up: whether the listening side takes it for the present one.
        number: tells it from others that there are.
        reader: incarnation of the listening side that still reads from it; empty for none.
        queued: messages that wait for the welcome.
        announced: epoch of the newest attempt that was announced on it.
    """

    decode: int
    name: str
    prefill: int
    address: str
    number: int
    accepted: bool = False
    opened: bool = False
    decode_up: bool = True
    prefill_up: bool = False
    reader: str = ""
    queued: list[LinkMessage] = field(default_factory=list)
    announced: int = NO_EPOCH
    to_prefill: deque[LinkMessage] = field(default_factory=deque)
    to_decode: deque[LinkMessage] = field(default_factory=deque)

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

Keys = tuple[tuple[bytes, ...], tuple[bytes, ...], bytes]
"""Equal for histories that have come to the same."""


class World:
    """See the module.

    Args:
        options: what there is.

    Attributes:
        budget: faults that may still happen.
        hurries: how often time may still pass early.
        dials: how often the address was dialled that all prefill engines share.
        happened: kinds of what has gone wrong.
        orphans: writes that their engine can do nothing about, because they have failed, or it has
            crashed and is not started again.
        notices: on their way: who says it, the rank that is meant, what is said.
        unfenced: attempts of which something was on its way when their prefill engine ended.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.budget = options.budget
        self.hurries = options.hurries
        self.dials = 0
        self.happened: tuple[str, ...] = ()
        cases = options.cases
        self.prefills = Engines(
            [Prefill(i, 0, options) for i in range(1 + max(c.prefill for c in cases))]
        )
        self.decodes = Engines(
            [Decode(i, 0, options) for i in range(1 + max(c.decode for c in cases))]
        )
        parts = [case.part for case in cases]
        self.to_arrive_prefill = [i for i, part in enumerate(parts) if part != "decode"]
        self.to_arrive_decode = [i for i, part in enumerate(parts) if part != "prefill"]
        self.down: list[int] = []
        self.connections: list[Connection] = []
        self.orphans: list[Orphan] = []
        self.notices: list[tuple[str, int, Delivered]] = []
        self.unfenced: set[tuple[str, int]] = set()

    # -- copies ------------------------------------------------------------------------------

    def copy(self, keys: Keys | None = None) -> Copy:
        """All of it; :meth:`of` makes another one of that.

        Args:
            keys: what :meth:`keys` says now, if it was asked already.
        """
        prefills, decodes, _ = keys or self.keys()
        copies = self.prefills.copy(prefills), self.decodes.copy(decodes)
        return self.options, *copies, dump(self._rest())

    @staticmethod
    def of(copy: Copy) -> World:
        options, prefills, decodes, rest = copy
        world = World.__new__(World)
        world.options = options
        world.prefills = Engines.of(prefills)
        world.decodes = Engines.of(decodes)
        (
            world.budget,
            world.hurries,
            world.dials,
            world.happened,
            world.to_arrive_prefill,
            world.to_arrive_decode,
            world.down,
            world.connections,
            world.orphans,
            world.notices,
            unfenced,
        ) = pickle.loads(rest)
        world.unfenced = set(unfenced)
        return world

    def keys(self) -> Keys:
        """See :data:`Keys`."""
        return self.prefills.keys(), self.decodes.keys(), dump(self._rest(), compare=True)

    def key(self) -> int:
        """A hash of :meth:`keys`."""
        return hash(self.keys())

    def _rest(self) -> tuple[object, ...]:
        return (
            self.budget,
            self.hurries,
            self.dials,
            self.happened,
            self.to_arrive_prefill,
            self.to_arrive_decode,
            self.down,
            self.connections,
            self.orphans,
            self.notices,
            sorted(self.unfenced),
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
            if not prefill.stopped:
                yield from self._landings(prefill)
                for rank in prefill.ranks:
                    if rank.heard:
                        yield "hear", prefill.index, rank.rank
        for decode in self.decodes:
            for rank_index in sorted({item.rank for item in decode.arrived}):
                yield "take_up", decode.index, rank_index
        for number in range(len(self.notices)):
            yield "notice", number
        for prefill in self._going():
            for name, request in prefill.requests.items():
                if request.stage == "loading":
                    yield "loaded", prefill.index, name
                if request.stage == "running" and request.computed == request.case.tokens:
                    yield "end_prefill", prefill.index, name
            if prefill.awake:
                yield "step_prefill", prefill.index
                if self.options.beside and prefill.requests and self._unread(prefill):
                    yield "read_in_step", prefill.index, "planned"
                    yield "read_in_step", prefill.index, "ordered"
        for decode in self.decodes:
            for name, request_there in decode.requests.items():
                if request_there.stage in ("resumed", "recomputed"):
                    yield "end_decode", decode.index, name
            if decode.awake:
                yield "step_decode", decode.index
        yield from self._arrivals()

    def late(self) -> Iterator[Event]:
        """What may happen at any time, or never."""
        for number in range(len(self.orphans)):
            yield "land_orphan", number
        for prefill in self._living():
            if not prefill.goes_on:
                yield "go_on", prefill.index
            if prefill.stopped:
                yield from self._landings(prefill)

    def _landings(self, prefill: Prefill) -> Iterator[Event]:
        for rank in prefill.ranks:
            for number in range(len(rank.writes())):
                yield "land", prefill.index, rank.rank, number

    def _arrivals(self) -> Iterator[Event]:
        for case in self.to_arrive_prefill:
            if self._goes_on(self.options.cases[case].prefill):
                yield "arrive_prefill", case
        for case in self.to_arrive_decode:
            yield "arrive_decode", case

    def _link_events(self) -> Iterator[Event]:
        for number, link in enumerate(self.connections):
            listens = self._listens(link)
            if link.decode_up and not link.accepted and listens:
                yield "accept", number
            if link.to_prefill and link.reader and listens and self._reads(link):
                yield "read_prefill", number
            if link.to_decode and link.decode_up:
                yield "read_decode", number
            if link.prefill_up and not link.decode_up and listens:
                yield "break_prefill", number
            if link.decode_up and not link.to_decode:
                if self._unreachable(link):
                    yield "break_decode", number
                elif link.prefill not in self.down and self.prefills[link.prefill].stopped:
                    yield "silent", number

    def _unread(self, prefill: Prefill) -> list[int]:
        """Connections on which something has come to a prefill engine."""
        return [
            number
            for number, link in enumerate(self.connections)
            if link.prefill == prefill.index
            and link.to_prefill
            and link.reader
            and self._listens(link)
            and self._reads(link)
        ]

    def _reads(self, link: Connection) -> bool:
        return self.prefills[link.prefill].incarnation == link.reader

    def _unreachable(self, link: Connection) -> bool:
        """Whether the dialling side will find that nobody is there."""
        if not link.accepted:
            return link.prefill in self.down
        return not link.prefill_up

    def faults(self) -> Iterator[Event]:
        """What may go wrong, and time that passes early."""
        for event in self._possible_faults():
            left = self.hurries if event[0] in HURRIES else self.budget
            if left and event[0] in self.options.faults:
                yield event

    def _possible_faults(self) -> Iterator[Event]:
        if not (self.budget or self.hurries):
            return
        for number, link in enumerate(self.connections):
            if link.prefill_up and link.decode_up:
                yield "break_prefill", number
            if link.decode_up and (link.to_decode or not self._unreachable(link)):
                # Whoever writes listens: a call to it may be lost, but nobody says it is not there.
                if link.accepted or not self.sends:
                    yield "break_decode", number
                yield "silent", number
        if any(decode.outbox for decode in self.decodes):
            return
        for prefill in self._living():
            yield "crash_prefill", prefill.index
            if not prefill.stopped:
                yield "close_prefill", prefill.index
            for rank in prefill.ranks:
                for number in range(len(rank.writes())):
                    yield "write_fails", prefill.index, rank.rank, number
                    yield "lag", prefill.index, rank.rank, number
                if rank.heard:
                    yield "deaf", prefill.index, rank.rank
        for prefill in self._going():
            yield "stop_prefill", prefill.index
            yield "hang_prefill", prefill.index
            if prefill.source._outbound:
                yield "patience", prefill.index
                yield "moment", prefill.index
            for push in prefill.source._outbound:
                yield "withdraw", prefill.index, push
            for name, request in prefill.requests.items():
                if request.stage == "running":
                    yield "preempt", prefill.index, name
                if request.stage != "running" or request.computed < request.case.tokens:
                    yield "abort_prefill", prefill.index, name
        for decode in self.decodes:
            if decode.target._inbound and not self._dialling(decode):
                yield "second", decode.index
                yield "silence", decode.index
            if decode.awake:
                yield "tarry", decode.index
            yield "crash_decode", decode.index
            for name, request_there in decode.requests.items():
                if request_there.stage == "parked":
                    yield "abort_decode", decode.index, name
            for epoch in decode.expected:
                yield "deadline", decode.index, epoch
        for case in self.to_arrive_prefill:
            yield "never_prefill", case
        for case in self.to_arrive_decode:
            yield "never_decode", case

    def _dialling(self, decode: Decode) -> bool:
        """Whether a connection waits for its welcome, or one is over on one side alone: each for
        less than a silence."""
        mine = [link for link in self.connections if link.decode == decode.index]
        return any(
            not link.opened if link.decode_up else link.prefill_up and self._listens(link)
            for link in mine
        )

    def _listens(self, link: Connection) -> bool:
        return link.prefill not in self.down and not self.prefills[link.prefill].stopped

    def time(self) -> list[Event]:
        """What happens when nothing else does: the next thing that somebody waits for."""
        return list(islice(self._waits(), 1))

    def _waits(self) -> Iterator[Event]:
        for decode in self.decodes:
            target = decode.target
            if any(self._is_short(inbound, decode.now) for inbound in target._inbound.values()):
                yield "second", decode.index
            for epoch in decode.expected:
                yield "run_out", decode.index, epoch
            if decode.requests or any(i.until < inf for i in target._inbound.values()):
                yield "silence", decode.index
        for prefill in self._living():
            if not prefill.goes_on:
                yield "go_on", prefill.index
        for decode in self.decodes:
            mine = any(orphan.name[0] == decode.incarnation for orphan in self.orphans)
            if mine or decode.target.due < inf:
                yield "silence", decode.index
        for prefill in self._living():
            stages = {out.stage for out in prefill.source._outbound.values()}
            if stages - {SourceStage.STOPPED}:  # nobody pokes an engine whose pushes have stopped
                yield "forget", prefill.index

    @staticmethod
    def _is_short(inbound: Inbound, now: float) -> bool:
        """Whether a second more or less is the question."""
        announced = inbound.stage is Stage.ANNOUNCED and not inbound.whereabouts.here
        absent = announced and not inbound.reason and inbound.whereabouts.absent is not None
        return absent or inbound.until <= now + SETTLE

    @property
    def _one_sided(self) -> bool:
        if self.options.together:
            return True  # a router may ask one of them, and a dial reach another
        return any(case.part != "both" for case in self.options.cases)

    @property
    def sends(self) -> bool:
        """Whether a page is on its way."""
        return any(rank.streams for prefill in self._living() for rank in prefill.ranks)

    def _living(self) -> list[Prefill]:
        return [prefill for prefill in self.prefills if prefill.index not in self.down]

    def _going(self) -> list[Prefill]:
        return [prefill for prefill in self._living() if prefill.goes_on]

    def _goes_on(self, index: int) -> bool:
        return index not in self.down and self.prefills[index].goes_on

    # -- what happens ------------------------------------------------------------------------

    def run(self, event: Event, *, fault: bool = False) -> None:
        """Let something happen.

        Raises:
            ProtocolViolationError: if it must not have.
        """
        if fault:
            self.happened = tuple(sorted({*self.happened, str(event[0])}))
            self.hurries -= event[0] in HURRIES
            self.budget -= event[0] not in HURRIES
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
        self._check_goodbyes()

    def _arrive_prefill(self, case: int) -> None:
        self.to_arrive_prefill.remove(case)
        push = self.options.cases[case]
        name, prompt = self.options.push_of(case), self.options.prompt_of(case)
        self.prefills[push.prefill].arrive(f"request{case}", name, prompt, push)

    def _arrive_decode(self, case: int) -> None:
        self.to_arrive_decode.remove(case)
        push = self.options.cases[case]
        name, prompt = self.options.push_of(case), self.options.prompt_of(case)
        address = address_of(0 if self.options.together else push.prefill)
        self.decodes[push.decode].arrive(f"request{case}", name, prompt, push, address)

    def _never_prefill(self, case: int) -> None:
        self.to_arrive_prefill.remove(case)

    def _never_decode(self, case: int) -> None:
        self.to_arrive_decode.remove(case)

    def _withdraw(self, index: int, push: str) -> None:
        """A router says that no decode engine will ask for it, whether that is so or not."""
        prefill = self.prefills[index]
        prefill.source.withdraw(push, "carrier")
        prefill.exchange()

    def _step_prefill(self, index: int) -> None:
        self.prefills[index].step()

    def _read_in_step(self, index: int, when: str) -> None:
        """The link reads, and the ranks hear of it, while a step is under way."""
        prefill = self.prefills[index]

        def read() -> None:
            for number in self._unread(prefill):
                self._read_prefill(number)
            for rank in prefill.ranks:
                while rank.heard:
                    prefill.hear(rank)

        prefill.step(**{when: read})

    def _hear(self, index: int, rank: int) -> None:
        prefill = self.prefills[index]
        prefill.hear(prefill.ranks[rank])

    def _deaf(self, index: int, rank: int) -> None:
        """What is said beside the plans does not arrive."""
        self.prefills[index].ranks[rank].heard.clear()

    def _loaded(self, index: int, push: str) -> None:
        self.prefills[index].loaded(push)

    def _preempt(self, index: int, push: str) -> None:
        self.prefills[index].preempt(push)

    def _end_prefill(self, index: int, push: str) -> None:
        self.prefills[index].end(push)

    _abort_prefill = _end_prefill

    def _stop_prefill(self, index: int) -> None:
        self.prefills[index].stopped = True

    def _hang_prefill(self, index: int) -> None:
        self.prefills[index].hung = True

    def _go_on(self, index: int) -> None:
        prefill = self.prefills[index]
        prefill.stopped = prefill.hung = False

    def _patience(self, index: int) -> None:
        self._pass_prefill(index, PATIENCE)

    def _forget(self, index: int) -> None:
        """Patience ends because nothing else happens any more."""
        if not (self.happened or self._one_sided):
            raise ProtocolViolationError(f"P{index} waits for something that nobody will say")
        self._patience(index)

    def _moment(self, index: int) -> None:
        self._pass_prefill(index, SILENCE)

    def _pass_prefill(self, index: int, seconds: float) -> None:
        prefill = self.prefills[index]
        prefill.now += seconds
        prefill.step()

    def _step_decode(self, index: int) -> None:
        self.decodes[index].step()

    def _tarry(self, index: int) -> None:
        """A step is planned, and the ranks are busy."""
        self.decodes[index].step(carry_out=False)

    def _end_decode(self, index: int, push: str) -> None:
        self.decodes[index].end(push)

    _abort_decode = _end_decode

    def _deadline(self, index: int, epoch: int) -> None:
        self.decodes[index].run_out(epoch)

    def _run_out(self, index: int, epoch: int) -> None:
        """A deadline passes because nothing else happens any more."""
        if not EXCUSES.intersection(self.happened):
            raise ProtocolViolationError(f"nobody says what becomes of attempt {epoch}")
        self._deadline(index, epoch)

    def _second(self, index: int) -> None:
        self._pass_decode(index, SETTLE)

    def _silence(self, index: int) -> None:
        self._pass_decode(index, SILENCE)

    def _pass_decode(self, index: int, seconds: float) -> None:
        decode = self.decodes[index]
        for rank in range(self.options.decode_ranks):
            decode.take_up(rank)
        decode.now += seconds
        for number, orphan in reversed(list(enumerate(self.orphans))):
            if orphan.name[0] == decode.incarnation and decode.now >= orphan.until:
                self._land_orphan(number)  # in the last moment
        if decode.awake or decode.target.due <= decode.now:
            decode.step()
        decode.check_waits()

    def _take_up(self, index: int, rank: int) -> None:
        self.decodes[index].take_up(rank)

    # -- writes and notices ------------------------------------------------------------------

    def _land(self, index: int, rank_index: int, number: int) -> None:
        prefill = self.prefills[index]
        rank = prefill.ranks[rank_index]
        name, _, sending, write = rank.writes()[number]
        self._arrives(prefill, name, write)
        sending.writes.remove(write)
        rank.settle(name)

    def _lag(self, index: int, rank_index: int, number: int) -> None:
        """A write is done as its sender sees it, and not yet as the rank that it is for does."""
        prefill = self.prefills[index]
        rank = prefill.ranks[rank_index]
        name, _, sending, write = rank.writes()[number]
        decode = self._decode_of(name[0])
        if decode is not None:
            content = tuple(prefill.content)
            decode.arrived.append(Arrived(write.route.rank, name[1], write, content))
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

    def _close_prefill(self, index: int) -> None:
        """It is told to end. What it says last waits for whoever reads it; what has not been read
        of what it was told never will be."""
        prefill = self.prefills[index]
        self.unfenced |= prefill.close()
        letters, prefill.letters = prefill.letters, []
        for letter in letters:
            self._post_prefill(prefill, letter)
        for link in self.connections:
            if link.prefill == index and link.prefill_up and link.decode_up:
                link.to_decode.append(prefill.source.goodbye(link.name))
        self._crash_prefill(index)

    def _check_goodbyes(self) -> None:
        """If nothing else goes wrong, a prefill engine that has ended leaves nothing in quarantine
        but what was on its way."""
        if self.happened != ("close_prefill",):
            return
        for decode in self.decodes.awake():
            for epoch, inbound in decode.target._inbound.items():
                name = decode.incarnation, int(epoch)
                if inbound.gone is not None and name not in self.unfenced:
                    raise ProtocolViolationError(f"nobody says that nothing is sent of {name}")

    def _restart(self, index: int) -> None:
        # What the former process, or a worker that outlives it, has sent may still arrive.
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
                prefill = self._dialled(letter.peer)
                taken = {connection.number for connection in self.connections}
                number = next(number for number in count() if number not in taken)
                link = Connection(index, decode.incarnation, prefill, letter.peer, number)
                decode.boxes[number] = Mailbox()
                self.connections.append(link)
            if isinstance(letter.message, Announce):
                link.announced = letter.message.attempt.epoch
            if not link.opened:
                link.queued.append(letter.message)
            elif link.prefill_up:
                link.to_prefill.append(letter.message)

    def _dialled(self, address: str) -> int:
        """Which prefill engine is reached."""
        if not self.options.together:
            return int(address.partition(":")[2])
        self.dials += 1
        return (self.dials - 1) % len(self.prefills)

    def _post_prefill(self, prefill: Prefill, letter: Letter) -> None:
        for link in self.connections:
            if link.prefill == prefill.index and link.name == letter.peer and link.prefill_up:
                if link.decode_up:
                    link.to_decode.append(letter.message)
                return

    def _accept(self, number: int) -> None:
        link = self.connections[number]
        prefill = self.prefills[link.prefill]
        link.accepted = True
        if any(
            former.prefill_up and (former.name, former.prefill) == (link.name, link.prefill)
            for former in self.connections
        ):
            self._break_decode(number)  # refused: it is connected, as far as is known here
            return
        link.prefill_up = True
        link.reader = prefill.incarnation
        ranks, heads = (
            self.options.decode_ranks,
            max(self.options.prefill_ranks, self.options.decode_ranks),
        )
        card = card_of(
            link.name,
            ranks,
            len(self.options.groups),
            heads,
            self.options.blocks,
            replicated=self.options.replicated,
        )
        box = prefill.boxes[link.number] = Mailbox()
        prefill.inbox.opened(box, Opened(link.name, link.name, card))
        ends = tuple(rank.end for rank in prefill.ranks)
        link.to_decode.append(
            Welcome(SenderCard(prefill.incarnation, self.options.replicated, ends))
        )

    def _read_prefill(self, number: int) -> None:
        """The link takes up all that is there; the engine, when it steps."""
        link = self.connections[number]
        prefill = self.prefills[link.prefill]
        box = prefill.boxes[link.number]
        while link.to_prefill:
            letter = Letter(link.name, link.to_prefill.popleft())
            if (never := prefill.inbox.letter(box, letter, 1)) is not None:
                prefill.check_fence((link.name, never.epoch))
                if link.decode_up:
                    link.to_decode.append(Fenced(never, clean=True))

    def _read_decode(self, number: int) -> None:
        link = self.connections[number]
        decode = self.decodes[link.decode]
        box = decode.boxes[link.number]
        while link.to_decode:
            message = link.to_decode.popleft()
            if isinstance(message, Goodbye):
                self._break_decode(number, goodbye=message)
                return
            if not isinstance(message, Welcome):
                decode.inbox.letter(box, Letter(link.address, message), 1)
                continue
            link.opened = True
            opened = Opened(link.address, message.card.incarnation, message.card)
            decode.inbox.opened(box, opened)
            queued, link.queued = link.queued, []
            if link.prefill_up:
                link.to_prefill.extend(queued)

    def _break_decode(
        self, number: int, fate: Fate = Fate.CLOSED, *, goodbye: Goodbye | None = None
    ) -> None:
        link = self.connections[number]
        link.decode_up = False
        link.to_decode.clear()
        unsent = tuple(m.attempt for m in link.queued if isinstance(m, Announce))
        lost = Lost(link.address, "lost", link.opened, fate, link.announced, unsent, goodbye)
        decode = self.decodes[link.decode]
        decode.inbox.lost(decode.boxes.pop(link.number), lost, forget=False)

    def _silent(self, number: int) -> None:
        self._break_decode(number, Fate.SILENT)

    def _break_prefill(self, number: int) -> None:
        self._lose(self.connections[number], "lost")

    def _lose(self, link: Connection, reason: str) -> None:
        """The listening side has a connection no more."""
        link.prefill_up, link.reader = False, ""
        link.to_prefill.clear()
        prefill = self.prefills[link.prefill]
        lost = Lost(link.name, reason, was_open=True, fate=Fate.CLOSED)
        prefill.inbox.lost(prefill.boxes.pop(link.number), lost, forget=True)

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
    keys = world.keys()
    before = world.copy(keys)
    for _ in range(limit):
        for kind in (World.normal, World.time):
            for event in list(kind(world)):
                world.run(event)
                if (after := world.keys()) != keys:
                    break
                world = World.of(before)
            else:
                continue
            before, keys = world.copy(after), after
            break
        else:
            world.check_clean()
            return world
    raise ProtocolViolationError("it never ends")
