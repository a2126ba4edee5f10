"""Engines that a router believes in, without a server behind them."""

from __future__ import annotations

import asyncio

import msgspec

from lamina_kv.push.proxy.engines import Engine, Role
from lamina_kv.push.proxy.metrics import Metrics
from lamina_kv.push.proxy.requests import ApiRequest, parse_fields
from lamina_kv.push.proxy.routing.prompt import Prompt
from lamina_kv.push.proxy.routing.router import Router
from lamina_kv.push.proxy.routing.words import Disaggregate, RoutingPolicy
from lamina_kv.push.proxy.settings import PrefillAddress, Settings


class Clock:
    """One that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Pools:
    """Prefill and decode engines, all healthy, and a router in front of them.

    Args:
        policy: the router's.
        mode: which prompts are pushed.
        prefill: how many prefill engines.
        decode: how many decode engines.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        mode: Disaggregate = Disaggregate.AUTO,
        *,
        prefill: int = 2,
        decode: int = 2,
    ) -> None:
        self.clock = Clock()
        places = tuple(PrefillAddress(f"http://p{n}:1", f"p{n}:7000") for n in range(prefill))
        urls = tuple(f"http://d{n}:1" for n in range(decode))
        settings = Settings(prefill=places, decode=urls)
        self.prefill = [
            Engine(Role.PREFILL, place.url, place.push, settings, self.clock) for place in places
        ]
        self.decode = [Engine(Role.DECODE, url, "", settings, self.clock) for url in urls]
        for engine in (*self.prefill, *self.decode):
            engine.healthy = True
        self.metrics = Metrics([*self.prefill, *self.decode])
        self.router = Router(policy, mode, self.metrics, self.clock)

    def read(self, asked: ApiRequest) -> Prompt:
        """What the router knows of a request."""
        return asyncio.run(self.router.read(asked, self.decode))


def completion(prompt: object, **fields: object) -> ApiRequest:
    """A request for a completion."""
    return request({"model": "m", "prompt": prompt, **fields})


def chat(*messages: tuple[str, object], **fields: object) -> ApiRequest:
    """A request for the next message of a conversation."""
    said = [{"role": role, "content": content} for role, content in messages]
    return request({"model": "m", "messages": said, **fields})


def request(body: object, **headers: str) -> ApiRequest:
    """Any request for which there is a body."""
    raw = msgspec.json.encode(body)
    path = b"/v1/chat/completions" if b'"messages"' in raw else b"/v1/completions"
    return ApiRequest("id", "POST", path, dict(headers), parse_fields(raw), len(raw))
