"""The code blocks of pages, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SOMETHING_LEFT_OUT = ("…", "[--", "...", "FILE", "PATH")
"""A line that has one of these shows what could be typed."""


def blocks(page: str, language: str = "") -> Iterator[str]:
    """Code blocks of a page in one language."""
    for named, text in _BLOCK.findall((ROOT / page).read_text()):
        if named == language:
            yield text


def commands(page: str, program: str) -> Iterator[list[str]]:
    """The arguments of every call of ``program`` in a page."""
    for text in blocks(page):
        lines = iter(text.replace("\\\n", "").splitlines())
        for line in lines:
            if not line.startswith(program):
                continue
            command = line
            while (words := _words(command)) is None:
                command += "\n" + next(lines)
            left_out = any(part in command for part in _SOMETHING_LEFT_OUT)
            if words[: len(program.split())] == program.split() and not left_out:
                yield words[len(program.split()) :]


def _words(command: str) -> list[str] | None:
    """The words of a command; None if a quotation in it goes on in the next line."""
    try:
        return shlex.split(command, comments=True)
    except ValueError:
        return None
