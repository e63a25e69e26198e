"""Objects of the Prometheus operator's API, as its own CRDs have them, on a real API server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_operator
import pytest
from cluster import external
from cluster.api import Cluster
from cluster.commands import CommandError
from operator_process import STOP_SECONDS, condition, deployment, install, running

MONITORING = Path(__file__).parents[2] / "manifests/components/monitoring"
REPAIR_SECONDS = 10.0
KIND = "podmonitors.monitoring.coreos.com"


@pytest.fixture(scope="module")
def crds(able: None) -> None:
    """Here before the cluster, from whose network nothing can be downloaded."""
    if external.configured():
        pytest.skip("the CRDs of a Prometheus operator that others may use are left alone")
    prometheus_operator.crds()


@pytest.fixture(scope="module")
def installed(crds: None, cluster: Cluster) -> Iterator[Cluster]:
    install(cluster)
    yield cluster
    prometheus_operator.uninstall(cluster)


def monitors(cluster: Cluster, namespace: str) -> list[dict[str, Any]]:
    """The PodMonitors of a namespace."""
    return cluster.list(KIND, namespace)


def specs(cluster: Cluster, namespace: str) -> dict[str, Any]:
    """Those of its PodMonitors, by name."""
    return {one["metadata"]["name"]: one["spec"] for one in monitors(cluster, namespace)}


def test_an_operator_makes_pod_monitors_where_that_api_exists_and_none_where_not(
    installed: Cluster, tmp_path: Path
) -> None:
    with installed.namespace("measured") as namespace:

        def told() -> bool:
            return condition(installed, "one", namespace, "Ready")[0] == "False"

        with running(installed, tmp_path) as operator:
            installed.apply(deployment("one", namespace))
            installed.wait("the operator has looked at it", told)
            failed = [event for event in operator.events() if event["level"] == "error"]
            assert failed == []
        with pytest.raises(CommandError, match="doesn't have a resource type"):
            monitors(installed, namespace)

        prometheus_operator.install(installed)
        with running(installed, tmp_path):
            installed.wait("one for each role", lambda: len(monitors(installed, namespace)) == 2)
            made = specs(installed, namespace)
            deleted, edited = made
            where = ("--namespace", namespace)
            installed.kubectl("delete", KIND, deleted, *where)
            wrong = json.dumps({"spec": {"podMetricsEndpoints": [{"port": "other"}]}})
            installed.kubectl("patch", KIND, edited, *where, "--type=merge", f"--patch={wrong}")
            installed.wait(
                "they are as they were",
                lambda: specs(installed, namespace) == made,
                seconds=REPAIR_SECONDS,
            )
            installed.kubectl("delete", "infd", "one", "--namespace", namespace)
            installed.wait("they go with it", lambda: not monitors(installed, namespace))


def test_an_operator_that_works_when_the_api_comes_starts_anew_with_it(
    installed: Cluster, tmp_path: Path
) -> None:
    prometheus_operator.uninstall(installed)

    def noticed() -> bool:
        return any(event["event"] == "monitoring_api_changed" for event in operator.events())

    with (
        installed.namespace("later") as namespace,
        running(installed, tmp_path, "--relist-seconds", "1") as operator,
    ):
        installed.apply(deployment("one", namespace))
        installed.wait("it works", lambda: condition(installed, "one", namespace, "Ready")[0])
        prometheus_operator.install(installed)
        installed.wait("it has noticed", noticed)
        assert operator.wait(STOP_SECONDS) == 0
        operator.start()  # as the kubelet does
        installed.wait("one for each role", lambda: len(monitors(installed, namespace)) == 2)


def test_the_server_accepts_what_the_component_has_and_refuses_a_field_that_is_none(
    installed: Cluster,
) -> None:
    prometheus_operator.install(installed)
    apply = ("apply", "--server-side", "--dry-run=server", "--validate=strict")
    said = installed.kubectl(*apply, "-k", MONITORING)
    for kind in ("podmonitor", "prometheusrule"):
        assert f"{kind}.monitoring.coreos.com/" in said
    rules = (MONITORING / "rules.yaml").read_text()
    with pytest.raises(CommandError, match="rulez"):
        installed.kubectl(*apply, "-f", "-", stdin=rules.replace("rules:", "rulez:", 1))
