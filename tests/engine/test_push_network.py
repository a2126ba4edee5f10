"""A network between prefill and decode that stops to carry anything for a while: the decode engine
computes itself, what arrives late harms nothing, all blocks come back, and then pushes go well.

Two namespaces, joined by a bridge in a third one from which a cable is drawn.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.driver import Ask, EngineSpec, Fleet, Start, differences
from engine.faults import namespace
from engine.pair import HURRIED, QUICK, Pair
from engine.test_push import SMALL_STEPS
from engine.workload import mixed_prompts, prompt

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CUT_SECONDS = 15.0
"""More than TCP bears here (see :data:`lamina_kv.push.transports.nixl.SETTINGS`)."""
PORT = 7000
TCP = {
    "UCX_TLS": "tcp",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}


class Cables:
    """The three namespaces; one cable leads to each engine."""

    def __init__(self) -> None:
        first = 10 * os.getpid()
        self.numbers = (first, first + 1)
        self.addresses = ("192.0.2.1", "192.0.2.2")
        self._bridge = namespace(first + 2)

    def lay(self) -> None:
        ip("netns", "add", self._bridge)
        ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._bridge, "link", "set", "bridge", "up")
        for index, (number, address) in enumerate(zip(self.numbers, self.addresses, strict=True)):
            name, port = namespace(number), f"port{index}"
            ip("netns", "add", name)
            peer = ("peer", "name", "wire", "netns", name)
            ip("-n", self._bridge, "link", "add", port, "type", "veth", *peer)
            ip("-n", self._bridge, "link", "set", port, "master", "bridge", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")

    def cut(self) -> None:
        """Nothing gets through, and nobody is told."""
        ip("-n", self._bridge, "link", "set", "port0", "nomaster")

    def heal(self) -> None:
        ip("-n", self._bridge, "link", "set", "port0", "master", "bridge")

    def remove(self) -> None:
        for number in (*self.numbers, self.numbers[0] + 2):
            subprocess.run(("ip", "netns", "delete", namespace(number)), check=False)


def ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True)


@pytest.fixture
def cables() -> Iterator[Cables]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root, and the command ip")
    cables = Cables()
    try:
        cables.lay()
    except subprocess.CalledProcessError as error:
        cables.remove()
        pytest.skip(f"no network namespaces here: {error.stderr}")
    yield cables
    cables.remove()


@pytest.mark.parametrize("steps", [1, pytest.param(4, marks=pytest.mark.soak)])
def test_a_network_that_stalls(
    llama: Path, fleet: Fleet, start: Start, cables: Cables, steps: int
) -> None:
    alone = fleet.get(EngineSpec(llama, options=SMALL_STEPS))
    address = f"{cables.addresses[0]}:{PORT}"
    breaker = {"failures": 1000}
    sides = [{**QUICK, "listen": address}, QUICK]
    prefill, decode = (
        start(
            EngineSpec(
                llama,
                {"host": {"capacity": "64MiB"}, "push": push, "breaker": breaker},
                SMALL_STEPS,
                environment=TCP,
                faults={"network": number, **HURRIED},
            )
        )
        for push, number in zip(sides, cables.numbers, strict=True)
    )
    pair = Pair(prefill, decode, address)
    ask = Ask(prompt(900, 1800))
    others = [Ask(tokens) for tokens in mixed_prompts(91, count=8)]
    expected = alone.generate(others)
    (right,) = alone.generate([ask])
    assert not differences(pair.push(others), expected)
    pair.settle()
    received = pair.pushes(decode, "received")
    assert received >= len(others) - 2

    pushes = [pair.name_push()]
    names = pair.submit_decode([ask], pushes)
    pair.step(decode)
    pair.submit_prefill([ask], pushes)
    for _ in range(steps):
        pair.step()
    cables.cut()
    end = time.monotonic() + CUT_SECONDS
    assert not differences(pair.finish(names), [right])
    while time.monotonic() < end:
        assert not differences(decode.generate(others), expected)
        assert not differences(prefill.generate(others), expected)
        time.sleep(0.2)
    cables.heal()
    assert pair.pushes(decode, "given_up") == 1
    pair.settle()

    for engine in (prefill, decode):
        assert not differences(engine.generate(others), expected)
    pair.forget_all()
    assert not differences(pair.push([*others, ask]), [*expected, right])
    pair.settle()
    assert pair.pushes(decode, "received") >= 2 * received
