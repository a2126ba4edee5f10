"""The one call that brings Lamina into continuous batching."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import transformers
from torch import distributed
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from lamina_kv.config import Config, load_config
from lamina_kv.engines.standalone import Standalone
from lamina_kv.engines.transformers.scheduler import WithLamina

SUPPORTED = "5.19."
"""Versions of transformers whose continuous batching is known: names that are relied on there are
not part of its public interface."""

_names: dict[tuple[str, Config, tuple[int, ...] | None], str] = {}
"""What the library knows a kind of scheduler, a configuration and the ranks of an engine by: one
name, however often."""


class UnsupportedEngine(ValueError):
    """This version of the library, or this way of running it, cannot be served."""


def attach(
    batching: ContinuousBatchingConfig | None = None,
    settings: Mapping[str, object] | None = None,
    *,
    model: PreTrainedModel | None = None,
) -> ContinuousBatchingConfig:
    """Have Lamina keep the KV cache of whatever runs with the configuration that is returned.

    It is what transformers' ``generate_batch``, ``continuous_batching_context_manager`` and
    ``init_continuous_batching`` take as ``continuous_batching_config``. Each manager that is made
    with it has tiers of its own, from its start until it is stopped; what far tiers hold outlives
    it.

    Args:
        batching: how to batch; its defaults without one. It is not changed.
        settings: Lamina's configuration, the same tree as everywhere; what ``LAMINA_CONFIG`` names
            is read, too.
        model: what will run with it; needed where ``torch.distributed`` has several processes,
            because it says which of them share it. All of these call this with equal arguments.

    Returns:
        ``batching`` with a scheduler type that is registered for it.

    Raises:
        ConfigError: if the settings are wrong.
        UnsupportedEngine: for another version of the library, or for what it cannot do together
            with Lamina; the message says what to set.
    """
    version = transformers.__version__
    if not version.startswith(SUPPORTED):
        raise UnsupportedEngine(
            f"transformers {version} is installed, and Lamina knows the continuous batching of "
            f"{SUPPORTED}x only: pip install 'lamina-kv[transformers]', or run without attach()"
        )
    config = load_config(dict(settings or {}), os.environ)
    batching = batching or ContinuousBatchingConfig()
    if batching.use_async_batching:
        raise UnsupportedEngine(
            "use_async_batching=True plans a batch before the one ahead of it has run, and Lamina "
            "has to know what became of that: leave it out"
        )
    graphs = batching.use_cuda_graph
    if config.load.mode != "parked":
        if graphs not in (None, False, (False, False)):
            raise UnsupportedEngine(
                'CUDA graphs call no hooks, and loads wait in those: set load.mode to "parked", or '
                "leave use_cuda_graph out"
            )
        graphs = False
    base = SCHEDULER_MAPPING.get(batching.scheduler_type)
    if base is None:
        known = ", ".join(sorted(SCHEDULER_MAPPING))
        raise UnsupportedEngine(
            f"there is no scheduler_type {batching.scheduler_type!r}; there are: {known}"
        )
    if isinstance(base, partial):
        raise UnsupportedEngine("this configuration has Lamina already: attach to another one")
    shared_by = None if model is None else _sharing(model)
    kind = (batching.scheduler_type, config, shared_by)
    name = _names.setdefault(kind, f"{batching.scheduler_type} with lamina {len(_names) + 1}")
    if name not in SCHEDULER_MAPPING:
        SCHEDULER_MAPPING[name] = partial(
            type(f"{base.__name__}WithLamina", (WithLamina, base), {}), config, shared_by
        )
    return replace(batching, scheduler_type=name, use_async_batching=False, use_cuda_graph=graphs)


def _sharing(model: PreTrainedModel) -> tuple[int, ...]:
    """Global ranks of the processes that have a share of a model; none if this one has all of it.
    The library reads the same attribute (``continuous_api.py``)."""
    mesh = DistributedHelper.extract_tp_mesh(getattr(model, "_device_mesh", None))
    return () if mesh is None else tuple(distributed.get_process_group_ranks(mesh.get_group()))


def attached_to(manager: ContinuousBatchingManager) -> Standalone | None:
    """What a running manager has of Lamina: its figures, and its ``hand_off``, whose ``reset`` says
    that weights have changed (to be called inside of ``manager.pause()``).

    Returns:
        None if it has nothing, or has not started.
    """
    processor = manager.batch_processor
    scheduler = None if processor is None else processor.scheduler
    return scheduler.lamina if isinstance(scheduler, WithLamina) else None
