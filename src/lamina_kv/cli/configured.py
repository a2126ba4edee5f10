"""The configuration that an engine has, for a command that is given the same."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from lamina_kv.config import CONFIG_VARIABLE, Config, ConfigError, load_config

TRANSFER_CONFIG = "--kv-transfer-config"


def configured(config_file: Path | None, kv_transfer_config: str | None) -> Config:
    """The configuration, from where an engine has it.

    Args:
        config_file: a file; None: the one that ``LAMINA_CONFIG`` names, if any.
        kv_transfer_config: what vLLM is given, as JSON.

    Raises:
        ConfigError: if it is wrong.
    """
    environ = dict(os.environ)
    if config_file is not None:
        environ[CONFIG_VARIABLE] = str(config_file)
    document: dict[str, object] = (
        {} if kv_transfer_config is None else parse_transfer_config(kv_transfer_config)
    )
    return load_config(extra_of(document), environ)


def parse_transfer_config(text: str) -> dict[str, object]:
    """What vLLM takes as ``--kv-transfer-config``.

    Raises:
        ConfigError: if it is no JSON object.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        quote = "quote it for the shell: '{\"kv_…\": …}'"
        raise ConfigError([f"{TRANSFER_CONFIG}: is not valid JSON: {error}; {quote}"]) from None
    if not isinstance(document, dict):
        found = json.dumps(document)
        raise ConfigError([f"{TRANSFER_CONFIG}: is not a JSON object: {found}; it is {{…}}"])
    return document


def extra_of(document: Mapping[str, object]) -> Mapping[str, object]:
    """Lamina's keys in what vLLM takes; none if they are no object."""
    given = document.get("kv_connector_extra_config")
    return given if isinstance(given, dict) else {}
