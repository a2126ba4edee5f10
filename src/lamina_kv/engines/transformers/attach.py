"""The one call that brings Lamina into continuous batching."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import transformers
from packaging.version import Version
from torch import distributed
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING
from transformers.generation.continuous_batching.utils import get_accelerator_graph_name
from transformers.utils.generic import is_flash_attention_requested

from lamina_kv.config import Config, load_config
from lamina_kv.engines.standalone import Standalone
from lamina_kv.engines.transformers.scheduler import WithLamina

log = logging.getLogger("lamina_kv.engines.transformers")

OLDEST, NEWEST = (5, 19), (5, 24)
"""Minor versions of transformers whose continuous batching is known, those between them included:
names that are relied on there are not part of its public interface. Tests run at both ends."""

Graphs = tuple[bool, bool]
"""Whether graphs may be replayed of varlen forwards, and of forwards that decode only."""

_names: dict[tuple[str, Config, tuple[int, ...] | None, Graphs], str] = {}
"""What the library knows a kind of scheduler, a configuration, the ranks of an engine and its
graphs by: one name, however often."""


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
        model: what will run with it. Needed where ``torch.distributed`` has several processes,
            because it says which of them share it; all of these call this with equal arguments. On
            a GPU it says whether graphs are worth it, too: without, there are none, unless
            ``batching`` asks for them.

    Returns:
        ``batching`` with a scheduler type that is registered for it.

    Raises:
        ConfigError: if the settings are wrong.
        UnsupportedEngine: for another version of the library, or for what it cannot do together
            with Lamina; the message says what to set.
    """
    version = transformers.__version__
    if not OLDEST <= Version(version).release[:2] <= NEWEST:
        oldest, newest = (".".join(map(str, each)) for each in (OLDEST, NEWEST))
        raise UnsupportedEngine(
            f"transformers {version} is installed, and Lamina knows the continuous batching of "
            f"{oldest} to {newest} only: pip install 'lamina-kv[transformers]', or run without "
            "attach()"
        )
    config = load_config(dict(settings or {}), os.environ)
    batching = batching or ContinuousBatchingConfig()
    if batching.use_async_batching:
        raise UnsupportedEngine(
            "use_async_batching=True plans a batch before the one ahead of it has run, and Lamina "
            "has to know what became of that: leave it out"
        )
    graphs = batching.use_cuda_graph
    if graphs is None and config.load.mode != "parked":
        graphs = (False, _decodes_with_graphs(model))
    _say_what_is_off(graphs, model)
    base = SCHEDULER_MAPPING.get(batching.scheduler_type)
    if base is None:
        known = ", ".join(sorted(SCHEDULER_MAPPING))
        raise UnsupportedEngine(
            f"there is no scheduler_type {batching.scheduler_type!r}; there are: {known}"
        )
    if isinstance(base, partial):
        raise UnsupportedEngine("this configuration has Lamina already: attach to another one")
    shared_by = None if model is None else _sharing(model)
    if graphs is None:  # the library decides, and any forward may be one
        replayed = (True, True)
    else:
        replayed = (graphs, graphs) if isinstance(graphs, bool) else graphs
    kind = (batching.scheduler_type, config, shared_by, replayed)
    name = _names.setdefault(kind, f"{batching.scheduler_type} with lamina {len(_names) + 1}")
    if name not in SCHEDULER_MAPPING:
        SCHEDULER_MAPPING[name] = partial(
            type(f"{base.__name__}WithLamina", (WithLamina, base), {}), config, shared_by, replayed
        )
    return replace(batching, scheduler_type=name, use_async_batching=False, use_cuda_graph=graphs)


def _decodes_with_graphs(model: PreTrainedModel | None) -> bool:
    """Whether the library would replay graphs of forwards that decode, by the rule of its own
    (``initialization.py``), left to itself. Those of other forwards are given up for loads that
    arrive layer by layer, and a forward that decodes has such a load only now and then."""
    if model is None or get_accelerator_graph_name() is None:
        return False
    return bool(is_flash_attention_requested(model.config))


def _say_what_is_off(graphs: bool | Graphs | None, model: PreTrainedModel | None) -> None:
    """What the library does without because of Lamina. On a CPU it has neither."""
    if get_accelerator_graph_name() is None:
        return
    log.warning(
        "asynchronous batching is off: what became of a batch has to be known before the next one "
        "is planned"
    )
    if graphs in (False, (False, False), (False, True)):
        log.warning(
            "CUDA graphs %s are off, so that loads arrive layer by layer. %suse_cuda_graph=True "
            'keeps them all, and loads come before a forward then; load.mode "parked" keeps them, '
            "and no forward waits for a load",
            "of prompts" if graphs == (False, True) else "of prompts and of decoding",
            "attach(..., model=model) keeps those of decoding. " if model is None else "",
        )


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
