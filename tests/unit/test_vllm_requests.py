"""Guards: what names a chunk of one of vLLM's requests is what it was computed from, and nothing
that vLLM may take back or counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from driven_planner import CHUNK, Engine
from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from lamina_kv.control.requests import BoundaryState, RequestRecord, RequestView
from lamina_kv.control.shape import ChunkShape
from lamina_kv.engines.vllm.adapters import Adapters
from lamina_kv.engines.vllm.requests import VllmRequest
from lamina_kv.geometry import Group, GroupKind
from lamina_kv.tiers.regard import USUAL

STATE = Group(GroupKind.STATE, CHUNK)
FULL = Group(GroupKind.FULL, 16)


def request(
    tokens: int = 3 * CHUNK,
    *features: MultiModalFeatureSpec,
    adapter: LoRARequest | None = None,
    name: str = "r",
    resumable: bool = False,
) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(tokens)),
        sampling_params=SamplingParams(max_tokens=50),
        pooling_params=None,
        mm_features=list(features),
        lora_request=adapter,
        resumable=resumable,
    )


def feature(identifier: str, offset: int = CHUNK, prefix: str = "") -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None,
        modality="audio",
        identifier=prefix + identifier,
        mm_position=PlaceholderRange(offset=offset, length=8),
        mm_hash=identifier,
    )


def view(of: Request, *, counted: bool = False) -> VllmRequest:
    blocks = list(range(1, 40))
    return VllmRequest(of, lambda: (blocks, blocks), (FULL, STATE), "", counted, 1, None, USUAL)


# -- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["renderer0-mm-7-audio-0", "ab" * 32])
def test_nothing_is_known_behind_an_input_that_is_named_by_a_counter(name: str) -> None:
    """Also not if the counter was hashed together with a processor's settings."""
    assert view(request(3 * CHUNK, feature(name)), counted=True).num_tokens == CHUNK
    assert view(request(3 * CHUNK, feature(name))).num_tokens == 3 * CHUNK


def test_a_users_name_is_believed() -> None:
    assert view(request(3 * CHUNK, feature("cat-audio-0")), counted=True).num_tokens == 3 * CHUNK


def test_a_prompt_without_inputs_is_known() -> None:
    assert view(request(), counted=True).num_tokens == 3 * CHUNK


def test_the_name_of_an_adapter_names_no_input() -> None:
    adapter = LoRARequest("name", 1, "/somewhere")
    named = request(3 * CHUNK, feature("ab", prefix="name:"), adapter=adapter)
    plain = request(3 * CHUNK, feature("ab"))
    for start in range(0, 3 * CHUNK, CHUNK):
        extras = [view(r).chunk_extra(start, start + CHUNK) for r in (named, plain)]
        assert extras[0] == extras[1]
        assert bool(extras[0]) == (start == CHUNK)


def test_an_input_names_every_chunk_that_it_touches_and_where() -> None:
    across = view(request(3 * CHUNK, feature("ab", offset=CHUNK - 4)))
    extras = [across.chunk_extra(start, start + CHUNK) for start in (0, CHUNK, 2 * CHUNK)]
    assert extras[2] == b""
    assert len(set(extras)) == 3


# -- sessions ------------------------------------------------------------------------------------


def stop(of: Request, computed: int, sampled: int) -> None:
    """A turn ends with a token that was sampled and never computed, as far as anybody may know."""
    of.append_output_token_ids(sampled)
    of.num_computed_tokens = computed
    of.status = RequestStatus.WAITING_FOR_STREAMING_REQ


def go_on(of: Request, tokens: list[int]) -> None:
    """As ``Scheduler._update_request_as_session`` does."""
    kept = of._all_token_ids[of.num_prompt_tokens : of.num_computed_tokens]
    del of._all_token_ids[of.num_computed_tokens :]
    of._output_token_ids.clear()
    assert of.prompt_token_ids is not None
    of.prompt_token_ids.extend([*kept, *tokens])
    of._all_token_ids.extend(tokens)
    of.num_prompt_tokens = len(of.prompt_token_ids)
    of.status = RequestStatus.WAITING


def served(*groups: Group, **settings: object) -> Engine:
    return Engine(dict(settings), shape=ChunkShape(CHUNK, groups, 0))


def begin(engine: Engine, of: RequestView) -> None:
    engine.planner.lookup(of, 0)
    engine.planner.admitted(of.request_id, 0)


def test_a_token_that_a_session_takes_back_is_not_known_while_it_waits() -> None:
    session = request(CHUNK - 1, resumable=True)
    stop(session, CHUNK - 1, 7)
    assert view(session).num_tokens == CHUNK - 1
    go_on(session, [1, 2])
    assert view(session).num_tokens == CHUNK + 1


def a_state_behind_a_token_that_was_taken_back() -> list[int]:
    """Slots of the states that are saved when a step in flight has computed the token that ended
    the turn, and it was the last one of a chunk."""
    engine, session = served(FULL, STATE), request(CHUNK - 1, resumable=True)
    seen = view(session)
    begin(engine, seen)
    plans = [engine.step(("r", CHUNK - 1))]
    states = [BoundaryState("r", 1, 30, CHUNK)]
    plans.append(engine.planner.plan_step([("r", CHUNK - 1, CHUNK)], forward=True, states=states))
    stop(session, CHUNK - 1, 7)
    plans.append(engine.step())
    go_on(session, [1, 2, 3])
    plans.append(engine.step(("r", CHUNK + 2)))
    saved = [order.slot for plan in plans for order in plan.saves if order.group == 1]
    assert saved or 30 not in engine.pool.held
    return saved


def test_a_state_behind_a_token_that_was_taken_back_is_not_kept() -> None:
    assert a_state_behind_a_token_that_was_taken_back() == []


def states_of_the_next_turn(*, in_flight: bool) -> list[int]:
    """Slots of the states that are saved of a turn; before it a step in flight may have computed
    the token that ended the last one."""
    engine, session = served(FULL, STATE), request(CHUNK - 2, resumable=True)
    begin(engine, view(session))
    engine.step(("r", CHUNK - 2))
    if in_flight:
        engine.planner.plan_step([("r", CHUNK - 2, CHUNK - 1)], forward=True)
    stop(session, CHUNK - 2, 7)
    go_on(session, list(range(CHUNK + 9)))
    states = [BoundaryState("r", 1, 30, CHUNK)]
    progress = [("r", CHUNK - 2, 2 * CHUNK)]
    plan = engine.planner.plan_step(progress, forward=True, states=states)
    return [order.slot for order in plan.saves if order.group == 1]


def test_a_state_that_has_a_token_in_it_that_was_taken_back_is_not_kept() -> None:
    assert states_of_the_next_turn(in_flight=True) == []
    assert len(states_of_the_next_turn(in_flight=False)) == 1


def test_a_state_that_is_believed_to_forget_a_token_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RequestRecord, "computes", lambda record, start, end: None)
    with pytest.raises(AssertionError):
        test_a_state_that_has_a_token_in_it_that_was_taken_back_is_not_kept()


@pytest.mark.parametrize("broken", ["the prompt's length", "what is known"])
def test_a_session_that_is_not_looked_at_anew_is_seen(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "what is known":
        known = property(lambda self: self._request.num_tokens)
        monkeypatch.setattr(VllmRequest, "num_tokens", known)
    else:
        prompt = property(lambda self: CHUNK - 1)
        monkeypatch.setattr(VllmRequest, "num_prompt_tokens", prompt)
    assert a_state_behind_a_token_that_was_taken_back()


@pytest.mark.parametrize("tokens", ["prompt", "all"])
def test_every_turns_prompt_is_saved(tokens: str) -> None:
    engine, session = served(FULL, save={"tokens": tokens}), request(CHUNK, resumable=True)
    begin(engine, view(session))
    assert len(engine.step(("r", CHUNK)).saves) == 1
    stop(session, CHUNK, 7)
    go_on(session, list(range(CHUNK)))
    assert len(engine.step(("r", 2 * CHUNK)).saves) == 1


# -- adapters ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(folder, "first")
    return folder


def write(folder: Path, content: str) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8}))
    draft = folder / "draft"
    draft.write_text(content)
    os.replace(draft, folder / "adapter_model.safetensors")


class Asking:
    """Requests of one adapter, one after the other."""

    def __init__(self, folder: Path, config: LoRAConfig | None = None) -> None:
        self.adapters = Adapters(config)
        self.folder = folder
        self.asked = 0

    def request(self, name: str = "adapter", *, inplace: bool = False) -> Request:
        self.asked += 1
        adapter = LoRARequest(name, 1, str(self.folder), load_inplace=inplace)
        return request(adapter=adapter, name=f"r{self.asked}")

    def ask(self, name: str = "adapter", *, inplace: bool = False) -> str:
        asked = self.request(name, inplace=inplace)
        identity = self.adapters.identity(asked)
        self.adapters.admitted(asked)
        self.adapters.finished(asked)
        return identity


def test_an_adapter_is_its_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    write(moved, "first")
    assert Asking(folder).ask("one") == Asking(moved).ask("two")
    write(moved, "second")
    assert Asking(folder).ask() != Asking(moved).ask()


def test_a_request_without_an_adapter_has_none() -> None:
    assert Adapters(None).identity(request()) == ""


def test_an_adapter_that_is_removed_and_added_with_other_files_is_another(folder: Path) -> None:
    asking = Asking(folder)
    first = asking.ask()
    write(folder, "second")
    asking.adapters.removed(1)
    second = asking.ask()
    assert second != first
    assert asking.ask() == second
    asking.adapters.removed(1)
    write(folder, "first")
    assert asking.ask() == first


def test_files_that_nobody_said_were_loaded_are_believed_to_be_neither(folder: Path) -> None:
    """vLLM keeps the old weights, unless its workers had to make room."""
    asking = Asking(folder)
    first = asking.ask()
    write(folder, "second")
    unknown = {asking.ask(), asking.ask()}
    assert len(unknown | {first}) == 3
    asking.adapters.added(LoRARequest("adapter", 1, str(folder)))
    assert asking.ask() not in unknown | {first}


def test_another_adapter_under_a_number_in_use_is_neither(folder: Path) -> None:
    asking = Asking(folder)
    assert asking.ask("one") != asking.ask("other")


def test_files_that_are_gone_cannot_be_loaded_instead(folder: Path) -> None:
    asking = Asking(folder)
    first = asking.ask()
    for file in folder.iterdir():
        file.unlink()
    assert asking.ask() == first
    folder.rmdir()
    assert asking.ask() == first


@pytest.mark.parametrize("inplace", [False, True])
def test_files_are_read_once_for_as_long_as_they_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch, inplace: bool
) -> None:
    asking = Asking(folder)
    waiting = asking.request(inplace=inplace)
    first = asking.adapters.identity(waiting)
    with monkeypatch.context() as patch:
        patch.setattr("lamina_kv.engines.vllm.adapters.fingerprint", forbidden)
        assert asking.adapters.identity(waiting) == first
        assert asking.ask(inplace=inplace) == first
        assert asking.ask(inplace=inplace) == first
    write(folder, "second")
    asking.adapters.removed(1)
    assert asking.adapters.identity(waiting) != first
    asking.adapters.finished(waiting)
    assert not asking.adapters._known


def forbidden(path: str) -> Path:
    raise AssertionError(f"{path} is read")


def test_an_adapter_that_is_loaded_in_place_is_read_whenever_it_may_be(folder: Path) -> None:
    asking = Asking(folder)
    first = asking.ask(inplace=True)
    write(folder, "second")
    waiting = asking.request(inplace=True)
    second = asking.adapters.identity(waiting)
    assert second != first
    asking.adapters.admitted(waiting)
    assert asking.ask() == second


@pytest.mark.parametrize(
    "setting",
    [{"target_modules": ["q_proj"]}, {"enable_tower_connector_lora": True}, {"lora_dtype": "half"}],
)
def test_settings_of_the_server_change_what_an_adapter_does(
    folder: Path, setting: dict[str, Any]
) -> None:
    usual = {
        "target_modules": None, "enable_tower_connector_lora": False, "lora_dtype": "auto"
    }  # fmt: skip
    configs = [cast(LoRAConfig, SimpleNamespace(**usual | s)) for s in ({}, setting)]
    assert len({Asking(folder, config).ask() for config in configs}) == 2


@pytest.mark.parametrize(
    "case",
    [
        test_files_that_nobody_said_were_loaded_are_believed_to_be_neither,
        test_another_adapter_under_a_number_in_use_is_neither,
    ],
)
def test_an_adapter_that_is_only_a_number_is_seen(
    case: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = Adapters._content

    def remembered(adapters: Adapters, adapter: LoRARequest) -> str:
        loaded = adapters._loaded.get(adapter.lora_int_id)
        return content(adapters, adapter) if loaded is None else loaded.content

    monkeypatch.setattr(Adapters, "_content", remembered)
    with pytest.raises(AssertionError):
        case(folder)
