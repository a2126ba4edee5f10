"""The faults that are put into the product are faults, and each is the only one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mutation.faults import faults_of

SOURCE = '''
"""A module with an é before code."""
LIMIT = 3
def f(a: int = 1, *, b=None) -> "Literal[2]":
    """Text 4 < 5."""
    text = "é"; log.info("%d", a + 6)
    if TYPE_CHECKING:
        x = 7
    if a < 8 and (b is None
                  or a == 9):
        g(a)
        super().__init__(a)
    if a > 10 > b:
        raise ValueError(f"{a + 11}")
    assert a >= 12
    return a
def __repr__(self):
    return 13
'''


def test_what_is_changed() -> None:
    found = [
        (fault.kind, " ".join(fault.before.split()), fault.after) for fault in faults_of(SOURCE)
    ]
    assert sorted(found) == [
        ("call", "g(a)", "pass"),
        ("comparison", "a < 8", "(a <= 8)"),
        ("comparison", "a == 9", "(a != 9)"),
        ("comparison", "b is None", "(b is not None)"),
        ("connective", "a < 8 and (b is None or a == 9)", "(a < 8 or (b is None or a == 9))"),
        ("connective", "b is None or a == 9", "(b is None and a == 9)"),
        ("number", "1", "2"),
        ("number", "10", "11"),
        ("number", "3", "4"),
        ("number", "8", "9"),
        ("number", "9", "10"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("room", ["control", "data", "tiers", "push", "engines"])
def test_every_fault_is_another_program(room: str) -> None:
    paths = sorted((Path(__file__).parents[2] / "src" / "lamina_kv" / room).rglob("*.py"))
    for path in paths:
        source = path.read_text()
        whole = ast.dump(ast.parse(source))
        for fault in faults_of(source)[::100]:
            assert ast.dump(ast.parse(fault.put_into(source))) != whole
