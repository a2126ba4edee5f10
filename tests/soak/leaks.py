"""Thousands of requests on one real engine, and what it still holds when they are gone.

Runs in a child that was forked from a process with vLLM in it, like :mod:`engine.child`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from engine.driver import Ask, EngineSpec, enter_child
from engine.workload import CHUNK, random_tokens

ACTIVE = 24
"""Requests that the engine has at a time."""
DOCUMENTS = 40
"""That prompts begin with: more than both tiers hold."""
LONGEST = 6 * CHUNK
LEAVING = 0.16
"""Of requests that are not to wait for their end; some have it before they leave."""


@dataclass(frozen=True)
class Census:
    """What there is when nothing is under way.

    Attributes:
        requests: served so far.
        held: leases, transfers, records and the like, by name; each must be 0.
        threads: of the process.
        files: open file descriptors.
        shared: shared memory that is mapped or open, by name.
        objects: living objects of Lamina's classes, by class.
        memory: resident bytes.
        blocks: pieces of memory that Python has given out.
    """

    requests: int
    held: dict[str, float]
    threads: int
    files: int
    shared: frozenset[str]
    objects: Counter[str]
    memory: int
    blocks: int


@dataclass(frozen=True)
class Account:
    """How it went.

    Attributes:
        censuses: taken now and then, the first after the warm-up.
        aborted: requests.
        metrics: totals of what was published, by name.
    """

    censuses: tuple[Census, ...] = ()
    aborted: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def run(
    pipe: Connection,
    spec: EngineSpec,
    log: Path,
    seed: int,
    *,
    warm_up: int,
    requests: int,
    every: int,
) -> None:
    """The child: serve ``warm_up`` requests, then ``requests`` more with a census before, after and
    each time that ``every`` are over, and answer with whether that went well, and an
    :class:`Account` or a traceback.
    """
    enter_child(log)
    try:
        from engine import child

        os.environ.update({**child.ENVIRONMENT, **spec.environment})
        crowd = Crowd(child.Service(spec), Random(seed))
        crowd.serve(warm_up)
        censuses = [crowd.census()]
        for _ in range(requests // every):
            crowd.serve(every)
            censuses.append(crowd.census())
        account = Account(tuple(censuses), crowd.aborted, crowd.metrics())
        pipe.send((True, account))
        crowd.close()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise


class Crowd:
    """Clients that come and go, some before they were served.

    Args:
        service: the engine, a :class:`engine.child.Service`.
        random: decides what they want.

    Attributes:
        aborted: requests given up so far.
    """

    def __init__(self, service: object, random: Random) -> None:
        self.aborted = 0
        self._service = service
        self._random = random
        self._served = 0
        self._documents = [random_tokens(random, LONGEST) for _ in range(DOCUMENTS)]
        self._patience: dict[str, int] = {}

    def serve(self, requests: int) -> None:
        """So many requests, until nothing is left of them."""
        service, submitted = self._service, 0
        while submitted < requests or self._patience:
            room = min(ACTIVE - len(self._patience), requests - submitted)
            if room > 0:
                names = service.submit([self._ask() for _ in range(room)])
                for name in names:
                    leaves = self._random.random() < LEAVING
                    self._patience[name] = self._random.randrange(6) if leaves else 1 << 30
                submitted += room
            self._abort([name for name, steps in self._patience.items() if steps == 0])
            for answer in service.step():
                self._patience.pop(answer.name, None)
            self._patience = {name: steps - 1 for name, steps in self._patience.items()}
        service.drain()
        self._served += requests

    def _ask(self) -> Ask:
        random = self._random
        tokens = random.choice(self._documents)[: random.randrange(1, LONGEST)]
        if random.random() < 0.3:
            tokens += random_tokens(random, random.randrange(1, CHUNK))
        salt = random.choice((None, None, "a"))
        return Ask(tokens, max_tokens=random.choice((1, 2, 4)), salt=salt)

    def _abort(self, names: Sequence[str]) -> None:
        if names:
            self._service.abort(names)
            self.aborted += len(names)
            for name in names:
                del self._patience[name]

    # -- what is left --------------------------------------------------------------------------

    def census(self) -> Census:
        """Count everything; the engine is idle."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        objects = Counter(
            type(thing).__qualname__
            for thing in gc.get_objects()
            if type(thing).__module__.startswith("lamina_kv.")
        )
        _, pages, *_ = Path("/proc/self/statm").read_text().split()
        maps = Path("/proc/self/maps").read_text().splitlines()
        files = self._files()
        shared = {line.split(maxsplit=5)[5] for line in maps if "/dev/shm/" in line}
        return Census(
            requests=self._served,
            held=self._held(),
            threads=len(os.listdir("/proc/self/task")),
            files=len(files),
            shared=frozenset(shared | {file for file in files if file.startswith("/dev/shm/")}),
            objects=objects,
            memory=int(pages) * os.sysconf("SC_PAGE_SIZE"),
            blocks=sys.getallocatedblocks(),
        )

    @staticmethod
    def _files() -> list[str]:
        with os.scandir("/proc/self/fd") as links:  # one more while it is looked at, always
            return [os.readlink(link.path) for link in links]

    def _held(self) -> dict[str, float]:
        scheduler = self._service._core.scheduler
        planner = scheduler.connector._scheduler.planner
        pool = scheduler.kv_cache_manager.block_pool
        books = planner._books
        tiers = [books.catalog.near, *(far.index for far in books.catalog.far.values())]
        return {
            "requests in vLLM": len(scheduler.requests),
            "requests in Lamina": len(planner._requests),
            "transfers": len(books.transfers),
            "leased blocks": books.leases.leased_blocks,
            "leased slots": sum(tier.leased for tier in tiers),
            "filling slots": sum(tier.used - len(tier.visible) for tier in tiers),
            "blocks not given back": sum(
                block.ref_cnt for block in pool.blocks if not block.is_null
            ),
        }

    def metrics(self) -> dict[str, float]:
        """Totals over all labels."""
        totals: Counter[str] = Counter()
        for sample in self._service.metrics():
            totals[sample.name] += sample.value
        return {name: value for name, value in totals.items() if name.startswith("lamina_")}

    def close(self) -> None:
        """Shut the engine down; its threads are to end."""
        self._service.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("lamina-")]
