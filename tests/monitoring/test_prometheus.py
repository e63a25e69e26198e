"""A real Prometheus reads a real relay under load: every panel and every rule has data.

The operator's dashboard needs a cluster, and is left to the tests that have one.
"""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import outside_tools
import pytest
import tiny_models
import yaml
from fresh_seed import fresh_seed
from prometheus_server import Prometheus
from relays import Relay, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MONITORING = Path(__file__).parents[2] / "manifests/components/monitoring"
WAIT_SECONDS = 60.0
NO_OPERATOR = {"TasukiOperatorAbsent"}
"""What fires here all the time, rightly."""


def faster(rules: dict[str, Any]) -> dict[str, Any]:
    """The rules with minutes as seconds, so that a test need not wait."""
    text = re.sub(
        r"\[(\d+)m(:1m)?\]", lambda m: f"[{m[1]}s{':1s' if m[2] else ''}]", json.dumps(rules)
    )
    text = re.sub(r'"(for|interval)": "\d+[ms]"', r'"\1": "1s"', text)
    return dict(json.loads(text))


def rules() -> dict[str, Any]:
    return faster(yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"])


def panels() -> list[tuple[str, str]]:
    """(panel, query) of the dashboards for what runs here."""
    found = []
    for name in ("fleet", "deployment", "hand_over"):
        board = json.loads((MONITORING / f"dashboards/{name}.json").read_text())
        found += [
            (f"{name}: {panel['title']}", target["expr"])
            for panel in board["panels"]
            for target in panel.get("targets", ())
        ]
    return found


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    folder = tmp_path_factory.mktemp("monitored")
    model = tiny_models.make("granite_hybrid", folder, fresh_seed())
    with running(Relay(folder / "relay", model, transports=("tcp",))) as relay:
        yield relay


@pytest.fixture(scope="module")
def prometheus(relay: Relay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    executable = outside_tools.debian("prometheus", "prometheus")
    targets = [(relay.url.removeprefix("http://"), {"namespace": "system", "pod": "gateway"})]
    for pod in relay.pods:
        labels = {"namespace": "models", "tasuki_dev_deployment": "tiny"}
        address = f"127.0.0.1:{pod.flags['port']}"
        targets.append((address, {**labels, "pod": str(pod.flags["pod_name"])}))
    folder = tmp_path_factory.mktemp("prometheus")
    with Prometheus(executable, folder, targets, rules()) as server:
        yield server


@pytest.fixture
def load(relay: Relay) -> Iterator[None]:
    """One client after the other asks, until the test is over."""
    over = threading.Event()

    def ask() -> None:
        number = 0
        while not over.is_set():
            number += 1
            prompt = [5 + (number * 7 + i) % 90 for i in range(120)]
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "stream": True}
            httpx.post(f"{relay.url}/v1/completions", json=body, timeout=60)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join(60)


def until(true: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


@pytest.mark.usefixtures("load")
def test_every_panel_and_every_recording_rule_has_data_under_load(prometheus: Prometheus) -> None:
    recorded = [
        (rule["record"], rule["record"])
        for group in rules()["groups"]
        for rule in group["rules"]
        if "record" in rule
    ]
    queries = [
        (name, re.sub(r"\$\w+", ".*", query.replace("$__rate_interval", "15s")))
        for name, query in [*panels(), *recorded]
    ]

    def without_data() -> list[tuple[str, str]]:
        return [
            (name, query)
            for name, query in queries
            if not any(math.isfinite(value) for value in prometheus.query(query))
        ]

    until(lambda: not without_data(), lambda: f"no data: {without_data()}")
    assert prometheus.query("sum(tasuki_transfer_bytes_total)")[0] > 0
    assert prometheus.firing() <= NO_OPERATOR


@pytest.mark.usefixtures("load")
def test_a_lost_index_is_an_alert_until_it_is_back(relay: Relay, prometheus: Prometheus) -> None:
    assert relay.redis is not None
    relay.redis.stop()
    try:
        until(lambda: "TasukiIndexUnreachable" in prometheus.firing(), lambda: "it does not fire")
    finally:
        relay.redis.start()
    until(
        lambda: prometheus.firing() == NO_OPERATOR, lambda: f"still firing: {prometheus.firing()}"
    )
