"""Lamina beside an engine that schedules and computes in one process, or in each of its ranks.

The scheduler's side and the worker's side are neighbours here: a plan is handed to the executor,
and receipts are handed back, by a call. The engine brings a
:class:`~lamina_kv.geometry.CacheGeometry` of its cache, a block pool that counts references, and a
view of each request. ``docs/engines.md`` says what it has to do then.

With several ranks every call is made on each of them, in the same order and with the same
arguments; see :mod:`lamina_kv.engines.ranks`.
"""

from __future__ import annotations

import logging
import math
import threading
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from lamina_kv.config import Config
from lamina_kv.control.leases import BlockPool
from lamina_kv.control.planner import Planner
from lamina_kv.control.reporting.summary import opening
from lamina_kv.control.requests import PushParameters
from lamina_kv.control.shape import ChunkShape
from lamina_kv.data.assembly import assemble
from lamina_kv.data.executor import Executor
from lamina_kv.data.movers import make_mover
from lamina_kv.data.replicas import Replicas
from lamina_kv.engines.hand_off import HandOff
from lamina_kv.engines.ranks import Ranks
from lamina_kv.geometry import CacheGeometry, Group
from lamina_kv.keys import Namespace
from lamina_kv.observe.metrics import Meter, Series
from lamina_kv.observe.traces import open_recorder
from lamina_kv.plan import LoadMode
from lamina_kv.tiers.contract import Tenant
from lamina_kv.tiers.regard import USUAL

log = logging.getLogger("lamina_kv.engines.standalone")


class TextRequest(ABC):
    """A request as control sees it, see :class:`~lamina_kv.control.requests.RequestView`, of an
    engine that has neither images nor salts, adapters, drafts or recurrent states. What is left to
    say is read at the moment of the call.

    Args:
        request_id: the engine's name for it.
    """

    recompute_tokens = 1
    root_extra = b""
    push: PushParameters | None = None
    regard = USUAL

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id

    @property
    @abstractmethod
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""

    @abstractmethod
    def tokens(self) -> Sequence[int]:
        """All known token ids: the prompt, and what was sampled so far."""

    @abstractmethod
    def blocks(self, group: int) -> Sequence[int]:
        """Its block ids of one group, in token order."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are known."""
        return len(self.tokens())

    def chunk_extra(self, start: int, end: int) -> bytes:
        """Nothing."""
        return b""

    def state_blocks(self, group: int, end: int) -> Sequence[int]:
        """None."""
        return ()


class LoadFailed(RuntimeError):
    """A load has failed under a request that was running."""


class Standalone:
    """See the module. Everything is called from the engine's thread, :meth:`close` from any once
    that has ended.

    Args:
        config: the whole tree.
        geometry: the engine's cache.
        groups: its cache groups.
        allocations: uint8 tensors that back it.
        namespace: everything but tokens that changes its bytes.
        pool: the engine's block pool.
        limit: requests that may have blocks at the same time.
        null_block: a block id that stands for none in the tables of requests.
        settle: called before loads begin. An engine that copies blocks on a stream of its own
            orders the calling thread's present stream behind it here: a load may go into a block
            that such a copy still reads or fills.
        shares: whether the engine has a prefix cache in which other requests find what was loaded
            for one.
        ranks: of which this is one; none for an engine in one process. They are closed with it.

    Attributes:
        hand_off: what the engine's scheduler asks.
        clock: the time that decisions are made by, monotonic seconds: on all ranks the same.

    Raises:
        ValueError: if a tier or a bound is smaller than one chunk, or if the configuration asks for
            pushes.
        StoreError: if the store cannot be used.
        RanksError: if the ranks are not alike, or another one cannot start.
    """

    def __init__(
        self,
        config: Config,
        geometry: CacheGeometry,
        groups: Sequence[Group],
        allocations: Sequence[torch.Tensor],
        namespace: Namespace,
        pool: BlockPool,
        *,
        limit: int,
        null_block: int = -1,
        settle: Callable[[], None] = lambda: None,
        shares: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        if config.push is not None:
            raise ValueError("push: engines push to each other with vLLM only; leave it out")
        self._ranks = ranks = ranks or Ranks.alone()
        self.clock = ranks.clock
        self._settle = settle
        self._meter = Meter()
        with ExitStack() as undo:
            undo.callback(ranks.close)
            ranks.agree("at the start", (config, geometry, tuple(groups), namespace, limit))

            def opened() -> Executor:
                executor = assemble(
                    config,
                    geometry,
                    make_mover(geometry, allocations),
                    rank=ranks.rank,
                    replicas=Replicas(ranks.rank, 1, lambda word: [word]),
                    slabs=ranks.neighbours,
                    tenant=Tenant(
                        namespace.hex,
                        namespace.describe(),
                        ranks.first_part + ranks.rank,
                        None,
                        geometry.object_bytes,
                        ranks.rank,
                    ),
                )
                undo.callback(executor.close)
                return executor

            self._executor = ranks.together("opening its tiers", opened)
            shape = ChunkShape(geometry.chunk_tokens, tuple(groups), null_block)
            reports = ranks.tell("with what it has stored", self._executor.report())
            self._recorder = open_recorder(
                config.observe.trace if ranks.rank == 0 else None,
                shape.chunk_tokens,
                shape.prefix_bytes(reports),
                ranks.clock(),
                ranks.engine,
            )
            if self._recorder is not None:
                undo.callback(self._recorder.close)
            self._planner = Planner(
                config,
                shape,
                namespace.fingerprint,
                pool,
                reports,
                self._meter,
                leases_loads=True,
                incarnation=ranks.first("with a name for this run", uuid.uuid4().hex),
                on_end=None if self._recorder is None else self._recorder.ended,
                clock=ranks.clock,
            )
            self.hand_off = HandOff(
                self._planner,
                boundary=math.lcm(*(group.block_tokens for group in groups)),
                limit=limit,
                shares=shares,
            )
            undo.pop_all()
        if ranks.rank == 0:
            told = opening(config, shape.chunk_tokens, reports, loads=True, saves=True)
            log.info("%s", told)
        self.wait_layer = self._executor.wait_layer
        self.layer_written = self._executor.layer_written
        self._totals: dict[Series, float] = defaultdict(float)
        self._gauges: dict[Series, float] = {}
        self._counting = threading.Lock()
        self._in_step = self._loads_in_step = False
        self._closed = False

    @property
    def moves_rows(self) -> bool:
        """Whether layers have to call ``wait_layer(name)`` before they read their cache and
        ``layer_written(name)`` after they have written it, in this step."""
        return self._loads_in_step or self._executor.moves_rows

    def begin_step(
        self, progress: Sequence[tuple[str, int, int]], *, layers_call: bool = True
    ) -> None:
        """The engine has scheduled a step: order what belongs to it. Call it right before the
        forward; in a step that runs nothing, too, for as long as there is work.

        Args:
            progress: for each request that runs, how many of its tokens are computed before the
                step and when it is over.
            layers_call: whether layers of the forward call ``wait_layer``. If it is a graph that is
                replayed they cannot: then it has to come after what the calling thread has
                submitted to the device by the end of this call.

        Raises:
            HandOffError: if a request runs that may not.
            LoadFailed: if a load of the step has failed, and layers do not call.
            RanksError: if ranks have come to different plans.
        """
        plan = self.hand_off.plan(progress, forward=bool(progress))
        self._ranks.agree("before a step", plan)
        if plan.loads:
            self._settle()
        self._in_step = True
        self._loads_in_step = any(order.mode is LoadMode.LAYERWISE for order in plan.loads)
        self._executor.begin_step(plan)
        self._executor.start_loads(layers_call=layers_call)
        if not layers_call:
            self.finish_loads()

    def end_step(self) -> None:
        """The forward is over: take in what has become of everything. Waits for no save; a step
        that ran nothing waits a few milliseconds for news. Without a step ranks tell each other the
        time, and nothing else happens."""
        if self._in_step:
            self._in_step = False
            self._executor.end_step()
            self._collect("after a step")
        else:
            self._ranks.tell("between steps", None)

    def abandon_step(self) -> None:
        """The forward of the step that has begun has failed, or nobody knows: what it was to save
        is not kept. Nothing happens without a step."""
        if self._in_step:
            self._executor.fail_step("step_failed")
            self.end_step()

    def finish_loads(self) -> None:
        """Wait for the step's loads. The engine calls it before it samples, at best before the
        last layer reads its cache: what was computed on a load that has failed is worth nothing.

        Raises:
            LoadFailed: if one has failed.
        """
        if not self._loads_in_step:
            return
        self._loads_in_step = False
        self._executor.finish_loads()
        self._collect("after the loads of a step")
        if cut := self.hand_off.take_cut():
            names = ", ".join(resumption.request_id for resumption in cut)
            raise LoadFailed(f"a copy from host memory failed under {names} while they ran")

    def _collect(self, occasion: str) -> None:
        self.hand_off.receive(self._ranks.tell(occasion, self._executor.collect().receipt))
        self.publish()

    def publish(self) -> None:
        """Have :meth:`figures` say what was counted by now. Every step does; an engine that ends a
        request calls it, because its last step may have been the last for long."""
        self._planner.gauges()
        readings = self._meter.drain()
        with self._counting:
            for series, amount in readings.counters.items():
                self._totals[series] += amount
            for (name, labels), values in readings.observations.items():
                self._totals[name + "_sum", labels] += sum(values)
                self._totals[name + "_count", labels] += len(values)
            self._gauges.update(readings.gauges)

    def figures(self) -> dict[str, float]:
        """What Lamina has counted since the start, by names of :data:`lamina_kv.observe.metrics
        .METRICS` with the labels' values behind them, and the state that it is in, as of the last
        step; of what is distributed, sum and count. Any thread may ask."""
        with self._counting:
            series = {**self._totals, **self._gauges}
        return {" ".join((name, *labels)): value for (name, labels), value in series.items()}

    def close(self) -> None:
        """The engine ends: let what is under way come to its end, and release everything. A step
        that has begun and not ended leaves nothing visible. A second call does nothing.

        The garbage collector may call this on any thread. One of Lamina's own cannot wait for
        itself, and may be inside of a lock; so it returns at once there, and another one goes on.
        """
        if self._closed:
            return
        self._closed = True
        if threading.current_thread().name.startswith("lamina-"):
            threading.Thread(target=self._close, name="lamina-close").start()
        else:
            self._close()

    def _close(self) -> None:
        self._executor.close()
        self._ranks.close()
        if self._recorder is not None:
            self._recorder.close()
        if self._ranks.rank == 0:
            log.info("%s", self._planner.closing())
