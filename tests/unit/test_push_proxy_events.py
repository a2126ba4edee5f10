"""Guards what the proxy makes of KV events: which blocks an engine holds, which are in a store for
all, and that a request goes where it is announced to be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq

from lamina_kv.bench.ports import free_port
from lamina_kv.push.proxy.routing.cache_aware import CacheAware
from lamina_kv.push.proxy.routing.events import blocks as blocks_module
from lamina_kv.push.proxy.routing.events import stores as stores_module
from lamina_kv.push.proxy.routing.events import tokens as tokens_module
from lamina_kv.push.proxy.routing.events.blocks import Blocks
from lamina_kv.push.proxy.routing.events.follow import follow
from lamina_kv.push.proxy.routing.events.followers import Followers
from lamina_kv.push.proxy.routing.events.messages import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    read_batch,
)
from lamina_kv.push.proxy.routing.events.places import EventPlaces, read_event_places
from lamina_kv.push.proxy.routing.events.stores import SharedStores
from lamina_kv.push.proxy.routing.events.tokens import PAUSE, Tokens
from lamina_kv.push.proxy.routing.prompt import read_prompt
from lamina_kv.push.proxy.routing.ranks import UNTOLD
from lamina_kv.push.proxy.routing.words import PolicyName
from push_proxy.engines import FakeEngine
from push_proxy.pools import Clock, Pools, chat, completion
from push_proxy.proxies import COMPLETION, proxied
from push_proxy.running import until

SIZE = 16
TOKENS = tuple(range(100, 100 + 10 * SIZE))
REMOTE = {"medium": "STORAGE", "ownership": "valkey", "locality": "REMOTE"}


def stored(
    first: int, count: int, tokens: Sequence[int] = TOKENS, engine: str = "a", **fields: Any
) -> BlockStored:
    """Blocks ``first`` and so on of a prompt, as an engine names them."""
    return BlockStored(
        block_hashes=[f"{engine}{index}".encode() for index in range(first, first + count)],
        parent_block_hash=f"{engine}{first - 1}".encode() if first else None,
        token_ids=list(tokens[first * SIZE : (first + count) * SIZE]),
        block_size=SIZE,
        **fields,
    )


def removed(first: int, count: int, engine: str = "a", **fields: Any) -> BlockRemoved:
    hashes = [f"{engine}{index}".encode() for index in range(first, first + count)]
    return BlockRemoved(block_hashes=hashes, **fields)


def told(*events: Any, stores: SharedStores | None = None) -> Blocks:
    blocks = Blocks(SharedStores() if stores is None else stores)
    for event in events:
        blocks.take(event)
    return blocks


def hit(blocks: Blocks, tokens: Sequence[int] = TOKENS, model: str = "m") -> int:
    return blocks.hit(tokens, model) // SIZE


def test_the_longest_prefix() -> None:
    blocks = told(stored(0, 4, medium="GPU"), stored(4, 2, medium="GPU"))
    assert hit(blocks) == 6
    assert hit(blocks, TOKENS[: 3 * SIZE + 5]) == 3
    assert hit(blocks, TOKENS[1:]) == 0
    blocks.take(removed(2, 1, medium="GPU"))
    assert hit(blocks) == 2


def test_a_block_counts_as_long_as_it_is_somewhere() -> None:
    blocks = told(stored(0, 4, medium="GPU"), stored(0, 4, medium="CPU"))
    blocks.take(removed(0, 4, medium="GPU"))
    assert hit(blocks) == 4
    blocks.take(removed(1, 1, medium="STORAGE", ownership="disk"))
    assert hit(blocks) == 4
    blocks.take(removed(1, 1, medium="CPU"))
    assert hit(blocks) == 1


def test_a_block_may_come_before_its_parent() -> None:
    blocks = told(stored(4, 2), stored(2, 2), stored(0, 2))
    assert hit(blocks) == 6


def test_all_cleared_and_told_again() -> None:
    blocks = told(stored(0, 4, medium="GPU"), AllBlocksCleared())
    assert hit(blocks) == 0
    blocks.take(stored(2, 2, medium="CPU"))
    blocks.take(stored(0, 2, medium="CPU"))
    assert hit(blocks) == 4


def test_one_group_counts() -> None:
    """Windows and states hold the end of a prompt only."""
    window = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window"}
    full = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}
    blocks = told(stored(0, 4, engine="w", **window), stored(0, 2, **full))
    assert hit(blocks) == 2
    blocks.take(removed(0, 2, group_idx=1))
    assert hit(blocks) == 2
    blocks.take(removed(0, 2, group_idx=0))
    assert hit(blocks) == 0


def test_what_has_another_salt_or_picture_is_another_block() -> None:
    assert hit(told(stored(0, 2, extra_keys=[["salt"], None]))) == 0


def test_an_adapter_is_asked_for_by_its_name() -> None:
    blocks = told(stored(0, 2, lora_name="ours", extra_keys=[["ours"], ["ours"]]))
    assert hit(blocks, model="ours") == 2
    assert hit(blocks, model="m") == 0


def test_a_store_is_there_for_all_who_use_it() -> None:
    stores = SharedStores()
    first = told(stored(0, 4, engine="a", **REMOTE), stores=stores)
    second = told(stored(0, 1, engine="b", **REMOTE), stores=stores)
    third = told(stored(9, 1, engine="c"), stored(0, 1, engine="c", medium="GPU"), stores=stores)
    assert (hit(first), hit(second), hit(third)) == (4, 4, 1)
    second.take(stored(0, 4, engine="b", medium="GPU"))
    second.take(removed(3, 1, engine="b", **REMOTE))
    assert (hit(first), hit(second)) == (3, 4)
    first.forget()
    assert (hit(first), hit(second)) == (0, 4)
    assert hit(told(stored(0, 1, engine="d", **REMOTE), stores=stores)) == 1


def test_what_a_store_holds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores_module, "MAX_BLOCKS", 6)
    stores = SharedStores()
    first = told(stored(0, 4, engine="a", **REMOTE), stores=stores)
    second = told(stored(0, 2, engine="b", **REMOTE), stores=stores)
    assert len(stores) == 4
    second.take(stored(0, 4, [1] * 4 * SIZE, engine="c", **REMOTE))
    assert len(stores) == 6
    assert hit(second, [1] * 4 * SIZE) == 4
    assert (hit(first), hit(second)) == (2, 2), "announced again meanwhile"


def test_a_block_whose_name_a_rank_forgets_is_not_known_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks_module, "MAX_NAMES", 4)
    stores = SharedStores()
    first = told(stored(0, 4, engine="a", **REMOTE), stores=stores)
    second = told(stored(0, 1, engine="b", **REMOTE), stores=stores)
    first.take(stored(0, 2, [1] * 2 * SIZE, engine="c", **REMOTE))
    assert hit(first) == 1, "the second one has announced it, too"
    second.forget()
    assert hit(first) == 0
    assert len(stores) <= 5


def test_who_is_gone_is_forgotten_at_once() -> None:
    stores = SharedStores()
    many = range(10_000 * SIZE)
    first = told(stored(0, 10_000, many, engine="a", **REMOTE), stores=stores)
    second = told(stored(0, 1, many, engine="b", **REMOTE), stores=stores)
    began = time.process_time()
    for _ in range(20_000):
        second.forget()
        second.take(stored(0, 1, many, engine="b", **REMOTE))
    assert time.process_time() - began < 3
    first.forget()
    assert hit(second, many) == 1
    first.take(stored(9, 1, many, engine="a", **REMOTE))
    assert hit(first, many) == 0, "it begins anew, and knows no parent"
    first.take(stored(0, 1, many, engine="a", **REMOTE))
    assert hit(first, many) == 1


def test_blocks_without_a_parent_are_bounded_by_their_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks_module, "MAX_ORPHAN_TOKENS", 4 * SIZE)
    blocks = told(stored(8, 1), stored(6, 2), stored(4, 2), stored(2, 2))
    blocks.take(stored(0, 2))
    assert hit(blocks) == 4, "what waited for longer is gone"
    for _ in range(100):
        blocks.take(stored(9, 1))
    assert blocks._orphan_tokens <= 4 * SIZE
    blocks.forget()
    assert not blocks._orphan_tokens


def test_what_is_announced_is_all_there_is_from_the_beginning_on() -> None:
    blocks = told(stored(2, 2))
    assert not blocks.complete
    blocks.begins()
    assert not blocks.complete, "blocks whose parent is not known"
    blocks.take(stored(0, 2))
    assert blocks.complete
    blocks.forget()
    assert not blocks.complete
    blocks.take(AllBlocksCleared())
    assert blocks.complete


@pytest.mark.parametrize("whole", [False, True])
def test_what_was_learnt_counts_while_not_all_was_announced(whole: bool) -> None:
    pool = Pools(CacheAware(), decode=1)
    rank = pool.decode[0].ranks[0]
    rank.blocks = told(stored(0, 1, [9] * SIZE))
    if whole:
        rank.blocks.begins()
    prompt = pool.read(completion([*TOKENS]))
    assert prompt.ids == TOKENS
    rank.prefixes.add(prompt.marks)
    pool.clock.now += UNTOLD + 1

    def expected() -> int:
        return rank.candidate(prompt, sticky=False, decodes=True).hit

    assert expected() == (0 if whole else len(TOKENS) - 1)
    rank.blocks.take(stored(0, 4, engine="b"))
    assert expected() == (4 * SIZE if whole else len(TOKENS) - 1)
    for _ in range(100):
        rank.found(len(TOKENS), 0)
    assert expected() == 4 * SIZE, "what is learnt is not believed any more"


# -- as they come ------------------------------------------------------------------------------


def payload(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1.5, [*events], 0])


def test_a_batch_as_vllm_sends_it() -> None:
    events = pytest.importorskip("vllm.distributed.kv_events")
    sent = events.KVEventBatch(
        ts=1.0,
        data_parallel_rank=0,
        events=[
            events.BlockStored(
                block_hashes=[b"x", 7],
                parent_block_hash=None,
                token_ids=[1, 2],
                block_size=1,
                lora_id=None,
                medium="GPU",
                lora_name=None,
                extra_keys=[None, ("salt",)],
                group_idx=0,
                session_id="s",
            ),
            events.BlockRemoved(block_hashes=[7], medium="CPU", ownership="t"),
            events.AllBlocksCleared(),
        ],
    )
    assert read_batch(msgspec.msgpack.encode(sent)) == [
        BlockStored(
            [b"x", 7], None, [1, 2], 1, medium="GPU", extra_keys=[None, ["salt"]], group_idx=0
        ),
        BlockRemoved([7], medium="CPU", ownership="t"),
        AllBlocksCleared(),
    ]


def test_an_event_of_another_kind_is_passed_over() -> None:
    batch = payload({"type": "BlockMoved", "x": 1}, {"type": "AllBlocksCleared"})
    assert read_batch(batch) == [AllBlocksCleared()]
    with pytest.raises(msgspec.MsgspecError):
        read_batch(b"\xc1")


class Publisher:
    """As vLLM's, on a port of this machine."""

    def __init__(self) -> None:
        self.port = free_port()
        self._socket = zmq.Context.instance().socket(zmq.XPUB)
        self._socket.bind(f"tcp://127.0.0.1:{self.port}")

    def wait(self) -> None:
        """For a subscriber."""
        self._hear(b"\x01")

    def wait_alone(self) -> None:
        """For the subscriber to leave."""
        self._hear(b"\x00")

    def _hear(self, word: bytes) -> None:
        assert self._socket.poll(60_000)
        assert self._socket.recv() == word

    def publish(self, number: int, body: bytes) -> None:
        self._socket.send_multipart([b"", number.to_bytes(8, "big"), body])

    def close(self) -> None:
        self._socket.close(linger=0)


@contextmanager
def publishing() -> Iterator[Publisher]:
    publisher = Publisher()
    try:
        yield publisher
    finally:
        publisher.close()


def test_what_is_missed_is_not_believed_any_more() -> None:
    async def scenario(publisher: Publisher) -> None:
        blocks = Blocks(SharedStores())
        following = asyncio.create_task(follow(f"tcp://127.0.0.1:{publisher.port}", blocks))

        async def holds(count: int) -> None:
            async with asyncio.timeout(60):
                while hit(blocks) != count:
                    await asyncio.sleep(0.01)

        await asyncio.to_thread(publisher.wait)
        publisher.publish(7, payload(stored(0, 2)))
        await holds(2)
        assert not blocks.complete, "it did not begin with this"
        publisher.publish(8, payload(stored(2, 2)))
        await holds(4)
        publisher.publish(10, payload(stored(0, 1)))  # 9 never came
        await holds(1)
        publisher.publish(0, payload(stored(0, 3)))  # another process
        await holds(3)
        assert blocks.complete
        publisher.publish(1, b"\xc1")
        await holds(0)
        publisher.publish(2, payload(stored(0, 5)))
        await holds(5)
        assert not blocks.complete
        following.cancel()
        await asyncio.wait({following})

    with publishing() as publisher:
        asyncio.run(scenario(publisher))


@pytest.mark.parametrize("why", ["it is ill", "it is not known any more"])
def test_what_an_engine_has_announced_is_forgotten_with_it(why: str) -> None:
    engine = Pools(PolicyName.CACHE_AWARE).decode[0]

    async def scenario(publisher: Publisher) -> None:
        places = EventPlaces(hosts={engine.url: f"127.0.0.1:{publisher.port}"})
        followers = Followers(places)
        followers.changed(engine)
        await asyncio.to_thread(publisher.wait)
        publisher.publish(0, payload(stored(0, 2)))
        async with asyncio.timeout(60):
            while engine.announced != 2:
                await asyncio.sleep(0.01)
        if why == "it is ill":
            engine.healthy = False
            followers.changed(engine)
        else:
            followers.gone(engine)
        assert engine.announced == 0
        await asyncio.to_thread(publisher.wait_alone)
        await followers.close()

    with publishing() as publisher:
        asyncio.run(scenario(publisher))


# -- which tokens ------------------------------------------------------------------------------


class Tells:
    """An engine that says which tokens a prompt has, or nothing after some seconds."""

    def __init__(self, clock: Clock, tokens: int, load: int = 0) -> None:
        self.load = load
        self.asked = 0
        self.tokens = tokens
        self.silent: float | None = None
        self._clock = clock

    async def tokenize(self, body: bytes) -> bytes | None:
        assert set(msgspec.json.decode(body)) == {"model", "prompt"}
        self.asked += 1
        if self.silent is not None:
            self._clock.now += self.silent
            return None
        return msgspec.json.encode({"tokens": [7] * self.tokens})


def test_the_engine_with_least_to_do_tells_tokens_and_a_silent_one_is_left_alone() -> None:
    clock = Clock()
    tokens = Tokens(clock)
    idle, busy = Tells(clock, 1000), Tells(clock, 2000, load=5)

    def ask(text: str) -> int:
        asked = completion(text * 1000)
        prompt = read_prompt(asked, lambda _: 1.0)
        return len(asyncio.run(tokens.of(asked, prompt, [busy, idle])))

    assert [ask("a"), ask("a"), ask("b")] == [1000] * 3
    assert (idle.asked, busy.asked) == (2, 0), "it is remembered"
    idle.silent = 0.01
    assert [ask("c"), ask("d")] == [0, 0]
    assert idle.asked == 4, "a mistake of the client's, perhaps"
    idle.silent = 1.0
    assert [ask("c"), ask("c"), ask("d")] == [0, 2000, 2000]
    busy.silent = 1.0
    assert [ask("e"), ask("e"), ask("e")] == [0, 0, 0]
    assert (idle.asked, busy.asked) == (5, 3), "nobody is asked"
    idle.silent = None
    clock.now += PAUSE
    assert ask("e") == 1000


def test_nobody_is_asked_for_tokens_that_do_not_say_which_blocks_a_prompt_has() -> None:
    """Blocks of another salt or picture have other names, and none would be found."""
    clock = Clock()
    tokens, engine = Tokens(clock), Tells(clock, 1000)
    picture = [{"type": "text", "text": "a" * 4000}, {"type": "image_url", "image_url": {}}]
    for asked in (completion("a" * 4000, cache_salt="s"), chat(("user", picture))):
        prompt = read_prompt(asked, lambda _: 4.0)
        assert asyncio.run(tokens.of(asked, prompt, [engine])) == ()
    assert not engine.asked


def test_tokens_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "MAX_KNOWN", 2500)
    clock = Clock()
    tokens, engine = Tokens(clock), Tells(clock, 1000)

    def ask(text: str) -> int:
        asked = completion(text * 1000)
        prompt = read_prompt(asked, lambda _: 1.0)
        return len(asyncio.run(tokens.of(asked, prompt, [engine])))

    assert [ask(text) for text in "abab"] == [1000] * 4
    assert engine.asked == 2
    ask("c")
    ask("b")
    assert engine.asked == 3
    ask("a")
    assert engine.asked == 4
    engine.tokens = 5000
    assert ask("d") == 5000, "more than is remembered"
    ask("a")
    assert engine.asked == 6


# -- where they come from ----------------------------------------------------------------------


def test_where_engines_publish() -> None:
    places = read_event_places(["5557", "http://10.0.0.1:8000,10.9.9.9:6000"])
    assert places.endpoint("http://10.0.0.1:8000", 0) == "tcp://10.9.9.9:6000"
    assert places.endpoint("http://10.0.0.2:8000", 3) == "tcp://10.0.0.2:5560"
    assert places.endpoint("http://[::1]:8000", 0) == "tcp://[::1]:5557"
    assert EventPlaces().endpoint("http://10.0.0.2:8000", 0) == ""


@pytest.mark.parametrize(
    "given", ["", "x", "0", "99999", "10.0.0.1:5557", "http://a,5557", "http://a,b:x", ",", "-1"]
)
def test_what_is_no_such_place(given: str) -> None:
    with pytest.raises(ValueError, match="is neither PORT nor URL,HOST:PORT"):
        read_event_places([given])


@pytest.mark.parametrize("text", [False, True])
def test_a_request_goes_where_its_prompt_is_announced(text: bool) -> None:
    prompt: Any = "y" * 4000 if text else [ord("y")] * 4000
    with (
        publishing() as announces, FakeEngine() as p0, FakeEngine() as d0, FakeEngine() as d1,
        proxied(
            [p0],
            [d0, d1],
            policy=PolicyName.CACHE_AWARE,
            kv_events=EventPlaces(hosts={d1.url: f"127.0.0.1:{announces.port}"}),
        ) as proxy,
    ):  # fmt: skip
        announces.wait()
        announces.publish(0, payload(stored(0, 250, [ord("y")] * 4000)))
        until(lambda: proxy.metric("announced_blocks", engine=d1.url) == 250)
        for _ in range(3):
            assert proxy.post("/v1/completions", COMPLETION | {"prompt": prompt}).is_success
        assert (len(d0.calls), len(d1.calls)) == (0, 3)
        assert proxy.metric("routes_total", chosen="prefix") == 3
        announces.publish(1, payload({"type": "AllBlocksCleared"}))
        until(lambda: proxy.metric("announced_blocks") == 0)
