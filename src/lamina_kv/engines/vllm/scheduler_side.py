"""The connector's half in vLLM's scheduler: translates between vLLM and the planner."""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.distributed.kv_events import KVCacheEvent
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from lamina_kv.config import Config
from lamina_kv.control.planner import Planner
from lamina_kv.control.push.pushes import Pushes
from lamina_kv.control.reporting.summary import opening
from lamina_kv.control.requests import BoundaryState, PushParameters
from lamina_kv.control.shape import ChunkShape
from lamina_kv.control.sharing import Sharing
from lamina_kv.engines.vllm import layout
from lamina_kv.engines.vllm.adapters import Adapters
from lamina_kv.engines.vllm.concerns import BOTH, RECOMPUTE, concerns
from lamina_kv.engines.vllm.core_loop import CoreLoop
from lamina_kv.engines.vllm.events import KvEvents
from lamina_kv.engines.vllm.messages import LaminaPlan, LaminaReport, LaminaWords
from lamina_kv.engines.vllm.metrics import LaminaStats
from lamina_kv.engines.vllm.namespace import arranged, build_namespace
from lamina_kv.engines.vllm.opening import Opening
from lamina_kv.engines.vllm.regard import regard_of
from lamina_kv.engines.vllm.requests import (
    PUSH_PARAMETER,
    VllmBlockPool,
    VllmRequest,
    handed_on,
    is_asked_first,
    push_parameters,
    withdrawn_push,
)
from lamina_kv.engines.vllm.resets import reset_despite_readers
from lamina_kv.engines.vllm.sleep import be_quiet_before_sleep
from lamina_kv.engines.vllm.weights import Watch, WeightsWatch, watch_engine_core
from lamina_kv.observe.metrics import Meter
from lamina_kv.observe.traces import TraceRecorder, open_recorder
from lamina_kv.plan import NEAR, PUSHED, LoadMode, StepPlan, TierName
from lamina_kv.push.addresses import Peers, join_address, split_address
from lamina_kv.push.cards import EngineCard
from lamina_kv.push.complaints import Complaints
from lamina_kv.push.handshake import check_cipher
from lamina_kv.push.link import Link, listen_at
from lamina_kv.push.ranks import RanksCaller

if TYPE_CHECKING:
    from lamina_kv.observe.spans import Spans

log = logging.getLogger("lamina_kv.engines.vllm")

COMPLAINTS = 64
"""Different problems with routers that are worth a warning."""


def hit_sources(config: Config) -> dict[TierName, CacheHitSource]:
    """What vLLM's counters call each tier: by its kind, if vLLM has a word for that."""
    words = {source.value: source for source in CacheHitSource}
    far = {
        TierName(tier.name): words.get(tier.kind, CacheHitSource.EXTERNAL_UNSPECIFIED)
        for tier in config.tiers
    }
    return {NEAR: CacheHitSource.HOST, PUSHED: CacheHitSource.P2P, **far}


def _spans(vllm_config: VllmConfig) -> Spans | None:
    """Where spans go: to the provider that vLLM has made for its own, if it has."""
    if vllm_config.observability_config.otlp_traces_endpoint is None:
        return None
    from lamina_kv.observe.spans import Spans

    return Spans()


def _names(request: Request, push: PushParameters | None) -> Iterator[str]:
    """What spans call a request: those of a push have its id."""
    yield request.request_id
    if push is not None and push.prefill is None:
        yield push.id


class SchedulerSide:
    """See the module.

    Args:
        config: Lamina's configuration.
        vllm_config: vLLM's.
        cache: vLLM's cache.

    Attributes:
        watch: what vLLM's engine core tells.

    Raises:
        ValueError: if other engines could not reach this one where the configuration says.
    """

    def __init__(self, config: Config, vllm_config: VllmConfig, cache: KVCacheConfig) -> None:
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        self._config = config
        for concern in concerns(config, transfer.kv_role, transfer.kv_load_failure_policy):
            log.warning("%s", concern)
        # What the role says is of tiers; any engine with a `push` section takes part in pushes.
        self._loads: bool = transfer.is_kv_consumer
        self._recomputes = transfer.kv_load_failure_policy == RECOMPUTE
        # vLLM caches the blocks of a load in the step as it allocates them, and those of a parked
        # one when it takes up its request, which it does before it looks at others.
        caches = vllm_config.cache_config.enable_prefix_caching
        self._sharing = Sharing.PARKED if caches else Sharing.NOTHING
        self._saves: bool = transfer.is_kv_producer
        if config.push is not None and not self._loads:
            # vLLM looks at the role again when this connector is made: only if something may be
            # loaded does it keep freed blocks back until no step in flight writes to them.
            transfer.kv_role = BOTH
        self._shape = ChunkShape(
            layout.chunk_tokens(cache, config.chunk_tokens),
            layout.groups(cache, config.chunk_tokens),
            layout.NULL_BLOCK,
        )
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        chunk = self._shape.chunk_tokens
        if self._shape.in_place and budget % chunk and chunk % budget:
            log.warning(
                "prompts are computed %d tokens at a time, and without vLLM's prefix cache a "
                "recurrent state is kept only where a step ends on a multiple of chunk_tokens, %d: "
                "few are. Use --max-num-batched-tokens with a multiple of it.",
                budget,
                chunk,
            )
        self._namespace = build_namespace(config, vllm_config, cache)
        self._sources = hit_sources(config)
        events = vllm_config.kv_events_config
        self._events: KvEvents | None = None
        if events is not None and events.enable_kv_cache_events:
            self._events = KvEvents(config.tiers, chunk, self._shape.groups)
        speculative = vllm_config.speculative_config
        self._recompute = 1 + (speculative.num_speculative_tokens if speculative else 0)
        self._meter = Meter()
        self._manager: KVCacheManager | None = None
        self._opening = Opening(vllm_config.parallel_config.world_size)
        self._planner: Planner | None = None
        watch_engine_core()
        be_quiet_before_sleep()
        self._link: Link | None = None
        self._recorder: TraceRecorder | None = None
        self._spans = _spans(vllm_config)
        self._caller: RanksCaller | None = None
        # Engines of one server: each has a port and a file of its own.
        self._index = vllm_config.parallel_config.data_parallel_index
        self._adapters = Adapters(vllm_config.lora_config)
        self.watch = Watch(WeightsWatch(self._opening), self._adapters, CoreLoop())
        multimodal = vllm_config.model_config.multimodal_config
        self._counted = (
            multimodal is not None
            and multimodal.mm_processor_cache_gb == 0
            and not vllm_config.cache_config.enable_prefix_caching
        )
        self._moved = True
        self._has_ended = False
        self._complaints = Complaints(log, COMPLAINTS)
        self._disregards = Complaints(log)
        self._peers = Peers(() if config.push is None else config.push.peers)
        # Peers may dial before the tiers are known, and a mistake is to be seen at the start.
        self._servers = self._listen()

    def bind(self, manager: KVCacheManager) -> None:
        """VLLM's cache manager exists now."""
        self._manager = manager
        if self._events is None:
            reset_despite_readers(manager, self._leaving)
        else:
            self._events.bind(manager)
            reset_despite_readers(manager, self._leaving, self._events.pool_was_reset)

    def _leaving(self) -> Collection[str]:
        return () if self._planner is None else self._planner.leaving

    def _open(self, ours: Sequence[LaminaReport]) -> None:
        """Every rank has reported its tiers: requests can be served from them."""
        assert self._manager is not None
        self._namespace = arranged(self._namespace, ours[0].arrangement)
        named = {message.namespace for message in ours} - {""}
        # The ranks know their caches to the layer; the scheduler is shown less (vLLM replaces
        # UniformTypeKVCacheSpecs by one of its members there).
        fingerprint = bytes.fromhex(named.pop()) if named else self._namespace.fingerprint
        card = self._card(ours)
        if self._config.push is not None and self._config.push.listen is not None:
            self._caller = RanksCaller([message.place for message in ours])
        reports = [message.report for message in ours]
        self._recorder = open_recorder(
            self._config.observe.trace,
            self._shape.chunk_tokens,
            self._shape.prefix_bytes(reports),
            time.monotonic(),
            self._index,
        )
        self._planner = Planner(
            self._config,
            self._shape,
            fingerprint,
            VllmBlockPool(self._manager.block_pool),
            reports,
            self._meter,
            card=card,
            recomputes=self._recomputes,
            loads=self._loads,
            saves=self._saves,
            channel=self._caller,
            on_end=None if self._recorder is None else self._recorder.ended,
            describe=None if self._events is None else self._events.describe,
            spans=self._spans,
        )
        if card is not None:
            self._link = self._open_link(card)
        log.info(
            "%s",
            opening(
                self._config,
                self._shape.chunk_tokens,
                reports,
                loads=self._loads,
                saves=self._saves,
                pushes=self._part_in_pushes,
            ),
        )
        self.watch.loop.on_end = self._hurry
        self._planner.begin(self._opening.epoch)
        self.watch.weights.follow(self._planner)
        self._adapters.follow(self._planner.bar)
        for request in self._opening.hand_over():
            self.arrived(request)

    def _card(self, ours: Sequence[LaminaReport]) -> EngineCard | None:
        """This engine as other engines see it, if it takes part in pushes."""
        ranks = tuple(message.card for message in ours if message.card is not None)
        if self._config.push is None or len(ranks) != len(ours):
            return None
        # Ranks of another number may hold the same content.
        content = replace(self._namespace, tensor_parallel=1, chunk_tokens=1, page_bytes=())
        return EngineCard(
            ours[0].incarnation,
            content.fingerprint,
            ours[0].replicated,
            self._namespace.groups,
            ranks,
        )

    def _open_link(self, card: EngineCard) -> Link:
        config = self._config.push
        assert config is not None
        servers, self._servers = self._servers, []
        return Link(
            card,
            servers=servers,
            token=config.token,
            silence=config.silence,
            wake=self.watch.loop.wake,
            take=self._pushes.take_announcement,
        )

    @property
    def _part_in_pushes(self) -> str:
        """What this engine does in pushes, for the log; empty for nothing."""
        config = self._config.push
        if self._link is None or config is None:
            return ""
        if config.listen is None:
            return "receives, and listens nowhere"
        return f"listens at {self._listens_at(config.listen)}"

    def _listen(self) -> list[socket.socket]:
        config = self._config.push
        if config is not None and config.token is not None:
            check_cipher()
        if config is None or config.listen is None:
            return []
        listen = self._listens_at(config.listen)
        try:
            return listen_at(listen)
        except OSError as error:
            raise ValueError(f"push.listen: cannot listen at {listen}: {error}") from error

    def _listens_at(self, first: str) -> str:
        """This engine's own address, of several engines of one server.

        Args:
            first: that of the first one.
        """
        host, port = split_address(first)
        return join_address(host, port + self._index)

    def _address(self) -> str:
        """Where decode engines reach this engine; empty if it does not know."""
        config = self._config.push
        if config is None or config.listen is None:
            return ""
        host, _ = split_address(config.listen)
        try:
            anywhere = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            anywhere = False
        return "" if anywhere else self._listens_at(config.listen)

    def _exchange(self) -> None:
        """Say what the planner has to say to other engines, and hear what they say."""
        if self._link is not None:
            news = self._link.news()
            self._moved |= bool(news)
            self._pushes.take_news(news)
            for letter in self._pushes.drain_letters():
                self._link.send(letter)
            self.watch.loop.abort(self._pushes.drain_unwanted())

    def _end_pushes(self, *, at_once: bool = False) -> None:
        """Tell decode engines what they need not wait for, because this engine ends."""
        if self._link is not None:
            self._exchange()
            self._pushes.end(at_once=at_once)
            self._exchange()

    def _hurry(self) -> None:
        """The engine is told to end, and steps for as long as there is work."""
        self._end_pushes()
        if self._planner is not None:
            self._planner.hurry()
            if not self.has_work:  # vLLM may kill this process before it closes anything
                self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Log what Lamina was worth, once."""
        if self._planner is not None and not self._has_ended:
            self._has_ended = True
            log.info("%s", self._planner.closing())

    def close(self) -> None:
        """The engine ends."""
        if self._link is not None:
            self._end_pushes(at_once=True)
            self._link.close(self._pushes.goodbye)
        if self._caller is not None:
            self._caller.close()
        for server in self._servers:
            server.close()
        if self._recorder is not None:
            self._recorder.close()
        self._say_goodbye()

    @property
    def has_work(self) -> bool:
        """Whether the engine must keep stepping, although it may have no request to run."""
        if self._planner is None:
            return True
        return self._planner.has_work or (self._link is not None and self._link.has_news)

    @property
    def planner(self) -> Planner:
        """The planner; it exists once every rank has reported."""
        assert self._planner is not None, "no rank has reported yet"
        return self._planner

    @property
    def _pushes(self) -> Pushes:
        """Pushes; the planner has them where there is a link."""
        assert self.planner.pushes is not None, "a link is opened for pushes"
        return self.planner.pushes

    def arrived(self, request: Request) -> None:
        """A request will wait for its turn."""
        if self._planner is None:
            self._opening.arrived(request)
            return
        if (problem := self._wish(request)[1]) is not None:
            self._complain(request, problem)
        if (problem := regard_of(request)[1]) is not None:
            self._disregards.warn(problem, f"request {request.request_id}: ")
        loads = not request.skip_reading_prefix_cache
        view = self._view(request)
        if self._spans is not None:
            for name in _names(request, view.push):
                self._spans.request(name, request.trace_headers)
        withdrawn = withdrawn_push(request)
        if withdrawn is not None:
            self._exchange()  # somebody may have asked for it
            if self._link is not None:
                self._pushes.withdraw(withdrawn, request.request_id)
        elif loads or view.push is not None:
            self.planner.arrived(view, loads=loads)
            self._adapters.look_anew()  # the next step may be far away
        if withdrawn is not None or view.push is not None:
            self._exchange()

    def lookup(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Tokens to load beyond ``computed``, and whether between steps; None to be asked again in
        the next step, which vLLM does unless the request may not hit."""
        self.watch.weights.request()
        if self._planner is None:
            return None, False
        declined = "skip_reading_prefix_cache" if request.skip_reading_prefix_cache else ""
        if not self._blocks_are_cached:  # vLLM tells nobody of a reset of its own cache alone
            self._adapters.emptied()
        view = self._view(request, computed)
        if view.push is not None:
            self._exchange()  # it may be announced by now
        hit = self.planner.lookup(view, computed, declined=declined, sharing=self._sharing)
        if hit.ask_again:
            return None, False
        return hit.tokens, hit.tokens > 0 and hit.mode is LoadMode.PARKED

    def admitted(self, request: Request, loaded: int) -> None:
        """VLLM has given the request its blocks."""
        if self._planner is not None:
            self._planner.admitted(request.request_id, loaded)
        self._adapters.admitted(request)
        if self._planner is not None:
            self._exchange()
            self._moved = True

    def hit_sources(self, request: Request, tokens: int) -> dict[CacheHitSource, int]:
        """Where ``tokens`` come from."""
        sources = self.planner.hit_sources(request.request_id)
        counts: Counter[CacheHitSource] = Counter()
        for tier, count in sources.items() if tokens else ():
            counts[self._sources[tier]] += count
        return dict(counts)

    def plan(self, output: SchedulerOutput) -> LaminaPlan:
        """The plan of the step that vLLM has just scheduled."""
        if forward := output.total_num_scheduled_tokens > 0:
            self.watch.weights.computed()
        self._adapters.check()
        if self._planner is None:
            return LaminaPlan(StepPlan(-1, forward=forward), self._opening.asks())
        self._exchange()
        progress = list(self._progress(output))
        leased = self._planner.leased_blocks
        plan = self._planner.plan_step(
            progress,
            forward=forward,
            states=self._boundary_states(output, progress),
        )
        # Time alone ends quarantines, and prompts that wait for their destination.
        self._moved |= not plan.is_empty or self._planner.leased_blocks != leased
        self._exchange()
        self._remind()
        return LaminaPlan(plan)

    def _remind(self) -> None:
        """Have a step when one is needed, although nobody asks for anything until then."""
        if self._link is not None:
            self._link.remind(self._pushes.wait)
        self.watch.loop.wake_after(self.planner.write_wait)

    def receive(self, output: KVConnectorOutput) -> None:
        """Take in what the ranks report."""
        self._adapters.check()
        if output.invalid_block_ids and self._planner is not None:
            # Perhaps another connector's load: what was computed on it is in our saves.
            self._planner.distrust()
        message = output.kv_connector_worker_meta
        if message is None:
            return
        assert isinstance(message, LaminaWords)
        self._moved = True
        if message.reports and (reports := self._opening.heard(message.reports)) is not None:
            self._open(reports)
        if message.receipts:
            self.planner.receive(message.receipts)
        if self._planner is not None:
            self._exchange()
            self._remind()

    def reset(self) -> None:
        """VLLM's cache is void: its weights are others from now on, or may be."""
        self.watch.weights.was_reset(void=not self._blocks_are_cached)
        self._moved = True

    @property
    def _blocks_are_cached(self) -> bool:
        """Whether a request may find anything in vLLM's own cache."""
        assert self._manager is not None
        return len(self._manager.block_pool.cached_block_hash_to_block) > 0

    def finished(self, request: Request, blocks: tuple[list[int], ...]) -> dict[str, Any] | None:
        """A request has ended and its blocks are about to be freed.

        Returns:
            what the router is to tell a decode engine, if it wants to know.
        """
        self._adapters.finished(request)
        if self._planner is None:
            self._opening.finished(request)
            return None
        computed = request.num_computed_tokens
        push = self._push(request)
        self._planner.finished(request.request_id, computed, blocks, push=push)
        if self._spans is not None:
            for name in _names(request, push):
                self._spans.forget(name)
        self._moved = True  # its prompt is counted by now
        self._exchange()
        self._remind()
        if push is None or not is_asked_first(request):
            return None
        return handed_on(request, self._address())

    def take_events(self) -> Sequence[KVCacheEvent]:
        """What has become of chunks in tiers since the last call, if anybody listens."""
        if self._events is None or self._planner is None or self._planner.residency is None:
            return ()
        return self._events.take(self._planner.residency)

    def stats(self) -> LaminaStats | None:
        """Figures since the last call; None if nothing has moved."""
        if not self._moved or self._planner is None:
            return None
        self._moved = False
        self._planner.gauges()
        readings = self._meter.drain()
        return None if readings.is_empty else LaminaStats.of(readings)

    def _progress(self, output: SchedulerOutput) -> Iterator[tuple[str, int, int]]:
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            computed = new.num_computed_tokens
            yield new.req_id, computed, computed + scheduled[new.req_id]
        cached = output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            yield request_id, computed, computed + scheduled[request_id]

    def _boundary_states(
        self, output: SchedulerOutput, progress: Sequence[tuple[str, int, int]]
    ) -> list[BoundaryState]:
        """Recurrent states that stand at a boundary when the step is over: those that vLLM keeps
        for its own prefix cache and hands over, and those that it passes by. What is drafted may be
        taken back, so that with speculation only the former are sure."""
        state = output.kv_connector_block_state
        wanted = self._saves or self._link is not None
        if state is None or not (wanted and self._shape.recurrent):
            return []
        found = {
            BoundaryState(request_id, group, block, end)
            for request_id, offers in state.boundary_state_offloads.items()
            for group, block, end in offers
        }
        for request_id, _, end in progress if self._recompute == 1 else ():
            if end % self._shape.chunk_tokens == 0:
                tables = state.resolve_block_ids(request_id)
                for group in self._shape.recurrent:
                    index = self._shape.groups[group].state_index(end)
                    if (block := tables[group][index]) != layout.NULL_BLOCK:
                        found.add(BoundaryState(request_id, group, block, end))
        return sorted(found, key=lambda state: (state.request_id, state.end, state.group))

    def _view(self, request: Request, found: int = 0) -> VllmRequest:
        manager = self._manager
        assert manager is not None
        return VllmRequest(
            request,
            lambda: manager.get_block_ids(request.request_id),
            self._shape.groups,
            self._adapters.identity(request, found),
            self._counted,
            self._recompute,
            self._push(request),
            regard_of(request)[0],
        )

    def _push(self, request: Request) -> PushParameters | None:
        """The push that a request is part of, if this engine can take its part in it."""
        return self._wish(request)[0]

    def _complain(self, request: Request, problem: str) -> None:
        """Say why a router's wish is not met, once for all requests with the same problem."""
        self._complaints.warn(problem, f"request {request.request_id}: {PUSH_PARAMETER}: ")

    def _wish(self, request: Request) -> tuple[PushParameters | None, str | None]:
        """The push that a router wants for a request, if this engine can take its part in it; or
        why it cannot. Neither, if it wants none."""
        try:
            push = push_parameters(request)
        except ValueError as error:
            return None, f"{error}: the prompt is computed here"
        if push is None:
            return None, None
        if self._link is None:
            return None, "this engine takes no part in pushes: give it a `push` section"
        if is_asked_first(request) and not self._address():
            return None, (
                "the router asks this engine first, which cannot say where it is: set push.listen "
                "to an address that decode engines reach"
            )
        if push.prefill is None or self._peers.allow(push.prefill):
            return push, None
        return None, (
            f"push.peers does not list {push.prefill!r}: the prompt is computed here; list every "
            "prefill engine that requests may name"
        )
