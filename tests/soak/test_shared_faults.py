"""Whatever happens to a shared store while an engine uses it: no wrong token, no request that is
later than its deadline and its own computation, nothing that is not given back, and serving is
never slower than without a cache by more than a twentieth.

The engine is the simulated one, in real time, with Lamina's own planner and data room. The stores
and their servers are real; what cannot be done to them is done by a store that fails on purpose.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lamina_kv.bench.faulty_store import StoreFaults
from lamina_kv.tiers.contract import Fate
from lamina_kv.tiers.directory.sweeper import Limits, sweep
from soak.busy import CLIENTS, DEADLINE, DOCUMENT, QUESTION, TOKEN, Busy
from soak.conftest import Note
from soak.rigs import RIGS, DirectoryRig, Rig

pytestmark = pytest.mark.scaled

REQUESTS = int(os.environ.get("LAMINA_SOAK_SHARED_REQUESTS", "60"))
SLACK = 3.0
"""Seconds of this machine's own that a request may take: it has two cores, and others use them."""
PATIENCE = 60.0

Script = Mapping[float, str | StoreFaults]
"""What happens at which share of the requests: a method of the rig, or what is wrong from then."""

SOME = {Fate.LATE: 0.05, Fate.REFUSED: 0.05, Fate.DOWN: 0.05, Fate.GONE: 0.05, Fate.CORRUPT: 0.05}

INJECTED: dict[str, Script] = {
    "errors": {0.1: StoreFaults(unread=SOME, unwritten={Fate.REFUSED: 0.1, Fate.DOWN: 0.1})},
    "wrong-bytes": {0.1: StoreFaults(wrong=0.2)},
    "vanishing": {0.1: StoreFaults(vanishes=0.2, unkept=0.2)},
    "lies": {0.1: StoreFaults(lies=0.3, unanswered=0.1)},
    "tail": {0.1: StoreFaults(latency=0.001, tail=0.5)},
    "slower-than-computing": {0.1: StoreFaults(bandwidth=300e3)},
    "hangs": {0.1: StoreFaults(hangs=0.05, hang=2.0), 0.7: StoreFaults()},
    "raises": {0.1: StoreFaults(raises=0.3)},
}
"""On every store."""

DONE: dict[str, dict[str, Script]] = {
    "directory": {
        "not-mounted": {0.2: "vanish", 0.6: "come_back"},
        "emptied": {0.3: "empty", 0.6: "empty"},
        "evicting": {share / 20: "evict" for share in range(4, 16)},
        "spoiled": {share / 20: "spoil" for share in range(4, 16)},
        "short": {share / 20: "shorten" for share in range(4, 16)},
    },
    "valkey": {
        "killed": {0.2: "kill", 0.6: "start"},
        "stopped": {0.2: "stop", 0.6: "go_on"},
        "restarted": {0.3: "restart", 0.6: "restart"},
        "full": {0.1: "fill", 0.6: "widen"},
        "evicting": {share / 20: "evict" for share in range(4, 16)},
        "spoiled": {share / 20: "spoil" for share in range(4, 16)},
        "short": {share / 20: "shorten" for share in range(4, 16)},
        "revoked": {0.2: "revoke", 0.6: "admit"},
        "held-back": {0.2: "hold_back", 0.6: "let_pass"},
    },
    "seaweed": {
        "killed": {0.2: "kill", 0.6: "start"},
        "stopped": {0.2: "stop", 0.6: "go_on"},
        "held-back": {0.2: "hold_back", 0.6: "let_pass"},
    },
    "scripted-s3": {
        "overloaded": {0.2: "refuse", 0.6: "admit"},
        "revoked": {0.2: "revoke", 0.6: "admit"},
        "full": {0.1: "fill", 0.6: "admit"},
        "cut": {0.2: "cut", 0.6: "admit"},
        "emptied": {0.3: "empty", 0.6: "empty"},
        "evicting": {share / 20: "evict" for share in range(4, 16)},
        "spoiled": {share / 20: "spoil" for share in range(4, 16)},
        "short": {share / 20: "shorten" for share in range(4, 16)},
    },
    "mooncake": {
        "killed": {0.1: "kill", 0.3: "start", 0.4: "kill", 0.5: "start", 0.6: "kill", 0.8: "start"},
        "stopped": {0.2: "stop", 0.6: "go_on"},
        "donor-lost": {0.2: "lose", 0.6: "find"},
    },
}
"""To a server, or to what it holds."""

QUICK = {("directory", "spoiled"), ("valkey", "killed")}
"""What `make test` runs, too."""


def cases() -> Iterator[Any]:
    for rig, scripts in DONE.items():
        injected = INJECTED if rig != "scripted-s3" else {}
        for name, script in {**scripts, **injected}.items():
            marks = () if (rig, name) in QUICK else (pytest.mark.soak,)
            yield pytest.param(rig, script, id=f"{rig}-{name}", marks=marks)


@pytest.fixture
def rig(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    with RIGS[request.param](tmp_path) as rig:
        for name, value in rig.environment.items():
            monkeypatch.setenv(name, value)
        yield rig


@pytest.fixture(autouse=True)
def nothing_is_held_by_what_was_logged() -> Iterator[None]:
    """What was raised holds on to whoever has raised it, and pytest keeps it."""

    def let_go(record: logging.LogRecord) -> bool:
        record.exc_info = None
        return True

    log = logging.getLogger("lamina_kv.data")
    log.addFilter(let_go)
    yield
    log.removeFilter(let_go)


def play(script: Script, rig: Rig, engine: Busy) -> Callable[[int], None]:
    """What carries out a script as requests are served."""
    left = sorted(script.items())

    def happens(served: int) -> None:
        while left and served >= left[0][0] * REQUESTS:
            what = left.pop(0)[1]
            if isinstance(what, StoreFaults):
                engine.faulty.faults = what
            else:
                getattr(rig, what)()

    return happens


def possessions(rig: Rig) -> Counter[str]:
    """Threads and open files of this process, by what they are; without those of the rig."""
    held = Counter(t.name for t in threading.enumerate() if t.name.startswith("lamina"))
    if not rig.serves_here:
        held["threads"] = len(os.listdir("/proc/self/task"))
    with os.scandir("/proc/self/fd") as links:
        for link in links:
            with suppress(FileNotFoundError):  # it was closed meanwhile
                what = os.readlink(link.path)
                if not any(what.startswith(kind) for kind in rig.files):
                    held[what] += 1
    return held


def use_a_little(rig: Rig, tmp_path: Path) -> None:
    """Client libraries start threads for good when they are first used."""
    with Busy(0, rig.entry, tmp_path) as engine:
        engine.serve(CLIENTS)
        engine.drain()


def live_through(rig: Rig, script: Script, tmp_path: Path) -> str:
    """An engine serves while a script is carried out. Returns how it went.

    Raises:
        Violation: if a promise was broken.
    """
    with Busy(1, rig.entry, tmp_path) as engine:
        engine.serve(REQUESTS, play(script, rig, engine))
        engine.drain()
        account = engine.account()
    check(engine)
    return account


def check(engine: Busy) -> None:
    """Nobody has waited too long, and all together no longer than without a cache."""
    alone = (DOCUMENT + QUESTION) * TOKEN
    assert engine.slowest < DEADLINE + 2 * CLIENTS * alone + SLACK
    engine.check_pace()


def check_possessions(rig: Rig, before: Counter[str]) -> None:
    """No thread and no file is left of engines that have ended."""
    due = time.monotonic() + PATIENCE
    while True:
        gc.collect()  # what is mapped is open until then
        more = possessions(rig) - before
        more["threads"] -= rig.threads
        if not +more:
            return
        assert time.monotonic() < due, more
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("rig", "script"), [*cases()], indirect=["rig"])
def test_whatever_happens_to_a_store(
    rig: Rig,
    script: Script,
    tmp_path: Path,
    note: Note,
    request: pytest.FixtureRequest,
) -> None:
    use_a_little(rig, tmp_path)
    gc.collect()
    before = possessions(rig)
    note(request.node.callspec.id, live_through(rig, script, tmp_path))
    check_possessions(rig, before)


@pytest.mark.parametrize(
    "rig",
    [
        "directory",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("valkey", "seaweed", "mooncake")),
    ],
    indirect=True,
)
def test_two_engines_that_write_the_same_chunks(rig: Rig, tmp_path: Path, note: Note) -> None:
    """Both compute the same documents at the same time, and each reads what the other has
    written."""
    use_a_little(rig, tmp_path)
    gc.collect()
    before = possessions(rig)
    note(f"two writers of {rig.entry['kind']}", live_side_by_side(rig, tmp_path))
    check_possessions(rig, before)


def live_side_by_side(rig: Rig, tmp_path: Path) -> str:
    """Two engines serve at the same time. Returns how it went."""
    with Busy(1, rig.entry, tmp_path) as one, Busy(2, rig.entry, tmp_path) as other:
        engines = one, other
        with ThreadPoolExecutor(len(engines)) as pool:
            list(pool.map(lambda engine: engine.serve(REQUESTS // 2), engines))
        for engine in engines:
            engine.drain()
        account = "; ".join(engine.account() for engine in engines)
    for engine in engines:
        check(engine)
        assert not engine.failures.keys() & {"fetch_corrupt", "fetch_gone"}
    return account


@pytest.mark.parametrize("rig", ["directory"], indirect=True)
@pytest.mark.soak
def test_a_sweeper_that_never_rests(rig: DirectoryRig, tmp_path: Path, note: Note) -> None:
    """What it deletes while it is read is gone, and nothing else happens."""
    swept, over = Counter[str](), threading.Event()

    def sweep_all_the_time() -> None:
        while not over.wait(0.01):
            # An hour later: nothing is too young to go.
            found = sweep(rig.root, Limits(capacity=80 * 4096), time.time() + 3600, lambda: None)
            swept["chunks"] += found.freed

    with Busy(1, rig.entry, tmp_path) as engine, ThreadPoolExecutor(1) as pool:
        sweeping = pool.submit(sweep_all_the_time)
        engine.serve(REQUESTS)
        over.set()
        sweeping.result()
        engine.drain()
        note("a sweeper against readers", f"{swept['chunks']} swept; {engine.account()}")
    check(engine)
    assert swept["chunks"] > 0
    assert "fetch_corrupt" not in engine.failures
