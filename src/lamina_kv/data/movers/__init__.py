"""Movers copy pages between an engine's cache and the near tier, many rows in one call."""

from lamina_kv.data.movers.base import Mover, Pairs, make_mover
from lamina_kv.data.movers.fences import Fence

__all__ = ["Fence", "Mover", "Pairs", "make_mover"]
