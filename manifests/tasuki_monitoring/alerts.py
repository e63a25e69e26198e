"""The alerts: each asks a person to do something, and `runbook` says what comes first."""

from typing import NamedTuple

_ROLE = "namespace, tasuki_dev_deployment, role"
_DEPLOYMENT = "{{ $labels.namespace }}/{{ $labels.tasuki_dev_deployment }}"


class Clock(NamedTuple):
    """Writes the minutes of all windows and delays; a test's are shorter than a minute."""

    minute: int = 60
    """Seconds."""

    def __call__(self, minutes: int) -> str:
        """So many minutes as PromQL has them."""
        seconds = minutes * self.minute
        return f"{seconds // 60}m" if seconds % 60 == 0 else f"{seconds}s"


class Alert(NamedTuple):
    """One alert; `minutes` is how long `expr` must hold before it fires."""

    name: str
    severity: str
    expr: str
    minutes: int
    summary: str
    runbook: str


def groups(t: Clock) -> dict[str, tuple[Alert, ...]]:
    """All alerts, by who or what they are about."""
    return {
        "clients": (*_answers(t), *_speed(t)),
        "pods": _pods(t),
        "hand-over": (*_hand_over(t), *_keeping(t)),
        "operator": _operator(),
    }


def _in_routing(role: str) -> str:
    return f'tasuki_gateway_pods{{role="{role}"}}'


def _answers(t: Clock) -> tuple[Alert, ...]:
    requests = "tasuki_gateway_requests_total"
    return (
        Alert(
            "TasukiErrors",
            "critical",
            "model:tasuki_gateway_errors:ratio_rate5m > 0.05",
            5,
            "{{ $value | humanizePercentage }} of the requests for {{ $labels.model }} fail.",
            'Look at "Requests by status" and "Pods in routing" of the fleet dashboard: 503 '
            "without decode pods means look at `kubectl get infd -A -o wide`; 503 with them means "
            "that they are full, add decode replicas; 502 and 504 have the pod's name in the "
            "gateway's log.",
        ),
        Alert(
            "TasukiModelWithoutPods",
            "critical",
            f"""
            sum by (model) (rate({requests}{{code=~"5.."}}[{t(5)}])) > 0
            unless max by (model) ({_in_routing("decode")}) > 0
            """,
            2,
            "Clients ask for {{ $labels.model }}, which has no decode pod in routing.",
            "`kubectl get infd -A` has the reason in words; when its pods are ready and the "
            "gateway still does not see them, check that both use the same Redis (condition "
            "IndexReady).",
        ),
        Alert(
            "TasukiRefusing",
            "warning",
            f"""
            sum(rate({requests}{{code="429"}}[{t(5)}]))
            / sum(rate({requests}[{t(5)}])) > 0.05
            """,
            5,
            "Gateways refuse {{ $value | humanizePercentage }} of the requests as too many.",
            "Add gateway replicas, or raise TASUKI_MAX_REQUESTS if they have memory and time left.",
        ),
        Alert(
            "TasukiGatewayAbsent",
            "critical",
            "absent(tasuki_gateway_requests_in_flight)",
            5,
            "No gateway is being measured; the endpoint is probably down.",
            "`kubectl -n tasuki-system get pods -l app.kubernetes.io/component=gateway`; when they "
            "run, look at Prometheus' targets: the PodMonitor or its permissions are at fault.",
        ),
    )


def _speed(t: Clock) -> tuple[Alert, ...]:
    return (
        Alert(
            "TasukiFirstTokenSlow",
            "warning",
            "tasuki:time_to_first_token_seconds:p95_5m > 10",
            10,
            "One request in twenty waits {{ $value | humanizeDuration }} for its first token.",
            "On the deployment dashboard, waiting requests on the prefill side ask for prefill "
            'replicas; a long "Until admitted" with idle engines asks for the hand-over dashboard.',
        ),
        Alert(
            "TasukiStreamsSlow",
            "warning",
            "tasuki:inter_token_seconds:p95_5m > 1",
            10,
            "One stream in twenty waits {{ $value | humanizeDuration }} between tokens.",
            'Decode pods are the bottleneck: compare "seconds per step" of the pods, replace one '
            "that stands out, else add decode replicas.",
        ),
    )


def _pods(t: Clock) -> tuple[Alert, ...]:
    return (
        Alert(
            "TasukiQueueGrowing",
            "warning",
            f"""
            min_over_time(
              (
                sum by ({_ROLE}) (tasuki_requests_waiting)
                - sum by ({_ROLE}) (tasuki_requests_running)
              )[{t(10)}:{t(1)}]
            ) > 0
            """,
            5,
            f"More requests wait for {{{{ $labels.role }}}} of {_DEPLOYMENT} than run, for ten "
            "minutes.",
            "Add replicas of this role; when its blocks are all used and its steps short, more "
            "memory per pod helps as well.",
        ),
        Alert(
            "TasukiPreempting",
            "warning",
            f"sum by ({_ROLE}) (rate(tasuki_preemptions_total[{t(5)}])) > 0.1",
            10,
            f"{{{{ $labels.role }}}} pods of {_DEPLOYMENT} put requests back for want of blocks or "
            "state slots.",
            "Lower engine.maxNumSeqs or add replicas; on CUDA engine.memoryShare may leave memory "
            "unused.",
        ),
        Alert(
            "TasukiPodsLost",
            "warning",
            f"sum by (reason) (increase(tasuki_gateway_failovers_total[{t(15)}])) > 3",
            0,
            "Decode pods were lost {{ $value | humanize }} times in mid-stream "
            "({{ $labels.reason }}); other pods went on.",
            "`kubectl get events -A --field-selector involvedObject.kind=Pod` and the last state "
            "of the decode pods: out of memory, evicted, or crashed with a line in the "
            "deployment's conditions.",
        ),
    )


def _hand_over(t: Clock) -> tuple[Alert, ...]:
    failures = "deployment:tasuki_transfer_failures:rate5m"
    return (
        Alert(
            "TasukiHandOversFail",
            "warning",
            f"{failures} / ({failures} + deployment:tasuki_transfers:rate5m > 0) > 0.1",
            10,
            f"{{{{ $value | humanizePercentage }}}} of the hand-overs of {_DEPLOYMENT} fail; "
            "prompts are computed twice.",
            '"Hand-overs that failed" says why: refused_fingerprint during a rollout passes by '
            "itself; unreachable and timeout ask for the NetworkPolicy and the transfer port; "
            "unauthorized means pods with different transfer keys; checksum asks for the network "
            "or the memory of the pod in the decode pods' log.",
        ),
        Alert(
            "TasukiPrefillLost",
            "warning",
            f"""
            max by (model) (max_over_time({_in_routing("prefill")}[{t(30)}])) > 0
            and on (model) max by (model) ({_in_routing("decode")}) > 0
            unless on (model) max by (model) ({_in_routing("prefill")}) > 0
            """,
            5,
            "{{ $labels.model }} has lost its prefill pods; its decode pods compute all prompts, "
            "and streams wait for them.",
            "`kubectl get infd -A -o wide`; the condition PrefillReady says why. Where "
            "prefill.replicas was set to 0 on purpose, this ends by itself within half an hour.",
        ),
    )


def _keeping(t: Clock) -> tuple[Alert, ...]:
    def ended(labels: str) -> str:
        counted = f"tasuki_leases_ended_total{labels}"
        return f"sum by (namespace, tasuki_dev_deployment) (rate({counted}[{t(5)}]))"

    expired = ended('{outcome="expired"}')
    return (
        Alert(
            "TasukiLeasesExpire",
            "warning",
            f"{expired}\n/ {ended('')} > 0.1",
            10,
            f"{{{{ $value | humanizePercentage }}}} of the prefixes that prefill pods of "
            f"{_DEPLOYMENT} kept were never fetched.",
            "Decode pods do not come or come late: look at their waiting requests; if clients "
            "leave before their turn, that is the reason, else raise transfer.leaseSeconds.",
        ),
        Alert(
            "TasukiIndexUnreachable",
            "warning",
            f"sum(rate(tasuki_gateway_index_failures_total[{t(5)}]))\n"
            f"/ sum(rate(tasuki_gateway_routed_total[{t(5)}])) > 0.2",
            5,
            "For {{ $value | humanizePercentage }} of the requests the index has no answer; they "
            "go on, routed by load alone.",
            "`kubectl -n tasuki-system get pods -l app.kubernetes.io/component=redis`; nothing has "
            "to be restored when it is back, pods publish again.",
        ),
    )


def _operator() -> tuple[Alert, ...]:
    return (
        Alert(
            "TasukiReconcilesFail",
            "warning",
            "sum(tasuki_operator_failing_deployments) > 0",
            10,
            "The operator fails again and again; changes to InferenceDeployments may wait.",
            '"Requests to the API server" of the operator dashboard: 403 means that its role lacks '
            "a rule; else the operator's log has the object and the cause in one line.",
        ),
        Alert(
            "TasukiOperatorAbsent",
            "warning",
            "sum(tasuki_operator_leader) < 1 or absent(tasuki_operator_leader)",
            5,
            "No operator works; what runs goes on, but changes and repairs wait.",
            "`kubectl -n tasuki-system get pods,leases`; delete a lease whose holder is gone for "
            "more than a minute.",
        ),
        Alert(
            "TasukiDeploymentNotReady",
            "warning",
            "min by (deployment) (tasuki_operator_deployment_ready) < 1",
            30,
            "{{ $labels.deployment }} has not been ready for half an hour.",
            "`kubectl get infd -A -o wide`; the reason and the message of Ready say what to do.",
        ),
    )
