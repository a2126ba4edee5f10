"""``lamina-kv push-proxy``: the rendezvous between prefill and decode engines."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

from lamina_kv.push.proxy.settings import PrefillAddress, Settings, SettingsError

log = logging.getLogger("lamina_kv.push.proxy")

_KEEP_ALIVE = 30


@dataclass(frozen=True, slots=True)
class Listening:
    """Where and how the server listens.

    Attributes:
        host: address of an interface.
        port: TCP's.
        drain_seconds: how long requests may go on once it is asked to end.
    """

    host: str
    port: int
    drain_seconds: int


@contextmanager
def errors() -> Iterator[None]:
    """Tells plainly why settings cannot work, and exits with 2."""
    try:
        yield
    except SettingsError as error:
        for problem in error.problems:
            typer.echo(f"lamina-kv push-proxy: {problem}", err=True)
        raise typer.Exit(2) from error


def prefill_addresses(options: list[str]) -> tuple[PrefillAddress, ...]:
    """What ``--prefill`` was given: a URL, a comma and a push address each."""
    pairs = [option.partition(",") for option in options]
    return tuple(PrefillAddress(url.strip(), push.strip()) for url, _, push in pairs)


def run(settings: Settings, listening: Listening) -> None:
    """Serve until SIGINT or SIGTERM; requests that are under way then may go on for a while.

    Raises:
        typer.Exit: with 1, if the server cannot start, or what it needs is not installed.
    """
    try:
        import uvicorn

        from lamina_kv.push.proxy.app import create_app
    except ModuleNotFoundError as error:
        typer.echo(
            f"lamina-kv push-proxy needs {error.name}: pip install 'lamina-kv[push]'", err=True
        )
        raise typer.Exit(1) from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if settings.token is None and not _is_loopback(listening.host):
        log.warning("there is no token: whoever can reach %s may ask", listening.host)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            host=listening.host,
            port=listening.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=listening.drain_seconds,
        )
    )
    server.run()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
