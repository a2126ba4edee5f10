"""What the proxy says of its engines: at the start, and when one of them changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from weakref import WeakKeyDictionary

from lamina_kv.push.proxy.engines import Engine, Role

log = logging.getLogger("lamina_kv.push.proxy")


class Roster:
    """See the module.

    Args:
        engines: all there are at the moment, of both roles.
    """

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._engines = engines
        self._troubles: WeakKeyDictionary[Engine, set[str]] = WeakKeyDictionary()
        self._differences: set[str] = set()

    def changed(self, engine: Engine) -> None:
        """An engine is healthy from now on, or is not, or for another reason."""
        said = self._troubles.setdefault(engine, set())
        if engine.healthy:
            said.clear()
            log.info("%s %s", engine, _introduction(engine))
            self._compare()
        elif engine.trouble not in said:  # it may have several, in turn
            said.add(engine.trouble)
            log.warning(
                "%s does not answer: %s. Nothing is sent there until it does",
                engine,
                engine.trouble,
            )

    def _compare(self) -> None:
        differences = {*self._find_differences()}
        for difference in differences - self._differences:
            log.warning("%s", difference)
        self._differences = differences

    def _find_differences(self) -> Iterator[str]:
        """Models for which a request is refused by prefill engines."""
        known = [engine for engine in self._engines if engine.models]
        for decode in (engine for engine in known if engine.role is Role.DECODE):
            for prefill in (engine for engine in known if engine.role is Role.PREFILL):
                if missing := decode.models - prefill.models:
                    yield (
                        f"{prefill} does not serve {_names(missing)}, as {decode} does: such "
                        "prompts are computed by the decode engine. Give both the same "
                        "--served-model-name and the same adapters"
                    )


def _introduction(engine: Engine) -> str:
    text = f"serves {_names(engine.models)}" if engine.models else "serves a model without a name"
    if len(engine.ranks) > 1:
        text += " on data-parallel ranks " + ", ".join(str(rank.number) for rank in engine.ranks)
    if engine.push:
        text += ", and pushes from " + ", ".join(rank.push for rank in engine.ranks)
    return text


def _names(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
