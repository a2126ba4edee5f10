"""``lamina-kv bench``: what Lamina costs and gains on the machine it runs on, measured against
floors.

Every engine runs in a process of its own, with dummy weights: speed does not depend on what a
model says. Both sides of a comparison, and the floor it is held against, are measured in the same
run, in turns, so that a machine that is busy with something else is so for all of them.
"""

from __future__ import annotations

from lamina_kv.bench.commands import app

__all__ = ["app"]
