"""Debian's Prometheus, reading what a test's processes measure, every second."""

import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from redis_server import free_port

START_SECONDS = 30.0


class Prometheus:
    """One server on a loopback port; `targets` are (host:port, labels) each."""

    def __init__(
        self,
        executable: str,
        folder: Path,
        targets: list[tuple[str, dict[str, str]]],
        rules: dict[str, Any],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = folder / "prometheus.log"
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
        static = [{"targets": [target], "labels": labels} for target, labels in targets]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "tasuki", "static_configs": static}],
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
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=10).json()
        assert answer["status"] == "success", (expr, answer)
        return [float(sample["value"][1]) for sample in answer["data"]["result"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        answer = httpx.get(f"{self.url}/api/v1/alerts", timeout=10).json()
        alerts = answer["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=1).status_code == 200
        except httpx.HTTPError:
            return False
