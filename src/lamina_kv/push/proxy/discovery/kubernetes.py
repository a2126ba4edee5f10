"""Engines behind a Service of Kubernetes, by its plain API: EndpointSlices are listed and watched.

The pod needs a service account that may get, list and watch ``endpointslices`` of
``discovery.k8s.io`` in the Service's namespace.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec

from lamina_kv.push.addresses import join_address
from lamina_kv.push.proxy.discovery.places import Found, Place, SourceError
from lamina_kv.push.proxy.engines import Role

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts the token, the namespace and the authority's certificate of a pod."""
REST = 0.5
"""Seconds from the end of a watch until the slices are listed anew."""
_WATCH_SECONDS = 300
"""How long the API is to keep one watch; then the slices are listed anew."""
_SILENCE = 30.0
"""Seconds that the API may take to answer, or to go on with what it has begun."""
_LINE = 8 << 20
"""Bytes of an event of a watch, at most. A slice has 1,000 endpoints at most."""


class _Conditions(msgspec.Struct):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Endpoint(msgspec.Struct):
    addresses: list[str]
    conditions: _Conditions = msgspec.field(default_factory=_Conditions)


class _Port(msgspec.Struct):
    port: int | None = None
    name: str | None = None


class _Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    resource_version: str = ""


class _Slice(msgspec.Struct, rename="camel"):
    metadata: _Metadata
    address_type: str = ""
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


class _List(msgspec.Struct):
    metadata: _Metadata
    items: list[_Slice] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _ApiError(Exception):
    """The API has not answered as it should. Says what it did."""


_FAILURES = (_ApiError, OSError, aiohttp.ClientError, msgspec.MsgspecError, ValueError)


@dataclass(frozen=True, slots=True)
class Api:
    """The API as a pod reaches it.

    Attributes:
        url: of its server; empty outside of a cluster.
        account: folder of the service account.
        rest: seconds from the end of a watch until the slices are listed anew.
    """

    url: str
    account: Path = ACCOUNT
    rest: float = REST

    @classmethod
    def of_this_pod(cls) -> Api:
        """As the environment of a pod says."""
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        return cls(f"https://{join_address(host, int(port))}" if host else "")

    def read(self, name: str) -> str:
        """A file of the service account: its token is changed every hour.

        Raises:
            _ApiError: if there is none.
        """
        try:
            return (self.account / name).read_text().strip()
        except OSError as error:
            raise _ApiError(f"{error.filename}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class PodPort:
    """How a pod's engine is reached.

    Attributes:
        port: of its server: a number, or the name that it has in the Service.
        scheme: of its URL.
        push_port: of its ``push.listen``; None for a decode engine.
    """

    port: int | str
    scheme: str = "http"
    push_port: int | None = None


@dataclass(frozen=True, slots=True)
class KubernetesService:
    """The pods of a Service.

    Attributes:
        role: of all of them.
        service: its name.
        namespace: empty for the proxy's own.
        port: how each is reached.
        api: where the API is.
    """

    role: Role
    service: str
    namespace: str
    port: PodPort
    api: Api = field(default_factory=Api.of_this_pod)

    async def watch(self, found: Found) -> None:
        """See :class:`Source`. A pod that is terminating is drained; one that is not ready, or not
        in the Service any more, is not known."""
        try:
            while True:
                namespace = self.namespace or self.api.read("namespace")
                async with self._client() as client:
                    async for slices in self._slices(client, namespace):
                        found(tuple(self._places(slices, namespace)))
                await asyncio.sleep(self.api.rest)
        except _FAILURES as error:
            reason = f"{type(error).__name__} {error}".lstrip("_").rstrip()
            raise SourceError(f"Service {self.service}: {reason}") from error

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[aiohttp.ClientSession]:
        if not self.api.url:
            raise _ApiError("KUBERNETES_SERVICE_HOST is not set: this is no pod")
        verify: ssl.SSLContext | bool = True
        if self.api.url.startswith("https:"):
            verify = ssl.create_default_context(cadata=self.api.read("ca.crt"))
        async with aiohttp.ClientSession(
            self.api.url,
            connector=aiohttp.TCPConnector(ssl=verify),
            headers={"authorization": f"Bearer {self.api.read('token')}"},
            timeout=_patience(_SILENCE),
            read_bufsize=_LINE,
        ) as client:
            yield client

    async def _slices(
        self, client: aiohttp.ClientSession, namespace: str
    ) -> AsyncIterator[list[_Slice]]:
        """All slices of the Service, again whenever one changes; ends with the watch."""
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        selector = {"labelSelector": f"kubernetes.io/service-name={self.service}"}
        async with client.get(path, params=selector, allow_redirects=False) as answer:
            if answer.status != 200:
                raise _ApiError(f"GET {path}: status {answer.status}")
            listed = msgspec.json.decode(await answer.read(), type=_List)
        slices = {each.metadata.name: each for each in listed.items or ()}
        yield [*slices.values()]
        watch = {
            **selector,
            "watch": "1",
            "resourceVersion": listed.metadata.resource_version,
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        # Nothing comes for as long as nothing changes.
        timeout = _patience(_WATCH_SECONDS + _SILENCE)
        async with client.get(path, params=watch, timeout=timeout, allow_redirects=False) as events:
            if events.status != 200:
                raise _ApiError(f"GET {path} as a watch: status {events.status}")
            async for line in events.content:
                if not line.strip():
                    continue
                event = msgspec.json.decode(line, type=_Event)
                if event.type == "ERROR":  # what was listed is too old: list it again
                    return
                if event.type == "BOOKMARK":
                    continue
                each = msgspec.json.decode(event.object, type=_Slice)
                if event.type == "DELETED":
                    slices.pop(each.metadata.name, None)
                else:
                    slices[each.metadata.name] = each
                yield [*slices.values()]

    def _places(self, slices: list[_Slice], namespace: str) -> Iterator[Place]:
        # A Service of two families has two slices of the same pods.
        four = any(each.address_type == "IPv4" and each.endpoints for each in slices)
        for each in slices:
            port = self._port(each)
            if port is None or (four and each.address_type == "IPv6"):
                continue
            for endpoint in each.endpoints or ():
                conditions = endpoint.conditions
                # Both mean yes if they are not said.
                ready = conditions.ready is not False
                leaving = conditions.terminating is True and conditions.serving is not False
                if ready or leaving:
                    push = self.port.push_port
                    host = endpoint.addresses[0]
                    yield Place(
                        self.role,
                        f"{self.port.scheme}://{join_address(host, port)}",
                        join_address(host, push) if push is not None else "",
                        f"{self.service}.{namespace}.svc" if self.port.scheme == "https" else "",
                        drain=leaving,
                    )

    def _port(self, each: _Slice) -> int | None:
        if isinstance(self.port.port, int):
            return self.port.port
        ports = (port.port for port in each.ports or () if port.name == self.port.port)
        return next(ports, None)


def _patience(read: float) -> aiohttp.ClientTimeout:
    """Seconds between two pieces of an answer; those for a connection are the same for all."""
    return aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=read)
