"""The queries of the shipped dashboards and rules, as a Prometheus can be asked them."""

import json
import math
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_server import Prometheus

BOARDS = Path(__file__).parents[2] / "manifests/components/monitoring/dashboards"
ALL = tuple(sorted(path.stem for path in BOARDS.glob("*.json")))
_VARIABLE = re.compile(r"label_values\((.*), (\w+)\)")


class Asked(NamedTuple):
    """A query, and whose it is."""

    where: str
    query: str


def panels(*boards: str, window: str = "1m") -> list[Asked]:
    """The queries of all panels, with Grafana's variables filled in."""
    found = []
    for name in boards:
        for panel in _board(name)["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"].replace("$__rate_interval", window)
                found.append(Asked(f"{name}: {panel['title']}", _filled(query)))
    return found


def variables(*boards: str) -> list[Asked]:
    """Queries that have a value if a variable of a dashboard has one to choose."""
    found = []
    for name in boards:
        for variable in _board(name)["templating"]["list"]:
            if match := _VARIABLE.fullmatch(str(variable.get("query", ""))):
                metric, label = match[1], match[2]
                selector = metric.rstrip("}") + ("," if metric[-1] == "}" else "{")
                query = f'count({_filled(selector)}{label}!=""}})'
                found.append(Asked(f"{name}: ${variable['name']}", query))
    return found


def recorded(rules: dict[str, Any]) -> list[Asked]:
    """What recording rules have recorded."""
    every = (rule for group in rules["groups"] for rule in group["rules"])
    return [Asked(rule["record"], rule["record"]) for rule in every if "record" in rule]


def wait_for_data(prometheus: Prometheus, queries: Iterable[Asked], seconds: float) -> None:
    """Returns when each has a number at one time; AssertionError names those that have none."""
    deadline = time.monotonic() + seconds
    asked = tuple(queries)
    while missing := [one for one in asked if not _has_number(prometheus, one.query)]:
        assert time.monotonic() < deadline, f"no data: {missing}"
        time.sleep(0.5)


def _has_number(prometheus: Prometheus, query: str) -> bool:
    return any(math.isfinite(value) for value in prometheus.query(query))


def _board(name: str) -> dict[str, Any]:
    return dict(json.loads((BOARDS / f"{name}.json").read_text()))


def _filled(query: str) -> str:
    return re.sub(r"\$\w+", ".*", query)
