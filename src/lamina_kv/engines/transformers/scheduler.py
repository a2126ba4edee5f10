"""transformers' scheduler with the hand-off in it.

The library makes a scheduler of the type that the configuration names and calls it in every turn of
its loop (transformers 5.19, ``continuous_api.py``)::

    clear_cancelled_requests     the forward before this turn is over and its tokens are known
    has_pending_requests
    add_waiting_request          a request has come, or comes back
    schedule_batch               who runs; what follows is the forward
    finish_request               a request is over, or is reset and waits again

A request whose cache is outside gets blocks for all its tokens and is parked: it stays among the
waiting requests, out of the sight of the scheduler that this is mixed into, and comes back as one
that is being prefilled, as if a part of its prompt had been computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import Scheduler

from lamina_kv.config import Config
from lamina_kv.engines.hand_off import Phase
from lamina_kv.engines.ranks import Ranks
from lamina_kv.engines.standalone import Standalone
from lamina_kv.engines.transformers import layout
from lamina_kv.engines.transformers.hooks import hook_layers
from lamina_kv.engines.transformers.namespace import build_namespace
from lamina_kv.engines.transformers.requests import LedgerPool, TransformersRequest
from lamina_kv.engines.transformers.streams import ComputeStream

IDLE_SECONDS = 0.05
"""How long a turn with nothing to run waits for loads and saves. The library looks for new requests
between turns, and sleeps a tenth of a second after one in which nothing ran."""

LOOKAHEAD = 64
"""Waiting requests that are considered in a turn; those behind them wait for the next one."""

Scheduled = tuple[list[FutureRequestState] | None, bool, int, int]


class WithLamina(Scheduler):
    """To be mixed into a scheduler of the library, before it.

    Args:
        config: Lamina's configuration.
        shared_by: global ranks of the processes that run one engine together, each its share of the
            model's heads; this one alone, or several. None if nobody has said so.
        graphs: whether the library may replay graphs of varlen forwards, and of those that decode
            only. Such a forward comes after the loads of its step.
        cache: the library's cache.
        safety_margin: the library's.
        max_requests_per_batch: the library's; parked requests count.

    Attributes:
        lamina: what carries out loads and saves. It is closed when the scheduler goes.

    Raises:
        UnsupportedModel: if the model, or how it runs, cannot be served.
        ValueError: if a tier is smaller than a chunk.
        StoreError: if the store cannot be used.
    """

    def __init__(
        self,
        config: Config,
        shared_by: tuple[int, ...] | None,
        graphs: tuple[bool, bool],
        cache: PagedAttentionCache,
        safety_margin: float | None,
        max_requests_per_batch: int,
    ) -> None:
        layout.check_supported(cache, shared_by)
        self._parts = layout.parts(cache)
        groups = layout.groups(self._parts)
        geometry = layout.geometry(cache, self._parts, config.chunk_tokens)
        self._chunk = geometry.chunk_tokens
        self._window = max(group.window for group in groups)
        self._graphs = graphs
        self._stream = ComputeStream(cache.cache_tensor.device)
        self._allocators = tuple(cache.cache_allocators.values())
        self._pool = LedgerPool(self._parts)
        ranks = Ranks.among(shared_by) if shared_by else Ranks.alone()
        try:
            namespace = build_namespace(config, cache, groups, geometry, ranks)
        except BaseException:  # the other ranks wait for this one's word
            ranks.close()
            raise
        self.lamina = Standalone(
            config,
            geometry,
            groups,
            [cache.cache_tensor],
            namespace,
            self._pool,
            limit=max_requests_per_batch,
            null_block=layout.NO_BLOCK,
            settle=self._stream.precede,
            shares=cache.use_prefix_sharing,
            ranks=ranks,
        )
        weakref.finalize(self, self.lamina.close)
        self._in_sight: list[str] = []
        self._loaded: dict[str, tuple[int, int]] = {}
        try:
            hook_layers(cache, self.lamina, self._stream)
            super().__init__(cache, safety_margin, max_requests_per_batch)
        except BaseException:  # the error's traceback keeps this object, and with it the store
            self.lamina.close()
            raise

    # -- what the library calls --------------------------------------------------------------

    def reset(self) -> None:
        """A new session: the requests of the one before are gone, and if a step of theirs has not
        been ended its forward has failed."""
        self.lamina.abandon_step()
        for request_id in self.lamina.hand_off.abandon_all():
            if any(request_id in allocator.block_table for allocator in self._allocators):
                self.cache.free_blocks(request_id)
        self._loaded.clear()
        super().reset()

    def has_pending_requests(self) -> bool:
        """Whether there is anything to do; until what is on its way is kept, too, so that a manager
        that is stopped loses nothing."""
        return super().has_pending_requests() or self.lamina.hand_off.has_work

    def clear_cancelled_requests(self) -> list[RequestState]:
        """The first call of a turn: what was under way in the last one has ended."""
        self.lamina.end_step()
        self._publish_loaded()
        self._take_up_ready()
        with self._cancellation_lock:
            wanted: list[str] = sorted(self._requests_to_cancel)
            self._requests_to_cancel.clear()
        cancelled: list[RequestState] = []
        for request_id in wanted:  # one by one: a set has another order on each rank
            self._over(request_id)
            self.set_request_cancellation(request_id)
            cancelled += super().clear_cancelled_requests()
        return cancelled

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Scheduled:
        """Who runs in this turn, with what is loaded for them."""
        lamina = self.lamina
        give_up = lamina.clock() + IDLE_SECONDS
        while True:
            self._place_waiting()
            scheduled: Scheduled = super().schedule_batch(token_budget, cache_budget)
            batch, decodes = scheduled[:2]
            if batch:
                graph = self._graphs[1 if decodes else 0]
                progress = [self._progress(future) for future in batch]
                lamina.begin_step(progress, layers_call=not graph)
                if graph or self._window:  # what it reads is there, what it overwrites was read
                    self._stream.follow()
                return scheduled
            if batch is None and not self._blocks_come_back:
                return scheduled
            lamina.begin_step(())
            lamina.end_step()
            self._take_up_ready()
            if not lamina.hand_off.has_work or lamina.clock() > give_up:
                return [], *scheduled[1:]

    def add_waiting_request(self, state: RequestState) -> None:
        """A request waits; one that was reset has new tokens to wait with."""
        # First, because the library fails a request alone whose arrival is refused.
        self.lamina.hand_off.arrived(self._view(state))
        super().add_waiting_request(state)

    def finish_request(self, request_id: str) -> None:
        """A request has ended, or its blocks are taken away and it will wait again."""
        self._over(request_id)
        super().finish_request(request_id)

    def _get_waiting_candidates(self) -> list[RequestState]:
        """Of the waiting requests, those that may be computed."""
        waiting = self.waiting_requests
        in_sight = {name for name in self._in_sight if name in waiting}
        candidates = super()._get_waiting_candidates() if in_sight else []
        return [state for state in candidates if state.request_id in in_sight]

    def _schedule_request(
        self,
        state: RequestState,
        request_tokens: list[int],
        token_budget: int,
        request_ids_to_remove_from_waiting: set[str],
    ) -> None:
        """A request is in the batch; here it is said with how many tokens."""
        tokens = self._cut(state, len(request_tokens), token_budget)
        super()._schedule_request(state, request_tokens, tokens, request_ids_to_remove_from_waiting)

    def _cut(self, state: RequestState, left: int, budget: int) -> int:
        """Tokens of a request to compute in a step. Of a step that goes further than a window, the
        end of the last chunk would be all that remains of it: what the window before the boundary
        held is overwritten. So it ends on a boundary; the last one that a hit of the same prompt
        can end on is one of them, and the little behind that is the next step's.

        Args:
            state: the request.
            left: tokens that it lacks.
            budget: tokens that the step has room for.
        """
        start, chunk = state.position_offset, self._chunk
        end = start + min(left, budget)
        if not self._window or end - start // chunk * chunk <= self._window:
            return budget
        usable = start + left - self._view(state).recompute_tokens
        tokens = min(end, usable) // chunk * chunk - start
        return tokens if tokens > 0 else budget

    # -- waiting requests --------------------------------------------------------------------

    def _place_waiting(self) -> None:
        """Give those that are to be loaded their blocks, and say which others may be computed. Who
        came first has first claim on blocks, or others could take what it waits for, for ever:
        blocks are left for what is still to be computed of prompts before, and one that has to wait
        for its blocks keeps those behind it waiting."""
        self._in_sight = []
        hand_off = self.lamina.hand_off
        claimed = [
            self._needs(state, len(state.remaining_prefill_tokens))
            for state in self.active_requests.values()
            if state.remaining_prefill_tokens
        ]
        if self.block_new_requests:
            return
        for request_id in list(self.waiting_requests_order)[:LOOKAHEAD]:
            if not hand_off.has_room:
                return
            state = self.waiting_requests[request_id]
            if hand_off.phase(request_id) is Phase.PARKED:
                continue
            found: int | None = 0
            if not state.is_cpu_offloaded:
                found = hand_off.look(self._view(state), self._match(state))
            if found is None:
                continue  # what it needs is on its way near, or being loaded for another
            if not found:
                self._in_sight.append(request_id)
                claimed.append(self._needs(state, len(state.remaining_prefill_tokens)))
            elif self._allocate(state, claimed):
                self._admit(state)
            elif self.active_requests or self._blocks_come_back:
                return
            else:
                self._in_sight.append(request_id)  # it will never have room for all its tokens

    def _match(self, state: RequestState) -> int:
        """Tokens that the library's prefix cache has of a waiting request."""
        if not self.cache.use_prefix_sharing:
            return 0
        tokens = state.remaining_prefill_tokens
        found: int = min(
            len(allocator.match_prefix_blocks(tokens)) * allocator.tokens_per_page
            for allocator in self._allocators
        )
        return found

    def _needs(self, state: RequestState, tokens: int) -> dict[str, int]:
        """Blocks that a request lacks for ``tokens`` more, by allocator."""
        return {
            name: allocator.needs_new_blocks(state.request_id, state.current_len(), tokens)
            for name, allocator in self.cache.cache_allocators.items()
        }

    def _allocate(self, state: RequestState, claimed: list[dict[str, int]]) -> bool:
        """Give a waiting request what is found of it, and blocks for the rest of its tokens, if so
        many are free that there are those that others have claimed, too."""
        if not self._try_to_meet_safety_margin() and self.active_requests:
            return False
        request_id, tokens = state.request_id, state.remaining_prefill_tokens
        found = self.cache.search_prefix_match(request_id, tokens)
        state.position_offset = found
        rest = len(tokens) - found
        if self._fits(state, rest, claimed):
            return True
        if not self.active_requests and self.cache.evict_cached_blocks():
            self.cache.pool.try_to_free_sectors()
            if self._fits(state, rest, claimed):
                return True
        state.position_offset = 0
        self.cache.free_blocks(request_id)
        return False

    def _fits(self, state: RequestState, rest: int, claimed: list[dict[str, int]]) -> bool:
        """Take blocks for ``rest`` more tokens of a request, if there is room for others', too."""
        needs = [self._needs(state, rest), *claimed]
        if self.cache.count_storable_requests(needs) < len(needs):
            return False
        return bool(self.cache.can_store_request_tokens(state, rest))

    def _admit(self, state: RequestState) -> None:
        """A waiting request has blocks for all its tokens: load what there is."""
        floor = state.position_offset
        admission = self.lamina.hand_off.admit(self._view(state), floor)
        if admission.phase is Phase.RUNNING:
            self._run(state, admission.start)
            if admission.start > floor:
                self._loaded[state.request_id] = floor, admission.start

    def _run(self, state: RequestState, start: int) -> None:
        """A waiting request that has blocks runs from its token ``start`` on."""
        request_id = state.request_id
        del self.waiting_requests[request_id]
        self.waiting_requests_order.remove(request_id)
        state.position_offset = start
        state.remaining_prefill_tokens = state.initial_tokens[start:]
        state.status = RequestStatus.PREFILLING
        self.active_requests[request_id] = state

    def _take_up_ready(self) -> None:
        """Those whose load has ended run before any other that waits."""
        for resumption in self.lamina.hand_off.take_ready():
            state = self.waiting_requests[resumption.request_id]
            self._run(state, resumption.start)
            self.cache.mark_complete_blocks(state, self._blocks(resumption.floor, resumption.start))

    # -- running requests --------------------------------------------------------------------

    def _progress(self, future: FutureRequestState) -> tuple[str, int, int]:
        """What of a request is computed in the batch."""
        state = future.state
        request_id, start = state.request_id, state.position_offset
        hand_off = self.lamina.hand_off
        if hand_off.phase(request_id) in (Phase.WAITING, Phase.DRAINING):
            # The library has let it in: it has blocks for this batch only.
            hand_off.admit(self._view(state), start, declined="not_all_blocks")
        if request_id in self._loaded:  # by the time that the library marks them they are there
            for name, count in self._blocks(*self._loaded.pop(request_id)).items():
                future.complete_blocks[name] = future.complete_blocks.get(name, 0) + count
        return request_id, start, start + future.query_length

    def _publish_loaded(self) -> None:
        """What was loaded in a step that its request was not part of can be found from now on."""
        while self._loaded:
            request_id, (floor, start) = self._loaded.popitem()
            if (state := self.active_requests.get(request_id)) is not None:
                self.cache.mark_complete_blocks(state, self._blocks(floor, start))

    def _blocks(self, floor: int, start: int) -> dict[str, int]:
        """How many blocks tokens ``floor`` to ``start`` fill, by allocator, if they can be found
        by others at all."""
        if not self.cache.use_prefix_sharing:
            return {}
        return {
            name: start // allocator.tokens_per_page - floor // allocator.tokens_per_page
            for name, allocator in self.cache.cache_allocators.items()
        }

    def _over(self, request_id: str) -> None:
        """A request ends here; its blocks are freed after this, if they have not been."""
        state = self.active_requests.get(request_id)
        tables: list[Sequence[int]] = []
        computed = 0
        if state is not None and state.status is not RequestStatus.FAILED:
            tables = [part.blocks(request_id, state.position_offset) for part in self._parts]
            if all(tables):
                computed = state.position_offset
        self._loaded.pop(request_id, None)
        self.lamina.hand_off.finished(request_id, computed, tables)
        self.lamina.publish()

    @property
    def _blocks_come_back(self) -> bool:
        """Whether blocks are held that will be free without the library's doing."""
        return self._pool.held > 0 or self.lamina.hand_off.count(Phase.PARKED) > 0

    def _view(self, state: RequestState) -> TransformersRequest:
        return TransformersRequest(state, self._parts)
