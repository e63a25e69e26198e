"""The Prometheus operator's API in tests: its own CRDs, and what it would have Prometheus read."""

import contextlib
import functools
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from cluster import binaries, toolchain
from cluster.api import Cluster, Object
from cluster.commands import CommandError, run
from prometheus_server import Job

MODULE = "github.com/prometheus-operator/prometheus-operator"
KINDS = ("podmonitors", "prometheusrules")
API = "podmonitors.monitoring.coreos.com"
DOWNLOAD_SECONDS = 300.0


@functools.cache
def crds() -> list[Path]:
    """Files of the CRDs that tasuki has objects of; downloaded once, by the sum in go.sum."""
    source = binaries.MODULES / "prometheus_operator"
    found = re.search(rf"{MODULE} (v\S+)", (source / "go.mod").read_text())
    assert found is not None
    command = [toolchain.go(), "mod", "download", "-json", f"{MODULE}@{found[1]}"]
    environment = toolchain.environment()
    said = run(command, timeout=DOWNLOAD_SECONDS, cwd=source, env=environment, tries=3)
    folder = Path(json.loads(said)["Dir"]) / "example/prometheus-operator-crd"
    return [folder / f"monitoring.coreos.com_{kind}.yaml" for kind in KINDS]


def install(cluster: Cluster) -> None:
    """Applies the CRDs, until they are served."""
    for path in crds():
        cluster.kubectl("apply", "--server-side", "-f", path)
    cluster.wait(
        "the monitoring API is served",
        lambda: [cluster.list(f"{kind}.monitoring.coreos.com") for kind in KINDS],
    )


def uninstall(cluster: Cluster) -> None:
    """Removes the CRDs, and all objects of theirs."""
    for path in crds():
        cluster.kubectl("delete", "-f", path, "--ignore-not-found", "--timeout=60s", timeout=70)


class Discovery:
    """Tells a Prometheus the targets of all PodMonitors: what the Prometheus operator has the
    service discovery do, which Debian's Prometheus is built without."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._file = cluster, folder / "targets.json"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @property
    def job(self) -> Job:
        """Reads what is found."""
        return {"job_name": "pods", "file_sd_configs": [{"files": [str(self._file)]}]}

    def __enter__(self) -> "Discovery":
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._over.wait(1):
            with contextlib.suppress(CommandError):  # the API server is asked again in a second
                self._look()

    def _look(self) -> None:
        said = self._cluster.kubectl("get", f"pods,{API}", "--all-namespaces", "--output=json")
        objects = json.loads(said)["items"]
        monitors = [one for one in objects if one["kind"] == "PodMonitor"]
        pods = [one for one in objects if one["kind"] == "Pod"]
        found = [target for one in monitors for pod in pods for target in _targets(one, pod)]
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.replace(self._file)


def _targets(monitor: Object, pod: Object) -> Iterator[Object]:
    """A pod's addresses and labels, if the monitor is about it."""
    spec, metadata = monitor["spec"], pod["metadata"]
    labels = metadata.get("labels", {})
    wanted = spec["selector"]["matchLabels"].items() <= labels.items()
    running = pod["status"]["phase"] == "Running"
    if not wanted or not running or metadata["namespace"] != monitor["metadata"]["namespace"]:
        return
    known = {"namespace": metadata["namespace"], "pod": metadata["name"]}
    known |= {re.sub(r"\W", "_", key): labels[key] for key in spec.get("podTargetLabels", ())}
    for endpoint in spec["podMetricsEndpoints"]:
        for container in pod["spec"]["containers"]:
            for port in container.get("ports", ()):
                if port.get("name") == endpoint["port"]:
                    address = f"{pod['status']['podIP']}:{port['containerPort']}"
                    path = {"__metrics_path__": endpoint["path"]}
                    yield {"targets": [address], "labels": known | path}
