"""A sleep takes away the memory of vLLM's cache: nobody may still read or write it then.

vLLM says so to connectors from 0.33 on (``unregister_kv_caches``). Under 0.32 its executor does on
their behalf, here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.executor.abstract import Executor

SAYS_SO = hasattr(KVConnectorBase_V1, "unregister_kv_caches")
"""Whether vLLM tells its connectors itself."""


def be_quiet_before_sleep() -> None:
    """Have every executor of this process say what vLLM 0.32 does not. Once is enough."""
    if SAYS_SO or hasattr(Executor.sleep, "__wrapped__"):
        return
    for method in ("sleep", "discard"):
        setattr(Executor, method, _after_quiet(getattr(Executor, method)))


def _after_quiet(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def quiet(executor: Executor, *args: Any, **kwargs: Any) -> Any:
        executor.collective_rpc(unregister)
        return method(executor, *args, **kwargs)

    return quiet


def unregister(worker: object) -> None:
    """Tell a worker's connectors; runs in the worker."""
    todo = [get_kv_transfer_group()] if has_kv_transfer_group() else []
    while todo:
        connector = todo.pop()
        todo += getattr(connector, "sub_connectors", ())
        getattr(connector, "unregister_kv_caches", lambda: None)()
