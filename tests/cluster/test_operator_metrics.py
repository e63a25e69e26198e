"""Debian's Prometheus reads a working operator: its dashboard has data, its absence is an alert."""

import json
import math
import re
from pathlib import Path

import outside_tools
import pytest
import yaml
from cluster.api import Cluster
from operator_process import condition, deployment, install, running
from prometheus_server import Prometheus
from redis_server import free_port

MONITORING = Path(__file__).parents[2] / "manifests/components/monitoring"


def panels() -> list[tuple[str, str]]:
    """(panel, query) of the operator's dashboard."""
    board = json.loads((MONITORING / "dashboards/operator.json").read_text())
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "30s"))
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]


def alerts() -> dict[str, object]:
    """The operator's alerts, without their patience."""
    spec = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
    groups = [group for group in spec["groups"] if group["name"] == "tasuki-operator"]
    text = re.sub(r'"for": "\w+"', '"for": "0s"', json.dumps({"groups": groups}))
    return dict(json.loads(text))


@pytest.fixture(scope="session")
def executable() -> str:
    """Before the cluster, from whose network nothing can be installed."""
    return outside_tools.debian("prometheus", "prometheus")


def test_the_operators_dashboard_has_data_and_its_absence_is_an_alert(
    executable: str, cluster: Cluster, tmp_path: Path
) -> None:
    install(cluster)
    port = free_port()
    targets = [(f"127.0.0.1:{port}", {"namespace": "tasuki-system", "pod": "operator"})]
    with (
        cluster.namespace("measured") as namespace,
        Prometheus(executable, tmp_path / "prometheus", targets, alerts()) as prometheus,
    ):
        with running(cluster, tmp_path, f"--port={port}"):
            cluster.apply(deployment("one", namespace))
            cluster.wait(
                "a condition", lambda: condition(cluster, "one", namespace, "Ready")[0] == "False"
            )

            def without_data() -> list[str]:
                return [
                    title
                    for title, query in panels()
                    if not any(math.isfinite(value) for value in prometheus.query(query))
                ]

            cluster.wait("data in every panel", lambda: not without_data())
            assert prometheus.query('sum(tasuki_operator_deployments{ready="false"})') == [1]
            assert prometheus.query("sum(tasuki_operator_leader)") == [1]
            firing = {"TasukiDeploymentNotReady"}
            cluster.wait("the alert that is due", lambda: prometheus.firing() == firing)
        cluster.wait(
            "the operator is missed", lambda: "TasukiOperatorAbsent" in prometheus.firing()
        )
