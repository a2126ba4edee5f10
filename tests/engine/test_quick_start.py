"""The example of docs/quick-start.md that needs no server runs as it stands there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from documented import blocks
from engine.models import Checkpoints

pytestmark = pytest.mark.engine


def test_the_example_without_vllm(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the models of the tests, which have no tokenizer."""

    class Tokenizer:
        @classmethod
        def from_pretrained(cls, name: str) -> Tokenizer:
            return cls()

        def __call__(self, text: str) -> Any:
            return SimpleNamespace(input_ids=[1 + ord(letter) % 100 for letter in text * 20])

        def decode(self, tokens: list[int]) -> str:
            return f"{len(tokens)} tokens"

    (text,) = blocks("docs/quick-start.md", "python")
    assert text.count('"MODEL"') == 2
    text = text.replace('"MODEL"', repr(str(checkpoints.model("llama")))).replace("4GiB", "16MiB")
    assert "AutoTokenizer, " in text
    text = text.replace("AutoTokenizer, ", "")
    exec(compile(text, "quick-start", "exec"), {"AutoTokenizer": Tokenizer})
    assert capsys.readouterr().out == "['50 tokens', '50 tokens']\n"
