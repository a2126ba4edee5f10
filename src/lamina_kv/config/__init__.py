"""What the operator may decide: one validated tree, from vLLM's extra config and one YAML file.

:func:`load_config` builds a :class:`Config`; :func:`table`, :func:`example` and :func:`json_schema`
document it. A mistake is one :class:`ConfigError` at the start that names every wrong key and says
what would be right.
"""

from lamina_kv.config.example import example
from lamina_kv.config.schema import json_schema
from lamina_kv.config.sources import CONFIG_VARIABLE, ConfigError, load_config
from lamina_kv.config.table import table
from lamina_kv.config.tree import (
    BreakerConfig,
    Config,
    HostConfig,
    LoadConfig,
    ObserveConfig,
    PushConfig,
    SaveConfig,
)
from lamina_kv.values import format_size

__all__ = [
    "CONFIG_VARIABLE",
    "BreakerConfig",
    "Config",
    "ConfigError",
    "HostConfig",
    "LoadConfig",
    "ObserveConfig",
    "PushConfig",
    "SaveConfig",
    "example",
    "format_size",
    "json_schema",
    "load_config",
    "table",
]
