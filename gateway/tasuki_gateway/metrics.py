"""The gateway's metrics; updated once per request or per read from a pod, never per token."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

registry = CollectorRegistry()

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STEPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_TOKENS = (0, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)

requests = Counter(
    "tasuki_gateway_requests_total",
    "Client requests answered, by HTTP status (499: the client left).",
    ["model", "endpoint", "code"],
    registry=registry,
)
in_flight = Gauge(
    "tasuki_gateway_requests_in_flight", "Client requests being served.", registry=registry
)
request_seconds = Histogram(
    "tasuki_gateway_request_seconds",
    "From a request's first byte to its answer's last.",
    ["endpoint"],
    buckets=_SECONDS,
    registry=registry,
)
time_to_first_token_seconds = Histogram(
    "tasuki_gateway_time_to_first_token_seconds",
    "From a request's first byte to the first bytes of its text.",
    ["endpoint"],
    buckets=_SECONDS,
    registry=registry,
)
inter_token_seconds = Histogram(
    "tasuki_gateway_inter_token_seconds",
    "Between two reads of tokens from a decode pod, mean over a prompt's stream.",
    buckets=_STEPS,
    registry=registry,
)
prompt_tokens = Counter(
    "tasuki_gateway_prompt_tokens_total", "Prompt tokens of answered requests.", registry=registry
)
completion_tokens = Counter(
    "tasuki_gateway_completion_tokens_total", "Tokens sent to clients.", registry=registry
)
routed = Counter(
    "tasuki_gateway_routed_total",
    "Prompts by route: prefill (handed over), local (the decode pod prefills).",
    ["route"],
    registry=registry,
)
hit_depth_tokens = Histogram(
    "tasuki_gateway_prefix_hit_depth_tokens",
    "Prompt tokens that the chosen decode pod held already, by the index.",
    buckets=_TOKENS,
    registry=registry,
)
prefill_leg_failures = Counter(
    "tasuki_gateway_prefill_leg_failures_total",
    "Prefill pods that gave no ticket, by reason.",
    ["reason"],
    registry=registry,
)
failovers = Counter(
    "tasuki_gateway_failovers_total",
    "Decode pods lost before their stream was complete, by reason.",
    ["reason"],
    registry=registry,
)
for _reason in ("connect", "cut", "silent", "refused", "retry"):
    failovers.labels(_reason)  # Prometheus sees no increase in what begins above zero
index_failures = Counter(
    "tasuki_gateway_index_failures_total",
    "Look-ups that the index did not answer.",
    registry=registry,
)
event_loop_tasks = Gauge(
    "tasuki_gateway_event_loop_tasks", "Tasks of the event loop, now.", registry=registry
)
pods = Gauge("tasuki_gateway_pods", "Pods in routing.", ["model", "role"], registry=registry)
