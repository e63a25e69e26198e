"""The hand-over and the index: how state moves, and what prefixes are worth."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from tasuki_monitoring.panels import (
    Panel,
    Query,
    board,
    deployments,
    graph,
    mean,
    quantiles,
    rate,
    share,
)

_WHERE = 'namespace=~"$namespace",tasuki_dev_deployment=~"$deployment"'


def hand_over() -> Dashboard:
    """Transfers, leases, and prefix hits."""
    made = board(
        "tasuki-hand-over",
        "tasuki: hand-over and index",
        "How state moves from prefill to decode pods, and how much is found instead of computed.",
        deployments("tasuki_requests_running"),
    )
    for title, panels in (("Transfers", _transfers()), ("Prefixes", _prefixes())):
        made = made.with_row(Row(title))
        for panel in panels:
            made = made.with_panel(panel)
    return made


def _transfers() -> tuple[Panel, ...]:
    return (
        graph(
            "Bytes taken over",
            "Bps",
            "By transport. tcp where nixl was hoped for: see the pods' logs at start.",
            Query(rate("tasuki_transfer_bytes_total", _WHERE, "backend"), "{{backend}}"),
        ),
        graph(
            "Time of a hand-over",
            "s",
            "On the taking side. It overlaps with the prefill: long prompts take as long as that.",
            *quantiles("tasuki_transfer_seconds", _WHERE),
        ),
        graph(
            "Bytes per hand-over",
            "bytes",
            "Mean; grows with prompts and shrinks with what decode pods already hold.",
            Query(
                share("tasuki_transfer_bytes_total", "tasuki_transfer_seconds_count", _WHERE),
                "mean",
            ),
        ),
        graph(
            "Hand-overs that failed",
            "reqps",
            "Each cost the time to compute the prompt again, never a wrong token. By reason.",
            Query(rate("tasuki_transfer_failures_total", _WHERE, "reason"), "{{reason}}"),
        ),
        graph(
            "Leases held",
            "short",
            "Prefixes that prefill pods keep for decode pods. Growth without load: nobody fetches.",
            Query(f"sum by (pod) (tasuki_leases{{{_WHERE}}}) or vector(0)", "{{pod}}"),
        ),
        graph(
            "Leases ended",
            "reqps",
            "released is right; expired: decode pods did not come, or came too late.",
            Query(rate("tasuki_leases_ended_total", _WHERE, "outcome"), "{{outcome}}"),
        ),
    )


def _prefixes() -> tuple[Panel, ...]:
    hit, asked = "tasuki_prefix_hit_tokens_total", "tasuki_prefix_query_tokens_total"
    by_role = tuple(
        Query(share(hit, asked, f'{_WHERE},role="{role}"'), role) for role in ("prefill", "decode")
    )
    return (
        graph(
            "Prompt tokens found",
            "percentunit",
            "Share of prompt tokens in the cache. On decode pods what was handed over counts: "
            "near zero there means that hand-overs are lost.",
            *by_role,
        ),
        graph(
            "Depth of a hit",
            "short",
            "Mean prompt tokens that a pod did not compute.",
            *(
                Query(mean("tasuki_prefix_hit_depth_tokens", f'{_WHERE},role="{role}"'), role)
                for role in ("prefill", "decode")
            ),
        ),
        graph(
            "Look-ups without an answer",
            "reqps",
            "Of gateways to the index. Requests go on, routed by load alone.",
            Query(rate("tasuki_gateway_index_failures_total"), "failed"),
        ),
    )
