"""Puts random faults into the product, each into a copy of its own, and runs the fast tests on it:
first those that name its module, then histories of the simulator, then all.

``python tests/mutation --count 40 --seed 1`` is what ``make mutants`` does.

A fault that no test notices is a promise that nothing holds. Some change nothing that anybody could
see (a bound on a queue, a hint): say so where it is, or write the test.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutation.faults import Fault, faults_of

ROOT = Path(__file__).parents[2]
ROOMS = ("control", "data", "tiers", "push", "engines")
FAST = "not engine and not slow and not soak and not compat"
HISTORIES = ["tests/unit/test_simulator.py", "tests/property/test_histories.py"]
"""What sees most of what is wrong in control and data; they run before all others."""
TIMEOUT = 900.0
"""Seconds for the fast tests; with some faults they hang, which is noticed, too."""


@dataclass(frozen=True)
class Mutant:
    """A fault and its module, relative to the sources."""

    module: Path
    fault: Fault

    def __str__(self) -> str:
        before, after = (
            " ".join(text.split())[:60] for text in (self.fault.before, self.fault.after)
        )
        return f"{self.module}:{self.fault.line}: {self.fault.kind}: {before} -> {after}"


def draw(count: int, seed: int, rooms: Sequence[str] = ROOMS) -> list[Mutant]:
    """As many faults as asked for, in random modules: the longer a module, the more of them."""
    source = ROOT / "src" / "lamina_kv"
    everything = [
        Mutant(path.relative_to(ROOT / "src"), fault)
        for room in rooms
        for path in sorted((source / room).rglob("*.py"))
        for fault in faults_of(path.read_text())
    ]
    return random.Random(seed).sample(everything, count)


def near(module: Path) -> list[str]:
    """Test files that name the module, which probably notice, and soon."""
    name = ".".join(module.with_suffix("").parts)
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests" / "unit").glob("test_*.py"))
        if name in path.read_text()
    ]


def survives(mutant: Mutant, rounds: Sequence[Sequence[str]]) -> str | None:
    """None if no test of these rounds notices the fault, else the test that does."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        broken = copy / mutant.module
        broken.write_text(mutant.fault.put_into(broken.read_text()))
        for tests in rounds:
            if tests and (noticed := _run(copy, tests)):
                return noticed
    return None


def _run(source: Path, arguments: Sequence[str]) -> str | None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-m", FAST]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "the tests do not end"
    if done.returncode in {0, 5}:
        return None
    lines = done.stdout.splitlines() or ["pytest does not start"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return (failed or lines[-1:])[0][:110]


def survivors(mutants: Sequence[Mutant], workers: int) -> Iterator[Mutant]:
    """The faults that no fast test notices. Most are noticed soon, and those that are not take
    minutes, so that these come last."""
    left = []
    for number, mutant in enumerate(mutants, 1):
        if not _noticed(number, mutant, (near(mutant.module), HISTORIES)):
            left.append((number, mutant))
    for number, mutant in left:
        if not _noticed(number, mutant, (["tests", "-n", str(workers)],)):
            yield mutant


def _noticed(number: int, mutant: Mutant, rounds: Sequence[Sequence[str]]) -> bool:
    began = time.monotonic()
    noticed = survives(mutant, rounds)
    took = time.monotonic() - began
    print(f"{number:>3} {took:4.0f} s {mutant}\n      {noticed or 'not noticed'}", flush=True)
    return noticed is not None


def main() -> int:
    """The number of faults that no test notices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="faults of the seed that are known")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="take for granted that tests pass")
    parser.add_argument("--list", action="store_true", help="say what they are, and run nothing")
    asked = parser.parse_args()
    mutants = draw(asked.count, asked.seed)[asked.skip :]
    if asked.list:
        print("\n".join(map(str, mutants)))
        return 0
    if not asked.quick and (noticed := _run(ROOT / "src", ["tests", "-n", str(asked.workers)])):
        print(f"without any fault: {noticed}", file=sys.stderr)
        return len(mutants)
    left = list(survivors(mutants, asked.workers))
    print(f"\n{len(mutants) - len(left)} of {len(mutants)} faults are noticed. Not noticed:")
    print("\n".join(map(str, left)) or "none")
    return len(left)


if __name__ == "__main__":
    sys.exit(main())
