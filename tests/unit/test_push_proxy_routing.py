"""Guards where requests go: by prefix, by session, by load; with a push or without; and that what
engines say changes it."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count

import pytest

from lamina_kv.push.proxy import engines
from lamina_kv.push.proxy.reports import EngineReport, RankReport
from lamina_kv.push.proxy.requests import ApiRequest
from lamina_kv.push.proxy.routing.cache_aware import FAITHFUL, SLACK, CacheAware
from lamina_kv.push.proxy.routing.least_loaded import LeastLoaded
from lamina_kv.push.proxy.routing.pace import HALF_LIFE
from lamina_kv.push.proxy.routing.placement import FEW, UNKNOWN
from lamina_kv.push.proxy.routing.power_of_two import PowerOfTwo
from lamina_kv.push.proxy.routing.ranks import Work
from lamina_kv.push.proxy.routing.router import Trip, serving
from lamina_kv.push.proxy.routing.sessions import MAX_AGE, Sessions
from lamina_kv.push.proxy.routing.words import Disaggregate, PolicyName, Reason, Why
from push_proxy.engines import FakeEngine
from push_proxy.pools import Pools, chat, completion, request
from push_proxy.proxies import COMPLETION, Proxy, proxied, push_address
from push_proxy.running import until

LONG = "Once upon a time there was a king who had three daughters. " * 100
SHORT = "Hello"


def pools(mode: Disaggregate = Disaggregate.AUTO, **counts: int) -> Pools:
    return Pools(CacheAware(random.Random(1)), mode, **counts)


def route(pool: Pools, asked: ApiRequest) -> Trip:
    prompt = pool.read(asked)
    return pool.router.begin(prompt, pool.prefill, serving(prompt.model, pool.decode))


def host(trip: Trip) -> str:
    return trip.route.decode.rank.engine.url.split("/")[2].split(":")[0]


def source(trip: Trip) -> str:
    return trip.route.prefill.rank.push.split(":")[0] if trip.route.prefill else ""


# -- which engine ------------------------------------------------------------------------------


def test_a_conversation_stays_with_both_engines() -> None:
    pool = pools(Disaggregate.ALWAYS)
    talks = [[("system", f"{n}" * 2000), ("user", LONG)] for n in range(6)]
    first = [route(pool, chat(*talk)) for talk in talks]
    for turn in range(3):
        for talk, before in zip(talks, first, strict=True):
            talk += [("assistant", f"answer {turn} " * 50), ("user", "And then? " * 50)]
            trip = route(pool, chat(*talk))
            assert (host(trip), source(trip)) == (host(before), source(before))
            assert trip.route.reason is Reason.PREFIX
    assert {host(trip) for trip in first} == {"d0", "d1"}
    assert {source(trip) for trip in first} == {"p0", "p1"}


def test_a_prefix_that_everybody_has_is_spread_by_load() -> None:
    pool = pools(Disaggregate.ALWAYS)
    with ExitStack() as stack:
        served = Counter[str]()
        for n in range(40):
            trip = route(pool, chat(("system", LONG), ("user", f"{n} " * 100)))
            served[host(trip)] += 1
            rank = trip.route.decode.rank
            stack.enter_context(rank.engine.visit(rank, trip.at_decode))
    assert min(served.values()) >= 10


def test_a_session_stays_until_its_engine_has_much_more_to_do() -> None:
    pool = pools()
    asked = completion(LONG, user="ann")
    home = route(pool, asked).route.decode.rank
    tokens = pool.read(asked).tokens
    for _ in range(5):
        trip = route(pool, completion(SHORT, user="ann"))
        assert (trip.route.decode.rank, trip.route.reason) == (home, Reason.SESSION)
    bearable = int(FAITHFUL * tokens + SLACK) - 1000
    with home.visit(Work(bearable, 0)):
        assert route(pool, asked).route.decode.rank is home
    with home.visit(Work(bearable + 2000, 0)):
        moved = route(pool, asked).route.decode.rank
        assert moved is not home
    assert route(pool, asked).route.decode.rank is moved, "its cache is there now"


def test_a_session_whose_engine_is_gone_moves() -> None:
    pool = pools()
    asked = completion(SHORT, session_id="s")
    home = route(pool, asked).route.decode.rank
    rest = [engine for engine in pool.decode if engine is not home.engine]
    prompt = pool.read(asked)
    moved = pool.router.begin(prompt, pool.prefill, rest)
    assert moved.route.decode.rank.engine is rest[0]
    assert route(pool, asked).route.decode.rank.engine is rest[0]


def test_sessions_keep_no_engine_that_is_gone() -> None:
    pool = pools()
    sessions = Sessions(pool.clock)
    first, second = pool.decode
    sessions.answered(b"first", first.ranks[0])
    sessions.answered(b"second", second.ranks[0])
    first.ranks = ()
    gc.collect()
    assert sessions.rank(b"first") is None
    assert sessions.rank(b"second") is second.ranks[0]
    pool.clock.now += MAX_AGE
    assert sessions.rank(b"second") is None


def test_a_header_names_a_session_too() -> None:
    pool = pools()
    for session in map(str, range(10)):
        asked = [request({"prompt": f"{n}"}, **{"x-session-id": session}) for n in range(3)]
        assert len({host(route(pool, one)) for one in asked}) == 1


def test_an_engine_that_is_full_is_spared() -> None:
    pool = pools(Disaggregate.ALWAYS)
    asked = completion(LONG, user="ann")
    home = route(pool, asked).route.decode.rank
    home.reported(RankReport(running=5, waiting=3, usage=0.99))
    assert route(pool, asked).route.decode.rank is not home


@pytest.mark.parametrize("policy", [LeastLoaded(), PowerOfTwo(random.Random(0)), CacheAware()])
def test_what_others_have_sent_there_counts(
    policy: LeastLoaded | PowerOfTwo | CacheAware,
) -> None:
    pool = Pools(policy)
    busy = pool.decode[0].ranks[0]
    for _ in range(2):
        busy.reported(RankReport(running=6, waiting=0))
    served = Counter(host(route(pool, completion(f"{n}" * 10))) for n in range(10))
    assert served == {"d1": 10}


def test_one_report_of_requests_that_are_not_ours_may_be_late() -> None:
    pool = Pools(LeastLoaded())
    rank = pool.decode[0].ranks[0]
    rank.reported(RankReport(running=1))
    assert rank.strangers == 0
    with rank.visit(Work(5, 5)):
        rank.reported(RankReport(running=1))
    assert rank.strangers == 0
    for _ in range(2):
        rank.reported(RankReport(running=2, waiting=1))
    assert rank.strangers == 3
    rank.reported(None)
    assert rank.strangers == 0


def test_a_request_goes_where_its_model_is() -> None:
    pool = pools(Disaggregate.ALWAYS)
    (d0, d1), (p0, p1) = pool.decode, pool.prefill
    for engine in (d0, d1, p0, p1):
        engine.models = frozenset({"m"})
    d1.models = p1.models = frozenset({"m", "adapter"})
    trips = [route(pool, completion(f"{n}" * 2000, model="adapter")) for n in range(12)]
    assert {(host(trip), source(trip)) for trip in trips} == {("d1", "p1")}
    trips = [route(pool, completion(f"{n}" * 3000)) for n in range(12)]
    assert {host(trip) for trip in trips} == {"d0", "d1"}
    assert {source(trip) for trip in trips} == {"p0", "p1"}
    p1.models = frozenset({"m"})
    assert route(pool, completion(LONG, model="adapter")).route.why is Why.NO_PREFILL_ENGINE
    d0.models = frozenset()
    trips = [route(pool, completion(f"{n}x" * 2000, model="adapter")) for n in range(12)]
    assert {host(trip) for trip in trips} == {"d0", "d1"}, "one does not say what it serves"
    d0.models = frozenset({"m"})
    trips = [route(pool, completion(f"{n}y" * 2000, model="unknown")) for n in range(12)]
    assert {host(trip) for trip in trips} == {"d0", "d1"}, "one of them says that there is none"


# -- pushed or not -----------------------------------------------------------------------------


def test_while_nothing_is_known_short_prompts_are_computed_on_decode() -> None:
    pool = pools()
    for length, why in ((1, Why.SHORT), (UNKNOWN, Why.SHORT), (UNKNOWN + 1, Why.PUSHED)):
        trip = route(pool, completion([length] * length))
        assert trip.route.why is why
        assert trip.pushed == (why is Why.PUSHED)


def test_a_next_turn_of_few_words_is_computed_where_its_history_is() -> None:
    pool = pools()
    talk = [("user", LONG)]
    assert route(pool, chat(*talk)).route.why is Why.PUSHED
    talk += [("assistant", "The first one left. " * 100), ("user", "And the second?")]
    trip = route(pool, chat(*talk))
    assert (trip.route.why, trip.route.prefill) == (Why.CACHED, None)
    assert trip.at_decode.compute < 64


@pytest.mark.parametrize(
    ("mode", "asked", "why"),
    [
        (Disaggregate.ALWAYS, completion(SHORT), Why.PUSHED),
        (Disaggregate.NEVER, completion(LONG), Why.NEVER),
        (Disaggregate.ALWAYS, completion(LONG, n=2), Why.REQUEST),
        (Disaggregate.AUTO, completion(LONG, n=2), Why.REQUEST),
    ],
)
def test_what_the_operator_says_and_what_cannot_be(
    mode: Disaggregate, asked: ApiRequest, why: Why
) -> None:
    assert route(pools(mode), asked).route.why is why


def test_without_a_prefill_engine_decode_computes() -> None:
    pool = pools(Disaggregate.ALWAYS)
    trip = pool.router.begin(pool.read(completion(LONG)), [], pool.decode)
    assert trip.route.why is Why.NO_PREFILL_ENGINE


async def finish(pool: Pools, trip: Trip, *, prefill: float, first: float) -> None:
    """A stream that begins so many seconds after it was sent, and a prefill that is done earlier.

    Args:
        pool: the engines.
        trip: the request.
        prefill: seconds that the prefill engine takes, if there is one.
        first: seconds to the first byte.
    """
    begun = pool.clock.now
    if trip.pushed:
        pool.clock.now = begun + prefill
        usage = f'{{"usage": {{"prompt_tokens": {trip.prompt.tokens}}}}}'
        pool.router.prefilled(trip, usage.encode())
    pool.clock.now = begun + first

    async def pieces():  # noqa: ANN202
        yield b"data: {}\n\n"

    async for _ in pool.router.answers(trip, pieces(), events=True):
        pass


@pytest.fixture
def learnt() -> Pools:
    """Prompts take 1 ms a token on both sides, and a push 50 ms more."""
    pool = pools(prefill=1, decode=1)
    rng = random.Random(5)
    for n in range(60):
        length = rng.randrange(300, 3000)
        trip = route(pool, completion([n] * length))
        seconds = length / 1000
        first = seconds + 0.05 * trip.pushed
        asyncio.run(finish(pool, trip, prefill=seconds, first=first))
    return pool


def test_at_low_load_nothing_is_pushed_that_would_come_later(learnt: Pools) -> None:
    trip = route(learnt, completion([1000] * 2000))
    assert trip.route.why is Why.SOONER


def test_a_decode_engine_with_answers_in_the_making_is_not_disturbed(learnt: Pools) -> None:
    rank = learnt.decode[0].ranks[0]
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(rank.visit(Work(0, 10, decodes=True))).computed()
        learnt.clock.now += 60
        assert route(learnt, completion([1000] * 2000)).route.why is Why.PUSHED
        assert route(learnt, completion([1001] * FEW)).route.why is Why.SHORT
    assert route(learnt, completion([1002] * 2000)).route.why is Why.PUSHED, "a moment ago"
    learnt.clock.now += 10 * HALF_LIFE
    # All that was learnt has faded.
    assert route(learnt, completion([1003] * UNKNOWN)).route.why is Why.SHORT


def test_a_prefill_engine_with_a_long_queue_is_helped(learnt: Pools) -> None:
    decode, prefill = learnt.decode[0].ranks[0], learnt.prefill[0].ranks[0]
    with decode.visit(Work(0, 10, decodes=True)) as visit:
        visit.computed()
        asked = completion([1000] * 2000)
        assert route(learnt, asked).route.why is Why.PUSHED
        with prefill.visit(Work(20_000, 20_000)):
            assert route(learnt, completion([1001] * 2000)).route.why is Why.SOONER


def test_prompts_in_front_count_on_both_sides(learnt: Pools) -> None:
    decode = learnt.decode[0].ranks[0]
    with decode.visit(Work(5000, 5000, decodes=True)):
        assert route(learnt, completion([1000] * 2000)).route.why is Why.PUSHED


def test_a_prompt_whose_answer_is_no_stream_is_computed_when_it_should_be(learnt: Pools) -> None:
    rank = learnt.decode[0].ranks[0]

    def crowd() -> float:
        return rank.candidate(learnt.read(completion("x")), sticky=False, decodes=True).crowd

    trip = route(learnt, completion([2000] * 1000))
    assert trip.at_decode.seconds == pytest.approx(1.0, rel=0.1)
    with rank.visit(trip.at_decode) as visit:
        assert (rank.queued, crowd()) == (1000, 0)
        learnt.clock.now += 1.2
        assert (rank.queued, crowd()) == (0, 1)
        visit.computed()
        assert (rank.queued, crowd()) == (0, 1)
    with rank.visit(trip.at_decode):
        pass
    learnt.clock.now += 1.2
    assert rank.queued == 0
    assert crowd() < 1
    stream = route(learnt, completion([2001] * 1000, stream=True))
    with rank.visit(stream.at_decode):
        learnt.clock.now += 100
        assert rank.queued == 1000, "its first byte has not come"
    assert rank.queued == 0


def test_a_queue_is_gone_before_answers_that_are_no_streams_have_come(learnt: Pools) -> None:
    rank = learnt.decode[0].ranks[0]
    with ExitStack() as stack:
        for n in range(3):
            trip = route(learnt, completion([3000 + n] * 300))
            stack.enter_context(rank.visit(trip.at_decode))
        busy = route(learnt, completion([3010] * 2000))
        learnt.clock.now += 2
        assert rank.queued == 0
        pushed = route(learnt, completion([3011] * 2000))
        assert busy.route.decode.queued > pushed.route.decode.queued == 0
        assert pushed.pushed, "because of the answers in the making"
        assert pushed.at_decode.compute == 0
        assert pushed.at_decode.seconds == pytest.approx(2.05, rel=0.1)
    while_idle = learnt.router.unpushed(pushed)
    assert while_idle.at_decode.compute == 2000
    assert while_idle.at_decode.seconds == pytest.approx(2.0, rel=0.1)


# -- what engines say --------------------------------------------------------------------------


def test_no_push_from_a_prefill_engine_that_decode_has_given_up() -> None:
    pool = pools(Disaggregate.ALWAYS, decode=1)
    decode = pool.decode[0]
    away = EngineReport({0: RankReport()}, frozenset({"p0:7000"}))
    decode._reported(away)
    served = [source(route(pool, completion(f"{n}" * 2000))) for n in range(10)]
    assert set(served) == {"p1"}
    decode._reported(EngineReport({0: RankReport()}, frozenset({"p0:7000", "p1:7000"})))
    assert route(pool, completion(LONG)).route.why is Why.NO_PREFILL_ENGINE
    pool.clock.now += 11
    tried = {source(route(pool, completion(f"{n}" * 2000))) for n in range(4)}
    assert tried == {"p0", "p1", ""}, "each is tried once"
    decode._reported(EngineReport({0: RankReport()}))
    assert route(pool, completion(LONG)).route.why is Why.PUSHED


def test_tokens_of_a_text_are_learnt() -> None:
    pool = pools(Disaggregate.ALWAYS)
    for n in range(60):
        trip = route(pool, completion(f"{n:03}" * 1000))
        pool.router.prefilled(trip, b'{"usage": {"prompt_tokens": 1500}}')
    assert pool.read(completion("x" * 3000)).tokens == pytest.approx(1500, rel=0.02)
    assert pool.read(completion("x" * 3000, model="another")).tokens == 750


def test_hits_are_compared_with_what_engines_find() -> None:
    pool = pools(Disaggregate.ALWAYS, prefill=1)
    for cached in (0, 600):
        trip = route(pool, completion([1] * 640))
        details = (
            f'{{"prompt_tokens": 640, "prompt_tokens_details": {{"cached_tokens": {cached}}}}}'
        )
        pool.router.prefilled(trip, f'{{"usage": {details}}}'.encode())
    page = pool.metrics.render().decode()
    assert 'lamina_proxy_hit_tokens_total{kind="expected",role="prefill"} 639.0' in page
    assert 'lamina_proxy_hit_tokens_total{kind="found",role="prefill"} 600.0' in page
    assert 'lamina_proxy_routes_total{chosen="load",why="pushed"} 1.0' in page
    assert 'lamina_proxy_routes_total{chosen="prefix",why="pushed"} 1.0' in page


def test_an_engine_that_does_not_find_what_is_expected_is_believed_less() -> None:
    pool = pools(Disaggregate.ALWAYS, prefill=1)

    def expect(cached: int) -> int:
        trip = route(pool, completion([1] * 640))
        details = {"prompt_tokens": 640, "prompt_tokens_details": {"cached_tokens": cached}}
        pool.router.prefilled(trip, json.dumps({"usage": details}).encode())
        assert trip.route.prefill is not None
        return trip.route.prefill.hit

    assert (expect(0), expect(639)) == (0, 639)
    assert [expect(0) for _ in range(40)][-1] < 100
    assert [expect(639) for _ in range(60)][-1] > 600


# -- over HTTP ---------------------------------------------------------------------------------


@pytest.fixture
def routed() -> Iterator[tuple[Proxy, list[FakeEngine], list[FakeEngine]]]:
    """A proxy as it comes, and two engines of each kind."""
    with FakeEngine() as p0, FakeEngine() as p1, FakeEngine() as d0, FakeEngine() as d1:
        usual = {"policy": PolicyName.CACHE_AWARE, "disaggregate": Disaggregate.AUTO}
        with proxied([p0, p1], [d0, d1], **usual) as proxy:
            yield proxy, [p0, p1], [d0, d1]


Routed = tuple[Proxy, list[FakeEngine], list[FakeEngine]]


def post(proxy: Proxy, prompt: str, **headers: str) -> None:
    body = COMPLETION | {"prompt": prompt}
    assert proxy.post("/v1/completions", body, headers=headers).is_success
    until(lambda: proxy.metric("engine_load") == 0)


def test_a_short_prompt_is_sent_to_decode_alone(routed: Routed) -> None:
    proxy, prefill, decode = routed
    post(proxy, SHORT)
    assert not [call for engine in prefill for call in engine.calls]
    (call,) = (call for engine in decode for call in engine.calls)
    assert call.push is None
    assert proxy.metric("routes_total", why="short") == 1
    assert proxy.metric("unpushed_total") == 0
    post(proxy, LONG)
    assert len([call for engine in prefill for call in engine.calls]) == 1
    assert proxy.metric("routes_total", why="pushed") == 1


def test_a_session_stays_where_it_is(routed: Routed) -> None:
    proxy, _, decode = routed
    for n in range(6):
        post(proxy, f"{n}", **{"x-session-id": "s"})
    assert sorted(len(engine.calls) for engine in decode) == [0, 6]


def test_what_an_engine_publishes_moves_requests(routed: Routed) -> None:
    proxy, _, decode = routed
    decode[0].published = ['vllm:num_requests_waiting{engine="0"} 9.0']

    def is_spared() -> bool:
        before = len(decode[0].calls)
        for n in range(4):
            post(proxy, f"{n}")
        return len(decode[0].calls) == before

    until(is_spared)


def test_what_decode_says_of_a_prefill_engine_moves_pushes(
    routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "PROBE_SECONDS", 1000.0)
    proxy, prefill, decode = routed
    peer = f'lamina_push_peer_in_use{{engine="0",peer="{push_address(0)}"}} 0.0'
    for engine in decode:
        engine.published = [peer]
    numbers = count()

    def is_spared() -> bool:
        before = len(prefill[0].calls)
        for _ in range(4):
            post(proxy, f"{next(numbers)} " * 2000)
        return len(prefill[0].calls) == before

    until(is_spared)
    assert prefill[1].calls
