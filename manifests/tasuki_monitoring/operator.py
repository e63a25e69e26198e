"""The operator itself: how fast it answers changes, what it costs the API server."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tasuki_monitoring.panels import Panel, Query, board, figure, graph, quantiles, rate


def operator() -> Dashboard:
    """All replicas together; one of them works."""
    made = board(
        "tasuki-operator",
        "tasuki: operator",
        "Reconciles of InferenceDeployments, and the operator's requests to the API server.",
    )
    for panel in (*_figures(), *_work()):
        made = made.with_panel(panel)
    return made


def _figures() -> tuple[Panel, ...]:
    def deployments(ready: str) -> str:
        return f'sum(tasuki_operator_deployments{{ready="{ready}"}}) or vector(0)'

    return (
        figure("Ready", "short", "InferenceDeployments that would answer.", deployments("true")),
        figure(
            "Not ready",
            "short",
            "`kubectl get infd -A` says why.",
            deployments("false"),
            worry=1,
        ),
        figure(
            "Waiting",
            "short",
            "InferenceDeployments that wait for their turn; 0 but for moments.",
            "sum(tasuki_operator_queue_depth)",
            worry=50,
        ),
        figure(
            "Leaders",
            "short",
            "Replicas that work: 1, or 0 for seconds while the lease changes hands.",
            "sum(tasuki_operator_leader)",
        ),
    )


def _work() -> tuple[Panel, ...]:
    prefix = "tasuki_operator"
    return (
        graph(
            "Reconciles",
            "ops",
            "Looks at one InferenceDeployment, by result.",
            Query(rate(f"{prefix}_reconcile_seconds_count", by="result"), "{{result}}"),
        ),
        graph(
            "Time of a reconcile",
            "s",
            "Most of it is the API server's.",
            *quantiles(f"{prefix}_reconcile_seconds"),
        ),
        graph(
            "Reconciles that failed",
            "ops",
            "Tried again with growing pauses; by cause.",
            Query(rate(f"{prefix}_reconcile_failures_total", by="reason"), "{{reason}}"),
        ),
        graph(
            "Children applied",
            "ops",
            "By kind. Without changes to a spec this is drift: someone else writes these objects.",
            Query(rate(f"{prefix}_applied_total", by="kind"), "{{kind}}"),
        ),
        graph(
            "Requests to the API server",
            "reqps",
            "Watches aside. 403: a permission is missing; 429: the server asks for patience.",
            Query(rate(f"{prefix}_api_requests_total", by="verb, code"), "{{verb}} {{code}}"),
        ),
        graph(
            "Time of a request",
            "s",
            "To the API server.",
            *quantiles(f"{prefix}_api_request_seconds"),
        ),
    )
