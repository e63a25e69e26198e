"""The health check for Argo CD, run by Lua as Argo CD runs it, on statuses the operator writes."""

from pathlib import Path
from typing import Any

import lupa
import pytest
import yaml

PAGE = (Path(__file__).parents[2] / "docs/gitops.md").read_text()
KEY = "resource.customizations.health.tasuki.dev_InferenceDeployment"


def health(body: dict[str, Any]) -> tuple[str, str]:
    """Status and message of an object, by the script in the page."""
    block = PAGE.partition("```yaml\n")[2].partition("```")[0]
    script = yaml.safe_load(block)["data"][KEY]
    lua = lupa.LuaRuntime()
    lua.globals().obj = lua.table_from(body, recursive=True)
    result = lua.execute(script)
    return result.status, result.message


def infd(*, seen: int | None = 3, **conditions: str) -> dict[str, Any]:
    """An object of generation 3 whose conditions have a message with their name."""
    body: dict[str, Any] = {"metadata": {"generation": 3}}
    if seen is not None:
        body["status"] = {
            "observedGeneration": seen,
            "conditions": [
                {"type": kind, "status": status, "reason": "Because", "message": f"{kind} says."}
                for kind, status in conditions.items()
            ],
        }
    return body


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (infd(seen=None), "Progressing", "The operator has not looked at it yet."),
        (
            infd(seen=2, Ready="True", Progressing="False", Degraded="False"),
            "Progressing",
            "The operator has not looked at it yet.",
        ),
        (infd(), "Progressing", "No condition yet."),
        (infd(Ready="False", Progressing="True"), "Progressing", "Progressing says."),
        (infd(Ready="True", Progressing="True"), "Progressing", "Progressing says."),
        (infd(Ready="False", Progressing="False"), "Progressing", "Ready says."),
        (infd(Ready="True", Progressing="False"), "Healthy", "Ready says."),
        (
            infd(Ready="True", Progressing="False", Degraded="False"),
            "Healthy",
            "Ready says.",
        ),
        (
            infd(Ready="True", Progressing="True", Degraded="True"),
            "Degraded",
            "Degraded says.",
        ),
    ],
)
def test_argo_cd_sees_what_the_conditions_say(
    body: dict[str, Any], status: str, message: str
) -> None:
    assert health(body) == (status, message)
