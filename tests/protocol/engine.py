"""What both kinds of engine are made of: blocks, requests, and constants that copies share."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from typing import Any, cast
from zlib import crc32

from lamina_kv.config import BreakerConfig, PushConfig
from lamina_kv.control.breakers import BreakerState
from lamina_kv.control.cost import Costs
from lamina_kv.control.offers import Offer
from lamina_kv.control.push.inbound import Sender
from lamina_kv.control.push.inbound import Stage as TargetStage
from lamina_kv.control.push.open_prompts import OpenPrompts, RanksChannel
from lamina_kv.control.push.outbound import Outbound, Progress
from lamina_kv.control.push.outbound import Stage as SourceStage
from lamina_kv.control.push.room import Room
from lamina_kv.control.push.source import PushSource
from lamina_kv.control.push.target import PushTarget
from lamina_kv.control.requests import Hit, PushParameters, RequestRecord
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.transfers import Kind, State, Transfer, TransferTable
from lamina_kv.data.push_receives import Receive, Receives
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.keys import ChunkChain, Epoch
from lamina_kv.observe.metrics import Meter
from lamina_kv.plan import LoadMode, Outcome, ReceiveOrder, TransferReceipt
from lamina_kv.push.cards import EngineCard, RankCard, RowCard
from lamina_kv.push.inbox import Inbox, Mailbox, Take
from lamina_kv.push.letters import Fate, Letter, Lost, News, Opened
from lamina_kv.tiers.regard import USUAL, Regard
from lamina_kv.tiers.reuse import Standing, Use

BLOCK = 2
"""Tokens of a block."""

PATIENCE, QUARANTINE, SILENCE, SETTLE = 40.0, 10.0, 5.0, 1.0
"""Seconds; of silences a quarantine has two, so that a peer is asked while it lasts. No write takes
longer here than that, so it may be shorter than operators may have it."""

NULL = -1
CONFIG = PushConfig(deadline=PATIENCE, silence=SILENCE, min_tokens=1).model_copy(
    update={"quarantine": QUARANTINE}
)
NARROW = CONFIG.model_copy(update={"max_inflight": 1})
BREAKER = BreakerConfig(failures=1000)
COST = Costs()

Label = tuple[str, int, int, int]
"""What a block holds: prompt, group, index in the prompt, tokens that are filled."""


class ProtocolViolationError(AssertionError):
    """What must never happen; says what did."""


class Quiet:
    """A meter that keeps nothing."""

    def __reduce__(self) -> str:
        return "QUIET"

    def count(self, *_: object, **__: object) -> None: ...

    def observe(self, *_: object, **__: object) -> None: ...


QUIET = Quiet()
METER = cast(Meter, QUIET)


def no_time() -> float:
    return 0.0


@dataclass(frozen=True)
class PushCase:
    """One push of a history.

    Attributes:
        prefill: index of the prefill engine.
        decode: index of the decode engine.
        tokens: length of the prompt.
        push: the router's id of it; a router may use one twice.
        prompt: names the content of the prompt.
        part: ``both`` if the router asks both engines, else the only one that it asks.
        hit: where the prefill engine has a part of the prompt: ``none``, ``engine`` (its own
            cache), ``parked`` or ``layerwise`` (a tier).
        hit_tokens: how much that is.
        floor: tokens that the decode engine has in its own cache.
        misled: whether the router sends the two engines different prompts.
    """

    prefill: int = 0
    decode: int = 0
    tokens: int = 4
    push: str = ""
    prompt: str = ""
    part: str = "both"
    hit: str = "none"
    hit_tokens: int = 0
    floor: int = 0
    misled: bool = False


@dataclass(frozen=True)
class Options:
    """What a history is about.

    Attributes:
        cases: the pushes.
        prefill_ranks: ranks of every prefill engine.
        decode_ranks: ranks of every decode engine.
        groups: cache groups of the model.
        faults: kinds of faults that there are, see :class:`~protocol.world.World`.
        budget: how many of them may happen.
        replicated: whether every rank holds the same.
        narrow: whether next to nothing may be on its way at a time.
        chunk: tokens that a step computes of a prompt.
        hurries: how often time may pass although something else could happen.
        scarce: whether each engine has only as many blocks as its largest prompt twice.
        beside: whether the ranks of a prefill engine are reached beside its plans.
        together: whether all prefill engines are behind one address, and each dial reaches the next
            of them. None of them is stopped there.
    """

    cases: tuple[PushCase, ...] = (PushCase(),)
    prefill_ranks: int = 1
    decode_ranks: int = 1
    groups: tuple[Group, ...] = (Group(GroupKind.FULL, BLOCK),)
    faults: frozenset[str] = frozenset()
    budget: int = 0
    replicated: bool = False
    narrow: bool = False
    chunk: int = BLOCK
    hurries: int = 0
    scarce: bool = False
    beside: bool = False
    together: bool = False

    @cached_property
    def blocks(self) -> int:
        """Of each engine's pool: enough for everything at once, and as much for each fault; or
        barely enough."""
        needed = [-(-case.tokens // BLOCK) + 1 for case in self.cases]
        if self.scarce:
            return 2 * len(self.groups) * max(needed)
        return len(self.groups) * sum(needed) * (2 + self.budget)

    def prompt_of(self, case: int) -> str:
        """Names the content of a case's prompt."""
        return self.cases[case].prompt or f"prompt{case}"

    def tokens_of(self, prompt: str) -> int:
        """Length of a prompt."""
        return next(c.tokens for i, c in enumerate(self.cases) if self.prompt_of(i) == prompt)

    def push_of(self, case: int) -> str:
        """The id under which the router sends a case."""
        return self.cases[case].push or f"push{case}"

    @cached_property
    def shape(self) -> ChunkShape:
        return ChunkShape(BLOCK, self.groups, NULL)

    @property
    def config(self) -> PushConfig:
        return NARROW if self.narrow else CONFIG


_shared: list[object] = []
_indices: dict[int, int] = {}


def shared(index: int) -> object:
    """A constant, of which copies of a history have one."""
    return _shared[index]


def _reduce_shared(value: object) -> tuple[Callable[[int], object], tuple[int]]:
    index = _indices.get(id(value))
    if index is None:
        index = _indices[id(value)] = len(_shared)
        _shared.append(value)
    return shared, (index,)


_alike: dict[tuple[type, object], int] = {}


def _reduce_alike(value: object) -> tuple[Callable[[int], object], tuple[int]]:
    """Of values that are equal, and never change, copies of all histories have one."""
    named = type(value), value
    index = _alike.get(named)
    if index is None:
        index = _alike[named] = len(_shared)
        _shared.append(value)
    return shared, (index,)


@cache
def _names(kind: type) -> list[str]:
    return [part.name for part in fields(kind)]


def _reduce_frozen(value: object) -> tuple[type, tuple[object, ...]]:
    return type(value), tuple([getattr(value, name) for name in _names(type(value))])


def _reduce_table(table: TransferTable) -> tuple[Callable[..., TransferTable], tuple[object, ...]]:
    return _make_table, (table._ranks, table._next, list(table.live()))


def _make_table(ranks: int, last: int, live: list[Transfer]) -> TransferTable:
    table = TransferTable(ranks)
    table._next = last
    for transfer in live:
        table._live[transfer.id] = transfer
        table._bytes[transfer.kind] += transfer.size
        table._counts[transfer.kind] += 1
    return table


class Bell:
    """What wakes an engine."""

    def __init__(self) -> None:
        self.rung = False

    def __call__(self) -> None:
        self.rung = True


def _reduce_inbox(inbox: Inbox) -> tuple[Callable[..., Inbox], tuple[object, ...]]:
    return _make_inbox, (inbox._wake, inbox._take, inbox._news, list(inbox._filled), inbox._next)


def _make_inbox(
    wake: Bell, take: Take, news: dict[int, News], filled: list[Mailbox], last: int
) -> Inbox:
    inbox = Inbox(wake, take)
    inbox._news, inbox._filled, inbox._next = news, set(filled), last
    return inbox


def _reduce_news(inbox: Inbox) -> tuple[type, tuple[object, ...]]:
    return list, (list(inbox._news.values()),)


def _reduce_open_prompts(
    prompts: OpenPrompts,
) -> tuple[Callable[..., OpenPrompts], tuple[object, ...]]:
    state = (prompts._peers, prompts._open, prompts._taken)
    return _make_open_prompts, (prompts._shape, prompts._patience, prompts._channel, *state)


def _make_open_prompts(
    shape: ChunkShape, patience: float, channel: RanksChannel, *state: dict[str, Any]
) -> OpenPrompts:
    prompts = OpenPrompts(shape, patience, channel)
    prompts._peers, prompts._open, prompts._taken = state
    return prompts


def _reduce_what_is_open(prompts: OpenPrompts) -> tuple[type, tuple[object, ...]]:
    return tuple, ([sorted(prompts._peers), prompts._open, prompts._taken],)


def _reduce_mailbox(box: Mailbox) -> tuple[type, tuple[object, ...]]:
    cancelled = sorted(box.cancelled, key=lambda attempt: (attempt.push, attempt.epoch))
    return tuple, ([*box.announced, None, *cancelled, box.opened is None],)


_CONSTANTS = (PushConfig, BreakerConfig, Costs, ChunkShape, EngineCard, Group, Options)
_ENUMS = (Kind, State, SourceStage, TargetStage, LoadMode, Outcome, BreakerState, Fate)
_ALIKE = (Epoch, Offer, Progress, Regard, Sender, Standing, Use)
_FROZEN = (Letter, Opened, Lost, TransferReceipt, ReceiveOrder, PushParameters)
_TABLE: dict[type, Callable[[Any], Any]] = {
    **dict.fromkeys((*_CONSTANTS, *_ENUMS), _reduce_shared),
    **dict.fromkeys(_ALIKE, _reduce_alike),
    **dict.fromkeys(_FROZEN, _reduce_frozen),
    TransferTable: _reduce_table,
    Inbox: _reduce_inbox,
    OpenPrompts: _reduce_open_prompts,
    Hit: lambda _: (Hit, ()),
}


def _reduce_counter(value: Counter[Any]) -> tuple[type, tuple[object, ...]]:
    return tuple, (sorted(f"{key} {count}" for key, count in value.items() if count),)


def _reduce_in_order(value: object) -> tuple[type, tuple[()], dict[str, object]]:
    """Sets have an order, which says nothing, and is another one in each copy of a set."""
    return type(value), (), {name: _in_order(each) for name, each in _state_of(value).items()}


def _state_of(value: object) -> dict[str, Any]:
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return vars(value)


def _in_order(value: object) -> object:
    if isinstance(value, dict):
        return {key: _in_order(each) for key, each in value.items()}
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _reduce_target(value: PushTarget) -> tuple[type, tuple[()], dict[str, object]]:
    """What is said in the log, and published, decides nothing."""
    said = ("_failures", "_known")
    return PushTarget, (), {k: v for k, v in vars(value).items() if k not in said}


_COMPARED = {
    **_TABLE,
    PushTarget: _reduce_target,
    PushSource: _reduce_in_order,
    Room: _reduce_in_order,
    Receive: _reduce_in_order,
    Receives: _reduce_in_order,
    Outbound: _reduce_in_order,
    Inbox: _reduce_news,
    OpenPrompts: _reduce_what_is_open,
    Counter: _reduce_counter,
    Mailbox: _reduce_mailbox,
}


def dump(value: object, *, compare: bool = False) -> bytes:
    """A copy of a part of a history; one to ``compare`` does not depend on who shares what with
    whom."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = _COMPARED if compare else _TABLE
    pickler.fast = compare
    pickler.dump(value)
    return buffer.getvalue()


@cache
def card_of(
    incarnation: str, ranks: int, groups: int, heads: int, blocks: int, *, replicated: bool
) -> EngineCard:
    """An engine whose pages have ``heads`` heads over all its ranks."""
    share = heads if replicated else heads // ranks
    row = RowCard(0, 64, 4 * share, share, tuple(range(groups)))
    shapes = tuple(("any", BLOCK, 0) for _ in range(groups))
    return EngineCard(
        incarnation,
        b"model",
        replicated,
        shapes,
        tuple(RankCard(rank, b"", blocks, (row,)) for rank in range(ranks)),
    )


class Pool:
    """A block pool that gives away the lowest free block: one that is freed is soon reused.

    Attributes:
        references: of each block.
        freed: blocks that nobody has held since :meth:`take_freed`.
    """

    def __init__(self, blocks: int) -> None:
        self.references = [0] * blocks
        self.freed: list[int] = []

    def hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if not self.references[block]:
                raise ProtocolViolationError(f"block {block} is held, but it was free")
            self.references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """What a freed block held is nobody's: whoever reads it afterwards is wrong."""
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] < 0:
                raise ProtocolViolationError(f"block {block} is given back twice")
            if not self.references[block]:
                self.freed.append(block)

    def allocate(self) -> int:
        block = self.references.index(0)
        self.references[block] = 1
        return block

    def room(self) -> int:
        return self.references.count(0)

    def take_freed(self) -> list[int]:
        freed, self.freed = self.freed, []
        return freed


@dataclass
class View:
    """A request, as control sees it.

    Attributes:
        prompt: names the content of the prompt.
        tables: block ids per group.
        states: per recurrent group, the block of the state where it may go on.
    """

    request_id: str
    prompt: str
    num_prompt_tokens: int
    push: PushParameters | None
    tables: list[list[int]]
    states: dict[int, list[int]] = field(default_factory=dict)
    recompute_tokens: int = 1
    root_extra: bytes = b""
    regard = USUAL

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens

    def tokens(self) -> Sequence[int]:
        first = crc32(self.prompt.encode())
        return range(first, first + self.num_prompt_tokens)

    def chunk_extra(self, start: int, end: int) -> bytes:
        return b""

    def blocks(self, group: int) -> Sequence[int]:
        return self.tables[group]

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        return self.states[group]

    def held(self) -> list[int]:
        """Every block that the engine has given it."""
        tables = [*self.tables, *self.states.values()]
        return [block for table in tables for block in table if block != NULL]


def record_of(view: View) -> RequestRecord:
    """Control's record of a request; of its chunk keys a push looks at the epoch alone."""
    return RequestRecord(view, ChunkChain(b"", BLOCK))
