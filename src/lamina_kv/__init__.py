"""Lamina moves the KV cache of large language models, layer by layer."""

__version__ = "0.1.0"
