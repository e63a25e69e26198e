"""What can be set, measured or sent is documented, and nothing else is."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tasuki_cli.up import UpSettings
from tasuki_gateway import bodies
from tasuki_gateway.config import GatewayConfig
from tasuki_operator.config import OperatorConfig
from tasuki_pod.config import PodConfig

DOCS = Path(__file__).parents[2] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()


def section(title: str) -> str:
    """The text under a heading, to the next one."""
    found = re.search(rf"^#+ {title}\n(.*?)(?=^#|\Z)", OPERATIONS, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


@pytest.mark.parametrize(
    ("title", "settings"),
    [
        ("tasuki up", UpSettings),
        ("tasuki gateway", GatewayConfig),
        ("tasuki prefill, tasuki decode", PodConfig),
        ("tasuki operator", OperatorConfig),
    ],
)
def test_the_documented_flags_are_the_real_ones(title: str, settings: Any) -> None:
    documented = set(re.findall(r"^\| `--([a-z-]+)`", section(title), re.MULTILINE))
    fields = [field for field in dataclasses.fields(settings) if field.init]
    real = {
        field.name.replace("_", "-") for field in fields if not field.metadata.get("positional")
    }
    assert documented == real


@pytest.mark.parametrize("body", [bodies.Chat, bodies.Completion])
def test_every_field_of_a_request_is_documented(body: type[msgspec.Struct]) -> None:
    api = (DOCS / "api.md").read_text()
    missing = [name for name in body.__struct_fields__ if f"`{name}`" not in api]
    assert missing == []
