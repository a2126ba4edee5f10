"""Guards certificates: those that engines show are checked, the proxy shows its own where it is
asked for one, and clients find it by HTTPS."""

from __future__ import annotations

import logging
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from lamina_kv.bench.ports import free_port
from lamina_kv.cli.main import app
from lamina_kv.push.proxy.settings import EngineTls
from push_proxy.certificates import Authority, Certified
from push_proxy.engines import ANSWER, FakeEngine
from push_proxy.proxies import COMPLETION, listed, proxied
from push_proxy.running import PATIENCE, until


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def localhost(authority: Authority) -> Certified:
    return authority.certify("localhost")


@pytest.fixture(scope="module")
def proxys(authority: Authority) -> Certified:
    """The proxy's own certificate."""
    return authority.certify("proxy")


@contextmanager
def engine(server: Certified, **more: Any) -> Iterator[FakeEngine]:
    """One that is reached by HTTPS."""
    with FakeEngine(ssl_certfile=server.certificate, ssl_keyfile=server.key, **more) as secured:
        yield secured


def test_an_engine_of_the_right_authority_is_used(
    authority: Authority, localhost: Certified, prefill: FakeEngine
) -> None:
    with (
        engine(localhost) as secured,
        proxied([prefill], [secured], engine_tls=EngineTls(authority.file)) as proxy,
    ):
        assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        assert secured.calls


def test_another_authority_is_not_believed(
    tmp_path: Path, localhost: Certified, prefill: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lamina_kv.push.proxy")
    other = Authority(tmp_path, "other")
    for tls in (EngineTls(other.file), EngineTls()):
        caplog.clear()
        with (
            engine(localhost) as secured,
            proxied([prefill], [secured], usable=1, engine_tls=tls),
        ):
            until(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text)


def test_an_engine_that_wants_a_certificate_is_shown_one(
    authority: Authority, localhost: Certified, proxys: Certified, prefill: FakeEngine
) -> None:
    asking = {"ssl_ca_certs": authority.file, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    own = EngineTls(authority.file, proxys.certificate, proxys.key)
    with engine(localhost, **asking) as secured:
        with proxied([prefill], [secured], engine_tls=own) as proxy:
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
        with proxied([prefill], [secured], usable=1, engine_tls=EngineTls(authority.file)) as proxy:
            assert proxy.client.get("/health").status_code == 503


def test_an_engine_that_was_found_by_its_name_shows_that_names_certificate(
    tmp_path: Path, authority: Authority, localhost: Certified
) -> None:
    """The proxy connects to an address, of which there is no certificate."""
    with engine(localhost) as secured:
        file = tmp_path / "engines.yaml"
        file.write_text(f"decode: [{{dns: 'https://localhost:{secured.port}'}}]")
        with listed(file, usable=1, engine_tls=EngineTls(authority.file)) as proxy:
            assert proxy.post("/v1/completions", COMPLETION).json() == ANSWER
            assert proxy.metric("engine_usable", engine=f"https://127.0.0.1:{secured.port}") == 1


def test_clients_reach_the_proxy_by_https(
    authority: Authority, localhost: Certified, prefill: FakeEngine, decode: FakeEngine
) -> None:
    port = free_port()
    url = f"https://localhost:{port}"
    command = [
        *(sys.executable, "-c", "from lamina_kv.cli.main import main; main()", "push-proxy"),
        *("--prefill", f"{prefill.url},10.0.0.1:7000", "--decode", decode.url),
        *("--port", str(port), "--disaggregate", "always"),
        *("--tls-cert", str(localhost.certificate), "--tls-key", str(localhost.key)),
    ]
    context = ssl.create_default_context(cafile=authority.file)
    with (
        subprocess.Popen(command) as program,
        httpx.Client(base_url=url, verify=context, trust_env=False, timeout=PATIENCE) as client,
    ):
        try:

            def answers() -> bool:
                assert program.poll() is None
                try:
                    return client.get("/health").is_success
                except httpx.ConnectError:
                    return False

            until(answers)
            assert client.post("/v1/completions", json=COMPLETION).json() == ANSWER
            with pytest.raises(httpx.HTTPError):
                httpx.get(url.replace("https", "http"), trust_env=False)
        finally:
            program.kill()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tls-key", "KEY"), "--tls-key: there is no --tls-cert"),
        (("--tls-cert", "nowhere"), "--tls-cert: nowhere, no --tls-key: No such file"),
        (("--tls-cert", "CERT", "--tls-key", "OTHER"), "--tls-cert: "),
        (("--engines-ca", "nowhere"), "--engines-ca: nowhere: No such file"),
        (("--engines-ca", "KEY"), "--engines-ca: "),
        (("--engines-cert", "CERT", "--engines-cert-key", "OTHER"), "--engines-cert: "),
        (("--engines-cert-key", "KEY"), "--engines-cert-key: there is no --engines-cert"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    localhost: Certified, proxys: Certified, options: tuple[str, ...], said: str
) -> None:
    files = {
        "CERT": str(localhost.certificate),
        "KEY": str(localhost.key),
        "OTHER": str(proxys.key),
    }
    given = [files.get(option, option) for option in options]
    engines = ("--prefill", "http://p:1,p:7000", "--decode", "http://d:1")
    result = CliRunner().invoke(app, ["push-proxy", *engines, *given])
    assert result.exit_code == 2
    assert said in result.output
