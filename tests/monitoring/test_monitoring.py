"""Dashboards, rules and the page of metrics fit the code that measures, and Prometheus' grammar."""

import re
import typing
from pathlib import Path
from typing import Any

import alert_faults
import cluster_faults
import dashboards
import outside_tools
import pytest
import yaml
from prometheus_client import generate_latest

from tasuki_gateway import metrics as gateway_metrics
from tasuki_monitoring import __main__ as generator, catalog, reference
from tasuki_operator.metrics import Metrics as OperatorMetrics
from tasuki_transfer.base import Outcome

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MONITORING = ROOT / "manifests/components/monitoring"
RULES: dict[str, Any] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
TESTS = yaml.safe_load((HERE / "alerts.yaml").read_text())["tests"]
_NAME = re.compile(r"\btasuki_\w+|\b\w+:tasuki_\w+:\w+|\btasuki:\w+:\w+")
_LABELS = {"tasuki_dev_deployment"}


@pytest.fixture
def promtool() -> str:
    return outside_tools.debian("promtool", "prometheus")


@pytest.mark.parametrize("path", generator.files(), ids=str)
def test_what_is_generated_is_what_the_code_generates(path: Path) -> None:
    assert (ROOT / path).read_text() == generator.files()[path], "run ./dev manifests"


def test_the_kustomization_brings_every_dashboard() -> None:
    kustomization = yaml.safe_load((MONITORING / "kustomization.yaml").read_text())
    brought = set(kustomization["configMapGenerator"][0]["files"])
    assert brought == {f"dashboards/{path.name}" for path in MONITORING.glob("dashboards/*")}


def test_queries_use_metrics_that_exist() -> None:
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    known = catalog.series() | {rule["record"] for rule in rules if "record" in rule} | _LABELS
    asked = ((rule.get("alert", "record"), rule["expr"]) for rule in rules)
    queries = [*dashboards.panels(*dashboards.ALL), *asked]
    unknown = {
        (where, name)
        for where, query in queries
        for name in _NAME.findall(query)
        if name not in known
    }
    assert unknown == set()
    assert len(queries) > 60


def test_every_metric_of_vllm_has_one_of_ours() -> None:
    names = {family.name for families in catalog.components().values() for family in families}
    assert {ours for _, ours, _ in reference.VLLM} <= names


@pytest.mark.parametrize("outcome", typing.get_args(Outcome))
def test_ends_of_leases_are_counted_from_zero(outcome: str) -> None:
    sample = f'tasuki_leases_ended_total{{outcome="{outcome}",role="decode"}} 0.0'
    assert sample in catalog.pod_text().splitlines()


def test_names_follow_prometheus_conventions(promtool: str, tmp_path: Path) -> None:
    texts = [
        generate_latest(gateway_metrics.registry).decode(),
        OperatorMetrics().render().decode(),
    ]
    for text in (*texts, catalog.pod_text()):
        file = tmp_path / "metrics"
        file.write_text(text)
        outside_tools.run("sh", "-c", f"{promtool} check metrics < {file}")


def test_prometheus_accepts_every_rule_and_every_query(promtool: str, tmp_path: Path) -> None:
    queries = [
        {"record": f"panel:query:{number}", "expr": asked.query}
        for number, asked in enumerate(
            dashboards.panels(*dashboards.ALL) + dashboards.variables(*dashboards.ALL)
        )
    ]
    for name, groups in (("rules", RULES["groups"]), ("panels", [_group(queries)])):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"groups": groups}))
        outside_tools.run(promtool, "check", "rules", file)


def _group(rules: list[dict[str, str]]) -> dict[str, Any]:
    return {"name": "panels", "rules": rules}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_says_what_to_do_and_is_tested_firing_and_clearing(
    alert: dict[str, Any],
) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"].endswith(".")
    assert alert["annotations"]["runbook"].endswith(".")
    mine = [
        bool(check["exp_alerts"])
        for test in TESTS
        for check in test["alert_rule_test"]
        if check["alertname"] == alert["alert"]
    ]
    assert {True, False} <= set(mine)


def test_alerts_fire_when_their_fault_is_there_and_clear_after(
    promtool: str, tmp_path: Path
) -> None:
    """Annotations aside: they are sentences, held above."""
    rules = {
        "groups": [
            {
                **group,
                "rules": [
                    {k: v for k, v in rule.items() if k != "annotations"} for rule in group["rules"]
                ],
            }
            for group in RULES["groups"]
        ]
    }
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "alerts.yaml").write_text((HERE / "alerts.yaml").read_text())
    outside_tools.run(promtool, "test", "rules", tmp_path / "alerts.yaml")


def test_every_alert_has_a_fault_that_makes_it_fire_with_real_processes() -> None:
    faults = (*alert_faults.FAULTS, *cluster_faults.FAULTS)
    assert {name for _, due in faults for name in due} == {alert["alert"] for alert in ALERTS}
