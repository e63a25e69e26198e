"""Events are what a person should notice, and no more of them than a person would read."""

from typing import Any

import kopf
import pytest

from tasuki_operator.api import Api
from tasuki_operator.events import Teller, changes
from tasuki_operator.metrics import Metrics

Manifest = dict[str, Any]


def state(ready: tuple[str, str], degraded: tuple[str, str]) -> Manifest:
    said = {"Ready": ready, "Degraded": degraded}
    conditions = [
        {"type": kind, "status": status, "reason": reason, "message": "A sentence."}
        for kind, (status, reason) in said.items()
    ]
    return {"conditions": conditions}


STARTS = state(("False", "Starting"), ("False", "AsWanted"))
SERVES = state(("True", "Serving"), ("False", "AsWanted"))
CRASHES = state(("False", "CrashLoop"), ("True", "CrashLoop"))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, STARTS, []),
        (STARTS, SERVES, [("Normal", "Serving")]),
        ({}, SERVES, [("Normal", "Serving")]),
        (SERVES, CRASHES, [("Warning", "CrashLoop")]),
        ({}, CRASHES, [("Warning", "CrashLoop")]),
        (CRASHES, SERVES, [("Normal", "Serving"), ("Normal", "AsWanted")]),
        (SERVES, STARTS, []),
        (SERVES, SERVES, []),
    ],
)
def test_to_serve_and_to_be_in_trouble_are_news_and_to_start_is_none(
    before: Manifest, after: Manifest, told: list[tuple[str, str]]
) -> None:
    found = [(severity, said["reason"]) for said, severity in changes(before, after) if severity]
    assert found == told


async def test_what_comes_and_goes_is_told_once_a_minute() -> None:
    api = Api(kopf.ConnectionInfo(server="http://127.0.0.1:1"), Metrics())  # not asked here
    teller, told = Teller(api), []
    for second in range(600):
        before, after = (SERVES, CRASHES) if second % 2 else (CRASHES, SERVES)
        told += [
            said["reason"]
            for said, severity in changes(before, after)
            if severity and teller.is_due(said["reason"], float(second))
        ]
    await api.close()
    assert {reason: told.count(reason) for reason in told} == {
        "Serving": 10,
        "AsWanted": 10,
        "CrashLoop": 10,
    }
