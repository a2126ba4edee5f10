"""Movers copy pages between an engine's cache and the near tier, many rows in one call."""

from lamina_kv.data.movers.base import Fence, Mover, Pairs, make_mover

__all__ = ["Fence", "Mover", "Pairs", "make_mover"]
