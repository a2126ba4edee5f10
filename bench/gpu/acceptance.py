"""Whether Lamina's CUDA path is right and fast on the GPU at hand, in eight minutes.

    python bench/gpu/acceptance.py --out DIRECTORY

Writes acceptance.json there after every section, and prints a table at the end. Needs torch for
CUDA, Triton and transformers; no vLLM, no network. Exit status: 0 if every section ran and kept its
promises, 1 otherwise.

**It has not yet run on a GPU.**
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(_ROOT / "bench"), str(_ROOT / "src")]

import torch
from rich.console import Console

from gpu.lab import CudaLab
from gpu.plan import Bench, Section, run_sections
from gpu.report import Outcome, table, write_json
from gpu.sections import (
    answers,
    bandwidth,
    bytes_moved,
    fences,
    host_costs,
    interference,
    machine,
    overlap,
    pinning,
)

SECTIONS: tuple[Section[CudaLab], ...] = (
    Section("A", "the machine", 5, machine.describe),
    Section("B", "ceilings: one large copy", 15, machine.ceilings),
    Section("C", "every layout, byte by byte", 60, bytes_moved.run),
    Section("D", "fences while streams lag", 60, fences.run),
    Section("E", "bandwidth by page size", 45, bandwidth.run),
    Section("F", "the model's kernels beside copies", 40, interference.run),
    Section("G", "host costs", 30, host_costs.run),
    Section("H", "a layerwise load and its step", 40, overlap.layerwise),
    Section("I", "a parked load beside steps", 20, overlap.parked),
    Section("J", "answers of transformers' continuous batching", 70, answers.run),
    Section("K", "pinning", 20, pinning.run),
)
"""In the order of their worth: what comes last is what a small budget leaves out."""

GRACE = 20.0
"""Seconds beyond the total budget after which a section that hangs ends the process."""

TABLE_WIDTH = 140


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections.

    Args:
        arguments: of the command line; None takes the process's.

    Returns:
        The exit status.
    """
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("no GPU: torch sees none, so there is nothing to accept or refuse", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    options.out.mkdir(parents=True, exist_ok=True)
    where = {
        "card": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }
    outcomes: list[Outcome] = []
    guard = _end_when_over(options.budget + GRACE)
    bench = Bench(CudaLab(device), 0.0)
    for outcome in run_sections(chosen(options.only), bench, options.budget, _lost_context):
        outcomes.append(outcome)
        write_json(options.out / "acceptance.json", where, outcomes)
        print(f"{outcome.key} {outcome.title}: {outcome.state} {outcome.why}", flush=True)
    guard.cancel()
    Console(width=TABLE_WIDTH).print(table(outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    total = sum(section.budget for section in SECTIONS)
    letters = [section.key for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--budget", type=_seconds, default=total, help=f"seconds for all sections ({total:g})"
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the JSON")
    parser.add_argument("--only", nargs="+", choices=letters, metavar="SECTION", help="letters")
    return parser.parse_args(arguments)


def chosen(only: Sequence[str] | None) -> list[Section[CudaLab]]:
    """The sections to run, in their order whatever that of ``only``."""
    return [section for section in SECTIONS if only is None or section.key in only]


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"a budget of {text} seconds leaves no time")
    return seconds


def _lost_context() -> str:
    """Why nothing can run on the device any more; empty if something can."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        return f"the section before took the device's context down: {message}; use --only"
    return ""


def _end_when_over(seconds: float) -> threading.Timer:
    """End the process then, with a trace of every thread: a copy that hangs cannot be called off.
    What the sections before have said is written. Returns what does so, to be cancelled."""

    def end() -> None:
        print("a section hangs:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


if __name__ == "__main__":
    sys.exit(main())
