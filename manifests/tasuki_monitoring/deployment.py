"""One InferenceDeployment, its two roles side by side."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from tasuki_monitoring.panels import Panel, Query, board, deployments, graph, mean, quantiles, rate

_WHERE = 'namespace=~"$namespace",tasuki_dev_deployment=~"$deployment"'
_ROLES = ("prefill", "decode")


def deployment() -> Dashboard:
    """Left prefill, right decode: what differs between them is what to look for."""
    made = board(
        "tasuki-deployment",
        "tasuki: one deployment",
        "An InferenceDeployment's pods: prefill on the left, decode on the right.",
        deployments("tasuki_requests_running"),
    )
    for title, pair in _ROWS.items():
        made = made.with_row(Row(title))
        for role in _ROLES:
            made = made.with_panel(pair(role, f'{_WHERE},role="{role}"'))
    made = made.with_row(Row("What a stream feels"))
    for panel in _streams(f'{_WHERE},role="decode"'):
        made = made.with_panel(panel)
    return made


def _load(role: str, where: str) -> Panel:
    return graph(
        f"{role}: requests",
        "short",
        "Waiting above running for minutes: this role wants more replicas.",
        Query(f"sum(tasuki_requests_running{{{where}}}) or vector(0)", "running"),
        Query(f"sum(tasuki_requests_waiting{{{where}}}) or vector(0)", "waiting"),
        span=12,
    )


def _tokens(role: str, where: str) -> Panel:
    return graph(
        f"{role}: tokens per second",
        "short",
        "Prefill computes prompts; decode computes only what was not handed over, and samples.",
        Query(rate("tasuki_prompt_tokens_computed_total", where), "prompt"),
        Query(rate("tasuki_generated_tokens_total", where), "generated"),
        span=12,
    )


def _steps(role: str, where: str) -> Panel:
    step = (
        f"(sum by (pod) (rate(tasuki_engine_step_seconds_total{{{where}}}[$__rate_interval]))"
        f" / (sum by (pod) (rate(tasuki_engine_steps_total{{{where}}}[$__rate_interval])) > 0))"
        " or vector(0)"
    )
    return graph(
        f"{role}: seconds per step",
        "s",
        "Mean time of an engine step, per pod; on decode pods it is the time between tokens.",
        Query(step, "{{pod}}"),
        span=12,
    )


def _memory(role: str, where: str) -> Panel:
    def filled(pool: str, what: str) -> str:
        held = f"sum(tasuki_{pool}_{what}{{{where}}})"
        return f"({held} / (sum(tasuki_{pool}_capacity{{{where}}}) > 0)) or vector(0)"

    return graph(
        f"{role}: pools",
        "percentunit",
        "Share of KV blocks and state slots in use, and kept for prefix hits alone. In use near "
        "100 %: requests wait or are preempted.",
        Query(filled("blocks", "used"), "blocks used"),
        Query(filled("blocks", "cached"), "blocks cached"),
        Query(filled("state_slots", "used"), "slots used"),
        Query(filled("state_slots", "cached"), "slots cached"),
        span=12,
    )


def _ends(role: str, where: str) -> Panel:
    return graph(
        f"{role}: requests ended",
        "reqps",
        "By how; preemptions put a request back to make room and cost a recomputation.",
        Query(rate("tasuki_requests_total", where, "outcome"), "{{outcome}}"),
        Query(rate("tasuki_preemptions_total", where), "preempted"),
        span=12,
    )


def _streams(where: str) -> tuple[Panel, ...]:
    return (
        graph(
            "Time to first token",
            "s",
            "From arrival at the decode pod: hand-over, queue, first step.",
            *quantiles("tasuki_time_to_first_token_seconds", where),
        ),
        graph(
            "Between tokens",
            "s",
            "Of one choice.",
            *quantiles("tasuki_inter_token_seconds", where),
        ),
        graph(
            "Until admitted",
            "s",
            "Hand-over and queue, mean. High with idle engines: look at the hand-over.",
            Query(mean("tasuki_queue_seconds", where), "mean"),
        ),
    )


_ROWS = {
    "Load": _load,
    "Work": _tokens,
    "Speed": _steps,
    "Memory": _memory,
    "Ends": _ends,
}
