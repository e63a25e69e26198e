"""The fleet: what clients of the cluster's endpoint see, and where their requests go."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from tasuki_monitoring.panels import Panel, Query, board, figure, graph, quantiles, rate, share

_MODEL = 'model=~"$model"'
_BAD = _MODEL + ',code=~"5.."'


def fleet() -> Dashboard:
    """All gateways together."""
    made = board(
        "tasuki-fleet",
        "tasuki: fleet",
        "The OpenAI endpoint as its clients see it, all gateways together.",
        (("model", "label_values(tasuki_gateway_requests_total, model)"),),
    )
    made = made.with_row(Row("What clients see"))
    for panel in (*_figures(), *_clients()):
        made = made.with_panel(panel)
    made = made.with_row(Row("Where requests go"))
    for panel in _routes():
        made = made.with_panel(panel)
    return made


def _figures() -> tuple[Panel, ...]:
    errors = (
        f"(sum(rate(tasuki_gateway_requests_total{{{_BAD}}}[$__rate_interval])) or vector(0))"
        f" / (sum(rate(tasuki_gateway_requests_total{{{_MODEL}}}[$__rate_interval])) > 0)"
        " or vector(0)"
    )
    first = quantiles("tasuki_gateway_time_to_first_token_seconds", of=(95,))[0].expr
    return (
        figure(
            "Requests",
            "reqps",
            "Requests answered per second.",
            rate("tasuki_gateway_requests_total", _MODEL),
        ),
        figure(
            "Errors",
            "percentunit",
            "Share of answers with status 5xx. Above 5 % for five minutes an alert fires.",
            errors,
            worry=0.05,
        ),
        figure(
            "First token, p95",
            "s",
            "From a request's first byte to the first bytes of its text.",
            first,
            worry=10,
        ),
        figure(
            "In flight",
            "short",
            "Requests being served now.",
            "sum(tasuki_gateway_requests_in_flight)",
        ),
    )


def _clients() -> tuple[Panel, ...]:
    prefix = "tasuki_gateway"
    return (
        graph(
            "Requests by status",
            "reqps",
            "499: the client left. 429: a gateway is at its limit. 503: pods are full or gone.",
            Query(rate(f"{prefix}_requests_total", _MODEL, "code"), "{{code}}"),
        ),
        graph(
            "Requests by model",
            "reqps",
            "By the name that clients sent.",
            Query(rate(f"{prefix}_requests_total", _MODEL, "model"), "{{model}}"),
        ),
        graph(
            "Tokens",
            "short",
            "Prompt tokens of answered requests, and tokens sent, per second.",
            Query(rate(f"{prefix}_prompt_tokens_total"), "prompt"),
            Query(rate(f"{prefix}_completion_tokens_total"), "sent"),
        ),
        graph(
            "Time to first token",
            "s",
            "Waiting, prefill and hand-over. Rising with load: prefill pods are the bottleneck.",
            *quantiles(f"{prefix}_time_to_first_token_seconds"),
        ),
        graph(
            "Between tokens",
            "s",
            "Mean gap of a stream. Rising with load: decode pods are the bottleneck.",
            *quantiles(f"{prefix}_inter_token_seconds"),
        ),
        graph(
            "Whole request",
            "s",
            "From first byte to last; long answers take long.",
            *quantiles(f"{prefix}_request_seconds"),
        ),
    )


def _routes() -> tuple[Panel, ...]:
    prefix = "tasuki_gateway"
    return (
        graph(
            "Pods in routing",
            "short",
            "As the gateways see them. A model without decode pods is answered with 503.",
            Query(
                f"max by (model, role) ({prefix}_pods{{{_MODEL}}}) or vector(0)",
                "{{model}} {{role}}",
            ),
        ),
        graph(
            "Prompts by route",
            "reqps",
            "prefill: computed elsewhere and handed over. local: too little to compute for a hop.",
            Query(rate(f"{prefix}_routed_total", by="route"), "{{route}}"),
        ),
        graph(
            "Legs that failed",
            "reqps",
            "No client saw these: another pod went on, or the decode pod computed the prompt.",
            Query(rate(f"{prefix}_failovers_total", by="reason"), "decode pod: {{reason}}"),
            Query(rate(f"{prefix}_prefill_leg_failures_total", by="reason"), "prefill: {{reason}}"),
        ),
        graph(
            "Tasks per gateway",
            "short",
            "Tasks of the event loop follow requests in flight; growth without load is a leak.",
            Query(f"sum by (pod) ({prefix}_event_loop_tasks)", "{{pod}}"),
            span=12,
        ),
        graph(
            "Prompt tokens already held",
            "percentunit",
            "Share of prompt tokens that the chosen decode pod held, by the index.",
            Query(
                share(f"{prefix}_prefix_hit_depth_tokens_sum", f"{prefix}_prompt_tokens_total"),
                "held",
            ),
            span=12,
        ),
    )
