"""Which weights a request's LoRA adapter has.

A name, a number or a path says nothing about weights, so an adapter is known by the content of its
files at the moment when vLLM's workers load them. They load an adapter when it is added, or when a
request of it runs and they have none of its number any more. Then they keep it, whatever becomes of
its files. The scheduler learns what is added and removed (:mod:`lamina.engines.vllm.weights`), and
not what workers give up to make room. So if files have changed since, it is open which weights a
request gets: nothing is kept of it, until the adapter is removed or added anew.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from typing import Protocol

from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest

from lamina.checkpoint import CheckpointError, Snapshot, fingerprint, locate, snapshot

log = logging.getLogger("lamina.engines.vllm")


class _Wanting(Protocol):
    """A request of vLLM."""

    request_id: str
    lora_request: LoRARequest | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An adapter as vLLM's workers have it.

    Attributes:
        source: its name and path.
        content: names its weights.
        files: what its files' metadata said when they were read; None if they cannot be read.
    """

    source: tuple[str, str]
    content: str
    files: Snapshot | None


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
        self._loaded: dict[int, _Loaded] = {}
        self._known: dict[str, tuple[int, str]] = {}
        self._changes = 0

    def identity(self, request: _Wanting) -> str:
        """What sets the chunks of a request apart; empty without an adapter. Files are looked at
        once for each request, and again when an adapter was added or removed meanwhile."""
        adapter = request.lora_request
        if adapter is None:
            return ""
        if adapter.load_inplace:  # workers read its files whenever it comes to run
            return f"{_read(adapter).content} {self._settings}"
        changes, identity = self._known.get(request.request_id, (-1, ""))
        if changes != self._changes:
            identity = f"{self._content(adapter)} {self._settings}"
            self._known[request.request_id] = self._changes, identity
        return identity

    def admitted(self, request: _Wanting) -> None:
        """A request runs with the next step."""
        if request.lora_request is not None and request.lora_request.load_inplace:
            self.added(request.lora_request)

    def finished(self, request: _Wanting) -> None:
        """A request is over."""
        self._known.pop(request.request_id, None)

    def added(self, adapter: LoRARequest) -> None:
        """Workers load an adapter now."""
        self._loaded[adapter.lora_int_id] = _read(adapter)
        self._changes += 1

    def removed(self, number: int) -> None:
        """Workers do not have the adapter of that number any more."""
        self._loaded.pop(number, None)
        self._changes += 1

    def _content(self, adapter: LoRARequest) -> str:
        loaded = self._loaded.get(adapter.lora_int_id)
        if loaded is None:
            loaded = self._loaded[adapter.lora_int_id] = _read(adapter)
        if loaded.source == (adapter.lora_name, adapter.lora_path) and _lasts(loaded):
            return loaded.content
        log.warning(
            "adapter %s: its files are not those that vLLM has loaded under number %d. Nothing is "
            "kept of its requests until it is removed or loaded anew.",
            adapter.lora_name,
            adapter.lora_int_id,
        )
        return _unknown()


def _read(adapter: LoRARequest) -> _Loaded:
    source = adapter.lora_name, adapter.lora_path
    try:
        folder = locate(adapter.lora_path)
        files = snapshot(folder)
        return _Loaded(source, fingerprint(folder), files)
    except CheckpointError as error:
        log.warning(
            "adapter %s: its cache is of use to this process only: %s", adapter.lora_name, error
        )
        return _Loaded(source, _unknown(), None)


def _lasts(loaded: _Loaded) -> bool:
    """Whether vLLM would load the same again. Where files are gone it loads nothing."""
    if loaded.files is None:
        return True
    try:
        return snapshot(locate(loaded.source[1])) in (loaded.files, ())
    except CheckpointError:
        return True


def _unknown() -> str:
    return f"unknown {uuid.uuid4()}"
