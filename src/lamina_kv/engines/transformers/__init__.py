"""Lamina in Hugging Face transformers' continuous batching.

::

    from lamina_kv.engines.transformers import attach

    batching = attach(ContinuousBatchingConfig(), {"host": {"capacity": "4GiB"}})
    model.generate_batch(prompts, continuous_batching_config=batching)
"""

from lamina_kv.engines.transformers.attach import UnsupportedEngine, attach, attached_to

__all__ = ["UnsupportedEngine", "attach", "attached_to"]
