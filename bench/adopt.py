"""How long a scheduler takes over what every rank's tier holds after a restart, and in how much
memory: its reports, the index, and what is needed only meanwhile.

Keys are random, the slots are in no order of age, and every thousandth slot holds another chunk on
some rank.

    python bench/adopt.py --chunks 1000000 --ranks 8
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path

import numpy as np

from lamina_kv.keys import KEY_BYTES
from lamina_kv.plan import StoredChunks, marks_of
from lamina_kv.tiers.slots import SlotIndex


def memory(line: str) -> float:
    """Megabytes of this process: ``VmRSS``, or the most there were since it began, ``VmHWM``."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (found,) = (each for each in status.splitlines() if each.startswith(line))
    return int(found.split()[1]) * 1024 / 1e6


def reports(chunks: int, ranks: int) -> list[StoredChunks]:
    """What each rank holds; arrays of its own, as they come from other processes."""
    random = np.random.default_rng(1)
    keys = random.integers(0, 256, (chunks, KEY_BYTES), np.uint8)
    found = []
    for rank in range(ranks):
        slots, marks = np.arange(chunks, dtype=np.int32), marks_of(keys).copy()
        marks[rank::1000] += rank > 0
        found.append(StoredChunks(slots, marks))
    found[0] = StoredChunks(found[0].slots, found[0].marks, keys, random.random(chunks))
    return found


def main() -> None:
    """Measure once, in a process that has done nothing else, and print seconds and megabytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    options = parser.parse_args()
    before = memory("VmRSS")
    stored = reports(options.chunks, options.ranks)
    reported = memory("VmRSS") - before
    began, used = time.perf_counter(), time.process_time()
    index = SlotIndex(options.chunks)
    index.adopt(stored)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    most = memory("VmHWM") - before
    del stored
    ctypes.CDLL(None).malloc_trim(0)
    left = memory("VmRSS") - before
    print(
        f"{options.ranks} ranks, {options.chunks} chunks each, {len(index.visible)} on all of them"
    )
    print(f"adopted in {seconds:.2f} s ({used:.2f} s of processor time)")
    print(f"memory: reports {reported:.0f} MB, reports and index at most {most:.0f} MB")
    per_chunk = left * 1e6 / options.chunks
    print(f"the index afterwards: {left:.0f} MB, {per_chunk:.0f} bytes a chunk")


if __name__ == "__main__":
    main()
