"""Workers that share a folder make each checkpoint once, and never see half of one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine import models
from engine.models import Checkpoints


def test_a_checkpoint_is_made_once_and_seen_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def make(name: str, folder: Path, seed: int = 0) -> Path:
        made.append(name)
        folder.mkdir()
        folder.joinpath("config.json").write_text("half")
        time.sleep(0.05)  # in which the others ask
        folder.joinpath("config.json").write_text("whole")
        return folder

    monkeypatch.setattr(models, "make_model", make)
    workers = [Checkpoints(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(len(workers)) as threads:
        seen = list(
            threads.map(lambda each: (each.model("llama") / "config.json").read_text(), workers)
        )
    assert (made, seen) == (["llama"], ["whole"] * len(workers))


def test_one_whose_maker_died_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("llama-0.part").mkdir()
    tmp_path.joinpath("llama-0.part", "left behind").touch()

    def make(name: str, folder: Path, seed: int = 0) -> Path:
        folder.mkdir()
        return folder

    monkeypatch.setattr(models, "make_model", make)
    assert not list(Checkpoints(tmp_path).model("llama").iterdir())
