"""What tells one model from another, for every engine that runs Hugging Face checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from lamina_kv.checkpoint import fingerprint, locate
from lamina_kv.config import Config

_IRRELEVANT = ("_name_or_path", "transformers_version")
"""Keys of a model's configuration that say where it is from and not what it computes."""


def describe_model(fields: Mapping[str, Any], **engine: object) -> str:
    """What a model computes, as text.

    Args:
        fields: its configuration, as its ``to_dict`` has it.
        engine: what the engine adds to it; what has no word of its own in the configuration.
    """
    return json.dumps({**_relevant(fields), **engine}, sort_keys=True, default=_as_text)


def _relevant(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is irrelevant; a model of several parts has a configuration for each."""
    return {
        key: _relevant(value) if isinstance(value, Mapping) else value
        for key, value in fields.items()
        if key not in _IRRELEVANT
    }


def _as_text(value: object) -> str | list[str]:
    """What JSON has no word for, the same in every process: sets have another order in each."""
    return sorted(map(str, value)) if isinstance(value, Set) else str(value)


def describe_checkpoint(
    config: Config, model: str, *, revision: str | None = None, download_dir: Path | None = None
) -> str:
    """Which weights a model has: what the operator says of them, else a fingerprint of their
    content.

    Args:
        config: the whole tree.
        model: a path, or a name on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        download_dir: the hub's local cache, if it is not in its usual place.

    Raises:
        CheckpointError: if they cannot be told apart from others; says to set ``identity``.
    """
    if config.identity != "auto":
        return f"identity {config.identity}"
    return fingerprint(locate(model, revision=revision, download_dir=download_dir))
