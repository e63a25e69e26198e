"""Prometheus and a trace collector see a cluster that serves: pods of our images, found through
the PodMonitors that the manifests and the operator make."""

from collections.abc import Iterator

import alert_faults
import cluster_faults
import dashboards
import demo_cluster
import httpx
import outside_tools
import prometheus_operator
import pytest
from cluster.api import Cluster
from cluster.machine import ADDRESS
from cluster.own import OwnCluster
from demo_cluster import ROOT, SYSTEM, endpoint
from prometheus_server import Prometheus
from trace_collector import Collector, check_parents, collecting

from tasuki_monitoring import rules

pytestmark = pytest.mark.timeout(600, func_only=True)

RULES = rules.spec(rules.Clock(minute=4))
"""The operator tries ever more seldom what fails: its first minute must do for an alert."""
ALERT_SECONDS = 240.0
DATA_SECONDS = 120.0
ROLES = ("prefill", "decode")
PODS = ("gateway", "operator", *ROLES)


@pytest.fixture(scope="module")
def built(built: list[str]) -> list[str]:
    """Programs too, here before the cluster's network takes the way to the packages."""
    outside_tools.debian("prometheus", "prometheus")
    prometheus_operator.crds()
    return built


@pytest.fixture(scope="module")
def collector(built: list[str], cluster: Cluster) -> Iterator[Collector]:
    with collecting(ADDRESS) as collector:
        yield collector


@pytest.fixture(scope="module")
def serving(built: list[str], cluster: Cluster, collector: Collector) -> Iterator[OwnCluster]:
    """The cluster with the monitoring component; its pods tell the collector of their spans."""
    assert isinstance(cluster, OwnCluster)
    cluster.load_images(built)
    prometheus_operator.install(cluster)
    tracing = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with demo_cluster.installed(cluster):
        cluster.kustomize(ROOT / "manifests/components/monitoring")
        words = [f"{name}={value}" for name, value in tracing.items()]
        gateway = ("deployment/tasuki-gateway", "--namespace", SYSTEM)
        cluster.kubectl("set", "env", *gateway, *words)
        cluster.wait_for_rollout("tasuki-gateway", SYSTEM, seconds=120)
        demo_cluster.apply(cluster, demo_cluster.demo(env=tracing))
        yield cluster


@pytest.fixture(scope="module")
def prometheus(
    serving: OwnCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    executable = outside_tools.debian("prometheus", "prometheus")
    folder = tmp_path_factory.mktemp("seen")
    with (
        prometheus_operator.Discovery(serving, folder) as discovery,
        Prometheus(executable, folder, [discovery.job], RULES) as server,
    ):
        yield server


def clients(cluster: Cluster) -> alert_faults.Clients:
    """Some that leave operator and control plane the time to do their work."""
    return alert_faults.Clients(endpoint(cluster), 2, model="demo", pause=0.3)


def test_a_request_is_one_trace_from_the_gateways_pod_to_the_decode_pods(
    serving: OwnCluster, collector: Collector
) -> None:
    url = endpoint(serving)
    counted = {f'tasuki_gateway_pods{{model="demo",role="{role}"}} 1.0' for role in ROLES}
    serving.wait(
        "the gateway knows a pod of each role",
        lambda: counted <= set(httpx.get(f"{url}/metrics", timeout=10).text.splitlines()),
    )
    body = {"model": "demo", "prompt": "And it came to pass. " * 9, "max_tokens": 8}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200
    found = collector.legs(answer.headers["x-request-id"])
    check_parents(found)
    assert found["tasuki-decode", "hand_over"].attributes["tasuki.bytes"] > 0


def test_every_panel_variable_and_rule_has_data_of_a_cluster_under_load(
    serving: OwnCluster, prometheus: Prometheus
) -> None:
    queries = [
        *dashboards.panels(*dashboards.ALL, window="20s"),
        *dashboards.variables(*dashboards.ALL),
        *dashboards.recorded(RULES),
    ]
    with clients(serving):
        dashboards.wait_for_data(prometheus, queries, DATA_SECONDS)
        moved = "sum(rate(tasuki_transfer_bytes_total[20s]))"
        ready = 'sum(tasuki_operator_deployments{ready="true"})'
        steps = "rate(tasuki_engine_steps_total{namespace='models'}[20s])"
        by_role = f"sum by (tasuki_dev_role) ({steps})"
        serving.wait("all are read", lambda: prometheus.query("up") == [1] * len(PODS))
        serving.wait("state moves", lambda: sum(prometheus.query(moved)) > 0)
        serving.wait("one is ready", lambda: prometheus.query(ready) == [1])
        serving.wait("both step", lambda: sum(one > 0 for one in prometheus.query(by_role)) == 2)
        serving.wait("no alert fires", lambda: prometheus.firing() == set())


@pytest.mark.parametrize(
    ("fault", "due"), cluster_faults.FAULTS, ids=lambda one: getattr(one, "__name__", "")
)
def test_alerts_fire_while_their_fault_lasts_and_clear_after(
    serving: OwnCluster,
    prometheus: Prometheus,
    fault: cluster_faults.Fault,
    due: frozenset[str],
) -> None:
    with clients(serving):
        with fault(serving):
            prometheus.wait_fired(due, ALERT_SECONDS)
        prometheus.wait_clear(due, ALERT_SECONDS)
