"""The order in which vLLM calls a worker's connector in a step.

Transfers belong to steps: what is loaded is there before a layer reads it, what is saved was
written, and each receipt goes up once. That rests on the order of the calls, which vLLM documents
nowhere. vLLM 0.32 and 0.33 have two orders. The usual one, under both of their runners::

    handle_preemptions                      the step begins
    start_load_kv                           here if the step has loads in it
      wait_for_layer_load, save_kv_layer    for each layer; in V2 of 0.32 of a draft model, too
    start_load_kv                           here otherwise
    wait_for_save                           the step ends
    get_transfer_results, get_block_ids_with_load_errors, build_connector_worker_meta

and with speculative decoding, under V1 of both versions and V2 of 0.33::

    handle_preemptions, start_load_kv, layers, start_load_kv
    get_transfer_results, get_block_ids_with_load_errors, build_connector_worker_meta
      wait_for_layer_load, save_kv_layer    for each layer of the draft model
    wait_for_save

A full graph calls no hook of a layer, and a step without a forward none either. Under a version
that calls in another order receipts would be lost, or rows be read that are not there: such a call
is an error.
"""

from __future__ import annotations

from enum import IntEnum

from lamina_kv.engines.vllm.version import served


class StepOrderError(RuntimeError):
    """vLLM made a call that does not belong where it came; the step cannot be trusted."""


class Call(IntEnum):
    """What vLLM calls once in a step. Each is a bit, for sets of them."""

    BEGIN = 1
    START = 2
    END = 4
    RESULTS = 8
    ERRORS = 16
    META = 32


_NAMES = {
    Call.BEGIN: "handle_preemptions",
    Call.START: "start_load_kv",
    Call.END: "wait_for_save",
    Call.RESULTS: "get_transfer_results",
    Call.ERRORS: "get_block_ids_with_load_errors",
    Call.META: "build_connector_worker_meta",
}
_BEFORE = {
    Call.START: Call.BEGIN | 0,
    Call.END: Call.BEGIN | Call.START,
    Call.RESULTS: Call.BEGIN | Call.START,
    Call.ERRORS: Call.RESULTS | 0,
    Call.META: Call.ERRORS | 0,
}
"""What must have come before a call."""
_WHOLE = Call.END | Call.META
_END = Call.END | 0


class StepOrder:
    """Where a worker is in its step; one for each connector. A call costs a fraction of a
    microsecond."""

    def __init__(self) -> None:
        self._made = _WHOLE
        self._before_layers = 0

    def begins(self, *, loads: bool) -> None:
        """A step begins.

        Args:
            loads: whether layers have to wait for loads of this step.

        Raises:
            StepOrderError: if the one before has not ended.
        """
        if self._made & _WHOLE != _WHOLE:
            self._fail(_NAMES[Call.BEGIN])
        self._made = Call.BEGIN | 0
        self._before_layers = Call.BEGIN | Call.START if loads else Call.BEGIN | 0

    def makes(self, call: Call) -> None:
        """A call comes that every step has once, after its beginning.

        Raises:
            StepOrderError: if it does not belong here.
        """
        made, before = self._made, _BEFORE[call]
        # The calls that hand results up are three that belong together.
        torn = call is Call.END and made & (Call.RESULTS | Call.META) == Call.RESULTS
        if made & call or made & before != before or torn:
            self._fail(_NAMES[call])
        self._made = made | call

    def layer(self, hook: str) -> None:
        """A layer's hook comes.

        Raises:
            StepOrderError: outside of a forward, or before the step's loads were started.
        """
        made = self._made
        if made & _END or made & self._before_layers != self._before_layers:
            self._fail(hook)

    def _fail(self, name: str) -> None:
        made = ", ".join(said for call, said in _NAMES.items() if self._made & call)
        raise StepOrderError(
            f"vLLM called LaminaConnector's {name} where it is not expected (it has already called "
            f"{made}). Rows may be missing from the step, and what it computed is not to be "
            f"trusted. Lamina knows the order of vLLM {served()}: use one of them, or serve "
            "without --kv-transfer-config"
        )
