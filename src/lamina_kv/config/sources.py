"""Where a configuration comes from: the engine's extra config and a YAML file, as one tree.

Both give the same keys. A key given in both places is an error, because either answer would
surprise somebody.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from lamina_kv.config.problems import printable, problem
from lamina_kv.config.tree import Config, section_of
from lamina_kv.values import MIB, Section, format_size, show

CONFIG_VARIABLE = "LAMINA_CONFIG"
"""The environment variable that names a YAML file with the same tree."""

_MAX_FILE_BYTES = MIB


class ConfigError(ValueError):
    """The configuration is wrong.

    Attributes:
        problems: one line for each mistake, which names the key or file and what would be right.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def load_config(extra: Mapping[str, object] | None, environ: Mapping[str, str]) -> Config:
    """The configuration of this process.

    Args:
        extra: the engine's own place for it (vLLM: ``kv_connector_extra_config``).
        environ: the environment; ``LAMINA_CONFIG`` names a YAML file, and is ignored when empty.

    Raises:
        ConfigError: with every mistake in both places.
    """
    problems: list[str] = []
    given: Mapping[str, object] = extra or {}
    if path := environ.get(CONFIG_VARIABLE):
        try:
            given = _merged(given, _read_file(path), Config, "", problems)
        except ConfigError as error:
            problems += error.problems
    try:
        config = Config.model_validate(dict(given))
    except ValidationError as error:
        problems += (problem(each, given) for each in error.errors(include_url=False))
    if problems:
        raise ConfigError(problems)
    return config


def _merged(
    extra: Mapping[str, object],
    file: Mapping[str, object],
    section: type[Section],
    prefix: str,
    problems: list[str],
) -> dict[str, object]:
    merged = {**file, **extra}
    for name in [name for name in file if name in extra]:
        field = section.model_fields.get(name)
        inner = section_of(field.annotation) if field else None
        ours, theirs = extra[name], file[name]
        if inner and isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            merged[name] = _merged(ours, theirs, inner, f"{prefix}{name}.", problems)
        else:
            problems.append(
                f"{prefix}{printable(name)}: given both in the engine's extra config and in the "
                f"file that {CONFIG_VARIABLE} names; keep one"
            )
    return merged


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key may be given only once."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no key of ours, and reported as such
            if key.value in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {printable(key.value)} is given twice", key.start_mark
                )
            seen.add(key.value)
        return node


def _complaint(error: Exception) -> str:
    """What PyYAML says, without the lines that it quotes: a secret may stand there."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark = error.problem_mark
    parts = (error.context, error.problem, f"in line {mark.line + 1}, column {mark.column + 1}")
    return ", ".join(part for part in parts if part)


def _read_file(path: str) -> Mapping[str, object]:
    """The tree in a YAML file; an empty file is an empty tree."""
    source = f"{CONFIG_VARIABLE}={repr(path)[1:-1]}"
    try:
        # Opening a pipe must not block; only a regular file is read.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(_MAX_FILE_BYTES + 1) if regular else b""
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError([f"{source}: cannot be read: {reason}"]) from error
    if not regular:
        raise ConfigError([f"{source}: is not a regular file"])
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError([f"{source}: is larger than {format_size(_MAX_FILE_BYTES)}"])
    try:
        document = yaml.load(content, _Loader)
    except Exception as error:  # beyond YAMLError come whatever PyYAML's conversions raise
        reason = " ".join(_complaint(error).split()) or type(error).__name__
        raise ConfigError([f"{source}: is not valid YAML: {reason}"]) from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError([f"{source}: must hold a mapping of keys, got {show(document)}"])
    return document
