"""Guards where the proxy finds engines: what may stand in the file and what is wrong with it, names
of DNS, Services of Kubernetes, and that nothing that goes wrong there loses an engine."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from documented import blocks
from lamina_kv.push.proxy.discovery.kubernetes import Api, KubernetesService, PodPort
from lamina_kv.push.proxy.discovery.listing import read_listing
from lamina_kv.push.proxy.discovery.names import Names
from lamina_kv.push.proxy.discovery.places import Found, Place, Source, SourceError
from lamina_kv.push.proxy.discovery.watch import Discovery, follow
from lamina_kv.push.proxy.engines import Role
from lamina_kv.push.proxy.settings import SettingsError
from push_proxy.kubernetes import KubernetesApi, endpoint_slice
from push_proxy.running import PATIENCE

Places = tuple[Place, ...]


class Seen:
    """What a source has said."""

    def __init__(self) -> None:
        self.all: list[Places] = []
        self._changed = asyncio.Event()

    def __call__(self, places: Places) -> None:
        self.all.append(places)
        self._changed.set()

    async def wait(self, right: Callable[[Places], bool]) -> Places:
        async with asyncio.timeout(PATIENCE):
            while not self.all or not right(self.all[-1]):
                self._changed.clear()
                await self._changed.wait()
        return self.all[-1]

    async def urls(self, *urls: str) -> Places:
        return await self.wait(lambda places: sorted(p.url for p in places) == sorted(urls))


@asynccontextmanager
async def watching(source: Source) -> AsyncIterator[Seen]:
    seen = Seen()
    task = asyncio.create_task(follow(source, seen, 0.02))
    try:
        yield seen
        assert not task.done(), task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})


# -- the file ----------------------------------------------------------------------------------

BAD_HOST = "decode: [http://a, http://10.0.0.300:8000]"
FULL = """
prefill:
  - {url: http://10.0.0.1:8000/v1, push: "10.0.0.1:9300"}
  - {url: http://10.0.0.2:8000, push: "10.0.0.2:9300", drain: true}
  - {dns: http://prefill.example:8000, push_port: 9400}
  - {kubernetes: {service: lamina-prefill, namespace: serving, port: http}, push_port: 9500}
decode:
  - http://10.0.0.3:8000
  - {url: "http://[::1]:8000"}
  - {dns: https://decode.example/base}
  - {kubernetes: {service: lamina-decode, port: 8000, scheme: https}}
"""


def test_all_that_a_file_may_say() -> None:
    listing = read_listing(FULL)
    assert [(p.role, p.url, p.push, p.drain) for p in listing.places] == [
        (Role.PREFILL, "http://10.0.0.1:8000", "10.0.0.1:9300", False),
        (Role.PREFILL, "http://10.0.0.2:8000", "10.0.0.2:9300", True),
        (Role.DECODE, "http://10.0.0.3:8000", "", False),
        (Role.DECODE, "http://[::1]:8000", "", False),
    ]
    assert listing.sources == {
        Names(Role.PREFILL, "http", "prefill.example", 8000, "", 9400),
        Names(Role.DECODE, "https", "decode.example", 443, "/base"),
        KubernetesService(Role.PREFILL, "lamina-prefill", "serving", PodPort("http", "http", 9500)),
        KubernetesService(Role.DECODE, "lamina-decode", "", PodPort(8000, "https")),
    }


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_a_name_without_a_port_is_asked_at_its_scheme_s(scheme: str, port: int) -> None:
    listing = read_listing(f"decode: [{{dns: '{scheme}://decode.example'}}]")
    assert listing.sources == {Names(Role.DECODE, scheme, "decode.example", port, "")}


def test_the_file_of_the_documentation() -> None:
    (text,) = blocks("docs/push-proxy.md", "yaml")
    listing = read_listing(text)
    assert (len(listing.places), len(listing.sources)) == (3, 4)
    assert [place.drain for place in listing.places] == [False, False, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("decode: [", "not YAML: "),
        ("decode: 7", "Expected `array`, got `int` - at `$.decode`"),
        ("decoed: []", "unknown field `decoed`"),
        ("[]", "Expected `object`"),
        ("", "names no decode engine"),
        ("decode: []", "names no decode engine"),
        ("decode: [nowhere]", "decode[0]: 'nowhere' is not the URL"),
        ("decode: [http://10.0.0.300:8000]", "decode[0]: 'http://10.0.0.300:8000' is not a URL"),
        ('decode: ["http://10.0.0\u20133:8000"]', "is not a URL"),
        ("decode: [{dns: http://10.0.0.300:8000}]", "decode[0]: 'http://10.0.0.300:8000'"),
        ("decode: [http://d, {}]", "decode[1]: give one of url, dns and kubernetes"),
        ("decode: [{url: http://d, dns: http://e}]", "decode[0]: give one of url"),
        ("decode: [http://d, http://d]", "http://d is given twice"),
        ("decode: [{url: http://d, push: 'd:1'}]", "decode[0]: a decode engine has no push"),
        ("decode: [{dns: d}]", "decode[0]: 'd' is not the URL"),
        ("decode: [{dns: http://d, drain: true}]", "decode[0]: drain is for one engine"),
        ("decode: [{kubernetes: {}}]", "missing required field `service`"),
        ("decode: [{kubernetes: {service: a, scheme: ftp}}]", "scheme is 'ftp'"),
        ("decode: [http://d]\nprefill: [http://p]", "prefill[0]: '' is not a push address"),
        (
            "decode: [http://d]\nprefill: [{url: http://p, push: '0.0.0.0:1'}]",
            "prefill[0]: '0.0.0.0:1' is no place",
        ),
        (
            "decode: [http://d]\nprefill: [{dns: http://p, push_port: 70000}]",
            "prefill[0]: push_port is 70000",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as wrong:
        read_listing(text)
    assert said in str(wrong.value)


def test_a_file_that_changes_is_read_again_and_a_bad_one_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lamina_kv.push.proxy")
    file = tmp_path / "engines.yaml"
    file.write_text("decode: [http://a]")

    async def scenario() -> None:
        seen = Seen()
        discovery = Discovery(file, 0.02)
        running = asyncio.create_task(discovery.run(seen))
        await seen.urls("http://a")
        file.write_text("decode: [http://a, http://b]")
        await seen.urls("http://a", "http://b")
        async with asyncio.timeout(PATIENCE):
            for text in ("decode: [http://a, nowhere]", BAD_HOST, "", "decode: ["):
                file.write_text(text)
                count = len(caplog.records)
                while len(caplog.records) == count:
                    await asyncio.sleep(0.01)
            file.unlink()
            while "No such file" not in caplog.text:
                await asyncio.sleep(0.01)
        assert [place.url for place in seen.all[-1]] == ["http://a", "http://b"]
        file.write_text("decode: [{url: http://b, drain: true}]")
        (place,) = await seen.urls("http://b")
        assert place.drain
        running.cancel()
        await asyncio.wait({running})

    asyncio.run(scenario())
    messages = [record.getMessage() for record in caplog.records]
    assert f"--engines: {file}: decode[1]: 'nowhere' is not the URL" in messages[0]
    assert all("The engines stay as they were: mend the file" in line for line in messages)
    assert len(messages) == len(set(messages)), "each is said once"


def test_a_file_that_is_half_written_loses_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rests = tmp_path / "engines.yaml", []
    half, rest = "decode:\n- http://b\n", "- http://c\n"
    file.write_text("decode:\n- http://a\n")
    discovery = Discovery(file, 0.02)

    async def meanwhile_written(seconds: float) -> None:
        rests.append(seconds)
        file.write_text(half + rest)

    monkeypatch.setattr(asyncio, "sleep", meanwhile_written)
    file.write_text(half)
    assert not asyncio.run(discovery._reread())
    assert [place.url for place in discovery.places] == ["http://a"]
    assert asyncio.run(discovery._reread())
    assert [place.url for place in discovery.places] == ["http://b", "http://c"]
    assert min(rests) > 0, "there is time to write the rest"


def test_what_the_file_says_of_an_engine_goes_before_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "engines.yaml"
    found = "{dns: http://decode.example:8000}"
    file.write_text(f"decode: [{found}]")
    resolve(monkeypatch, {"decode.example": ["10.0.0.1", "10.0.0.2"]})

    async def scenario() -> None:
        seen = Seen()
        discovery = Discovery(file, 0.02)
        running = asyncio.create_task(discovery.run(seen))
        both = ("http://10.0.0.1:8000", "http://10.0.0.2:8000")
        places = await seen.urls(*both)
        assert discovery.settled.is_set()
        assert not any(place.drain for place in places)
        file.write_text(f"decode: [{found}, {{url: 'http://10.0.0.2:8000', drain: true}}]")
        drained = await seen.wait(lambda places: any(place.drain for place in places))
        assert sorted((place.url, place.drain) for place in drained) == [
            (both[0], False),
            (both[1], True),
        ]
        file.write_text("decode: [http://10.0.0.9:8000]")
        await seen.urls("http://10.0.0.9:8000")
        running.cancel()
        await asyncio.wait({running})

    asyncio.run(scenario())


def test_what_fails_unforeseen_is_said_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "engines.yaml"
    file.write_text("decode: [http://a, {dns: http://decode.example:8000}]")
    watches, reports = count(), count()

    async def look(_: Names, found: Found) -> None:
        if next(watches) == 0:
            raise IndexError("an odd answer")
        found((Place(Role.DECODE, "http://b"),))
        await asyncio.Event().wait()

    monkeypatch.setattr(Names, "watch", look)

    async def scenario() -> None:
        seen = Seen()

        def found(places: Places) -> None:
            if next(reports) == 0:
                raise RuntimeError("an odd place")
            seen(places)

        running = asyncio.create_task(Discovery(file, 0.02, pause=0.01).run(found))
        await seen.urls("http://a", "http://b")
        running.cancel()
        await asyncio.wait({running})

    asyncio.run(scenario())
    assert "an odd answer" in caplog.text
    assert "an odd place" in caplog.text


def test_engines_stay_until_the_source_that_replaces_theirs_has_said_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "engines.yaml"

    async def scenario() -> None:
        ready = {"old": asyncio.Event(), "new": asyncio.Event(), "other": asyncio.Event()}
        ready["old"].set()

        async def look(source: Names, found: Found) -> None:
            await ready[source.host].wait()
            found((Place(source.role, f"http://found-by-{source.host}"),))
            await asyncio.Event().wait()

        monkeypatch.setattr(Names, "watch", look)

        def write(*entries: str) -> None:
            file.write_text(f"decode: [{', '.join(entries)}]")

        write("{dns: http://old}")
        seen = Seen()
        running = asyncio.create_task(Discovery(file, 0.02).run(seen))
        await seen.urls("http://found-by-old")
        write("{dns: http://new}", "http://a")
        await seen.urls("http://found-by-old", "http://a")
        write("{dns: http://other}", "http://b")
        await seen.urls("http://found-by-old", "http://b")
        ready["other"].set()
        await seen.urls("http://found-by-other", "http://b")
        write("http://b")
        await seen.urls("http://b")
        running.cancel()
        await asyncio.wait({running})

    asyncio.run(scenario())


class Moody:
    """A source in which something else is wrong each time."""

    role = Role.DECODE

    def __init__(self, *moods: Exception | None) -> None:
        self._moods = iter(moods)
        self.over = asyncio.Event()

    async def watch(self, found: Found) -> None:
        for mood in self._moods:
            if mood is not None:
                raise mood
            found(())
        self.over.set()
        await asyncio.Event().wait()


def test_what_is_wrong_with_a_source_is_said_when_it_is_news(
    caplog: pytest.LogCaptureFixture,
) -> None:
    moods = (
        *(SourceError("first"), SourceError("first"), SourceError("second")),
        *(IndexError("odd"), IndexError("odd"), SourceError("second")),
        *(None, SourceError("second")),
    )

    async def scenario() -> None:
        source = Moody(*moods)
        task = asyncio.create_task(follow(source, lambda _: None, 0.0))
        async with asyncio.timeout(PATIENCE):
            await source.over.wait()
        task.cancel()

    asyncio.run(scenario())
    said = [record.getMessage() for record in caplog.records]
    words = ("first", "second", "begins anew")
    assert [next(word for word in words if word in line) for line in said] == [
        "first",
        "second",
        "begins anew",
        "second",
        "second",
    ]
    assert said[0] == "decode engines: first. Those that are known stay"


# -- DNS ---------------------------------------------------------------------------------------


def resolve(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> None:
    """What the system's resolver says from now on."""

    def look_up(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if not names.get(host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_each_address_of_a_name_is_an_engine_and_of_two_families_one_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"prefill.example": ["10.0.0.2", "10.0.0.1", "fd00::1"]}
    resolve(monkeypatch, names)
    source = Names(Role.PREFILL, "https", "prefill.example", 8000, "/base", 9300, interval=0.02)

    async def scenario() -> None:
        async with watching(source) as seen:
            places = await seen.wait(lambda places: len(places) == 2)
            assert places[0] == Place(
                Role.PREFILL, "https://10.0.0.1:8000/base", "10.0.0.1:9300", "prefill.example"
            )
            names["prefill.example"] = ["fd00::1"]
            (place,) = await seen.urls("https://[fd00::1]:8000/base")
            assert place.push == "[fd00::1]:9300"
            names["prefill.example"] = ["10.0.0.1"]
            await seen.urls("https://10.0.0.1:8000/base")
            names["prefill.example"] = []
            async with asyncio.timeout(PATIENCE):
                while not caplog.records:
                    await asyncio.sleep(0.01)
            names["prefill.example"] = ["10.0.0.3"]
            await seen.urls("https://10.0.0.3:8000/base")
            assert all(seen.all), "an engine is not lost when names cannot be looked up"

    asyncio.run(scenario())
    (line,) = (record.getMessage() for record in caplog.records)
    assert "prefill.example cannot be looked up" in line


# -- Kubernetes --------------------------------------------------------------------------------


def service(api: Api, **port: Any) -> KubernetesService:
    return KubernetesService(
        Role.PREFILL,
        "lamina-prefill",
        "",
        PodPort(**{"port": "http", "push_port": 9300, **port}),
        api,
    )


def test_the_pods_of_a_service_are_listed_and_watched(tmp_path: Path) -> None:
    with KubernetesApi(tmp_path / "account") as kubernetes:
        kubernetes.slices["a"] = endpoint_slice("a", "10.0.0.1", "10.0.0.2", ready=True)
        kubernetes.slices["b"] = endpoint_slice("b", "fd00::1", ready=None)

        async def scenario() -> None:
            one, two, six = "http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://[fd00::1]:8000"
            async with watching(service(kubernetes.api)) as seen:
                places = await seen.urls(one, two, six)
                assert {place.push for place in places} == {
                    "10.0.0.1:9300",
                    "10.0.0.2:9300",
                    "[fd00::1]:9300",
                }
                await asyncio.to_thread(kubernetes.watched)
                terminating = {"ready": False, "serving": True, "terminating": True}
                starting = {"ready": False, "serving": False, "terminating": False}
                for change in (
                    endpoint_slice("b", "fd00::1", **terminating),
                    endpoint_slice("c", "10.0.0.3", **starting),
                ):
                    await asyncio.to_thread(kubernetes.set, change)
                places = await seen.wait(lambda places: any(place.drain for place in places))
                assert {(place.url, place.drain) for place in places} == {
                    (one, False),
                    (two, False),
                    (six, True),
                }
                await asyncio.to_thread(kubernetes.delete, "b")
                await seen.urls(one, two)
                ready = endpoint_slice("c", "10.0.0.3", ready=True)
                await asyncio.to_thread(kubernetes.set, ready)
                await seen.urls(one, two, "http://10.0.0.3:8000")

        asyncio.run(scenario())
    path, query = kubernetes.asked[0]
    assert path == "/apis/discovery.k8s.io/v1/namespaces/serving/endpointslices"
    assert query == {"labelSelector": ["kubernetes.io/service-name=lamina-prefill"]}
    assert kubernetes.asked[1][1]["resourceVersion"] == ["7"]
    assert {*kubernetes.tokens} == {"Bearer pod-token"}


def test_a_pod_with_addresses_of_two_families_is_one_engine(tmp_path: Path) -> None:
    with KubernetesApi(tmp_path / "account") as kubernetes:
        six = endpoint_slice("six", "fd00::1", ready=True) | {"addressType": "IPv6"}
        kubernetes.slices = {"six": six, "four": endpoint_slice("four", "10.0.0.1", ready=True)}

        async def scenario() -> None:
            async with watching(service(kubernetes.api)) as seen:
                await seen.urls("http://10.0.0.1:8000")
                await asyncio.to_thread(kubernetes.watched)
                await asyncio.to_thread(kubernetes.delete, "four")
                await seen.urls("http://[fd00::1]:8000")

        asyncio.run(scenario())


@pytest.mark.parametrize("gone", [True, False])
def test_a_watch_that_ends_begins_anew(tmp_path: Path, gone: bool) -> None:
    with KubernetesApi(tmp_path / "account") as kubernetes:
        kubernetes.slices["a"] = endpoint_slice("a", "10.0.0.1", ready=True)

        async def scenario() -> None:
            async with watching(service(kubernetes.api)) as seen:
                await seen.urls("http://10.0.0.1:8000")
                await asyncio.to_thread(kubernetes.watched)
                (tmp_path / "account" / "token").write_text("new-token")
                kubernetes.slices["a"] = endpoint_slice("a", "10.0.0.2", ready=True)
                if gone:  # what was listed is too old to be watched
                    status = {"kind": "Status", "code": 410}
                    await asyncio.to_thread(kubernetes.send, {"type": "ERROR", "object": status})
                else:
                    await asyncio.to_thread(kubernetes.end_watches)
                await seen.urls("http://10.0.0.2:8000")

        asyncio.run(scenario())
    assert "Bearer new-token" in kubernetes.tokens


def test_what_is_known_stays_while_the_api_cannot_be_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with KubernetesApi(tmp_path / "account") as kubernetes:
        kubernetes.slices["a"] = endpoint_slice("a", "10.0.0.1", ready=True)

        async def scenario() -> None:
            async with watching(service(kubernetes.api, port=8001)) as seen:
                await seen.urls("http://10.0.0.1:8001")
                await asyncio.to_thread(kubernetes.watched)
                kubernetes.status = 403
                await asyncio.to_thread(kubernetes.end_watches)
                async with asyncio.timeout(PATIENCE):
                    while "status 403" not in caplog.text:
                        await asyncio.sleep(0.01)
                kubernetes.slices["a"] = endpoint_slice("a", "10.0.0.2", ready=True)
                kubernetes.status = 200
                await seen.urls("http://10.0.0.2:8001")
                assert all(seen.all)

        asyncio.run(scenario())
    assert caplog.text.count("status 403") == 1


@pytest.mark.parametrize("url", ["", "https://10.0.0.1"])
def test_outside_of_a_pod_it_is_said_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    async def scenario() -> None:
        source = KubernetesService(
            Role.DECODE, "lamina-decode", "serving", PodPort(8000), Api(url, tmp_path)
        )
        async with watching(source), asyncio.timeout(PATIENCE):
            while not caplog.records:
                await asyncio.sleep(0.01)

    asyncio.run(scenario())
    (line,) = {record.getMessage() for record in caplog.records}
    missing = "ca.crt: No such file" if url else "KUBERNETES_SERVICE_HOST is not set"
    assert missing in line
