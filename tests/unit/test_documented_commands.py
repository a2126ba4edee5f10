"""Guards the commands that the documentation tells people to type: vLLM and Lamina take them as
they stand there, and what they configure does what the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import deployments
from deployments import Started
from documented import ROOT, blocks, commands
from lamina_kv.cli.checks import Verdict
from lamina_kv.cli.main import app
from lamina_kv.cli.push_proxy import Listening
from lamina_kv.cli.transfer_checks import transfer_config
from lamina_kv.config import ConfigError, load_config
from lamina_kv.control.requests import PushParameters
from lamina_kv.engines.vllm.concerns import concerns
from lamina_kv.push.addresses import split_address
from lamina_kv.push.proxy.discovery.listing import read_listing
from lamina_kv.push.proxy.settings import Settings
from lamina_kv.tiers.regard import Regard

PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
SERVERS = [
    *(Started(page, words) for page in PAGES for words in commands(page, "vllm serve")),
    *deployments.servers(),
]
LAMINA = [(page, words) for page in PAGES for words in commands(page, "lamina-kv")]
PROXIES = [(page, words[1:]) for page, words in LAMINA if words[0] == "push-proxy" and words[1:]]


@cache
def vllm_parser() -> Any:
    """That of ``vllm serve``."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def test_there_are_commands_to_check() -> None:
    pages = [server.where for server in SERVERS]
    assert pages.count("README.md") == 1
    assert pages.count("docs/quick-start.md") == 4
    assert "docs/configuration.md" in pages
    pages = [page for page, _ in PROXIES]
    assert pages == ["docs/prefill-decode.md", "docs/push-proxy.md", "docs/quick-start.md"]
    assert len(LAMINA) > 3


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.where)
def test_a_server_that_is_documented(server: Started, tmp_path: Path) -> None:
    """Its flags exist, nothing about it is to be warned of, and its tiers work both ways."""
    transfer = vllm_parser().parse_args(server.words).kv_transfer_config
    config = server.config(tmp_path)
    assert transfer.kv_connector == "LaminaConnector"
    assert transfer.kv_load_failure_policy == "recompute"
    assert transfer.is_kv_producer
    assert transfer.is_kv_consumer
    assert not [*concerns(config, transfer.kv_role, transfer.kv_load_failure_policy)]
    document = json.loads(server.words[server.words.index("--kv-transfer-config") + 1])
    assert {finding.verdict for finding in transfer_config(document)} == {Verdict.GOOD}


@pytest.mark.parametrize(("page", "words"), PROXIES)
def test_a_proxy_that_is_documented(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It goes to the servers that the same page configures on its commands, if it does."""
    started: list[tuple[Settings, Listening]] = []
    monkeypatch.setattr("lamina_kv.cli.push_proxy.run", lambda *given: started.append(given))
    done = CliRunner().invoke(app, ["push-proxy", *words])
    assert done.exit_code == 0, done.output
    ((settings, _),) = started
    assert all(split_address(prefill.push) for prefill in settings.prefill)
    pushing = {}
    for server in (server for server in SERVERS if server.where == page):
        config = server.config(tmp_path)
        if config.push is not None:
            arguments = vllm_parser().parse_args(server.words)
            pushing[f"http://{arguments.host}:{arguments.port}"] = config.push
    assert len(pushing) == {"docs/quick-start.md": 2}.get(page, 0)
    if pushing:
        (prefill,), (decode,) = settings.prefill, settings.decode
        assert pushing[prefill.url].listen == prefill.push
        assert pushing[decode].listen is None
        assert pushing[prefill.url].token == pushing[decode].token


@pytest.mark.parametrize(("page", "words"), LAMINA)
def test_a_command_that_is_documented(page: str, words: list[str]) -> None:
    """It exists, and so do its options."""
    verbs = words[: 2 if words[0] == "bench" else 1]
    usage = CliRunner().invoke(app, [*verbs, "--help"], terminal_width=200)
    assert usage.exit_code == 0, usage.output
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in usage.output


def test_the_parameters_of_a_request() -> None:
    """What a router has to say, as docs/push.md has it."""
    from lamina_kv.engines.vllm.requests import push_parameters

    class Asked:
        def __init__(self, given: Mapping[str, object]) -> None:
            self.kv_transfer_params = given

    found = [
        push_parameters(Asked(json.loads(line)))  # type: ignore[arg-type]
        for text in blocks("docs/push.md", "json")
        for line in re.findall(r"^\{.*\}", text, re.MULTILINE)
    ]
    assert found == [PushParameters("5b1c0f", None), PushParameters("5b1c0f", "10.0.0.1:9300")]


def test_what_a_request_may_say() -> None:
    """The words of docs/requests.md are understood, and its table has all of them, with bounds."""
    from lamina_kv.engines.vllm.regard import PARAMETER, WORDS, regard_of

    def said(parameters: object) -> Regard:
        asked = SimpleNamespace(kv_transfer_params=parameters, kv_hints=None, session_id=None)
        regard, problem = regard_of(asked)  # type: ignore[arg-type]
        assert problem is None
        return regard

    found = [
        said(json.loads(line))
        for text in blocks("docs/requests.md", "json")
        for line in text.splitlines()
    ]
    assert found == [Regard(pin_seconds=600, priority=1), Regard(keep=False)]
    (sent,) = commands("docs/requests.md", "curl")
    body = json.loads(sent[sent.index("-d") + 1])
    assert said(body["kv_transfer_params"]) == Regard(keep=False)
    table = re.findall(
        r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs/requests.md").read_text(), re.MULTILINE
    )
    assert sorted(name for name, _ in table) == sorted(WORDS)
    for name, value in table:
        for bound in re.findall(r"-?\d+", value):
            said({PARAMETER: {name: int(bound)}})


def test_what_a_router_sends() -> None:
    """Both engines the same prompt and one push; the prefill engine is asked for one token."""
    prefill, decode = (
        json.loads(words[words.index("-d") + 1])
        for words in commands("docs/prefill-decode.md", "curl")
    )
    assert prefill["prompt"] == decode["prompt"]
    assert (prefill["max_tokens"], prefill["stream"]) == (1, False)
    pushes = [body["kv_transfer_params"]["lamina_push"] for body in (prefill, decode)]
    assert pushes == [{"id": "5b1c0f"}, {"id": "5b1c0f", "prefill": "10.0.0.1:9300"}]


def test_an_older_configuration_is_told_what_to_write(tmp_path: Path) -> None:
    """What docs/upgrading.md shows as before is refused, and all that it shows as gone is named."""
    (before,) = blocks("docs/upgrading.md")
    file = tmp_path / "lamina.yaml"
    file.write_text(before)
    with pytest.raises(ConfigError) as refused:
        load_config({}, {"LAMINA_CONFIG": str(file)})
    disk, decisions = sorted(refused.value.problems)
    said = re.search(r'"tiers": (\[\{.*?\}\]); `fetch_ahead` does not exist any more', disk)
    (now,) = blocks("docs/upgrading.md", "yaml")
    assert said is not None
    assert json.loads(said[1]) == yaml.safe_load(now)["tiers"]
    assert "`lamina_kv.requests`" in decisions


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")))
def test_an_issue_form(path: Path) -> None:
    """It has what GitHub asks of one."""
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    questions = [each for each in form["body"] if each["type"] != "markdown"]
    assert len({each["id"] for each in questions}) == len(questions)
    for each in questions:
        assert each["type"] in ("input", "textarea", "dropdown")
        assert each["attributes"]["label"]


@pytest.mark.parametrize("page", PAGES)
def test_a_configuration_file_that_is_documented(page: str, tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text)
        if page == "docs/push-proxy.md":
            assert read_listing(text).places, "where the proxy's engines are"
            continue
        file = tmp_path / "lamina.yaml"
        file.write_text(text)
        load_config({}, {"LAMINA_CONFIG": str(file)})
