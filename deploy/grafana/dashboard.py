"""Writes the dashboard for operators, ``lamina.json``, to standard output.

``python deploy/grafana/dashboard.py > deploy/grafana/lamina.json`` after every change here. The
tests compare the two, and check every query against the metrics that the code publishes.
"""

from __future__ import annotations

import json

from layout import WIDTH, Panel, Query, Row, dashboard


def rate(metric: str, by: str = "", more: str = "", selector: str = "ENGINE") -> str:
    """Increase per second of a counter, summed."""
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate(lamina_{metric}{{{_and(selector, more)}}}[$__rate_interval]))"


def gauge(metric: str, by: str = "", more: str = "", how: str = "sum") -> str:
    """A gauge over all engines."""
    grouped = f"{how} by ({by}) " if by else how
    return f"{grouped}(lamina_{metric}{{{_and('ENGINE', more)}}})"


def quantile(share: float, metric: str, by: str = "", selector: str = "ENGINE") -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', _and('le', by), '', selector)})"


def quantiles(metric: str, by: str = "", selector: str = "ENGINE") -> list[Query]:
    """Median and 99th percentile."""
    name = f"{{{{{by}}}}} " if by else ""
    return [
        Query(quantile(0.5, metric, by, selector), f"{name}median"),
        Query(quantile(0.99, metric, by, selector), f"{name}99 %"),
    ]


def _and(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


LAMINAS = 'tier!~"engine|other"'

ROWS = (
    Row(
        "What it is worth",
        (
            Panel(
                "Found by Lamina",
                "Share of all prompt tokens that came from Lamina's tiers or a push, and were not "
                "computed. vLLM's own prefix cache is not in it.",
                [
                    Query(
                        f"{rate('hit_tokens_total', '', LAMINAS)} / {rate('prompt_tokens_total')}",
                        "found",
                    )
                ],
                "percentunit", "stat", 4,
            ),
            Panel(
                "Prefill saved",
                "Seconds of prefill that tokens from Lamina's tiers saved in the time range, as "
                "predicted from measured prefills. Subtract what loads and waits took.",
                [
                    Query(
                        f"sum(increase(lamina_saved_seconds_total{{ENGINE, {LAMINAS}}}[$__range]))",
                        "saved", instant=True,
                    )
                ],
                "s", "stat", 4,
            ),
            Panel(
                "Prompt tokens by source",
                "Where each token of each prompt came from. `computed` is what the model computed.",
                [
                    Query(rate("hit_tokens_total", "tier"), "{{tier}}"),
                    Query(rate("computed_tokens_total"), "computed"),
                    Query(rate("unfinished_tokens_total"), "unfinished"),
                ],
                "short", stacked=True,
            ),
            Panel(
                "Hit rate by tier",
                "Share of all prompt tokens. A step down after a deployment means that another "
                "model, version or setting looks under other keys.",
                [
                    Query(
                        f"{rate('hit_tokens_total', 'tier')} / ignoring (tier) group_left "
                        f"{rate('prompt_tokens_total')}",
                        "{{tier}}",
                    )
                ],
                "percentunit", most=1,
            ),
        ),
    ),
    Row(
        "Tiers",
        (
            Panel(
                "Fill",
                "Used share of each tier whose size Lamina knows. Full is normal: it evicts then.",
                [
                    Query(
                        f"{gauge('tier_used_bytes', 'tier')} / "
                        f"({gauge('tier_capacity_bytes', 'tier')} > 0)",
                        "{{tier}}",
                    )
                ],
                "percentunit", most=1,
            ),
            Panel(
                "Evictions",
                "Chunks that made room for others. Stores that evict by themselves (valkey, "
                "mooncake, s3, directory) are not in it.",
                [Query(rate("eviction_age_seconds_count", "tier"), "{{tier}}")],
                "ops",
            ),
            Panel(
                "Unused before eviction",
                "For how long evicted chunks had not been used. If that is shorter than the pause "
                "between the turns of a conversation, a larger tier would find them again.",
                quantiles("eviction_age_seconds", "tier"),
                "s",
            ),
            Panel(
                "In use",
                "1: used. 0: it kept failing and is left alone; requests are computed instead.",
                [
                    Query(
                        gauge("tier_in_use", "tier, direction", how="min"),
                        "{{tier}} {{direction}}",
                    ),
                    Query(gauge("push_peer_in_use", "peer", how="min"), "pushes from {{peer}}"),
                ],
                most=1,
            ),
            Panel(
                "Failures",
                "Transfers that failed, by tier and kind. Each costs a recompute. "
                "`fetch_corrupt` is damaged data: see the alert.",
                [Query(rate("failures_total", "tier, kind") + " > 0", "{{tier}} {{kind}}")],
                "ops",
            ),
            Panel(
                "Not found, by why",
                "Prompts whose hit was not whole, by the first chunk that was missing. `evicted`: "
                "a larger tier would have had it. `other_salt`: it was seen under another "
                "`cache_salt` or adapter.",
                [Query(rate("misses_total", "reason"), "{{reason}}")],
                "reqps",
            ),
            Panel(
                "Pinned by requests",
                "Bytes that requests asked to keep. At most a quarter of a tier.",
                [Query(gauge("tier_pinned_bytes", "tier"), "{{tier}}")],
                "bytes",
            ),
        ),
    ),
    Row(
        "Loads: what requests wait for",
        (
            Panel(
                "Load, host memory to engine",
                "Duration of loads. Layerwise loads run beside the model.",
                quantiles("load_seconds"), "s",
            ),
            Panel(
                "Time in which the model waited",
                "Share of time in which a forward pass stood still for a load.",
                [Query(rate("wait_seconds_sum"), "waited")], "percentunit",
            ),
            Panel(
                "Fetch of a chunk, by tier",
                "A chunk's share of the read of its batch, without the queue.",
                quantiles("fetch_seconds", "tier"), "s",
            ),
            Panel(
                "Wait for far tiers",
                "For how long a request waited, without blocks, for chunks of far tiers.",
                quantiles("fetch_wait_seconds"), "s",
            ),
            Panel(
                "Requests that wait",
                "For far tiers, for the same load of another request, for their own load, for a "
                "push.",
                [
                    Query(gauge("waiting_requests", "cause"), "{{cause}}"),
                    Query(gauge("transfers", "", 'direction="load"'), "load"),
                    Query(gauge("transfers", "", 'direction="receive"'), "push"),
                ],
            ),
            Panel(
                "Found and not loaded",
                "Hits that were computed instead. `slower_than_computing`: the tier is too slow "
                "to be worth it.",
                [Query(rate("loads_skipped_total", "reason"), "{{reason}}")], "ops",
            ),
        ),
    ),
    Row(
        "Bytes: what moves",
        (
            Panel(
                "Engine and host memory",
                "Loads and saves, all ranks.",
                [
                    Query(rate("load_bytes_total"), "load"),
                    Query(rate("save_bytes_total"), "save"),
                ],
                "Bps",
            ),
            Panel(
                "Far tiers",
                "Written to them, and fetched for requests that wait.",
                [
                    Query(rate("write_bytes_total", "tier"), "write {{tier}}"),
                    Query(rate("fetch_bytes_total", "tier"), "fetch {{tier}}"),
                ],
                "Bps",
            ),
            Panel(
                "In flight",
                "Bytes of transfers that have not ended.",
                [Query(gauge("bytes_in_flight", "direction"), "{{direction}}")], "bytes",
            ),
            Panel(
                "Queues",
                "Chunks that wait to be written, and work that no thread has taken up.",
                [
                    Query(gauge("write_backlog"), "chunks to write"),
                    Query(gauge("queue_depth"), "work without a thread"),
                ],
            ),
            Panel(
                "Not written",
                "Chunks that a far tier did not get. `evicted`: the tier is slower than what is "
                "saved. `already_there` is good news.",
                [Query(rate("writes_skipped_total", "tier, reason"), "{{tier}} {{reason}}")],
                "ops",
            ),
            Panel(
                "Not saved at once",
                "Chunks whose save had to wait, and those whose request ended first.",
                [
                    Query(rate("saves_held_back_total", "reason"), "{{reason}}"),
                    Query(rate("saves_dropped_total"), "dropped"),
                ],
                "ops",
            ),
        ),
    ),
    Row(
        "Pushes: prefill and decode engines",
        (
            Panel(
                "Pushes by outcome",
                "`sent`, `stopped`: prefill side. `received`, `given_up`: decode side.",
                [Query(rate("pushes_total", "outcome"), "{{outcome}}")], "ops",
            ),
            Panel(
                "Not received, or never announced",
                "Why a decode engine computed a prompt itself.",
                [
                    Query(rate("pushes_given_up_total", "reason"), "given up: {{reason}}"),
                    Query(rate("pushes_skipped_total", "reason"), "skipped: {{reason}}"),
                ],
                "ops",
            ),
            Panel(
                "Announcement to delivery",
                "What a request on a decode engine waits for its push.",
                quantiles("push_wait_seconds"), "s",
            ),
            Panel(
                "Engine blocks of pushes",
                "`quarantined` that does not fall: a prefill engine hangs or is stopped.",
                [Query(gauge("push_blocks", "state"), "{{state}}")],
            ),
            Panel(
                "Backlog by decode engine",
                "Bytes ordered and not there yet.",
                [Query(gauge("push_backlog_bytes", "peer"), "{{peer}}")], "bytes",
            ),
            Panel(
                "Connected engines",
                "As each side sees the other.",
                [Query(gauge("push_links", "side"), "{{side}} engines")],
            ),
        ),
        collapsed=True,
    ),
    Row(
        "Push proxy",
        (
            Panel(
                "Requests by status",
                "What clients got; 499: the client had left.",
                [Query(rate("proxy_requests_total", "status", "", "PROXY"), "{{status}}")], "reqps",
            ),
            Panel(
                "Time to the first byte",
                "Of answers to clients.",
                quantiles("proxy_first_byte_seconds", "", "PROXY"), "s",
            ),
            Panel(
                "Engines in use",
                "0: dead, or left alone because it fails.",
                [
                    Query(
                        "min by (role, engine) (lamina_proxy_engine_usable{PROXY})",
                        "{{role}} {{engine}}",
                    )
                ],
                most=1,
            ),
            Panel(
                "Computed by the decode engine alone",
                "Requests without a push, by reason.",
                [Query(rate("proxy_unpushed_total", "reason", "", "PROXY"), "{{reason}}")], "reqps",
            ),
        ),
        collapsed=True,
    ),
    Row(
        "Set-up",
        (
            Panel(
                "Version and settings",
                "One line for each engine.",
                [Query("lamina_config_info{ENGINE}", "", instant=True)],
                kind="table", width=WIDTH,
            ),
        ),
    ),
)  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(dashboard(ROWS), indent=1))
