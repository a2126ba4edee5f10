"""What a scheduler writes down beside its work: decisions as they are made, and at the end what it
has learnt about costs. For every engine."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from lamina.config import Config
from lamina.control.cost import Costs, decode_costs, encode_costs
from lamina.control.decisions import DecisionRecord, encode_decision

log = logging.getLogger("lamina.engines")


class Notebook:
    """See the module. What cannot be written is said once and not missed.

    Args:
        decisions: a file that receives a line for every decision; None for none.
        costs: a file that keeps costs from one run to the next; None for none.
    """

    def __init__(self, decisions: Path | None, costs: Path | None) -> None:
        self._costs = costs
        self._decisions = None
        if decisions is not None:
            try:
                self._decisions = decisions.open("ab", buffering=0)
            except OSError as error:
                log.warning("observe.decisions: nothing is written down: %s", error)

    @classmethod
    def of(cls, config: Config, fingerprint: bytes, engine: int = 0) -> Notebook:
        """The notebook that a configuration asks for.

        Args:
            config: the whole tree.
            fingerprint: of the namespace: costs are a model's.
            engine: number of the engine among those that share the store.
        """
        costs = None
        if config.disk is not None:
            costs = config.disk.path / f"costs-{fingerprint.hex()[:16]}-{engine}.json"
        return cls(config.observe.decisions, costs)

    def read_costs(self) -> Costs | None:
        """What was learnt before, if anything was."""
        if self._costs is None:
            return None
        try:
            return decode_costs(self._costs.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("costs of earlier runs are not used: %s: %s", self._costs, error)
            return None

    def note(self, record: DecisionRecord) -> None:
        """Write a decision down."""
        if self._decisions is not None:
            try:
                self._decisions.write(encode_decision(record) + b"\n")
            except OSError as error:
                log.warning("observe.decisions: no more is written down: %s", error)
                self._decisions = None

    def close(self, costs: Costs) -> None:
        """The engine ends; keep what was learnt."""
        if self._decisions is not None:
            with suppress(OSError):
                self._decisions.close()
            self._decisions = None
        if self._costs is None:
            return
        written = self._costs.with_suffix(".new")
        try:
            written.write_bytes(encode_costs(costs))
            written.replace(self._costs)
        except OSError as error:
            log.warning("what was learnt about costs is not kept: %s", error)
