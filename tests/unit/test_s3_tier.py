"""A tier in an object store, without a server, and against one that fails as it is told."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from obstore.store import MemoryStore
from pydantic import ValidationError

from disks import key
from lamina_kv.plan import ChunkKey
from lamina_kv.tiers import KINDS, open_audit
from lamina_kv.tiers.contract import Fate, Piece, Store, StoreError, Tenant
from lamina_kv.tiers.objects import verify
from lamina_kv.tiers.s3 import store as s3_store
from lamina_kv.tiers.s3.config import S3Config
from lamina_kv.tiers.s3.errors import say
from lamina_kv.tiers.s3.store import (
    LEAST_BYTES,
    LISTED_FOR_ONE,
    MOST_AT_ONCE,
    ObjectStore,
    open_store,
)
from lamina_kv.values import MIB
from push_proxy.running import until
from servers.scripted_s3 import Fault, ScriptedS3
from store_contract import TIMEOUT, Arena, Backing, Change, StoreContract, fill, rows_of

OBJECT = 12288
SHORT = 0.3
"""Seconds after which what hangs is late."""
NAMESPACE = "cd" * 16
ABOUT_IT = f"{NAMESPACE}/about.json"
TENANT = Tenant(NAMESPACE, {"model": "tiny", "chunk_tokens": "256"}, 0, None, OBJECT, 0)


class Memories:
    """Stores in one memory of the library; see :class:`~store_contract.Backing`."""

    def __init__(self) -> None:
        self._client = MemoryStore()

    def open(self, tenant: Tenant) -> Store:
        store = ObjectStore(S3Config(url="s3://bucket", timeout=TIMEOUT), tenant, self._client)
        store.introduce()
        return store

    def change(self, tenant: Tenant, key: ChunkKey, change: Change) -> None:
        name = f"{tenant.namespace}/{key.hex()[:2]}/{key.hex()}.{tenant.shard}"
        content = self._client.get(name).bytes().to_bytes()
        self._client.put(name, change(content))


class TestInMemory(StoreContract):
    @pytest.fixture
    def backing(self) -> Backing:
        return Memories()


# -- what an entry of the configuration may hold ---------------------------------------------------


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b-c_d.e=f/", "s3://bucket/a/b-c_d.e=f"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("az://container", "az://container"),
    ],
)
def test_urls(given: str, url: str) -> None:
    assert S3Config(url=given).url == url


@pytest.mark.parametrize(
    "url",
    ["", "bucket", "s3://", "s3:///x", "http://bucket", "s3://b:99/x", "s3://b/x?y=z", "s3://b/a//b",
     "s3://b/../c", "s3://b/a b", 3, "s3://id:secret@bucket"],
)  # fmt: skip
def test_wrong_urls(url: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        S3Config(url=url)
    assert "s3://bucket/prefix" in str(raised.value.errors()[0]["msg"])
    assert "secret" not in raised.value.errors()[0]["msg"].replace("secrets", "")


@pytest.mark.parametrize(
    "name",
    ["secret_access_key", "aws_session_token", "account_key", "sas_token", "service_account_key",
     "client_secret", "bearer_token", "sse_customer_key_base64", "password"],
)  # fmt: skip
def test_secrets_are_no_options(name: str) -> None:
    with pytest.raises(ValidationError) as raised:
        S3Config(url="s3://bucket", options={name: "hush-hush"})
    message = raised.value.errors()[0]["msg"]
    assert f"without {name}: secrets belong in the environment" in message
    assert "hush" not in message


@pytest.mark.parametrize("name", ["proxy_url", "endpoint"])
def test_an_address_has_no_secret_in_it(name: str) -> None:
    with pytest.raises(ValidationError) as raised:
        S3Config(url="s3://bucket", options={name: "http://id:hush@10.0.0.1:8080/"})
    message = raised.value.errors()[0]["msg"]
    assert f"without credentials in {name}" in message
    assert "hush" not in message
    S3Config(url="s3://bucket", options={name: "http://10.0.0.1:8080/@here"})


@pytest.mark.parametrize(
    "options",
    [3, {"Region": "x"}, {"region": None}, {"region": ["x"]}, {"timeout": "1s"}, {3: "x"}],
)
def test_wrong_options(options: Any) -> None:
    with pytest.raises(ValidationError):
        S3Config(url="s3://bucket", options=options)


@pytest.mark.parametrize(
    "options",
    [
        {"nonsense": "x"},
        {"pool_max_idle_per_host": "many"},
        {"s3_express": "maybe"},
    ],
)
def test_an_option_that_the_library_does_not_take_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"^tiers\.cold\.options: ") as raised:
        open_store(S3Config(name="cold", url="s3://bucket", options=options), TENANT)
    assert "\n" not in str(raised.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for module in ("client", "errors", "store"):
        monkeypatch.delitem(sys.modules, f"lamina_kv.tiers.s3.{module}")
    with pytest.raises(StoreError, match=r"pip install 'lamina-kv\[s3\]'"):
        KINDS["s3"].open(S3Config(url="s3://bucket"), TENANT)


# -- a store that fails as it is told --------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedS3]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    with ScriptedS3() as server:
        yield server


OpenHere = Callable[..., ObjectStore]


@pytest.fixture
def opened(server: ScriptedS3) -> Iterator[OpenHere]:
    """Opens stores at the server, closed at the end."""
    stores: list[ObjectStore] = []

    def open_here(tenant: Tenant = TENANT, *, timeout: float = 30.0, **keys: Any) -> ObjectStore:
        config = {
            "name": "cold",
            "url": "s3://bucket/kv",
            "options": {"endpoint": server.endpoint, "region": "here"},
            "timeout": timeout,
        }
        stores.append(open_store(S3Config(**config | keys), tenant))
        return stores[-1]

    yield open_here
    for store in stores:
        store.close()


def pieces_of(*numbers: int) -> list[Piece]:
    arena = Arena(len(numbers), OBJECT)
    for number, buffer in zip(numbers, arena.buffers, strict=True):
        fill(buffer, number)
    return [Piece(key(n), 0, b) for n, b in zip(numbers, arena.buffers, strict=True)]


def empty(*numbers: int) -> list[Piece]:
    arena = Arena(len(numbers), OBJECT)
    return [Piece(key(n), 0, b) for n, b in zip(numbers, arena.buffers, strict=True)]


def untouched(pieces: Sequence[Piece]) -> bool:
    return all((piece.buffer == 0xA5).all() for piece in pieces)


def test_where_objects_are(server: ScriptedS3, opened: OpenHere) -> None:
    store = opened(Tenant(NAMESPACE, {"model": "tiny"}, 3, 4, OBJECT, 1))
    pieces = pieces_of(1)
    assert store.write(pieces, TIMEOUT) == [Fate.DONE]
    text = key(1).hex()
    content = server.objects.pop(f"kv/{NAMESPACE}/{text[:2]}/{text}.1")
    assert content == pieces[0].buffer.tobytes()
    assert server.objects == {f"kv/{NAMESPACE}/about.json": b'{\n "model": "tiny"\n}'}


@pytest.mark.parametrize(
    ("fault", "fate"),
    [
        (Fault(403, "AccessDenied"), Fate.REFUSED),
        (Fault(401, "Unauthorized"), Fate.REFUSED),
        (Fault(503, "SlowDown"), Fate.DOWN),
        (Fault(500, "InternalError"), Fate.DOWN),
        (Fault(507, "InsufficientStorage"), Fate.REFUSED),
        (Fault(429, "TooManyRequests"), Fate.DOWN),
        (Fault(404, "NoSuchBucket"), Fate.REFUSED),
    ],
)
def test_answers_that_are_errors(
    server: ScriptedS3, opened: OpenHere, caplog: pytest.LogCaptureFixture, fault: Fault, fate: Fate
) -> None:
    store = opened()
    assert store.write(pieces_of(1, 2), TIMEOUT) == [Fate.DONE] * 2
    server.faults = dict.fromkeys(("GET", "PUT"), fault)
    into = empty(1, 2)
    for _ in range(2):
        assert store.read(into, TIMEOUT) == [fate] * 2
        assert store.write(pieces_of(3), TIMEOUT) == [fate]
    assert untouched(into)
    said = [record.getMessage() for record in caplog.records if "cannot be" in record.getMessage()]
    assert len(said) == 2, "each kind of error is said once"
    assert all(f"HTTP {fault.status}, {fault.code}" in each for each in said)
    server.faults.clear()
    assert store.read(into, TIMEOUT) == [Fate.DONE] * 2


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_question_that_is_refused_has_no_answer(
    server: ScriptedS3, opened: OpenHere, status: int
) -> None:
    store = opened()
    store.write(pieces_of(1), TIMEOUT)
    server.faults["HEAD"] = Fault(status)
    assert store.find([key(1), key(2)], TIMEOUT) is None
    server.faults.clear()
    assert store.find([key(1), key(2)], TIMEOUT) == [True, False]


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_probe_fails_while_the_store_does(
    server: ScriptedS3, opened: OpenHere, status: int
) -> None:
    store = opened()
    server.faults["HEAD"] = Fault(status)
    assert not store.probe(TIMEOUT)
    server.faults.clear()
    assert store.probe(TIMEOUT)


def test_the_library_tries_again_what_passes(server: ScriptedS3, opened: OpenHere) -> None:
    store = opened()
    server.seen.clear()
    server.faults = dict.fromkeys(("GET", "HEAD", "PUT"), Fault(503, "SlowDown", times=2))
    assert store.write(pieces_of(1), TIMEOUT) == [Fate.DONE]
    assert store.read(empty(1), TIMEOUT) == [Fate.DONE]
    assert store.find([key(1)], TIMEOUT) == [True]
    assert server.seen == {"PUT": 3, "GET": 3, "HEAD": 3}


def test_a_body_that_is_cut_short_is_not_delivered(server: ScriptedS3, opened: OpenHere) -> None:
    store = opened()
    store.write(pieces_of(1), TIMEOUT)
    server.faults["GET"] = Fault(cut=5000)
    into = empty(1)
    assert store.read(into, TIMEOUT)[0] in (Fate.DOWN, Fate.CORRUPT)
    assert untouched(into)


@pytest.mark.parametrize("length", [0, OBJECT - 1, OBJECT + 1, 8 * MIB])
def test_an_object_of_another_length_is_corrupt(
    server: ScriptedS3, opened: OpenHere, length: int
) -> None:
    store = opened()
    store.write(pieces_of(1), TIMEOUT)
    server.objects[f"kv/{store.name(key(1))}"] = b"x" * length
    server.faults["GET"] = Fault(cut=0)
    into = empty(1)
    assert store.read(into, TIMEOUT) == [Fate.CORRUPT], "by its length: its bytes do not come"
    assert untouched(into)


@pytest.mark.parametrize("verb", ["read", "write", "find"])
def test_what_hangs_is_late_and_touches_nothing_later(
    server: ScriptedS3, opened: OpenHere, verb: str
) -> None:
    store = opened()
    assert store.write(pieces_of(1), TIMEOUT) == [Fate.DONE]
    server.faults = dict.fromkeys(("GET", "HEAD", "PUT"), Fault(delay=600))
    pieces = pieces_of(2) if verb == "write" else empty(1)
    if verb == "find":
        assert store.find([key(1)], SHORT) is None
    else:
        assert getattr(store, verb)(pieces, SHORT) == [Fate.LATE]
    server.faults.clear()
    server.release()
    assert verb == "write" or untouched(pieces)
    assert store.read(empty(1), TIMEOUT) == [Fate.DONE], "and the store is as good as before"
    assert verb == "write" or untouched(pieces)


def test_the_tier_may_be_given_less_time(server: ScriptedS3, opened: OpenHere) -> None:
    assert opened().write(pieces_of(1), TIMEOUT) == [Fate.DONE]
    store = opened(timeout=SHORT, keep="nothing")
    server.faults["GET"] = Fault(delay=600)
    assert store.read(empty(1), TIMEOUT) == [Fate.LATE]


def test_answers_that_came_in_time_count(server: ScriptedS3, opened: OpenHere) -> None:
    store = opened()
    assert store.write(pieces_of(1), TIMEOUT) == [Fate.DONE]
    server.seen.clear()
    answered = store.name(key(1))
    server.faults = {"LIST": Fault(503), "HEAD": Fault(delay=600, spares=answered)}
    found = store.find([key(number) for number in range(1, 2 * MOST_AT_ONCE)], 3.0)
    assert found is not None
    assert found[0]
    assert not any(found[1:])


def test_a_small_namespace_is_listed(server: ScriptedS3, opened: OpenHere) -> None:
    store = opened()
    store.write(pieces_of(1, 2), TIMEOUT)
    few = [key(number) for number in range(MOST_AT_ONCE)]
    many = [*few, key(1000)]
    server.seen.clear()
    assert store.find(few, TIMEOUT) == [number in (1, 2) for number in range(len(few))]
    assert server.seen == {"HEAD": len(few)}
    server.seen.clear()
    assert store.find(many, TIMEOUT) == [number in (1, 2) for number in range(len(many))]
    assert server.seen == {"LIST": 1}


def test_a_large_namespace_is_not_listed_again(server: ScriptedS3, opened: OpenHere) -> None:
    store = opened()
    store.write(pieces_of(1), TIMEOUT)
    asked = [key(number) for number in range(MOST_AT_ONCE + 1)]
    for number in range(LISTED_FOR_ONE * len(asked)):
        server.objects[f"kv/{store.name(key(5000 + number))}"] = b""
    server.seen.clear()
    for _ in range(2):
        assert store.find(asked, TIMEOUT) == [number == 1 for number in range(len(asked))]
    assert server.seen == {"LIST": 1, "HEAD": 2 * len(asked)}


def test_a_listing_that_takes_too_long_is_not_tried_for_every_question(
    server: ScriptedS3, opened: OpenHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    store.write(pieces_of(1), TIMEOUT)
    asked = [key(number) for number in range(MOST_AT_ONCE + 1)]
    server.seen.clear()
    server.faults["LIST"] = Fault(delay=600)
    store.find(asked, 2 * SHORT)
    more = [*asked, key(1000)]  # a larger question, for which a listing may be longer
    for question in (asked, more):
        assert store.find(question, TIMEOUT) == [number == 1 for number in range(len(question))]
    assert server.seen["LIST"] == 1
    server.faults.clear()
    monkeypatch.setattr(s3_store, "LISTING_PAUSE", 0.0)
    store.find(asked, TIMEOUT)
    assert server.seen["LIST"] == 2


def test_the_second_writer_loses(server: ScriptedS3, opened: OpenHere) -> None:
    store, other = opened(), opened()
    first, second = pieces_of(1), pieces_of(1)
    second[0].buffer[-1] ^= 1  # in the padding
    assert store.write(first, TIMEOUT) == other.write(second, TIMEOUT) == [Fate.DONE]
    assert server.objects[f"kv/{store.name(key(1))}"] == first[0].buffer.tobytes()


@pytest.mark.parametrize("length", [100, OBJECT])
def test_who_finds_an_object_damaged_replaces_it(
    server: ScriptedS3, opened: OpenHere, length: int
) -> None:
    store, other, pieces = opened(), opened(), pieces_of(1)
    assert store.write(pieces, TIMEOUT) == [Fate.DONE]
    name = f"kv/{store.name(key(1))}"
    server.objects[name] = damaged = bytes(length)
    assert other.write(pieces, TIMEOUT) == [Fate.DONE]
    assert server.objects[name] == damaged, "whoever has not read it does not know"
    (fate,) = store.read(into := empty(1), TIMEOUT)
    whole = fate is Fate.DONE and verify(into[0].buffer, key(1), 0, rows_of(OBJECT))
    assert not whole
    assert store.write([pieces[0]._replace(damaged=True)], TIMEOUT) == [Fate.DONE]
    assert server.objects[name] == pieces[0].buffer.tobytes()


def test_an_endpoint_without_conditions_is_written_to(
    server: ScriptedS3, opened: OpenHere, caplog: pytest.LogCaptureFixture
) -> None:
    server.conditions = False
    with caplog.at_level(logging.INFO):
        store = opened()
        server.seen.clear()
        for _ in range(2):
            assert store.write(pieces_of(1, 2), TIMEOUT) == [Fate.DONE] * 2
    assert server.seen == {"PUT": 4}, "it is tried once, when the store is opened"
    assert sum("does not know puts with a condition" in text for text in caplog.messages) == 1
    assert opened().read(empty(1, 2), TIMEOUT) == [Fate.DONE] * 2


@pytest.mark.parametrize(("size", "batch"), [(4 * MIB, 8), (64 * MIB, 1), (OBJECT, 16)])
def test_a_call_is_so_large_that_it_can_end_in_time(
    opened: OpenHere, size: int, batch: int
) -> None:
    assert opened(replace(TENANT, object_bytes=size)).traits.batch == batch


# -- the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "word"),
    [
        ({"LIST": Fault(403, "InvalidAccessKeyId")}, "InvalidAccessKeyId"),
        ({"LIST": Fault(404, "NoSuchBucket")}, "has no such bucket"),
        ({"LIST": Fault(400, "AuthorizationHeaderMalformed")}, "AuthorizationHeaderMalformed"),
    ],
)
def test_what_will_not_work_is_said_at_the_start(
    server: ScriptedS3, opened: OpenHere, faults: dict[str, Fault], word: str
) -> None:
    server.faults = faults
    with pytest.raises(StoreError, match=r"^tiers\.cold\.url: .*s3://bucket/kv") as raised:
        opened()
    assert word in str(raised.value)
    assert "hush" not in str(raised.value)
    assert not [each for each in threading.enumerate() if each.name == "loop-cold"]


def test_who_only_reads_needs_no_right_to_write(server: ScriptedS3, opened: OpenHere) -> None:
    opened().write(pieces_of(1), TIMEOUT)
    server.faults["PUT"] = Fault(403, "AccessDenied")
    assert opened(keep="nothing").read(empty(1), TIMEOUT) == [Fate.DONE]


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        (Fault(507, "XMinioStorageFull"), "XMinioStorageFull"),
        (Fault(403, "QuotaExceeded"), "quota"),
        (Fault(403, "AccessDenied"), "s3:PutObject"),
        (Fault(503, "SlowDown"), "SlowDown"),
        (Fault(delay=600), "no answer"),
    ],
)
def test_a_store_that_takes_no_objects_is_opened_and_read(
    server: ScriptedS3,
    opened: OpenHere,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
    word: str,
) -> None:
    opened().write(pieces_of(1), TIMEOUT)
    del server.objects[f"kv/{ABOUT_IT}"]
    server.faults["PUT"] = fault
    store = opened(timeout=1.0)
    said = [text for text in caplog.messages if "cannot be written" in text and word in text]
    assert len(said) == 1
    assert store.read(empty(1), TIMEOUT) == [Fate.DONE]
    server.faults.clear()
    until(lambda: store.write(pieces_of(2), TIMEOUT) and f"kv/{ABOUT_IT}" in server.objects)


@pytest.mark.parametrize("fault", [Fault(503, "SlowDown"), Fault(delay=600)])
def test_a_store_that_does_not_answer_is_opened(
    server: ScriptedS3, opened: OpenHere, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    server.faults = dict.fromkeys(("LIST", "PUT", "GET"), fault)
    store = opened(timeout=1.0)
    assert [text for text in caplog.messages if "cannot be reached" in text]
    server.faults.clear()
    until(lambda: store.write(pieces_of(1), TIMEOUT) == [Fate.DONE])
    until(lambda: store.read(empty(1), TIMEOUT) == [Fate.DONE])
    until(lambda: store.write(pieces_of(1), TIMEOUT) and f"kv/{ABOUT_IT}" in server.objects)


def test_a_description_that_cannot_be_written_is_tried_again(
    server: ScriptedS3, opened: OpenHere
) -> None:
    server.faults["LIST"] = Fault(503, "SlowDown")
    store = opened()
    server.seen.clear()
    server.faults = {"PUT": Fault(403, "AccessDenied", after=1)}
    assert store.write(pieces_of(1), TIMEOUT) == [Fate.DONE]
    assert f"kv/{ABOUT_IT}" not in server.objects
    server.faults.clear()
    assert store.write(pieces_of(2), TIMEOUT) == [Fate.DONE]
    assert f"kv/{ABOUT_IT}" in server.objects


def test_nobody_listens(opened: OpenHere, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(options={"endpoint": "http://127.0.0.1:1"}, timeout=0.5)
    assert [text for text in caplog.messages if "cannot be reached" in text]
    assert store.read(empty(1), TIMEOUT)[0] in (Fate.DOWN, Fate.LATE)
    assert store.find([key(1)], TIMEOUT) is None


@pytest.mark.parametrize(("size", "tokens", "advice"), [(MIB, "256", "use chunk_tokens: 1024")])
def test_small_objects_are_said(
    opened: OpenHere, caplog: pytest.LogCaptureFixture, size: int, tokens: str, advice: str
) -> None:
    opened(Tenant(NAMESPACE, {"chunk_tokens": tokens}, 0, None, size, 0))
    assert [text for text in caplog.messages if "1.00 MiB" in text and advice in text]


def test_objects_that_are_large_enough_are_not_mentioned(
    opened: OpenHere, caplog: pytest.LogCaptureFixture
) -> None:
    opened(Tenant(NAMESPACE, {"chunk_tokens": "256"}, 0, None, LEAST_BYTES, 0))
    assert not caplog.messages


def test_a_line_for_people_has_no_secrets() -> None:
    url = "https://account.blob.core.windows.net/c/x?sv=2026&sig=hush-hush"
    assert "hush" not in say(ValueError(f"Error performing GET {url} in 3ms - HTTP error"))
    body = "<Error><Code>SignatureDoesNotMatch</Code><StringToSign>hush-hush</StringToSign></Error>"
    text = f"status code: 403 Forbidden: {body}\n\nDebug source: hush-hush"
    assert say(ValueError(text)) == "HTTP 403, SignatureDoesNotMatch"
    assert "hush" not in say(ValueError("status code: 403 Forbidden: <p>hush-hush</p>\nhush-hush"))


# -- what is there, for a person -------------------------------------------------------------------


@pytest.fixture
def filled(server: ScriptedS3, opened: OpenHere, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket with three chunks of one rank and one of another, and other things."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    opened().write(pieces_of(1, 2, 3), TIMEOUT)
    arena = Arena(1, OBJECT)
    fill(arena.buffers[0], 1, shard=1)
    tenant = replace(TENANT, rank=1, shard=1)
    opened(tenant).write([Piece(key(1), 0, arena.buffers[0])], TIMEOUT)
    text = key(1).hex()
    for name in ("kv/readme", f"kv/{NAMESPACE}/zz/{text}.0", f"other/{NAMESPACE}/{text[:2]}/x.0"):
        server.objects[name] = b"not Lamina's"
    return "s3://bucket/kv/"


def test_inspect_says_what_is_there(filled: str) -> None:
    with closing(open_audit(filled)) as audit:
        assert audit.place == "s3://bucket/kv"
        parts = audit.parts()
    assert [(part.namespace, part.shard, part.chunks, part.size) for part in parts] == [
        (NAMESPACE, 0, 3, 3 * OBJECT),
        (NAMESPACE, 1, 1, OBJECT),
    ]
    assert parts[0].description == TENANT.description
    assert parts[0].oldest == parts[0].newest > 0


def test_verify_names_what_is_damaged(server: ScriptedS3, filled: str) -> None:
    with closing(open_audit(filled)) as audit:
        assert [*audit.check()] == [(OBJECT, [])] * 4
        (name,) = [each for each in server.objects if each.endswith(f"{key(2).hex()}.0")]
        content = server.objects[name]
        server.objects[name] = content[:100] + b"\0\0\0" + content[103:]
        damage = [line for _, lines in audit.check() for line in lines]
        assert len(damage) == 1
        assert key(2).hex() in damage[0]
        assert NAMESPACE in damage[0]


def test_who_may_not_look_is_told(server: ScriptedS3, filled: str) -> None:
    server.faults["LIST"] = Fault(403, "AccessDenied")
    with pytest.raises(StoreError, match=r"^s3://bucket/kv: .*AccessDenied.*AWS_REGION"):
        open_audit(filled).parts()


def test_a_configured_bucket_is_looked_into_as_engines_reach_it(
    server: ScriptedS3, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its endpoint is in the configuration and nowhere else."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    options = {"endpoint": server.endpoint, "region": "here"}
    tiers = [S3Config(name="cold", url=filled, options=options)]
    for place in ("cold", filled, f"{filled}/"):
        with closing(open_audit(place, tiers)) as audit:
            assert sum(part.chunks or 0 for part in audit.parts()) == 4
            assert [*audit.check()] == [(OBJECT, [])] * 4


def test_an_option_of_a_configured_bucket_that_is_wrong_is_named() -> None:
    tiers = [S3Config(name="cold", url="s3://bucket", options={"nonsense": "x"})]
    with pytest.raises(StoreError, match="nonsense"):
        open_audit("cold", tiers)


def test_a_place_that_is_no_bucket() -> None:
    with pytest.raises(StoreError, match="without credentials"):
        open_audit("s3://id:hush@bucket")
