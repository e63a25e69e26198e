"""`tasuki operator` as a process of the test, with the rights of its service account alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crd_setup
import psutil
import yaml
from cluster.api import Cluster

ROOT = Path(__file__).parents[2]
SYSTEM = "tasuki-system"
STOP_SECONDS = 15.0
NO_INDEX = "redis://127.0.0.1:2"
"""Refuses at once; the cluster's network has no way to a server that knows names."""
KOPFS = "closing of asynchronous generator"
"""kopf leaves its watches to the end of the event loop, which may complain of it then."""
Object = dict[str, Any]


def install(cluster: Cluster, overlay: str = "default") -> None:
    """CRDs, an overlay's namespace where it has one, and its rights; not the operator."""
    crd_setup.install(cluster)
    folder = ROOT / "manifests/overlays" / overlay
    shipped = yaml.safe_load_all(cluster.kubectl("kustomize", folder))
    rights = ("Namespace", "ServiceAccount", "Role", "RoleBinding")
    cluster.apply(*(item for item in shipped if item["kind"].removeprefix("Cluster") in rights))


def kubeconfig(cluster: Cluster, path: Path, namespace: str = SYSTEM) -> Path:
    """Written to `path`: the cluster as the service account of the operator there sees it."""
    shown = json.loads(
        cluster.kubectl("config", "view", "--flatten", "--minify", "--output", "json")
    )
    token = cluster.kubectl("create", "token", "tasuki-operator", "--namespace", namespace).strip()
    shown["users"] = [{"name": "operator", "user": {"token": token}}]
    shown["contexts"][0]["context"]["user"] = "operator"
    path.write_text(yaml.safe_dump(shown))
    return path


class Operator:
    """One process; its log is at `log`."""

    def __init__(self, config: Path, log: Path, *flags: str) -> None:
        self._config, self.log, self._flags = config, log, flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; it works as soon as it has the lease."""
        command = [sys.executable, "-P", "-m", "tasuki_cli", "operator"]
        flags = ["--host=127.0.0.1", "--port=0", "--gateway=", f"--redis-url={NO_INDEX}"]
        environment = {**os.environ, "KUBECONFIG": str(self._config)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *flags, *self._flags], stderr=log, env=environment
            )

    def stop(self) -> int:
        """Ends it in order; its exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it as a crash does; the lease stays taken until it has run out."""
        self._end(signal.SIGKILL)

    def events(self) -> list[Object]:
        """Its log lines."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line[:1] == "{"]

    def errors(self) -> list[Object]:
        """Those that are errors of ours."""
        errors = [one for one in self.events() if one["level"] == "error"]
        return [one for one in errors if KOPFS not in one["event"]]

    def cpu_seconds(self) -> float:
        """What it has used of the processors since its start."""
        assert self._process is not None, "it does not run"
        used = psutil.Process(self._process.pid).cpu_times()
        return float(used.user + used.system)

    def wait(self, seconds: float) -> int:
        """Its exit status, when it ends by itself within that time; else TimeoutExpired."""
        assert self._process is not None, "it does not run"
        status = self._process.wait(seconds)
        self._process = None
        return status

    def end(self) -> None:
        """Ends it, if it runs."""
        if self._process is not None:
            self.stop()

    def _end(self, number: signal.Signals) -> int:
        assert self._process is not None, "it does not run"
        self._process.send_signal(number)
        try:
            return self._process.wait(STOP_SECONDS)
        finally:
            self._process.kill()
            self._process = None


@contextlib.contextmanager
def running(cluster: Cluster, folder: Path, *flags: str) -> Iterator[Operator]:
    """An operator that works from here to the end of the block."""
    operator = Operator(kubeconfig(cluster, folder / "kubeconfig"), folder / "log", *flags)
    operator.start()
    try:
        yield operator
    finally:
        operator.stop()


def deployment(name: str, namespace: str, **spec: Any) -> Object:
    """An InferenceDeployment, the smallest unless `spec` says more."""
    return {
        "apiVersion": "tasuki.dev/v1alpha1",
        "kind": "InferenceDeployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"model": {"source": "file:///models/demo"}, **spec},
    }


def condition(cluster: Cluster, name: str, namespace: str, kind: str) -> tuple[str, str, str]:
    """Status, reason and message of a condition; empty while there is none."""
    body = cluster.get("infd", name, namespace)
    for item in body.get("status", {}).get("conditions", []):
        if item["type"] == kind:
            return item["status"], item["reason"], item["message"]
    return "", "", ""
