"""Debian's Prometheus reads a working operator: its dashboard has data, its absence is an alert."""

from pathlib import Path

import dashboards
import outside_tools
import pytest
from cluster.api import Cluster
from operator_process import condition, deployment, install, running
from prometheus_server import Prometheus, static
from redis_server import free_port

from tasuki_monitoring import rules

GROUPS = rules.spec(rules.Clock(minute=1))["groups"]
RULES = {"groups": [group for group in GROUPS if group["name"] == "tasuki-operator"]}


@pytest.fixture(scope="session")
def executable() -> str:
    """Before the cluster, from whose network nothing can be installed."""
    return outside_tools.debian("prometheus", "prometheus")


def test_the_operators_dashboard_has_data_and_its_absence_is_an_alert(
    executable: str, cluster: Cluster, tmp_path: Path
) -> None:
    install(cluster)
    port = free_port()
    job = static((f"127.0.0.1:{port}", {"namespace": "tasuki-system", "pod": "operator"}))
    with (
        cluster.namespace("measured") as namespace,
        Prometheus(executable, tmp_path / "prometheus", [job], RULES) as prometheus,
    ):
        with running(cluster, tmp_path, f"--port={port}"):
            cluster.apply(deployment("one", namespace))
            cluster.wait(
                "a condition", lambda: condition(cluster, "one", namespace, "Ready")[0] == "False"
            )

            dashboards.wait_for_data(prometheus, dashboards.panels("operator", window="30s"), 60)
            for query in (
                'sum(tasuki_operator_deployments{ready="false"})',
                "sum(tasuki_operator_leader)",
            ):
                cluster.wait(query, lambda query=query: prometheus.query(query) == [1])
            firing = {"TasukiDeploymentNotReady"}
            cluster.wait("the alert that is due", lambda: prometheus.firing() == firing)
        cluster.wait(
            "the operator is missed", lambda: "TasukiOperatorAbsent" in prometheus.firing()
        )
