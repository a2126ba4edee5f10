"""What engines are forked from: a process that has done, once, what every vLLM would do as it
starts. Two seconds of computing for each engine become a third of a second.

It is imported by the server process of :mod:`multiprocessing` and by nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing

from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.v1.engine import utils as engine_utils
from vllm.v1.executor import multiproc_executor

import engine.child  # noqa: F401

LATER = (
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.v1.attention.backends.cpu_attn",
)
"""What an engine imports as it starts, beyond what :mod:`engine.child` imports."""

for module in LATER:
    with contextlib.suppress(ImportError):  # another version of vLLM may not have it
        importlib.import_module(module)

# The kernels of this platform are put in place in every module that has been imported.
current_platform.register_triton_kernel_overrides()
type(current_platform).register_triton_kernel_overrides = classmethod(lambda platform: None)

# vLLM looks at a class of models that it has never seen in a process of its own, so as not to touch
# a GPU: ten seconds for each, on a machine that is as new as CI's.
registry._run_in_subprocess = lambda look: look()

# Engines are forked from their server, and ranks from their engine, instead of importing all of it
# again.
for starts in (engine_utils, multiproc_executor):
    starts.get_mp_context = lambda: multiprocessing.get_context("fork")

# A collection looks at every object that there is, and an engine starts with five of them. Nothing
# that was imported will ever be garbage.
gc.collect()
gc.freeze()
