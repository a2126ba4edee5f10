"""The load of a step, as the engine's layers see it.

Every layer waits for its row. Where layers cannot call, all rows are loaded before the forward: in
a model with layers that never do (:meth:`StepLoads.load_before_forward`), and in a step that
replays one graph of the whole model (:meth:`StepLoads.start`). Likewise where copies would take the
cores that compute. A layer that was to wait and did not has read rows that nobody knows to have
been there: then nothing of the step is kept, and the engine has to stop.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import Enum

from lamina_kv.data.load_pipeline import LoadRun, LoadStuck
from lamina_kv.data.movers.base import Mover
from lamina_kv.geometry import CacheGeometry

log = logging.getLogger("lamina_kv.data")


class LayersDidNotWait(RuntimeError):
    """Layers have read rows of a load without waiting for them."""


class Waits(Enum):
    """Who waits, in a step, for rows that it loads."""

    LAYERS = "layers"
    """Each layer, for its own row; one that does not is a mistake."""
    FORWARD = "forward"
    """The whole forward, for all rows: layers cannot call."""
    NOBODY = "nobody"
    """The step runs no model."""


class StepLoads:
    """See the module.

    Args:
        geometry: the engine's cache.
        mover: orders the engine's work behind copies.

    Attributes:
        stopped: why the engine has to stop; None while it has not.
    """

    def __init__(self, geometry: CacheGeometry, mover: Mover) -> None:
        self._geometry = geometry
        self._mover = mover
        self._row_of_layer = geometry.row_of_layer
        self._run: LoadRun | None = None
        self._waits = self._model_waits = Waits.LAYERS
        self._order: Mapping[str, int] | None = None
        self._called: set[str] = set()
        self.stopped: RuntimeError | None = None

    @property
    def is_empty(self) -> bool:
        """Whether layers have nothing to wait for."""
        return self._run is None

    def load_before_forward(self) -> None:
        """Layers do not wait for their rows: :meth:`start` returns when all is there."""
        self._model_waits = Waits.FORWARD

    def drafts_follow(self, order: Sequence[str]) -> None:
        """Layers at the end of ``order``, which has all of them, may be a draft model's. They run
        once the loads of a step are finished, or not at all, and need not wait."""
        self._order = {layer: index for index, layer in enumerate(order)}

    def begin_step(self, *, forward: bool) -> None:
        """A step begins.

        Args:
            forward: whether it runs the model.

        Raises:
            LoadStuck, LayersDidNotWait: if the engine had to stop, and has not.
        """
        self.raise_if_stopped()
        self._waits = self._model_waits if forward else Waits.NOBODY
        self._called.clear()

    def add(self, run: LoadRun) -> None:
        """The step's loads."""
        self._run = run

    def start(self, *, layers_call: bool = True) -> None:
        """Submit the first rows; right before the forward, because engines prepare blocks (zero,
        copy) once a step has begun.

        Args:
            layers_call: whether layers of this step call :meth:`wait_layer`. If not, the forward
                comes after all rows: the device orders that where it can, and the host waits for
                launches only.

        Raises:
            LoadStuck: as :meth:`wait_layer` does, if all rows are loaded before the forward.
            RuntimeError: if there is no host memory to load from.
        """
        if self._run is not None and not self._run.is_started:
            # Of ranks that share a slab another one may have filled it while this one still pins
            # it. That takes its time, and no copy is late because of it.
            self._run.await_near()
            self._run.start(self._mover.fence_compute())
        if not layers_call and self._waits is Waits.LAYERS:
            self._waits = Waits.FORWARD
        if self._waits is Waits.FORWARD:
            self._wait_all()

    def wait_layer(self, layer: str) -> None:
        """Return when the row of ``layer`` may be read; at once if nothing is loaded, or if the
        layer has no row because it reads another one's.

        Raises:
            LoadStuck: if a copy does not end. The engine has to stop.
        """
        if self._run is not None and (row := self._row_of_layer.get(layer)) is not None:
            self._called.add(layer)
            self._hold(self._run, row)

    def finish(self, *, blameless: bool) -> LoadRun | None:
        """Wait for all rows.

        Args:
            blameless: whether layers had no chance to wait, because the forward has failed.

        Returns:
            The step's loads, which are over; None if there are none, or none any more.

        Raises:
            LoadStuck: as :meth:`wait_layer` does.
        """
        if self._run is not None and self._waits is Waits.LAYERS and not blameless:
            self._check_called(self._run)
        self._wait_all()
        run, self._run = self._run, None
        return run

    def _wait_all(self) -> None:
        if self._run is not None:
            for row in range(len(self._geometry.rows)):
                self._hold(self._run, row)

    def _hold(self, run: LoadRun, row: int) -> None:
        try:
            if (fence := run.wait(row)) is not None:
                self._mover.hold_compute(fence)
        except LoadStuck as error:
            self.stop(error)
            raise

    def stop(self, error: RuntimeError) -> None:
        """Keep nothing of the step, and begin no other one."""
        log.error("%s", error)
        # Without the traceback, in whose frames the engine stands: it could never be collected.
        self.stopped = type(error)(*error.args)
        self._run = None

    def raise_if_stopped(self) -> None:
        """Say once more why the engine has to stop.

        Raises:
            LoadStuck, LayersDidNotWait: if it has to.
        """
        if self.stopped is not None:
            raise type(self.stopped)(*self.stopped.args)

    def _check_called(self, run: LoadRun) -> None:
        """See that every layer has waited whose row is loaded in the step."""
        groups = {piece.group for load in run.loads for piece in load.pieces}
        layers = [
            layer
            for row in self._geometry.rows
            if groups.intersection(row.groups)
            for layer in row.layers
        ]
        if self._order is not None and self._called:
            last = max(map(self._order.__getitem__, self._called))
            layers = [layer for layer in layers if self._order[layer] <= last]
        if silent := [layer for layer in layers if layer not in self._called]:
            named = ", ".join(silent[:4]) + (f" and {len(silent) - 4} more" if silent[4:] else "")
            self.stop(
                LayersDidNotWait(
                    f"layers {named} did not wait for rows that were loaded in their step, and may "
                    "have read them before they were there. Nothing of the step is kept, and the "
                    'engine stops. Set load.mode to "parked" to serve this model, and report this'
                )
            )
