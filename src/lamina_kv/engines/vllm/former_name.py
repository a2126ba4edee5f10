"""The connector's former module path, as an error that says the new one.

The package was called ``lamina``, which other distributions on the package index are called, too.
vLLM imports ``kv_connector_module_path`` itself, so only an import can say what is wrong with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_FORMER = ("lamina", "lamina.engines", "lamina.engines.vllm", "lamina.engines.vllm.connector")


class FormerName(MetaPathFinder):
    """The last finder of a process: asked for a module that no other one has found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Nothing, or an error.

        Raises:
            ModuleNotFoundError: for a former name of the connector's module.
        """
        if fullname in _FORMER:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}. Lamina's package is called lamina_kv now: set "
                '"kv_connector_module_path": "lamina_kv.engines.vllm", or leave it out',
                name=fullname,
            )
        return None


def explain_former_name() -> None:
    """Install :class:`FormerName` once, behind every other finder."""
    if not any(isinstance(finder, FormerName) for finder in sys.meta_path):
        sys.meta_path.append(FormerName())
