"""Promise: what KV events cost is measured to the end, and every saved chunk is an event."""

from __future__ import annotations

import sys

import pytest

import kv_events


def test_it_measures_both_sides_and_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kv_events.py", "--tokens", "256", "--requests", "3"])
    kv_events.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("3 prompts of 256 tokens, 4 chunks each; ")
    assert [line.split()[0] for line in printed[2:7]] == [*kv_events.STAGES, "all"]
    assert printed[-1].startswith("12 events of 12 chunks, ")
