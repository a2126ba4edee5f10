"""``lamina-kv top``: what Lamina does in a running server, live in a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console
from rich.live import Live

from lamina_kv.cli.scrape import Scrape, ScrapeError, fetch, metrics_url
from lamina_kv.cli.top_view import SHOWN, frame


def run(address: str, *, engine: str | None, interval: float, once: bool) -> int:
    """Show a server until Ctrl-C.

    Args:
        address: the server's URL.
        engine: of several engines of the server, the one to look at; None for their sum.
        interval: seconds between two looks.
        once: whether to print one frame and end. Nothing is known of rates then.

    Returns:
        The exit status: 1 if the server cannot be asked at the start.
    """
    console = Console()
    try:
        url = metrics_url(address)
        first = fetch(url, engine)
    except ScrapeError as error:
        Console(stderr=True).print(f"{error}", style="red", markup=False, soft_wrap=True)
        return 1
    if once:
        console.print(frame([first], url))
        return 0
    with suppress(KeyboardInterrupt):
        _watch(console, url, first, lambda: fetch(url, engine), interval)
    return 0


def _watch(
    console: Console, url: str, first: Scrape, look: Callable[[], Scrape], interval: float
) -> None:
    """Look again and again. A server that does not answer is no reason to end: it may restart."""
    seen = deque([first], maxlen=SHOWN + 1)
    with Live(frame(seen, url), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            trouble = ""
            try:
                scrape = look()
            except ScrapeError as error:
                trouble = str(error)
            else:
                if scrape.total("prompt_tokens_total") < seen[-1].total("prompt_tokens_total"):
                    seen.clear()  # the server has restarted: its counters begin anew
                seen.append(scrape)
            live.update(frame(seen, url, trouble), refresh=True)
