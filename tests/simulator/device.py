"""A simulated device: streams whose work runs late, in any order that their waits allow.

It makes the calls that :class:`~lamina_kv.data.movers.device.TorchDevice` makes, so that the real
mover runs on it. A seed decides how fast each stream is at the moment: at once, by the size of its
copies, or many times slower than that. Nothing runs before somebody waits or pumps. Half of a copy
may be made when it begins and the other half when it ends, and what it reads or writes must be
memory of the device or pinned memory.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from lamina_kv.data.movers.batched_copy import Batch
from lamina_kv.data.movers.device import Device, Event
from lamina_kv.data.movers.row_table import RowRange
from lamina_kv.data.near import Indices
from simulator.content import Violation

LAUNCH_SECONDS = 1e-5
BYTES_PER_SECOND = 1e6
"""Pages are small here: a row of a load of some chunks takes a fraction of a millisecond."""

PACES = (0.0, 1.0, 1.0, 30.0)
"""What the time of a copy is multiplied by."""

PATIENCE = 30.0
"""Real seconds after which a wait for a stream that stands still is a hang."""

PACE_CHANGES = 0.1
"""Of a piece of work, how probable it is that its stream has another pace from then on."""


class Time(Protocol):
    """Who lets time pass, and the device run in it."""

    def wait_for(self, done: Callable[[], bool], seconds: float = math.inf) -> bool:
        """Let time pass and the device run until ``done``, for ``seconds`` at most; returns
        whether it is."""


class SimulatedEvent(Event):
    """A point in a stream.

    Attributes:
        passed_at: when it has passed; infinity while it has not.
        host_waits: how often the host has waited for it.
    """

    def __init__(self, device: SimulatedDevice, *, timed: bool) -> None:
        self._device = device
        self.timed = timed
        self.passed_at = math.inf
        self.host_waits = 0

    def wait(self) -> None:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        self.host_waits += 1
        self._device.wait_for(self.passed)

    def passed(self) -> bool:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        self._device.check()
        return self.is_over

    @property
    def is_over(self) -> bool:
        """Whether streams that wait for it may go on."""
        return self.passed_at < math.inf or self._device.dead

    def passes_within(self, seconds: float) -> bool:
        """See :class:`~lamina_kv.data.movers.fences.Fence`."""
        self.host_waits += 1
        return self._device.wait_for(self.passed, seconds)

    def seconds_since(self, earlier: Event) -> float:
        """See :class:`~lamina_kv.data.movers.device.Event`."""
        assert isinstance(earlier, SimulatedEvent)
        self._device.check()
        if not (self.timed and earlier.timed and self.passed() and earlier.passed()):
            raise Violation("the time between two events was asked, which are not timed or passed")
        return self.passed_at - earlier.passed_at


class Work:
    """Something that a stream does.

    Args:
        end: called when it is over.
        seconds: how long it takes.
    """

    def __init__(self, end: Callable[[], None], seconds: float) -> None:
        self.end = end
        self.seconds = seconds
        self.due = math.inf

    def begin(self) -> None:
        """It begins."""


class Copy(Work):
    """A copy of pages, some of which are moved when it begins and the others when it ends.

    Args:
        move: moves the pages of some of the pairs.
        early: how many are moved when it begins.
        seconds: how long it takes.
    """

    def __init__(self, move: Callable[[slice], None], early: int, seconds: float) -> None:
        super().__init__(lambda: move(slice(early, None)), seconds)
        self._move = move
        self._early = early

    def begin(self) -> None:
        """See :class:`Work`."""
        self._move(slice(self._early))


class SimulatedStream:
    """One stream of a device.

    Attributes:
        priority: as it was made.
        pace: what the time of its work is multiplied by.
        held: whether nothing of it runs for now, because the test wants so.
        log: what it was given last: the kind of it, and the event if it has one.
    """

    def __init__(self, device: SimulatedDevice, priority: int) -> None:
        self.priority = priority
        self.pace = 1.0
        self.held = False
        self.log: deque[tuple[str, SimulatedEvent | None]] = deque(maxlen=1000)
        self._device = device
        self._queue: deque[Work | tuple[str, SimulatedEvent]] = deque()

    @property
    def idle(self) -> bool:
        """Whether there is nothing in it."""
        return not self._queue

    def clear(self) -> None:
        """Nothing in it goes on."""
        self._queue.clear()

    def append(self, kind: str, what: Work | SimulatedEvent) -> None:
        """Give it something more to do."""
        event = what if isinstance(what, SimulatedEvent) else None
        self.log.append((kind, event))
        self._queue.append(what if isinstance(what, Work) else (kind, what))

    def head(self, now: float) -> Work | None:
        """The work that is next or under way; None if there is none, or it must wait."""
        while self._queue and not self.held:
            first = self._queue[0]
            if isinstance(first, Work):
                if first.due == math.inf:
                    first.due = now + first.seconds * self._device.pace_of(self)
                    first.begin()
                return first
            kind, event = first
            if kind == "record":
                event.passed_at = now
                self._device.passed_events += 1
            elif not event.is_over:
                return None
            self._queue.popleft()
        return None

    def finish(self) -> None:
        """The work at its head is over."""
        work = self._queue[0]
        assert isinstance(work, Work)
        work.end()
        self._queue.popleft()


@dataclass(frozen=True, eq=False)
class Launch:
    """A copy that was made.

    Attributes:
        stream: in which stream.
        rows: of how many rows.
        pairs: which pages, near and of the engine.
        to_engine: the direction.
    """

    stream: SimulatedStream
    rows: int
    pairs: npt.NDArray[np.int64]
    to_engine: bool


Upload = tuple[SimulatedStream, weakref.ref[torch.Tensor]]
"""The stream that indices were uploaded in, and the indices."""


class SimulatedDevice(Device[SimulatedStream]):
    """See the module. Thread safe.

    Args:
        memory: tensors that are its own. Nobody but its streams reads or writes them.
        random: decides.
        time: who lets time pass; None is a time of its own, which passes while somebody waits.
        copy_engines: whether it has some.

    Attributes:
        compute: the stream of the engine.
        streams: all streams.
        passed_events: how many events have passed.
        dead: whether it was killed. Nobody waits for it then.
        copies: the copies that were made last.
        registered: the length of what is pinned, by its address.
        chosen_by: threads that have chosen the device.
        check_load: called with near pages and pages of the engine when a copy into the engine
            begins, and when it ends.
        pins: what each call of :meth:`register` takes one of; None if it need not.
        pin_error: why nothing can be pinned; empty if it can.
        most_pinned: the most bytes that one call of :meth:`register` can pin.
        launches_left: kernels that can still be launched; the next one raises.
        error: why every call fails from now on; empty while none does.
        batches: what the copy engines were given last, and in which stream.
        refuses: whether its driver refuses what they are given.
    """

    def __init__(
        self,
        memory: Sequence[torch.Tensor],
        random: Random,
        time: Time | None = None,
        *,
        copy_engines: bool = False,
    ) -> None:
        self._memory = tuple(memory)
        self._random = random
        self._time = time
        self._now = 0.0
        self._changed = threading.Condition(threading.RLock())
        self._uploads: dict[int, Upload] = {}
        self._current = threading.local()
        self._pinned: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.streams: list[SimulatedStream] = []
        self.compute = self.stream(0)
        self.changes_pace = True
        self.dead = False
        self.passed_events = 0
        self.copies: deque[Launch] = deque(maxlen=1000)
        self.registered: dict[int, int] = {}
        self.chosen_by: list[threading.Thread] = []
        self.check_load: Callable[[Indices, Indices], object] = lambda near, pages: None
        self.pins: threading.Semaphore | None = None
        self.pin_error = ""
        self.most_pinned = sys.maxsize
        self.launches_left = sys.maxsize
        self.error = ""
        self.copy_engines = copy_engines
        self.batches: deque[tuple[SimulatedStream, Batch]] = deque(maxlen=1000)
        self.refuses = False

    # -- what a mover calls ----------------------------------------------------------------------

    def choose(self) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        self.chosen_by.append(threading.current_thread())

    def stream(self, priority: int) -> SimulatedStream:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        stream = SimulatedStream(self, priority)
        self.streams.append(stream)
        return stream

    def current_stream(self) -> SimulatedStream:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        return getattr(self._current, "stream", self.compute)

    def record(self, stream: SimulatedStream, *, timed: bool = False) -> Event:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        event = SimulatedEvent(self, timed=timed)
        with self._changed:
            stream.append("record", event)
            self._changed.notify_all()
        return event

    def hold(self, stream: SimulatedStream, event: Event) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        assert isinstance(event, SimulatedEvent)
        with self._changed:
            stream.append("wait", event)

    def upload(self, stream: SimulatedStream, values: Indices) -> torch.Tensor:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        self._check_current(stream)
        there, content = torch.full(values.shape, -1, dtype=torch.int64), values.copy()

        def arrive() -> None:
            there.numpy()[...] = content

        with self._changed:
            key = id(there)
            self._uploads[key] = (
                stream,
                weakref.ref(there, lambda _: _drop(self._uploads, key)),
            )
            stream.append("upload", Work(arrive, 0.0))
            self._changed.notify_all()
        return there

    @contextmanager
    def on(self, stream: SimulatedStream) -> Iterator[None]:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        before, self._current.stream = self.current_stream(), stream
        yield
        self._current.stream = before

    def copy(
        self,
        stream: SimulatedStream,
        near: torch.Tensor,
        rows: torch.Tensor,
        part: RowRange,
        pairs: torch.Tensor,
        *,
        to_engine: bool,
    ) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        self._check_current(stream)
        if not self.launches_left:
            raise RuntimeError("the simulated device refuses this launch")
        self.launches_left -= 1
        table, indices = self._reader(stream, rows), self._reader(stream, pairs)

        def move(moved: slice) -> None:
            entries = table()[part.first : part.first + part.count].tolist()
            ids, shape = indices()[moved], part.shape
            if moved.start is not None:
                self.copies.append(Launch(stream, part.count, indices(), to_engine))
            if not len(ids):
                return
            pages, blocks = ids[:, 0], ids[:, 1]
            if to_engine:
                self.check_load(pages, blocks)
            for base, offset in entries:
                engine = self._pages(base, shape.block_stride, shape.page_bytes, blocks)
                start, stride = near.data_ptr() + offset, shape.slot_bytes
                extent = shape.slot_pages * shape.page_bytes
                slots = self._pages(start, stride, extent, pages // shape.slot_pages)
                held = slots.reshape(len(slots), shape.slot_pages, -1)
                if to_engine:
                    engine[blocks] = held[pages // shape.slot_pages, pages % shape.slot_pages]
                else:
                    held[pages // shape.slot_pages, pages % shape.slot_pages] = engine[blocks]

        size = len(pairs) * part.count * part.shape.page_bytes
        with self._changed:
            early = self._random.randint(0, len(pairs))
            stream.append("copy", Copy(move, early, LAUNCH_SECONDS + size / BYTES_PER_SECOND))
            self._changed.notify_all()

    @property
    def has_copy_engines(self) -> bool:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        return self.copy_engines

    def copy_batch(self, stream: SimulatedStream, batch: Batch) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        if self.refuses:
            raise RuntimeError("the simulated driver refuses this copy")
        copies = list(
            zip(batch.sources.tolist(), batch.targets.tolist(), batch.sizes.tolist(), strict=True)
        )
        for source, target, size in copies:
            if not (self._owns_at_once(source, size) and self._owns_at_once(target, size)):
                raise Violation(
                    f"a copy of {size} bytes lies in memory that is not one range of the device's "
                    "own, or that one call has pinned"
                )

        def move(moved: slice) -> None:
            if moved.start is not None:
                self.batches.append((stream, batch))
            for source, target, size in copies[moved]:
                ctypes.memmove(target, source, size)

        with self._changed:
            early = self._random.randint(0, len(copies))
            seconds = LAUNCH_SECONDS + int(batch.sizes.sum()) / BYTES_PER_SECOND
            stream.append("copy", Copy(move, early, seconds))
            self._changed.notify_all()

    def pinned(self, size: int) -> torch.Tensor:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        memory = torch.empty(size, dtype=torch.uint8)
        self._pinned.add(memory)
        return memory

    @property
    def numa_node(self) -> int | None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        return None

    def register(self, address: int, length: int) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        if self.pins is not None and not self.pins.acquire(timeout=30):
            raise Violation("nobody lets this piece of memory be pinned")
        if threading.current_thread() not in self.chosen_by:
            raise Violation("a thread pins memory for a device that it has not chosen")
        if self.pin_error or length > self.most_pinned:
            raise RuntimeError(self.pin_error or "out of memory")
        with self._changed:
            self.registered[address] = length

    def unregister(self, address: int) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        del self.registered[address]

    def synchronize(self, stream: SimulatedStream) -> None:
        """See :class:`~lamina_kv.data.movers.device.Device`."""
        self.wait_for(lambda: stream.idle)

    # -- what the engine does --------------------------------------------------------------------

    def launch(
        self,
        run: Callable[[], None],
        seconds: float = LAUNCH_SECONDS,
        stream: SimulatedStream | None = None,
    ) -> None:
        """Have a stream, the compute stream if None, call ``run``, some time."""
        with self._changed:
            (stream or self.compute).append("kernel", Work(run, seconds))

    # -- time ------------------------------------------------------------------------------------

    def pace_of(self, stream: SimulatedStream) -> float:
        """The pace of a stream for its next piece of work."""
        if self.changes_pace and self._random.random() < PACE_CHANGES:
            stream.pace = self._random.choice(PACES)
        return stream.pace

    def soonest(self, now: float) -> float:
        """When something can be over; infinity if nothing is under way."""
        with self._changed:
            return min((work.due for _, work in self._heads(now)), default=math.inf)

    def _heads(self, now: float) -> list[tuple[SimulatedStream, Work]]:
        """What is next or under way in each stream that need not wait."""
        while True:
            passed = self.passed_events
            heads = [(stream, stream.head(now)) for stream in self.streams]
            if self.passed_events == passed:  # else streams before may go on
                return [(stream, work) for stream, work in heads if work is not None]

    def run_one(self, now: float) -> bool:
        """End one piece of work that is due; says whether there was one."""
        with self._changed:
            due = [stream for stream, work in self._heads(now) if work.due <= now]
            if not due:
                return False
            self._random.choice(due).finish()
            return True

    def wait_for(self, done: Callable[[], bool], seconds: float = math.inf) -> bool:
        """Let time pass until ``done``, but wait for ``seconds`` at most while nothing can run;
        returns whether it is."""
        if self._time is not None:
            return self._time.wait_for(done, seconds)
        with self._changed:
            while not done():
                if self.run_one(self._now):
                    self._changed.notify_all()
                elif (soonest := self.soonest(self._now)) < math.inf:
                    self._now = soonest
                elif not done() and not self._changed.wait(min(seconds, PATIENCE)):
                    if seconds <= PATIENCE:
                        return False
                    raise Violation("somebody waits for an event that never passes")
        return True

    def check(self) -> None:
        """Raise the error of a device that has failed.

        Raises:
            RuntimeError: if it has.
        """
        if self.error:
            raise RuntimeError(self.error)

    def fail(self, error: str) -> None:
        """Nothing runs any more, and every question is answered with an error."""
        with self._changed:
            self.error = error
            for stream in self.streams:
                stream.clear()
            self._changed.notify_all()

    def release(self, stream: SimulatedStream) -> None:
        """A stream that was held may run."""
        with self._changed:
            stream.held = False
            self._changed.notify_all()

    def kill(self) -> None:
        """Nothing that is under way goes on."""
        with self._changed:
            self.dead = True
            for stream in self.streams:
                stream.clear()

    def settle(self) -> None:
        """Let everything that can run come to its end."""
        with self._changed:
            while (soonest := self.soonest(self._now)) < math.inf:
                self._now = max(self._now, soonest)
                self.run_one(self._now)

    # -- memory ----------------------------------------------------------------------------------

    def _check_current(self, stream: SimulatedStream) -> None:
        if self.current_stream() is not stream:
            raise Violation("memory or work is asked for on a stream that is not the current one")

    def _reader(
        self, stream: SimulatedStream, uploaded: torch.Tensor
    ) -> Callable[[], npt.NDArray[np.int64]]:
        """What reads uploaded indices when the device gets there."""
        uploaded_in, reference = self._uploads[id(uploaded)]
        # What is dropped is given away in the order of the stream that it was made for.
        kept = uploaded if uploaded_in is stream else None

        def read() -> npt.NDArray[np.int64]:
            there = reference() if kept is None else kept
            if there is None:
                raise Violation("indices were dropped before the device had read them")
            values: npt.NDArray[np.int64] = there.numpy()
            if (values < 0).any():
                raise Violation("indices are read before they are on the device")
            return values

        return read

    def _pages(self, base: int, stride: int, size: int, ids: Indices) -> npt.NDArray[np.uint8]:
        """All pages up to the last of ``ids``; shape ``(pages, size)``."""
        begin, last = base + int(ids.min()) * stride, int(ids.max())
        end = base + last * stride + size
        if not self._owns(begin, end):
            raise Violation(
                f"the device uses {end - begin} bytes that are neither its own nor pinned"
            )
        memory = np.frombuffer((ctypes.c_uint8 * (end - base)).from_address(base), np.uint8)
        return np.lib.stride_tricks.as_strided(memory, (last + 1, size), (stride, 1))

    def _owns_at_once(self, begin: int, size: int) -> bool:
        """Whether bytes are in one tensor of its own, or in one range that is pinned."""
        ranges = [*self.registered.items()]
        ranges += [(t.data_ptr(), t.nbytes) for t in (*self._memory, *self._pinned)]
        return any(start <= begin and begin + size <= start + length for start, length in ranges)

    def _owns(self, begin: int, end: int) -> bool:
        for tensor in (*self._memory, *self._pinned):
            if tensor.data_ptr() <= begin and end <= tensor.data_ptr() + tensor.nbytes:
                return True
        for address in sorted(self.registered):
            if address <= begin < address + self.registered[address]:
                begin = min(end, address + self.registered[address])
        return begin == end


def _drop(uploads: dict[int, Upload], key: int) -> None:
    uploads.pop(key, None)
