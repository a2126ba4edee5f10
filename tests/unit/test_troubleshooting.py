"""Guards the messages that docs/troubleshooting.md explains: the code has them, word for word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from documented import ROOT
from lamina_kv.control.saving import Unsaved

PAGE = ROOT / "docs/troubleshooting.md"
SOURCES = ROOT / "src/lamina_kv"
SECTIONS = ("The server does not start", "A warning in the log")
OF_VLLM = ("Engine core initialization failed. See root cause above.",)

_FORMAT = re.compile(r"%[-.\d]*[sdrf]")


@cache
def messages() -> tuple[str, ...]:
    """All text in the code, with ``…`` where something is filled in."""
    return tuple(
        text
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (text := _text(node))
    )


def _text(node: ast.AST) -> str:
    match node:
        case ast.Constant(value=str(value)):
            return _FORMAT.sub("…", value)
        case ast.JoinedStr(values=values):
            return "".join(_text(value) or "…" for value in values)
        case ast.BinOp(left=left, right=right) if _text(left) and _text(right):
            return _text(left) + _text(right)
        case _:
            return ""


def explained() -> Iterator[str]:
    """Messages in the first column of the page's tables of messages."""
    text = PAGE.read_text()
    for section in SECTIONS:
        (_, _, rest) = text.partition(f"\n## {section}\n")
        table = rest.partition("\n## ")[0]
        for row in re.findall(r"^\| (`.*?`)[^|]*\|", table, re.MULTILINE):
            yield from re.findall(r"`([^`]*)`", row)


MESSAGES = list(explained())


def test_messages_are_explained() -> None:
    assert len(MESSAGES) > 30


def test_every_reason_why_saves_are_held_back_is_explained() -> None:
    (_, _, rest) = PAGE.read_text().partition("`lamina_saves_held_back_total{")
    told = re.findall(r"[\"`](\w+)[\"`]", "".join(rest.splitlines(keepends=True)[:4]))
    assert set(Unsaved) <= set(told)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_code(message: str) -> None:
    """The parts between ``…`` are there, in this order."""
    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
    wanted = re.compile(".*?".join(parts), re.DOTALL)
    assert any(wanted.search(text) for text in messages()), message
