"""Which weights vLLM computes with.

vLLM tells a connector that its cache is void (``reset_cache``), and neither why nor what the
weights are called. The engine core knows both, and the connector's scheduler side lives in its
process. So some of the core's methods tell it what they are about to do, or have done:

- ``set_weight_version`` names the weights.
- ``_reset_caches`` is called by a pause or a sleep. Either keeps the weights, unless somebody
  replaces them before the engine goes on. They are weighed before the reset, and again when the
  next request comes, so that nobody has to be believed.
- ``sleep`` at level 2 drops the weights.
- ``add_lora`` and ``remove_lora`` have workers load an adapter, and forget it.
- ``_handle_shutdown`` is the first call of every turn of its loop, before it waits for requests.

Whoever resets the caches without a pause says that the weights are others.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Protocol

import torch
from vllm.lora.request import LoRARequest
from vllm.v1.engine.core import EngineCore, EngineCoreProc

from lamina_kv.engines.vllm.adapters import Adapters
from lamina_kv.engines.vllm.core_loop import CoreLoop
from lamina_kv.keys import Epoch

log = logging.getLogger("lamina_kv.engines.vllm")

Scales = Callable[[], str | None]
"""Weighs the model on every rank; None if that cannot be done."""

_PART = 1 << 22
"""Words that are weighed at once: 32 MiB, and a few times as much for what is made of them."""


@dataclass(frozen=True, slots=True)
class _Promise:
    """An epoch that begins with the next request, if the weights are then what they were.

    Attributes:
        epoch: the epoch.
        weight: what its weights weigh.
        named: whether the operator has named it: a later reset does not take it back.
        due: whether the engine's cache was emptied since.
    """

    epoch: Epoch
    weight: str
    named: bool
    due: bool


@dataclass(frozen=True, slots=True)
class _Pause:
    """A pause whose reset is about to come.

    Attributes:
        weight: what the weights weigh; None while they sleep, and nobody replaces them.
    """

    weight: str | None


class Epochs(Protocol):
    """Whoever is in an epoch: the planner, and before there is one, what stands for it."""

    @property
    def epoch(self) -> Epoch:
        """Which weights compute now."""

    def begin(self, epoch: Epoch) -> None:
        """Other weights compute from now on."""

    def reset(self) -> None:
        """Weights without a name compute from now on."""


class WeightsWatch:
    """Decides which epoch an engine is in.

    Args:
        planner: whose epochs they are.
    """

    def __init__(self, planner: Epochs) -> None:
        self._planner = planner
        self._promise: _Promise | None = None
        self._scales: Scales = lambda: None
        self._pause: _Pause | None = None
        self._void = True
        self._lost = ""

    def follow(self, planner: Epochs) -> None:
        """Somebody else is in the epoch now."""
        self._planner = planner

    def pausing(self, scales: Scales) -> None:
        """The reset that follows is a pause's: the weights are still those of the epoch."""
        self._scales = scales
        weight = scales()
        self._pause = None if weight is None else _Pause(weight)

    def pausing_asleep(self) -> None:
        """The reset that follows is a pause's, and the weights are asleep: nobody may read them,
        and nobody replaces them. What was promised before stays promised."""
        self._pause = _Pause(None)

    def paused(self) -> None:
        """The pause is over, or has failed before its reset."""
        self._pause = None

    def was_reset(self, *, void: bool) -> None:
        """The engine's cache is not to be used any more.

        Args:
            void: whether it is empty. It is not where vLLM could not reset it.
        """
        promise, pause, self._pause = self._promise, self._pause, None
        if promise is not None and (promise.named or pause is not None):
            self._promise = replace(promise, due=promise.due or void)
        elif pause is not None and pause.weight is not None and void:
            self._promise = _Promise(self._planner.epoch, pause.weight, named=False, due=True)
        else:
            self._promise = None
            self._lost = (
                "the cache was reset without a pause, or the weights were dropped or not weighed"
            )
        self._void = void
        self._planner.reset()

    def named(self, name: str, scales: Scales) -> None:
        """The operator has named the weights."""
        epoch = Epoch(weights=name)
        if epoch == self._planner.epoch:
            return
        self._lost = ""
        if self._void:
            self._promise = None
            self._planner.begin(epoch)
            return
        # What the engine has in its cache may have been computed by others.
        self._planner.reset()
        self._scales, weight = scales, scales()
        self._promise = None if weight is None else _Promise(epoch, weight, named=True, due=False)
        log.info(
            "weights %r were named while the cache holds what was computed before: what is "
            "computed now is kept in host memory only, until the cache is reset "
            "(reset_prefix_cache with reset_connector, or pause with clear_cache)",
            name,
        )

    def request(self) -> None:
        """A request is about to be looked up."""
        lost, self._lost = self._lost, ""
        if (promise := self._promise) is not None and promise.due:
            self._promise = None
            if self._scales() == promise.weight:
                self._planner.begin(promise.epoch)
                return
            lost = (
                f"the weights are not those any more that were named {promise.epoch.weights!r}"
                if promise.named
                else "weights were replaced during a pause"
            )
        if lost:
            log.warning(
                "%s: what was kept before is not found any more, and what is computed now is kept "
                "in host memory only. Name the weights right after a reset "
                "(finish_weight_update or update_weight_version with a weight_version), or start "
                "the engine again.",
                lost,
            )

    def computed(self) -> None:
        """The model runs: from now on there is something in the engine's cache."""
        self._void = False


@dataclass(frozen=True)
class Watch:
    """What an engine core tells a connector's scheduler side.

    Attributes:
        weights: which weights the model has.
        adapters: which weights its adapters have.
        loop: the core's loop.
    """

    weights: WeightsWatch
    adapters: Adapters
    loop: CoreLoop


def watch_engine_core() -> None:
    """Have every engine core of this process tell the scheduler sides of its connectors what
    becomes of its weights and of its loop. Once is enough; vLLM's classes stay what they
    are but for that."""
    if hasattr(EngineCore.set_weight_version, "__wrapped__"):
        return
    name, reset, sleep = EngineCore.set_weight_version, EngineCore._reset_caches, EngineCore.sleep
    add, remove = EngineCore.add_lora, EngineCore.remove_lora
    turn = EngineCoreProc._handle_shutdown

    @functools.wraps(name)
    def set_weight_version(core: EngineCore, weight_version: str) -> None:
        name(core, weight_version)
        for watch in _watches(core):
            watch.weights.named(weight_version, functools.partial(_weigh, core))

    @functools.wraps(reset)
    def _reset_caches(core: EngineCore, *args: Any, **kwargs: Any) -> None:
        if not core.__dict__.pop(_DROPS, False):
            for watch in _watches(core):
                if _is_asleep(core):
                    watch.weights.pausing_asleep()
                else:
                    watch.weights.pausing(functools.partial(_weigh, core))
        try:
            reset(core, *args, **kwargs)
        finally:
            for watch in _watches(core):
                watch.weights.paused()

    @functools.wraps(sleep)
    def sleeping(core: EngineCore, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        def forget(future: Future[Any] | None = None) -> None:
            if future is None or future.cancelled() or future.exception() is not None:
                core.__dict__.pop(_DROPS, None)

        core.__dict__[_DROPS] = level > 1  # its reset may come when the last request has ended
        try:
            slept = sleep(core, level, *args, **kwargs)
        except BaseException:
            forget()
            raise
        if isinstance(slept, Future):
            slept.add_done_callback(forget)
        return slept

    @functools.wraps(add)
    def add_lora(core: EngineCore, lora_request: LoRARequest) -> bool:
        kept = not lora_request.load_inplace and lora_request.lora_int_id in core.list_loras()
        stamps = [(watch, watch.adapters.stamps(lora_request)) for watch in _watches(core)]
        added: bool = add(core, lora_request)
        for watch, before in stamps if not kept else ():
            watch.adapters.added(lora_request, before)
        return added

    @functools.wraps(remove)
    def remove_lora(core: EngineCore, lora_id: int) -> bool:
        for watch in _watches(core):
            watch.adapters.removed(lora_id)
        removed: bool = remove(core, lora_id)
        return removed

    @functools.wraps(turn)
    def _handle_shutdown(core: EngineCoreProc) -> bool:
        if _LOOPS not in core.__dict__:
            core.__dict__[_LOOPS] = [watch.loop for watch in _watches(core)]
            for loop in core.__dict__[_LOOPS]:
                loop.begins(core)
        for loop in core.__dict__[_LOOPS]:
            loop.turns()
        goes_on: bool = turn(core)
        return goes_on

    EngineCoreProc._handle_shutdown = _handle_shutdown
    for attribute, function in (
        ("add_lora", add_lora),
        ("remove_lora", remove_lora),
        ("set_weight_version", set_weight_version),
        ("_reset_caches", _reset_caches),
        ("sleep", sleeping),
    ):
        setattr(EngineCore, attribute, function)


_DROPS = "_lamina_drops_weights"
_LOOPS = "_lamina_loops"


def _watches(core: EngineCore) -> Iterator[Watch]:
    todo = [core.scheduler.get_kv_connector()]
    while todo:
        connector = todo.pop()
        todo += getattr(connector, "sub_connectors", ())
        if (watch := getattr(connector, "watch", None)) is not None:
            assert isinstance(watch, Watch)
            yield watch


def _is_asleep(core: EngineCore) -> bool:
    """Whether the memory of the weights is not mapped. VLLM resets caches before it asks."""
    return "weights" in core.model_executor.sleeping_tags


def _weigh(core: EngineCore) -> str | None:
    """What the weights of a core's engine weigh; None if that cannot be found out."""
    if _is_asleep(core):
        log.warning("the weights are asleep and cannot be weighed, and so count as changed")
        return None
    try:
        return " ".join(core.model_executor.collective_rpc(weigh_model))
    except (
        Exception
    ) as error:  # whatever an executor may raise: weights unknown are weights changed
        log.warning("the weights cannot be weighed, and so count as changed: %s", error)
        return None


def weigh_model(worker: Any) -> str:
    """A checksum over everything that a worker's models consist of, computed where they are.

    It tells weights that were replaced from weights that were not. It is no cryptographic hash:
    nobody gains anything by replacing weights with others that weigh the same.
    """
    models = [worker.model_runner.get_model()]
    draft = getattr(worker.model_runner, "get_draft_model", lambda: None)()
    models += [draft] if draft is not None else []
    weights: list[torch.Tensor] = []
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            weights += _weights(tensor.detach())
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for weight in weights:
        by_device.setdefault(weight.device, []).append(weight)
    digest = blake2b(digest_size=16)
    for found in by_device.values():
        digest.update(torch.stack(found).cpu().numpy().tobytes())
    return digest.hexdigest()


def _weights(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Two sums of a tensor's words for each of its parts; the second is weighted by place. No more
    than one part is copied at a time: a tensor may take most of the memory that there is."""
    places = torch.arange(min(-(-tensor.nbytes // 8), _PART), device=tensor.device) * 2 + 1
    for piece in _pieces(tensor):
        for part in piece.view(torch.uint8).split(8 * _PART):
            words = _words(part)
            weighted = (words ^ (words >> 29)) * places[: len(words)]
            yield torch.stack((words.sum(), weighted.sum()))


def _words(content: torch.Tensor) -> torch.Tensor:
    """Bytes as words; a copy where they do not begin or end on a word's boundary."""
    if rest := -len(content) % 8:
        content = torch.nn.functional.pad(content, (0, rest))
    elif content.storage_offset() % 8:
        content = content.clone()
    return content.view(torch.int64)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """All elements of a tensor, flat, in the order of memory: the tensor itself if it has no gaps,
    and else copies of at most one part each."""
    if tensor.dim():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    if tensor.is_contiguous() or tensor.nbytes <= 8 * _PART:
        yield tensor.contiguous().reshape(-1)
    elif len(tensor) > 1:
        for half in tensor.tensor_split(2):
            yield from _pieces(half)
    else:
        yield from _pieces(tensor[0])
