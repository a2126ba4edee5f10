"""Guards: what is kept of an adapter's requests was computed with that adapter's files, whenever
these change: under a request that waits, under one that runs, and in the middle of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from driven_planner import CHUNK, Engine, View, prompt
from vllm.lora.request import LoRARequest

from lamina_kv.checkpoint import Snapshot, fingerprint, snapshot
from lamina_kv.engines.vllm.adapters import Adapters
from lamina_kv.keys import pack

LENGTH = 4 * CHUNK


class Asked:
    """What of vLLM's requests an adapter depends on."""

    def __init__(self, name: str, adapter: LoRARequest) -> None:
        self.request_id = name
        self.lora_request: LoRARequest | None = adapter
        self.num_output_tokens = 0


class Served:
    """A planner and an adapter whose files are replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        self.write("A")
        self.engine = Engine(far_slots=50)
        self.adapters = Adapters(None)
        self.adapters.follow(self.engine.planner.bar)
        self.requests: dict[str, tuple[Asked, View]] = {}

    def write(self, content: str) -> None:
        (self.folder / "adapter_model.safetensors").write_text(content * (1 + ord(content[0])))

    def adapter(self, *, inplace: bool = False) -> LoRARequest:
        return LoRARequest("adapter", 1, str(self.folder), load_inplace=inplace)

    def lookup(self, name: str, *, inplace: bool = False, floor: int = 0, seed: int = 0) -> int:
        """Tokens that are found of a prompt of which vLLM has ``floor``."""
        if name not in self.requests:
            blocks = 1 + 50 * len(self.requests)
            view = View(name, prompt(LENGTH + 1, seed=seed), first_block=blocks)
            self.requests[name] = Asked(name, self.adapter(inplace=inplace)), view
        asked, view = self.requests[name]
        view = replace(view, root_extra=pack((None, self.adapters.identity(asked, floor))))
        self.requests[name] = asked, view
        return self.engine.planner.lookup(view, floor).tokens

    def admit(self, name: str) -> None:
        self.engine.planner.admitted(name, 0)
        self.adapters.admitted(self.requests[name][0])

    def begin(self, name: str, *, inplace: bool = False, floor: int = 0, seed: int = 0) -> None:
        self.lookup(name, inplace=inplace, floor=floor, seed=seed)
        self.admit(name)

    def step(self, name: str, end: int) -> int:
        """A step, and how many saves it ordered."""
        self.adapters.check()
        saves = self.engine.step((name, end)).saves
        self.adapters.check()
        self.engine.answer(*(save.transfer for save in saves))
        self.engine.write_all()
        return len(saves)

    def end(self, name: str) -> None:
        asked, view = self.requests[name]
        self.adapters.finished(asked)
        self.engine.planner.finished(name, LENGTH, [view.blocks()])

    def found(self, content: str) -> int:
        """Tokens that a new process would find for an adapter of that content."""
        self.write(content)
        fresh = Adapters(None)
        asked = Asked("fresh", self.adapter())
        view = View("fresh", prompt(LENGTH + 1), root_extra=pack((None, fresh.identity(asked))))
        return self.engine.planner.lookup(view, 0).tokens


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Served(tmp_path / "adapter")


@pytest.mark.parametrize("how", ["added", "removed", "asked for in place"])
def test_of_a_request_under_which_its_adapter_is_replaced_nothing_more_is_kept(
    served: Served, how: str
) -> None:
    served.adapters.added(served.adapter())
    served.begin("r")
    assert served.step("r", 2 * CHUNK) == 2
    served.requests["r"][0].num_output_tokens = 1
    served.step("r", 2 * CHUNK)
    served.write("B")
    if how == "added":
        served.adapters.added(served.adapter(inplace=True))
    elif how == "removed":
        served.adapters.removed(1)
    else:
        served.begin("s", inplace=True, seed=1)
    assert served.step("r", 4 * CHUNK) == 0
    served.end("r")
    assert served.found("A") == 2 * CHUNK
    assert served.found("B") == 0


def test_saves_that_are_under_way_when_an_adapter_is_replaced_are_not_shown(
    served: Served,
) -> None:
    served.begin("r")
    saves = served.engine.step(("r", LENGTH)).saves
    served.write("B")
    served.adapters.added(served.adapter(inplace=True))
    served.engine.answer(*(save.transfer for save in saves))
    assert served.found("A") == 0


def test_an_adapter_that_is_added_again_as_it_is_changes_nothing(served: Served) -> None:
    served.begin("r")
    served.adapters.added(served.adapter(inplace=True))
    assert served.step("r", LENGTH) == 4
    assert served.found("A") == LENGTH


def test_a_request_that_waits_is_looked_up_with_the_files_as_they_are(served: Served) -> None:
    served.lookup("r")
    served.adapters.check()
    served.write("B")
    served.begin("r")
    served.step("r", LENGTH)
    assert served.found("A") == 0
    assert served.found("B") == LENGTH


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_crowd_looks_at_an_adapter_once_a_step(
    served: Served, inplace: bool, loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loaded:
        served.begin("loads it")
    crowd = [Asked(str(number), served.adapter(inplace=inplace)) for number in range(5)]
    looks: list[Path] = []

    def counted(path: Path) -> Snapshot:
        looks.append(path)
        return snapshot(path)

    for asked in crowd:
        served.adapters.identity(asked)
    monkeypatch.setattr("lamina_kv.engines.vllm.adapters.snapshot", counted)
    for _ in range(3):
        served.adapters.check()
        looks.clear()
        for asked in crowd:
            served.adapters.identity(asked)
        assert len(looks) == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_files_that_change_between_lookup_and_admission_are_seen(
    served: Served, inplace: bool
) -> None:
    served.lookup("r", inplace=inplace)
    served.write("B")
    served.admit("r")
    assert served.step("r", LENGTH) == 0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("when", ["before the step", "in the step", "at the end"])
def test_files_that_change_while_workers_may_read_them_are_seen(
    served: Served, inplace: bool, when: str
) -> None:
    served.begin("r", inplace=inplace)
    if when == "before the step":
        served.write("B")
    served.adapters.check()
    saves = served.engine.step(("r", LENGTH)).saves
    if when != "before the step":
        served.write("B")
    if when == "in the step":
        served.adapters.check()
    else:
        served.end("r")
    served.engine.answer(*(save.transfer for save in saves))
    assert served.found("A") == 0
    assert served.found("B") == 0


def test_an_adapter_that_is_removed_is_looked_at_anew_in_the_same_step(served: Served) -> None:
    served.adapters.added(served.adapter())
    before = served.adapters.identity(Asked("a", served.adapter()))
    served.write("B")
    served.adapters.removed(1)
    assert served.adapters.identity(Asked("b", served.adapter())) != before


def test_an_adapter_that_workers_have_may_change_on_disk(served: Served) -> None:
    served.begin("r")
    served.step("r", 2 * CHUNK)
    served.requests["r"][0].num_output_tokens = 1
    served.step("r", 2 * CHUNK)
    served.write("B")
    assert served.step("r", LENGTH) == 2
    assert served.found("A") == LENGTH


def test_an_adapter_in_place_is_watched_in_every_step(served: Served) -> None:
    served.begin("r", inplace=True)
    served.requests["r"][0].num_output_tokens = 1
    assert served.step("r", 2 * CHUNK) == 2
    served.write("B")
    assert served.step("r", LENGTH) == 0


@pytest.mark.parametrize("emptied", [False, True])
def test_blocks_in_the_engine_that_the_former_content_computed_are_kept_for_none(
    served: Served, emptied: bool
) -> None:
    """VLLM finds them under the adapter's name, whatever its content."""
    served.begin("r")
    served.end("r")
    served.write("B")
    served.adapters.added(served.adapter(inplace=True))
    if emptied:
        served.adapters.emptied()
        served.begin("s", seed=1)
    served.begin("t", floor=2 * CHUNK)
    served.step("t", LENGTH)
    assert served.found("B") == (LENGTH if emptied else 0)


def test_what_a_running_request_may_leave_outlasts_an_empty_cache(served: Served) -> None:
    served.begin("r")
    served.write("B")
    served.adapters.added(served.adapter(inplace=True))
    served.adapters.emptied()
    served.begin("t", floor=2 * CHUNK)
    served.step("t", LENGTH)
    assert served.found("B") == 0


@pytest.mark.parametrize("when", ["while vLLM loads them", "while they are read"])
def test_files_that_change_while_an_adapter_is_loaded_name_nothing(
    served: Served, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(folder: Path) -> str:
        found = fingerprint(folder)
        served.write("B")
        return found

    before = served.adapters.stamps(served.adapter())
    if when == "while vLLM loads them":
        served.write("B")
    else:
        monkeypatch.setattr("lamina_kv.engines.vllm.adapters.fingerprint", slow)
    served.adapters.added(served.adapter(), before)
    monkeypatch.undo()
    served.begin("r")
    served.step("r", LENGTH)
    served.end("r")
    assert served.found("A") == 0
    assert served.found("B") == 0


def test_a_finished_request_leaves_no_trace(served: Served) -> None:
    served.begin("r")
    served.end("r")
    assert not served.adapters._running
    assert not served.adapters._known
    assert not served.adapters._loading


@pytest.mark.parametrize(
    ("method", "case"),
    [
        ("_changed", test_saves_that_are_under_way_when_an_adapter_is_replaced_are_not_shown),
        ("check", test_an_adapter_in_place_is_watched_in_every_step),
    ],
)
def test_adapters_that_tell_nobody_are_seen(
    served: Served,
    method: str,
    case: Callable[[Served], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Adapters, method, lambda *args: None)
    with pytest.raises(AssertionError):
        case(served)
