"""Debian's Prometheus, reading what a test's processes measure, every second."""

import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import plain_http
import yaml
from redis_server import free_port
from relays import Relay

START_SECONDS = 30.0
Job = dict[str, Any]
"""An entry of `scrape_configs`."""


def static(*targets: tuple[str, dict[str, str]]) -> Job:
    """Reads (host:port, labels) each."""
    entries = [{"targets": [address], "labels": labels} for address, labels in targets]
    return {"job_name": "static", "static_configs": entries}


def of_relay(relay: Relay) -> Job:
    """Reads the gateway and the pods of a relay, with the labels they would have in a cluster."""
    targets = [(relay.url.removeprefix("http://"), {"namespace": "system", "pod": "gateway"})]
    for pod in relay.pods:
        labels = {"namespace": "models", "tasuki_dev_deployment": "tiny"}
        address = f"127.0.0.1:{pod.flags['port']}"
        targets.append((address, {**labels, "pod": str(pod.flags["pod_name"])}))
    return static(*targets)


class Prometheus:
    """One server on a loopback port."""

    def __init__(
        self, executable: str, folder: Path, jobs: list[Job], rules: dict[str, Any]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = folder / "prometheus.log"
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": jobs,
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self._command = [
            executable,
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]

    def __enter__(self) -> "Prometheus":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def query(self, expr: str) -> list[float]:
        """The values of an expression now."""
        answer = plain_http.get(
            f"{self.url}/api/v1/query", params={"query": expr}, timeout=10
        ).json()
        assert answer["status"] == "success", (expr, answer)
        return [float(sample["value"][1]) for sample in answer["data"]["result"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        answer = plain_http.get(f"{self.url}/api/v1/alerts", timeout=10).json()
        alerts = answer["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def wait_fired(self, due: frozenset[str], seconds: float) -> None:
        """Returns when each has fired at some time; AssertionError names those that did not."""
        fired: set[str] = set()
        deadline = time.monotonic() + seconds
        while not due <= fired:
            assert time.monotonic() < deadline, f"did not fire: {due - fired}"
            time.sleep(0.5)
            fired |= self.firing()

    def wait_clear(self, due: frozenset[str], seconds: float) -> None:
        """Returns when none fires; AssertionError names those that still do."""
        deadline = time.monotonic() + seconds
        while still := due & self.firing():
            assert time.monotonic() < deadline, f"still firing: {still}"
            time.sleep(0.5)

    def _ready(self) -> bool:
        try:
            return plain_http.get(f"{self.url}/-/ready", timeout=1).status_code == 200
        except httpx.HTTPError:
            return False
