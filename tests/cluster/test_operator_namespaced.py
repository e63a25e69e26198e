"""An operator of overlay `namespaced`: all that it does, it does with rights in one namespace."""

import json
from pathlib import Path

from cluster.api import Cluster
from operator_process import Operator, condition, deployment, install, kubeconfig

MINE = "tasuki"
"""That of the overlay."""
KINDS = "serviceaccount,configmap,service,networkpolicy,poddisruptionbudget,deployment,secret"
REPAIR_SECONDS = 10.0


def children(cluster: Cluster, namespace: str) -> set[str]:
    """Uids of all that is made for `granite`."""
    found = cluster.list(KINDS, namespace, "tasuki.dev/deployment=granite")
    return {one["metadata"]["uid"] for one in found}


def test_an_operator_of_one_namespace_needs_no_right_outside_of_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    with cluster.namespace(MINE), cluster.namespace("of-others"):
        install(cluster, "namespaced")
        config = kubeconfig(cluster, tmp_path / "kubeconfig", MINE)
        flags = (f"--namespaces={MINE}", f"--system-namespace={MINE}")
        operator = Operator(config, tmp_path / "log", *flags)
        operator.start()
        try:
            nowhere = {"nodeSelector": {"type": "nowhere"}}
            for namespace in ("of-others", MINE):
                cluster.apply(deployment("granite", namespace, prefill=nowhere, decode=nowhere))
            cluster.wait(
                "its pods find no node",
                lambda: condition(cluster, "granite", MINE, "Ready")[1] == "Unschedulable",
            )
            before = children(cluster, MINE)
            cluster.kubectl("delete", KINDS, "--selector=tasuki.dev/deployment", "-n", MINE)

            def again() -> bool:
                found = children(cluster, MINE)
                return len(found) == len(before) and not found & before

            cluster.wait("all are there again", again, seconds=REPAIR_SECONDS)
            assert children(cluster, "of-others") == set()
            assert "status" not in cluster.get("infd", "granite", "of-others")
        finally:
            operator.stop()
        loud = [one for one in operator.events() if one["level"] in ("error", "warning")]
        assert loud == [], json.dumps(loud, indent=1)
