"""What the bench hands to its reader: JSON, and tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lamina_kv.bench.report import Machine, duration
from lamina_kv.bench.samples import Samples, Target
from peers.arrivals import Service
from peers.settings import Scenario


@dataclass(frozen=True, slots=True)
class Row:
    """One system in one scenario.

    Attributes:
        samples: what was measured.
        is_peer: whether Lamina is compared with it.
        cached: of each prompt, tokens that were not computed.
        per_token: seconds from token to token, the median.
    """

    samples: Samples
    is_peer: bool
    cached: tuple[int, ...] = ()
    per_token: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One scenario.

    Attributes:
        scenario: which.
        title: what was measured.
        rows: by system; seconds, or tokens a second if ``more_is_better``.
        floors: what cannot be gone below, and what it is made of.
        targets: what was promised.
        notes: what a reader must know.
        more_is_better: whether rows are rates.
        services: the mixed load has these instead of rows.
    """

    scenario: Scenario
    title: str
    rows: tuple[Row, ...] = ()
    floors: tuple[Samples, ...] = ()
    targets: tuple[Target, ...] = ()
    notes: tuple[str, ...] = ()
    more_is_better: bool = False
    services: tuple[Service, ...] = ()

    def as_markdown(self) -> str:
        """A heading, tables and notes."""
        parts = [f"### {self.title}"]
        if self.rows:
            parts.append(self._rows_table())
        if self.services:
            parts.append(_services_table(self.services))
        if self.targets:
            parts.append(_targets_table(self.targets))
        parts.extend(self.notes)
        return "\n\n".join(parts)

    def _rows_table(self) -> str:
        show = _rate if self.more_is_better else duration
        best = best_peer(self.rows, more_is_better=self.more_is_better)
        floor = self.floors[0].median if self.floors else None
        lines = []
        for row in self.rows:
            one = row.samples
            against = "" if best is None else f"{one.median / best.samples.median:.2f}x"
            above = "" if floor is None else f"{one.median / floor:.2f}x"
            cached = "/".join(str(count) for count in sorted(set(row.cached)))
            token = "" if row.per_token is None else duration(row.per_token)
            span = f"{show(one.low)} to {show(one.high)}"
            lines.append((one.name, show(one.median), span, against, above, token, cached))
        for one in self.floors:
            span = f"{duration(one.low)} to {duration(one.high)}"
            lines.append((f"*{one.name}*", duration(one.median), span, "", "", "", ""))
        heads = ("", "median", "span", "÷ best peer", "÷ floor", "per token", "cached")
        return table(heads, lines)


def best_peer(rows: Sequence[Row], *, more_is_better: bool = False) -> Row | None:
    """The peer with the best median, if there is one."""
    peers = [row for row in rows if row.is_peer]
    if not peers:
        return None
    choose = max if more_is_better else min
    return choose(peers, key=lambda row: row.samples.median)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


@dataclass(frozen=True, slots=True)
class PeersReport:
    """The outcome of the bench.

    Attributes:
        machine: where it ran.
        settings: the options that it ran with.
        outcomes: of each scenario.
    """

    machine: Machine
    settings: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]

    def as_json(self) -> str:
        """Everything, for a program; times in seconds."""
        document = {
            "bench": "peers",
            "machine": asdict(self.machine),
            "settings": dict(self.settings),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }
        return json.dumps(document, indent=2, default=str) + "\n"

    def as_markdown(self) -> str:
        """The same, for a person."""
        versions = ", ".join(f"{name} {number}" for name, number in self.machine.versions.items())
        where = (
            f"{self.machine.cpu}, {self.machine.cores} cores, "
            f"{self.machine.memory_bytes / (1 << 30):.0f} GiB; {versions}."
        )
        parts = [where, *(outcome.as_markdown() for outcome in self.outcomes)]
        if self.machine.is_busy:
            parts.append(f"**The machine was busy (load {self.machine.busy}): run this again.**")
        return "\n\n".join(parts) + "\n"


def _services_table(services: Sequence[Service]) -> str:
    heads = (
        "system",
        "hits",
        "requests/s",
        "goodput",
        "in time",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "cached",
    )
    lines = [
        (
            one.label,
            f"{one.share:.0%}",
            f"{one.rate:g}",
            f"{one.goodput:.2f}/s",
            f"{one.good}/{one.requests}",
            duration(one.first_median),
            duration(one.first_p99),
            duration(one.token_median),
            duration(one.token_p99),
            f"{one.cached:.0%}",
        )
        for one in services
    ]
    return table(heads, lines)


def _targets_table(targets: Sequence[Target]) -> str:
    lines = []
    for target in targets:
        if target.limit is None:
            promised = verdict = ""
        else:
            promised = f"{'≤' if target.at_most else '≥'} {target.limit:.2f}x"
            verdict = "met" if target.met else "**missed**"
        figure = target.figure
        lines.append((figure.name, f"{figure.median:.2f}x", promised, verdict))
    return table(("", "ratio", "promised", ""), lines)


def _rate(value: float) -> str:
    return f"{value:.0f}/s"
