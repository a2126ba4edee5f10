"""One frame of ``lamina-kv top``, made from the last scrapes of a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lamina_kv.cli.scrape import Scrape
from lamina_kv.plan import COMPUTED, ENGINE, OTHER, PUSHED
from lamina_kv.quantities import size_of, time_of

SELDOM = (PUSHED, OTHER)
"""Sources that most servers never have."""

_STOPPED = {"fetch": "not read", "write": "not written", "save": "not saved to"}

SHOWN = 16
"""Looks that a sparkline shows: half a minute by default. With :data:`_BAR` a frame has room in the
80 columns that every terminal has."""

_BAR = 10
_SPARKS = " ▁▂▃▄▅▆▇█"
_NOTHING = "-"


@dataclass(frozen=True, slots=True)
class _Way:
    """One way that bytes take.

    Attributes:
        words: what it is, for people.
        direction: its word in metrics.
        tier: the far tier; empty for none.
    """

    words: str
    direction: str
    tier: str = ""

    @property
    def labels(self) -> dict[str, str]:
        """Those of its bytes and durations."""
        return {"tier": self.tier} if self.tier else {}


def frame(seen: Sequence[Scrape], url: str, trouble: str = "") -> RenderableType:
    """What there is to see of a server.

    Args:
        seen: the last scrapes, the oldest first; at least one. Rates need two.
        url: where they are from.
        trouble: why there is no newer one; empty if there is.
    """
    parts: list[RenderableType] = [_head(seen[-1], url)]
    if trouble:
        parts.append(Text(f"no answer: {trouble}", style="bold red"))
    for part in (_prompts(seen), _tiers(seen[-1]), _bytes(seen), _lines(seen)):
        parts += [Text(), part]
    return Group(*parts)


def counted(numbers: Mapping[str, float]) -> str:
    """Counts of what has happened, the most frequent first: ``"late 3, down 1"``.

    Args:
        numbers: by name.
    """
    most = sorted(numbers.items(), key=lambda each: -each[1])
    return ", ".join(f"{name} {number:,.0f}" for name, number in most if number) or "none"


def served(now: Scrape) -> tuple[str, int]:
    """Names of the models that a server serves, and how many engines it has."""
    models = ", ".join(now.words("prompt_tokens_total", "model_name"))
    return models, len(now.words("prompt_tokens_total", "engine"))


def stopped(now: Scrape, tier: str) -> list[str]:
    """What a tier is, by the directions in which it is out of use; empty if it is in use."""
    return [
        _STOPPED.get(way, way)
        for way in now.by("tier_in_use", "direction", tier=tier)
        if not now.least("tier_in_use", tier=tier, direction=way)
    ]


def _head(now: Scrape, url: str) -> Text:
    model, engines = served(now)
    text = Text.assemble(("lamina-kv top", "bold"), f"  {url.removesuffix('/metrics')}  {model}")
    for config in (sample.labels for sample in now.samples.get("config_info", ())[:1]):
        text.append(
            f"\nLamina {config['version']}, chunks of {config['chunk_tokens']} tokens, load "
            f"{config['load_when']} {config['load_mode']}"
        )
        text.append("" if config["loads"] == "yes" else ", loads nothing", "yellow")
        text.append("" if config["saves"] == "yes" else ", saves nothing", "yellow")
    return text.append(f", {engines} engines" if engines > 1 else "")


# -- where prompts came from -------------------------------------------------------------------


def _prompts(seen: Sequence[Scrape]) -> Table:
    now = seen[-1]
    hits = now.by("hit_tokens_total", "tier")
    sources = {**hits, COMPUTED: now.total("computed_tokens_total")}
    everything = now.total("prompt_tokens_total")
    rates = {source: [*_token_rates(seen, source)] for source in sources}
    highest = max((rate for each in rates.values() for rate in each), default=0.0)
    saved = now.by("saved_seconds_total", "tier")
    table = _table("prompt tokens", "total>", "share>", "", "now/s>", "", "prefill saved>")
    for source, tokens in sources.items():
        if not tokens and source in SELDOM:
            continue
        table.add_row(
            source,
            f"{tokens:,.0f}",
            _percent(tokens, everything),
            _bar(tokens, everything),
            f"{rates[source][-1]:,.0f}" if rates[source] else _NOTHING,
            "".join(_spark(rate, highest) for rate in rates[source]),
            _worth(tokens, saved.get(source, 0.0)) if source not in (ENGINE, COMPUTED) else "",
        )
    return table


def _worth(tokens: float, seconds: float) -> str:
    """Prefill that tokens saved; nothing is known of it before a prefill was measured."""
    return time_of(seconds) if seconds or not tokens else _NOTHING


def _token_rates(seen: Sequence[Scrape], source: str) -> Iterator[float]:
    if source == COMPUTED:
        return _rates(seen, "computed_tokens_total")
    return _rates(seen, "hit_tokens_total", tier=source)


# -- tiers -------------------------------------------------------------------------------------


def _tiers(now: Scrape) -> Table:
    table = _table("tier", "used>", "of>", "", "pinned>", "evicted>", "unused for>", "state")
    for tier, used in now.by("tier_used_bytes", "tier").items():
        capacity = now.total("tier_capacity_bytes", tier=tier)
        age = now.mean("eviction_age_seconds", tier=tier)
        table.add_row(
            tier,
            size_of(int(used)),
            size_of(int(capacity)) if capacity else "?",
            _bar(used, capacity) if capacity else "",
            size_of(int(now.total("tier_pinned_bytes", tier=tier))),
            f"{now.total('eviction_age_seconds_count', tier=tier):,.0f}" if capacity else "?",
            _NOTHING if age is None else time_of(age),
            _state(now, tier),
        )
    return table


def _state(now: Scrape, tier: str) -> Text:
    words = stopped(now, tier)
    return Text(", ".join(words), style="bold red") if words else Text("in use", style="green")


# -- bytes -------------------------------------------------------------------------------------


def _bytes(seen: Sequence[Scrape]) -> Table:
    now = seen[-1]
    table = _table("bytes", "now/s>", "total>", "in flight>", "mean time>", "failed>")
    several = len(now.by("write_bytes_total", "tier")) > 1  # what is in flight is not told apart
    for way in _ways(now):
        name = f"{way.direction}_bytes_total"
        rates = [*_rates(seen, name, **way.labels)]
        mean = now.mean(f"{way.direction}_seconds", **way.labels)
        failed = sum(
            count
            for kind, count in now.by("failures_total", "kind", **way.labels).items()
            if kind.startswith(f"{way.direction}_")
        )
        table.add_row(
            way.words,
            size_of(int(rates[-1])) if rates else _NOTHING,
            size_of(int(now.total(name, **way.labels))),
            "" if way.tier and several else _in_flight(now, way),
            _NOTHING if mean is None else time_of(mean),
            Text(f"{failed:,.0f}", style="red" if failed else ""),
        )
    return table


def _in_flight(now: Scrape, way: _Way) -> str:
    return size_of(int(now.total("bytes_in_flight", direction=way.direction)))


def _ways(now: Scrape) -> Iterator[_Way]:
    yield _Way("host → engine (load)", "load")
    yield _Way("engine → host (save)", "save")
    for tier in now.by("write_bytes_total", "tier"):
        yield _Way(f"host → {tier} (write)", "write", tier)
        yield _Way(f"{tier} → host (fetch)", "fetch", tier)
    if _pushes(now):
        yield _Way("→ decode engines (push)", "push")


def _pushes(now: Scrape) -> bool:
    return bool(now.samples.get("pushes_total"))


# -- the rest, one line each -------------------------------------------------------------------


def _lines(seen: Sequence[Scrape]) -> Table:
    now = seen[-1]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    waiting = now.by("waiting_requests", "cause")
    table.add_row(
        "requests wait",
        f"for far tiers {waiting.get('fetch', 0):.0f}, for another's load "
        f"{waiting.get('shared_load', 0):.0f}, for their load "
        f"{now.total('transfers', direction='load'):.0f}, for a push "
        f"{now.total('transfers', direction='receive'):.0f}",
    )
    waited, steps = now.total("wait_seconds_sum"), now.total("wait_seconds_count")
    share = [*_rates(seen, "wait_seconds_sum")]
    table.add_row(
        "model waited",
        f"{time_of(waited)} in {steps:,.0f} steps with loads"
        + (f", now {100 * share[-1]:.1f} % of the time" if share else ""),
    )
    table.add_row(
        "queues",
        f"chunks to write {now.total('write_backlog'):,.0f}, work without a thread "
        f"{now.total('queue_depth'):,.0f}, engine blocks held {now.total('leased_blocks'):,.0f}",
    )
    table.add_row("not found", _counts(now, "misses_total", "reason"))
    table.add_row("not loaded", _counts(now, "loads_skipped_total", "reason"))
    table.add_row("not written", _counts(now, "writes_skipped_total", "reason"))
    if _pushes(now):
        table.add_row("pushes", _push_line(now))
    failed = _counts(now, "failures_total", "kind")
    table.add_row("failures", Text(failed, style="" if failed == "none" else "red"))
    return table


def _push_line(now: Scrape) -> str:
    words = [_counts(now, "pushes_total", "outcome")]
    if now.total("pushes_given_up_total"):
        words.append("given up: " + _counts(now, "pushes_given_up_total", "reason"))
    blocks = now.by("push_blocks", "state")
    words.append("blocks " + ", ".join(f"{state} {n:,.0f}" for state, n in blocks.items()))
    away = [peer for peer, used in now.by("push_peer_in_use", "peer").items() if not used]
    if away:
        words.append(f"NOT USED: {', '.join(away)}")
    return "; ".join(words)


def _counts(now: Scrape, name: str, label: str) -> str:
    return counted(now.by(name, label))


# -- parts -------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    """An empty table; a heading with ``>`` is that of numbers."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for heading in columns:
        number = heading.endswith(">")
        table.add_column(
            heading.removesuffix(">"), justify="right" if number else "left", no_wrap=True
        )
    return table


def _rates(seen: Sequence[Scrape], name: str, **labels: str) -> Iterator[float]:
    """Per second, between each two looks."""
    for before, after in pairwise(seen):
        grown = after.total(name, **labels) - before.total(name, **labels)
        yield max(0.0, grown) / max(1e-3, after.at - before.at)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else _NOTHING


def _bar(part: float, whole: float) -> Text:
    filled = round(_BAR * min(1.0, part / whole)) if whole else 0
    return Text("█" * filled + "░" * (_BAR - filled), style="cyan")


def _spark(value: float, highest: float) -> str:
    if not value:
        return _SPARKS[1]
    return _SPARKS[max(1, round((len(_SPARKS) - 1) * value / highest))]
