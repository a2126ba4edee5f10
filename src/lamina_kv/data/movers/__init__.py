"""Movers copy pages between an engine's cache and the near tier, one call per row."""

from lamina_kv.data.movers.base import Fence, Mover, make_mover

__all__ = ["Fence", "Mover", "make_mover"]
