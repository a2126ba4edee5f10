"""Guards a shared directory's tier on a mount whose server is stopped, killed and started again.

JuiceFS by FUSE: the only shared file system whose server a test can stop.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from disks import key
from juicefs import JuiceFS, missing
from lamina_kv.tiers.contract import Fate
from shared_directory import Directory, open_engine, put
from store_contract import Backing, StoreContract

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(bool(missing()), reason=missing() or "there is JuiceFS"),
]

PROGRAM = """
import atexit
import sys
from pathlib import Path

import torch

from disks import key
from lamina_kv.data.far import FarTier
from lamina_kv.data.moving import MovePipeline
from lamina_kv.data.near import NearSlab
from lamina_kv.plan import Ask, Move, TierOrders
from shared_directory import open_engine
from store_contract import rows_of

class Near:
    def __init__(self):
        self.geometry = self
        self.chunk_bytes = rows_of(12288)
    def object(self, slot):
        from lamina_kv.tiers.objects import aligned_memory
        return aligned_memory(12288)

engine = open_engine(Path(sys.argv[1]), timeout=0.5)
tier = FarTier("directory", engine.store, shard=0, length=rows_of(12288), timeout=0.5)
receipts = []
moves = MovePipeline(tier, Near(), receipts.extend)
print("ready", flush=True)
sys.stdin.readline()
inward = tuple(Move(n, key(n), n, 0) for n in range(8))
moves.carry_out(TierOrders("directory", (), (Move(8, key(8), 8, 0),), inward, (), ()), 1)
print("closed", moves.close(2.0), flush=True)
atexit.register(print, "ended", flush=True)
"""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[JuiceFS]:
    mounted = JuiceFS(tmp_path)
    try:
        mounted.start()
        yield mounted
    finally:
        mounted.close()


def test_a_server_that_is_stopped_keeps_threads_and_nothing_else(mount: JuiceFS) -> None:
    path = mount.path / "lamina"
    engine = open_engine(path, timeout=0.5)
    engine.put(*range(8))
    with ThreadPoolExecutor(2) as pool:
        mount.pause()
        try:
            for number in range(100, 110):  # more than there are threads to ask
                assert engine.store.find([key(number)], 5.0) is None
            reading = pool.submit(engine.read, range(4))
            writing = pool.submit(engine.write, [50])
            assert engine.store.find([key(111)], 5.0) is None
            assert not reading.done()
            assert not writing.done()
        finally:
            mount.resume()
        assert set(reading.result(60)) <= {Fate.DONE, Fate.LATE}
        assert writing.result(60) in ([Fate.DONE], [Fate.LATE])
    assert engine.read(range(8)) == [Fate.DONE] * 8
    assert engine.find([0, 111]) == [True, False]
    engine.put(51)
    engine.store.close()


def test_a_server_that_is_killed_and_started_again(
    mount: JuiceFS, caplog: pytest.LogCaptureFixture
) -> None:
    path = mount.path / "lamina"
    engine = open_engine(path)
    engine.put(*range(4))
    mount.kill()
    assert engine.store.find([key(100)], 5.0) is None
    assert engine.read([0, 1]) == [Fate.DOWN] * 2
    assert engine.write([9]) == [Fate.DOWN]
    mount.unmount()
    assert engine.read([0, 1]) == [Fate.DOWN] * 2
    assert engine.write([9]) == [Fate.DOWN]
    assert list(mount.path.iterdir()) == []
    mount.start()
    assert engine.read(range(5)) == [*[Fate.DONE] * 4, Fate.GONE]
    engine.put(9)
    engine.store.close()
    assert open_engine(path).read([9]) == [Fate.DONE]


def test_an_engine_starts_while_the_server_is_stopped(
    mount: JuiceFS, caplog: pytest.LogCaptureFixture
) -> None:
    path = mount.path / "lamina"
    put(path, 1)
    mount.kill()
    mount.unmount()
    mount.start()  # what the kernel knows of it is forgotten
    mount.pause()
    try:
        engine = open_engine(path, timeout=0.5)
        assert any("does not answer" in line for line in caplog.messages)
        assert engine.store.find([key(1)], 5.0) is None
    finally:
        mount.resume()
    while engine.store.find([key(1)], 5.0) is None:
        pass
    assert engine.read([1, 2]) == [Fate.DONE, Fate.GONE]
    engine.put(2)
    assert engine.read([1, 2]) == [Fate.DONE] * 2
    engine.store.close()


def test_an_engine_ends_while_the_server_is_stopped(mount: JuiceFS) -> None:
    path = mount.path / "lamina"
    put(path, *range(8))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        mount.pause()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "closed False\n"
        assert process.stdout.readline() == "ended\n"
        # The kernel keeps the process while a call of it is in the hands of the stopped daemon.
        mount.kill()
        assert process.wait(60) == 0
    finally:
        mount.kill()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JuiceFS]:
    mounted = JuiceFS(tmp_path_factory.mktemp("juicefs"))
    try:
        mounted.start()
        yield mounted
    finally:
        mounted.close()


class TestOnJuiceFS(StoreContract):
    @pytest.fixture(params=[False, True], ids=["buffered", "direct"])
    def backing(self, shared: JuiceFS, request: pytest.FixtureRequest) -> Backing:
        return Directory(shared.path / "lamina", direct=request.param)
