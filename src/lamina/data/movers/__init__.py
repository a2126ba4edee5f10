"""Movers copy pages between an engine's cache and host memory, one call per row."""

from lamina.data.movers.base import Fence, Mover, make_mover

__all__ = ["Fence", "Mover", "make_mover"]
