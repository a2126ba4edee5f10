"""Which weights a request's LoRA adapter has.

A name, a number or a path says nothing about weights, so an adapter is known by the content of its
files at the moment when vLLM's workers load them. They load an adapter

- when it is added,
- when a request of it runs and they have none of its number any more,
- in every step in which a request of it runs that says ``load_inplace``.

Then they keep it, whatever becomes of its files. The scheduler learns what is added and removed
(:mod:`lamina_kv.engines.vllm.weights`), and not what workers give up to make room. So if files have
changed since, it is open which weights a new request gets: nothing is kept of it, until the adapter
is removed or added anew.

Files may change at any time. Their metadata are compared with those of the loaded content once for
the lookups of a step, when a request is admitted, and, while workers may still load them, before
and after every step. Requests under which they have changed are barred: what these hold was
computed by several adapters.

VLLM keeps blocks of its own cache when an adapter is loaded anew under its name. A request that
finds such blocks computes on what another adapter has left: nothing is kept of it either.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest

from lamina_kv.checkpoint import CheckpointError, Snapshot, fingerprint, locate, snapshot

log = logging.getLogger("lamina_kv.engines.vllm")

_MIXED = ""
"""Content of an adapter under whose name several contents have computed."""


class _Wanting(Protocol):
    """A request of vLLM."""

    request_id: str
    lora_request: LoRARequest | None
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class _Files:
    """An adapter's files as they were read.

    Attributes:
        source: its name and path.
        content: names its weights.
        stamps: what the files' metadata said when they were read; None if they cannot be read.
    """

    source: tuple[str, str]
    content: str
    stamps: Snapshot | None


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a request was last looked up with.

    Attributes:
        content: content of its adapter; None if that is open.
        name: the same, or a name that nothing else has.
    """

    content: str | None
    name: str


@dataclass(frozen=True, slots=True)
class _Running:
    """A request that has blocks.

    Attributes:
        request: the request.
        adapter: its adapter.
        outputs: its output tokens when it got them: with the next one workers have its adapter.
    """

    request: _Wanting
    adapter: LoRARequest
    outputs: int


class Adapters:
    """The adapters of an engine.

    Args:
        config: vLLM's settings for them; None if it has none.
    """

    def __init__(self, config: LoRAConfig | None) -> None:
        self._settings = ""
        if config is not None:
            modules = sorted(config.target_modules or ())
            self._settings = f"{config.lora_dtype} {config.enable_tower_connector_lora} {modules}"
        self._bar: Callable[[Iterable[str]], None] = lambda requests: None
        self._read: dict[int, _Files] = {}
        self._loaded: dict[int, _Files] = {}
        self._known: dict[str, _Identity] = {}
        self._running: dict[int, dict[str, _Running]] = {}
        self._looked: dict[tuple[int, str, str, bool], str | None] = {}
        self._loading: set[int] = set()  # numbers whose files workers may yet read
        # By name and path, as vLLM's cache has it: the content that has computed its blocks.
        self._computed: dict[tuple[str, str], str] = {}

    def follow(self, bar: Callable[[Iterable[str]], None]) -> None:
        """Whom to tell of requests under which their adapter has changed."""
        self._bar = bar

    def identity(self, request: _Wanting, found: int = 0) -> str:
        """What sets the chunks of a request apart; empty without an adapter.

        Args:
            request: the request.
            found: tokens of it that are in vLLM's own cache.
        """
        adapter = request.lora_request
        if adapter is None:
            return ""
        looked = adapter.lora_int_id, *_source(adapter), adapter.load_inplace
        if looked not in self._looked:
            self._looked[looked] = self._content(adapter)
        content = self._looked[looked]
        if found and self._computed.get(_source(adapter), content) != content:
            content = None
        known = self._known.get(request.request_id)
        if known is None or known.content != content:
            if content is None:
                _warn_open(adapter)
            known = _Identity(content, _unknown() if content is None else content)
            self._known[request.request_id] = known
        return f"{known.name} {self._settings}"

    def look_anew(self) -> None:
        """The next lookup looks at the files itself. Lookups of one step look once for all: there
        may be thousands, and what changes in between is seen when a request is admitted."""
        self._looked.clear()

    def admitted(self, request: _Wanting) -> None:
        """A request has got its blocks, and runs with one of the next steps."""
        adapter = request.lora_request
        if adapter is None:
            return
        number = adapter.lora_int_id
        if adapter.load_inplace or number not in self._loaded:
            self._load(adapter, self._reading(adapter))
        content = self._content(adapter)
        running = self._running.setdefault(number, {})
        running[request.request_id] = _Running(request, adapter, request.num_output_tokens)
        self._loading.add(number)
        known = self._known.get(request.request_id)
        if known is None or (known.content is not None and known.content != content):
            self._bar([request.request_id])
        source = _source(adapter)
        if self._computed.setdefault(source, content or _MIXED) != content:
            self._computed[source] = _MIXED

    def check(self) -> None:
        """A step begins, or is over: of adapters that workers may have read in it, see whether
        their files are what they were."""
        self.look_anew()
        for number in list(self._loading):
            running, loaded = self._running[number].values(), self._loaded.get(number)
            inplace = next((run.adapter for run in running if run.adapter.load_inplace), None)
            if loaded is None or not _lasts(loaded):
                self._changed(number)
                if inplace is not None:
                    self._load(inplace, self._reading(inplace))
            if inplace is None and all(r.request.num_output_tokens > r.outputs for r in running):
                self._loading.discard(number)

    def finished(self, request: _Wanting) -> None:
        """A request is over; called before anything of it is kept for the last time."""
        if (adapter := request.lora_request) is None:
            return
        number = adapter.lora_int_id
        running = self._running.get(number, {})
        if request.request_id in running and number in self._loading:
            self.check()
        self._known.pop(request.request_id, None)
        running.pop(request.request_id, None)
        if not running:
            self._running.pop(number, None)
            self._loading.discard(number)

    def stamps(self, adapter: LoRARequest) -> Snapshot | None:
        """What metadata say of an adapter's files; None if they cannot be read."""
        try:
            return snapshot(locate(adapter.lora_path))
        except CheckpointError:
            return None

    def added(self, adapter: LoRARequest, before: Snapshot | None = None) -> None:
        """Workers have loaded the adapter.

        Args:
            adapter: the adapter.
            before: its :meth:`stamps` before they did, if they were looked at.
        """
        files = self._reading(adapter)
        if before is not None and before != files.stamps:
            log.warning("adapter %s: its files changed while it was loaded", adapter.lora_name)
            files = replace(files, content=_unknown())
        self._load(adapter, files)

    def removed(self, number: int) -> None:
        """Workers do not have the adapter of that number any more. Requests of it that still run
        have it loaded again, from whatever its files are then."""
        self._changed(number)
        self._loaded.pop(number, None)
        self.look_anew()
        self._read.pop(number, None)

    def emptied(self) -> None:
        """There is nothing in vLLM's cache but what requests that run will put there."""
        if self._computed:
            runs = {_source(r.adapter) for runs in self._running.values() for r in runs.values()}
            self._computed = {source: c for source, c in self._computed.items() if source in runs}

    def _load(self, adapter: LoRARequest, files: _Files) -> None:
        former = self._loaded.get(adapter.lora_int_id)
        self._loaded[adapter.lora_int_id] = files
        self.look_anew()
        if former is None or former.content != files.content:
            self._changed(adapter.lora_int_id)

    def _changed(self, number: int) -> None:
        """Requests that run have another content from now on, or since a moment ago."""
        running = self._running.get(number, {})
        self._bar(list(running))
        for run in running.values():
            self._computed[_source(run.adapter)] = _MIXED

    def _content(self, adapter: LoRARequest) -> str | None:
        """The content that workers have if a request runs now; None if it is open."""
        loaded = self._loaded.get(adapter.lora_int_id)
        if loaded is None or adapter.load_inplace:
            return self._reading(adapter).content
        same = loaded.source == _source(adapter) and _lasts(loaded)
        return loaded.content if same else None

    def _reading(self, adapter: LoRARequest) -> _Files:
        """The files as they are; they are read only if their metadata are others than before."""
        source, stamps = _source(adapter), self.stamps(adapter)
        known = self._read.get(adapter.lora_int_id)
        if known is None or (known.source, known.stamps) != (source, stamps):
            known = self._read[adapter.lora_int_id] = self._fingerprint(adapter, source, stamps)
        return known

    def _fingerprint(
        self, adapter: LoRARequest, source: tuple[str, str], stamps: Snapshot | None
    ) -> _Files:
        try:
            content = fingerprint(locate(adapter.lora_path))
        except CheckpointError as error:
            log.warning(
                "adapter %s: its cache is of use to this process only: %s", adapter.lora_name, error
            )
            return _Files(source, _unknown(), stamps)
        if self.stamps(adapter) != stamps:
            content = _unknown()  # of files that are being written, and will be read again
        return _Files(source, content, stamps)


def _source(adapter: LoRARequest) -> tuple[str, str]:
    return adapter.lora_name, adapter.lora_path


def _warn_open(adapter: LoRARequest) -> None:
    log.warning(
        "adapter %s: its files are not those that vLLM has loaded under number %d, or vLLM's cache "
        "holds blocks that others have computed. Nothing is kept of its requests: remove it or "
        "load it anew, and reset the prefix cache (reset_prefix_cache with reset_connector)",
        adapter.lora_name,
        adapter.lora_int_id,
    )


def _lasts(files: _Files) -> bool:
    """Whether vLLM would load the same again. Where files are gone it loads nothing."""
    if files.stamps is None:
        return True
    try:
        return snapshot(locate(files.source[1])) in (files.stamps, ())
    except CheckpointError:
        return True


def _unknown() -> str:
    return f"unknown {uuid.uuid4()}"
