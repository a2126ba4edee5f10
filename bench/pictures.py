"""Draws the pictures of docs/operating.md and docs/sizing.md anew: ``python bench/pictures.py``.

``top.svg`` shows a real server, vLLM with the demo's model on this machine, while some people talk
to it whose conversations do not all fit into its tiers. ``dashboard.png`` has what a Prometheus
that scrapes this server answers to the panels of the Grafana dashboard. ``sizing.png`` is that of
the example. It needs what ``make demo`` needs, matplotlib and a Prometheus
(``requirements/prometheus``), and takes four minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from importlib import resources
from pathlib import Path

from PIL import Image
from rich.console import Console

import drawn_dashboard
from lamina_kv.bench import app as benchmarks
from lamina_kv.cli import demo, top
from lamina_kv.cli.demo_server import Message, Server, ServerError, lamina_arguments, vllm_server
from prometheus_server import Prometheus

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
PEOPLE = 6
SECONDS = 120.0
"""For how long people talk."""
ROWS = ("What it is worth", "Tiers", "Loads: what requests wait for", "Bytes: what moves")
"""Of the dashboard. The others are about pushes and the proxy, which are not there."""
COLOURS = 64
"""Of a picture: they are lines and letters."""
QUESTIONS = ("Who is this about?", "What happened then?", "Say it in one word.")


def main() -> None:
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, default=ROOT / "models")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    with (
        demo.prepared(console, arguments.model_dir, ServerError) as model,
        tempfile.TemporaryDirectory(prefix="lamina-pictures-") as scratch,
        _served(console, model, Path(scratch)) as server,
    ):
        with demo.step(console, "Starting a server"):
            server.await_start()
        ended = threading.Event()
        people = threading.Thread(target=_talk, args=(server, ended))
        with Prometheus([server.url.removeprefix("http://")], Path(scratch)) as prometheus:
            began = time.time()
            people.start()
            try:
                with demo.step(console, "People talk to it"):
                    ended.wait(SECONDS)
                    top.run(server.url, top.Watching(svg=IMAGES / "top.svg"))
                passed = time.time() - began
                drawn_dashboard.draw(prometheus, IMAGES / "dashboard.png", passed, ROWS)
            finally:
                ended.set()
                people.join()
    trace = ROOT / "docs" / "examples" / "requests.jsonl"
    sizes = ["--host", "512MiB,1GiB,2GiB,4GiB", "--plot", str(IMAGES / "sizing.png")]
    benchmarks(["trace", str(trace), *sizes], prog_name="lamina-kv bench", standalone_mode=False)
    for name in ("dashboard.png", "sizing.png"):
        Image.open(IMAGES / name).quantize(COLOURS).save(IMAGES / name, optimize=True)


def _served(console: Console, model: Path, scratch: Path) -> Server:
    """A server whose tiers are too small for everybody."""
    settings = {
        "host": {"capacity": "192MiB"},
        "tiers": [{"kind": "disk", "path": str(scratch / "store"), "capacity": "384MiB"}],
    }
    arguments = [*demo.ARGUMENTS, "--block-size", "32", *lamina_arguments(settings)]
    return vllm_server(model, arguments, demo.environment(scratch), scratch / "server.log")


def _talk(server: Server, ended: threading.Event) -> None:
    """People take turns, each with a conversation about a part of a document; who has asked every
    question begins anew with another part. The engine's own cache is emptied all the time."""
    document = resources.files("lamina_kv.cli").joinpath("demo_document.txt").read_text()
    conversations: dict[int, list[Message]] = {}
    turn = 0
    while not ended.is_set():
        person, said = turn % PEOPLE, turn // PEOPLE % len(QUESTIONS)
        if said == 0:
            begin = turn * 700 % max(1, len(document) - 3000)
            part = document[begin : begin + 3000]
            conversations[person] = [{"role": "user", "content": f"{part}\n\n{QUESTIONS[0]}"}]
        else:
            conversations[person].append({"role": "user", "content": QUESTIONS[said]})
        answer = server.chat(conversations[person], max_tokens=8)
        conversations[person].append({"role": "assistant", "content": answer.text})
        server.reset_engine_cache()
        turn += 1


if __name__ == "__main__":
    main()
