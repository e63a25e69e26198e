"""The cluster of the tests is a real one, and nothing of it stays on this machine."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from cluster import external, machine, needs
from cluster.api import Cluster
from cluster.commands import CommandError
from cluster.own import OwnCluster
from cluster_objects import deployment, pod, pod_spec, service

NETWORK = os.open("/proc/self/ns/net", os.O_RDONLY)  # before any fixture enters another one
SERVE = ("sh", "-c", "echo hello > /dev/shm/index.html && exec httpd -f -p 8080 -h /dev/shm")


def phase(cluster: Cluster, name: str, namespace: str) -> str:
    return str(cluster.get("pod", name, namespace)["status"]["phase"])


def fetched(url: str) -> bytes:
    """What `url` answers; nothing where nobody listens yet."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bytes(answer.read())
    except urllib.error.URLError:
        return b""


def test_a_restricted_pod_runs_and_tells_what_it_wrote(cluster: Cluster) -> None:
    with cluster.namespace("restricted") as namespace:
        cluster.apply(pod("one", namespace, pod_spec("echo", "it runs")))
        cluster.wait("the pod is done", lambda: phase(cluster, "one", namespace) == "Succeeded")
        assert cluster.logs("one", namespace) == "it runs\n"


def test_a_pod_that_runs_as_root_is_not_admitted_to_a_restricted_namespace(
    cluster: Cluster,
) -> None:
    with cluster.namespace("refusing") as namespace:
        spec = pod_spec("id")
        spec["securityContext"]["runAsNonRoot"] = False
        with pytest.raises(CommandError, match="runAsNonRoot"):
            cluster.apply(pod("root", namespace, spec))


def test_an_account_may_do_only_what_a_role_allows(cluster: Cluster) -> None:
    account = "--as=system:serviceaccount:default:default"
    with pytest.raises(CommandError, match="forbidden"):
        cluster.kubectl("get", "secrets", account)


def test_a_service_is_found_by_name_and_answers_from_all_its_pods(
    cluster: Cluster,
) -> None:
    with cluster.namespace("named") as namespace:
        spec = pod_spec(*SERVE, port=8080)
        cluster.apply(deployment("web", namespace, spec, 2), service("web", namespace, 8080))
        cluster.wait_for_rollout("web", namespace)
        url = f"http://web.{namespace}.svc.cluster.local/index.html"
        fetch = ("sh", "-c", f"until wget -q -O - {url} 2>/dev/null; do sleep 1; done")
        cluster.apply(pod("client", namespace, pod_spec(*fetch)))
        cluster.wait("an answer", lambda: phase(cluster, "client", namespace) == "Succeeded")
        assert cluster.logs("client", namespace) == "hello\n"


def test_the_test_process_itself_reaches_a_service(own_cluster: OwnCluster) -> None:
    with own_cluster.namespace("reached") as namespace:
        spec = pod_spec(*SERVE, port=8080)
        own_cluster.apply(deployment("web", namespace, spec), service("web", namespace, 8080))
        own_cluster.wait_for_rollout("web", namespace)
        address = own_cluster.get("service", "web", namespace)["spec"]["clusterIP"]
        url = f"http://{address}/index.html"
        own_cluster.wait("kube-proxy knows the pod", lambda: fetched(url) == b"hello\n")


def test_a_deleted_namespace_takes_its_pods_along(cluster: Cluster) -> None:
    with cluster.namespace("passing") as namespace:
        cluster.apply(deployment("idle", namespace, pod_spec("sleep", "1000"), 2))
        cluster.wait_for_rollout("idle", namespace)
    with pytest.raises(CommandError, match="not found"):
        cluster.get("namespace", "passing")
    everywhere = json.loads(cluster.kubectl("get", "pods", "--all-namespaces", "-o", "json"))
    assert not [one for one in everywhere["items"] if one["metadata"]["namespace"] == "passing"]


def test_the_audit_log_counts_requests(own_cluster: OwnCluster) -> None:
    own_cluster.kubectl("get", "namespace", "kube-system")
    events = [json.loads(line) for line in own_cluster.audit()]
    ours = [event for event in events if event["user"]["username"] == "tests"]
    paths = {event["requestURI"] for event in ours if event["verb"] == "get"}
    assert "/api/v1/namespaces/kube-system" in paths


MAKER = """
import signal, sys
from cluster.machine import Machine
one = Machine({folder!r})
one.start("sleeper", ["sh", "-c", "ip link add left type bridge; setsid sleep 1000 & sleep 1000"])
one.run("mount", "-t", "tmpfs", "tmpfs", "/mnt")
print(one.init, one.cgroup, flush=True)
sys.stdin.readline()
one.close()
"""


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
def test_nothing_of_a_machine_is_left(killed: bool, tmp_path: Path) -> None:
    reason = needs.missing()
    if reason:
        pytest.skip(reason)
    before = traces()
    command = [sys.executable, "-c", MAKER.format(folder=str(tmp_path / "machine"))]
    support = str(Path(machine.__file__).parents[1])
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": support}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as maker:
        assert maker.stdin is not None
        assert maker.stdout is not None
        init, cgroup = maker.stdout.readline().split()
        assert list(machine.CGROUPS.rglob(cgroup.strip("/")))
        tree = psutil.Process(int(init)).children(recursive=True)
        if killed:
            maker.send_signal(signal.SIGKILL)
        else:
            maker.stdin.write("\n")
            maker.stdin.flush()
        maker.wait(30)
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not alive
    if killed:
        machine.remove_leftovers(tmp_path / "machine")
    assert traces() == before
    assert not list(machine.CGROUPS.rglob(cgroup.strip("/")))
    assert not (tmp_path / "machine").exists()


def outside(*command: str) -> list[str]:
    """Lines that a command prints on this machine's network, whichever the tests are on now."""
    words = ["nsenter", f"--net=/proc/self/fd/{NETWORK}", *command]
    done = subprocess.run(words, capture_output=True, text=True, check=True, pass_fds=[NETWORK])
    return done.stdout.splitlines()


def traces() -> dict[str, object]:
    """What a node could leave behind: mounts, links, rules of the firewall, sysctls."""
    links = outside("ip", "-brief", "link")
    rules = [line for line in outside("iptables-save") if not line.startswith(("#", ":"))]
    return {
        "mounts": sorted(Path("/proc/self/mounts").read_text().splitlines()),
        "links": links,
        "rules": rules,
        "sysctls": {name: Path("/proc/sys", name).read_text() for name in machine.TUNABLES},
    }


def test_a_cluster_that_nobody_named_for_tests_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text("apiVersion: v1\nkind: Config\ncurrent-context: production\n")
    monkeypatch.setenv(external.KUBECONFIG, str(config))
    monkeypatch.setenv(external.CONTEXTS, "kind-tests, staging")
    with pytest.raises(external.RefusedClusterError, match="'production'"):
        external.cluster()


def test_a_cluster_that_is_named_for_tests_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text("apiVersion: v1\nkind: Config\ncurrent-context: staging\n")
    monkeypatch.setenv(external.KUBECONFIG, str(config))
    monkeypatch.setenv(external.CONTEXTS, "kind-tests, staging")
    assert external.cluster().context == "staging"
