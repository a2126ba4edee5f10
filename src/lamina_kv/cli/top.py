"""``lamina-kv top``: what Lamina does in a running server, live in a terminal."""

from __future__ import annotations

import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from math import inf
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from lamina_kv.cli.scrape import Scrape, ScrapeError, fetch, metrics_url
from lamina_kv.cli.top_view import SHOWN, frame

_COLUMNS = 92

_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""In a picture: fonts that whoever looks at it would fetch from another server."""


@dataclass(frozen=True, slots=True)
class Watching:
    """How a server is watched.

    Attributes:
        engine: of several engines of the server, the one to look at; None for their sum.
        interval: seconds between two looks.
        once: whether to print one frame and end. Nothing is known of rates then.
        svg: a file to draw the last frame to, after as many looks as a sparkline shows; None to
            watch until Ctrl-C.
    """

    engine: str | None = None
    interval: float = 2.0
    once: bool = False
    svg: Path | None = None


def run(address: str, watching: Watching) -> int:
    """Show a server until Ctrl-C, or as long as is said.

    Args:
        address: the server's URL.
        watching: how.

    Returns:
        The exit status: 1 if the server cannot be asked at the start.
    """
    console = Console()
    try:
        url = metrics_url(address)
        first = fetch(url, watching.engine)
    except ScrapeError as error:
        Console(stderr=True).print(f"{error}", style="red", markup=False, soft_wrap=True)
        return 1
    if watching.once and watching.svg is None:
        console.print(frame([first], url))
        return 0
    with suppress(KeyboardInterrupt):
        _watch(console, url, first, watching)
    return 0


def _watch(console: Console, url: str, first: Scrape, watching: Watching) -> None:
    """Look again and again. A server that does not answer is no reason to end: it may restart."""
    seen = deque([first], maxlen=SHOWN + 1)
    looks = 0
    most = inf if watching.svg is None else 0 if watching.once else SHOWN
    trouble = ""
    with Live(frame(seen, url), console=console, screen=True, auto_refresh=False) as live:
        while looks < most:
            time.sleep(watching.interval)
            looks += 1
            trouble = ""
            try:
                scrape = fetch(url, watching.engine)
            except ScrapeError as error:
                trouble = str(error)
            else:
                if scrape.total("prompt_tokens_total") < seen[-1].total("prompt_tokens_total"):
                    seen.clear()  # the server has restarted: its counters begin anew
                seen.append(scrape)
            live.update(frame(seen, url, trouble), refresh=True)
    if watching.svg is not None:
        draw(frame(seen, url, trouble), watching.svg)


def draw(shown: RenderableType, path: Path) -> None:
    """Draw a frame as it looks in a terminal.

    Args:
        shown: the frame.
        path: an SVG file.
    """
    console = Console(record=True, width=_COLUMNS, file=StringIO(), force_terminal=True)
    console.print(shown)
    path.write_text(_FONTS.sub("", console.export_svg(title="lamina-kv top")), encoding="utf-8")
