"""What ``lamina-kv doctor --url`` reads in a running server's ``/metrics``, in plain words.

Counters count from the server's start. Thresholds are those of the alerts in
``deploy/prometheus/lamina.rules.yml``, which look at the last minutes instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lamina_kv.cli.checks import Finding, Verdict
from lamina_kv.cli.scrape import Scrape, ScrapeError, fetch, metrics_url
from lamina_kv.cli.top_view import SELDOM, counted, served, stopped
from lamina_kv.plan import COMPUTED, ENGINE, NEAR, OTHER, PUSHED
from lamina_kv.quantities import size_of, time_of

_UNWRITTEN = 0.2
"""Chunks that host memory gave up unwritten, as a share of those written."""
_SLOWER = 0.5
"""Hits that were computed because loading takes longer, as a share of lookups."""
_EVICTED = 0.25
"""Lookups whose next chunk was evicted, as a share of all: a larger tier may be worth its price."""
_FAILED = 0.01
"""Transfers that failed, as a share of all: fewer are an accident."""
_GIVEN_UP = 0.1
"""Pushes that were given up, as a share of those that were announced."""

_MISSED = {
    "evicted": "a larger tier would have had them: lamina-kv bench trace says how large",
    "other_salt": "requests with different cache_salt or adapters share nothing",
    "other_weights": "the weights have changed: name them, and the old chunks are found again",
    "not_kept": "their saves were not over, were held back, or have failed",
    "never_seen": "normal for new prompts. After an upgrade or with another model all are new: "
    "lamina-kv inspect says how namespaces differ",
}
_FAILURES = {
    "corrupt": "look at the disk or the store, and run lamina-kv verify on it",
    "late": "it is too slow for what it is asked: more bandwidth, or keep: shared",
    "overdue": "it is too slow for what it is asked: more bandwidth, or keep: shared",
    "deadline": "loads are too slow: lamina-kv doctor on the server looks at pinning and NUMA",
    "refused": "it is full, or permissions are missing",
    "down": "it answers with errors, which the server's log names",
}
_NO_FAULT = "gone"
"""The kind of failure that is nobody's: the store had evicted the chunk."""


def server(address: str) -> Iterator[Finding]:
    """What a server says of itself, or why it says nothing.

    Args:
        address: its URL, as people write it.
    """
    try:
        now = fetch(metrics_url(address))
    except ScrapeError as error:
        yield Finding("server", Verdict.FAILED, error.found, error.advice)
        return
    yield from read(now)


def read(now: Scrape) -> Iterator[Finding]:
    """What the figures of a server mean.

    Args:
        now: one scrape; of several engines the sums are looked at.
    """
    yield from _set_up(now)
    for tier in now.by("tier_used_bytes", "tier"):
        yield _tier(now, tier)
    yield from _hits(now)
    yield from _not_loaded(now)
    yield from _unwritten(now)
    yield from _failures(now)
    yield _waits(now)
    if now.samples.get("pushes_total"):
        yield from _pushes(now)


def _set_up(now: Scrape) -> Iterator[Finding]:
    models, engines = served(now)
    several = f"; {engines} engines, of which these are the sums" if engines > 1 else ""
    yield Finding("server", Verdict.GOOD, f"serves {models}{several}")
    ways = sorted({_way(sample.labels) for sample in now.samples.get("config_info", ())})
    if len(ways) > 1:
        found = f"its engines are set up differently: {' | '.join(ways)}"
        advice = "start all engines of a server with one version and one configuration"
        yield Finding("Lamina", Verdict.WARNING, found, advice)
    else:
        yield from (Finding("Lamina", Verdict.GOOD, way) for way in ways)


def _way(labels: Mapping[str, str]) -> str:
    does = [verb for verb in ("loads", "saves") if labels[verb] == "yes"]
    if labels["push"] == "yes":
        does.append("takes part in pushes")
    return (
        f"{labels['version']}; tiers {labels['tiers'].replace(',', ', ')}; chunks of "
        f"{labels['chunk_tokens']} tokens; load.when {labels['load_when']}, load.mode "
        f"{labels['load_mode']}; {', '.join(does) or 'neither loads nor saves'}"
    )


def _tier(now: Scrape, tier: str) -> Finding:
    used, capacity = (now.total(f"tier_{what}_bytes", tier=tier) for what in ("used", "capacity"))
    found = "its store knows how full it is"
    if capacity:
        found = f"{size_of(int(used))} of {size_of(int(capacity))} used"
    evicted = now.total("eviction_age_seconds_count", tier=tier)
    age = now.mean("eviction_age_seconds", tier=tier)
    if age is not None:
        found += f"; {evicted:,.0f} chunks evicted, on average unused for {time_of(age)}"
    ways = stopped(now, tier)
    if not ways:
        return Finding(f"tier {tier}", Verdict.GOOD, f"in use; {found}")
    return Finding(
        f"tier {tier}",
        Verdict.FAILED,
        f"out of use: {' and '.join(ways)}, because it kept failing; {found}",
        "is the store up, has it room, may this user write? The server's log names the error. "
        "The tier is tried again by itself, and requests are computed until then",
    )


def _hits(now: Scrape) -> Iterator[Finding]:
    prompts = now.total("prompt_tokens_total")
    if not prompts:
        found = "no prompt has ended yet"
        yield Finding("hits", Verdict.GOOD, found, "send one of some thousand tokens, twice")
        return
    hits = now.by("hit_tokens_total", "tier")
    shares = [
        f"{source} {100 * tokens / prompts:.1f} %"
        for source, tokens in (*hits.items(), (COMPUTED, now.total("computed_tokens_total")))
        if tokens or source not in SELDOM
    ]
    seconds = now.by("saved_seconds_total", "tier")
    saved = sum(each for tier, each in seconds.items() if tier not in (ENGINE, OTHER))
    worth = f"{time_of(saved)} of prefill saved"
    if not saved and any(hits.values()):
        worth = "what that saved is known once a prefill was measured"
    found = f"of {prompts:,.0f} prompt tokens {', '.join(shares)}; {worth}"
    yield Finding("hits", Verdict.GOOD, found)
    yield from _misses(now)


def _misses(now: Scrape) -> Iterator[Finding]:
    misses = now.by("misses_total", "reason")
    if not any(misses.values()):
        return
    evicted = misses.get("evicted", 0) > _EVICTED * now.total("lookups_total")
    reason = "evicted" if evicted else max(misses, key=misses.__getitem__)
    verdict = Verdict.WARNING if evicted else Verdict.GOOD
    found = f"prompts that were not found whole: {counted(misses)}"
    yield Finding("misses", verdict, found, _MISSED.get(reason, ""))


def _not_loaded(now: Scrape) -> Iterator[Finding]:
    skipped = now.by("loads_skipped_total", "reason")
    if not any(skipped.values()):
        return
    verdict, advice = Verdict.GOOD, ""
    if skipped.get("slower_than_computing", 0) > _SLOWER * now.total("lookups_total"):
        verdict = Verdict.WARNING
        advice = "loading takes longer than computing: make the slow tier faster, or take it out"
    yield Finding("not loaded", verdict, f"hits that were computed: {counted(skipped)}", advice)


def _unwritten(now: Scrape) -> Iterator[Finding]:
    for tier, lost in now.by("writes_skipped_total", "tier", reason="evicted").items():
        written = now.total("write_seconds_count", tier=tier)
        if lost > _UNWRITTEN * written:
            yield Finding(
                f"writes to {tier}",
                Verdict.WARNING,
                f"host memory gave up {lost:,.0f} chunks unwritten; {written:,.0f} were written",
                "more bandwidth, a larger host.capacity, keep: shared, or save.tokens: prompt",
            )


def _failures(now: Scrape) -> Iterator[Finding]:
    failed = {
        tier: {
            kind: count
            for kind, count in now.by("failures_total", "kind", tier=tier).items()
            if count and not kind.endswith(_NO_FAULT)
        }
        for tier in now.words("failures_total", "tier")
    }
    if not any(failed.values()):
        yield Finding("failures", Verdict.GOOD, "none")
    for tier, kinds in failed.items():
        if kinds:
            yield _failing(now, tier, kinds)


def _failing(now: Scrape, tier: str, kinds: Mapping[str, float]) -> Finding:
    damaged = [kind for kind in kinds if kind.endswith("_corrupt")]
    worst = damaged[0] if damaged else max(kinds, key=kinds.__getitem__)
    went_well = sum(now.total(f"{way}_seconds_count", **labels) for way, labels in _transfers(tier))
    often = sum(kinds.values()) > _FAILED * (went_well + sum(kinds.values()))
    return Finding(
        f"failures of {tier}",
        Verdict.WARNING if damaged or often else Verdict.GOOD,
        f"{counted(kinds)}, beside {went_well:,.0f} transfers that went well; what failed is "
        "computed",
        _FAILURES.get(worst.rpartition("_")[2], "the server's log names the error"),
    )


def _transfers(tier: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Histograms of what goes to and from a tier, with the labels that tell them apart."""
    if tier == NEAR:
        yield from (("load", {}), ("save", {}))
    elif tier == PUSHED:
        yield "push", {}
    else:
        yield from (("fetch", {"tier": tier}), ("write", {"tier": tier}))


def _waits(now: Scrape) -> Finding:
    waiting = now.by("waiting_requests", "cause")
    requests = sum(waiting.values()) + now.total("transfers", direction="load")
    mean = now.mean("fetch_wait_seconds")
    far = "" if mean is None else f"; a request waited {time_of(mean)} for far tiers, on average"
    model = now.mean("wait_seconds")
    stood = "" if model is None else f"; the model waited {time_of(model)} in a step that loads"
    return Finding(
        "waits",
        Verdict.GOOD,
        f"{requests:,.0f} requests wait for a tier now, and {now.total('write_backlog'):,.0f} "
        f"chunks to be written{far}{stood}",
    )


def _pushes(now: Scrape) -> Iterator[Finding]:
    outcomes = now.by("pushes_total", "outcome")
    given_up = now.by("pushes_given_up_total", "reason")
    lost = sum(count for reason, count in given_up.items() if reason != "cancelled")
    announced = outcomes.get("received", 0) + outcomes.get("given_up", 0)
    found = counted(outcomes)
    if any(given_up.values()):
        found += f"; given up: {counted(given_up)}"
    if lost > _GIVEN_UP * announced:
        advice = "look at the prefill engines: overload (deadline), network (lost), log (failed)"
        yield Finding("pushes", Verdict.WARNING, found, advice)
    else:
        yield Finding("pushes", Verdict.GOOD, found)
    held = now.total("push_blocks", state="quarantined")
    if held:
        yield Finding(
            "push blocks",
            Verdict.WARNING,
            f"{held:,.0f} are quarantined, because a prefill engine may still write to them",
            "if they stay so, find the prefill engine that hangs, and end all of its processes",
        )
    for peer, used in now.by("push_peer_in_use", "peer").items():
        if not used:
            yield Finding(
                f"prefill engine {peer}",
                Verdict.WARNING,
                "not used, because its pushes kept failing",
                "is it up, reachable at this address, with the same push.token?",
            )
