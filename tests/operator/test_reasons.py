"""A person who reads a reason in the status finds in the documentation what to do."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAID = {"Trouble": 0, "Says": 1}
"""Where the reason stands among a call's arguments."""
GOOD = {"AllReady", "AsWanted", "Done", "NotWanted", "Paired", "Reachable", "Serving", "Waiting"}
"""These ask nobody to do anything."""


def source() -> list[ast.AST]:
    """All of the operator's code."""
    files = sorted((ROOT / "operator/tasuki_operator").glob("*.py"))
    return [node for file in files for node in ast.walk(ast.parse(file.read_text()))]


def documented() -> set[str]:
    """Reasons in the table of the documentation."""
    table = (
        (ROOT / "docs/operations.md").read_text().partition("| reason |")[2].partition("\n\n")[0]
    )
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    return set(re.findall(r"`(\w+)`", " ".join(first)))


def test_every_reason_is_documented() -> None:
    said = {
        node.args[SAID[node.func.id]].value  # type: ignore[attr-defined]
        for node in source()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in SAID
        and len(node.args) > SAID[node.func.id]
        and isinstance(node.args[SAID[node.func.id]], ast.Constant)
    }
    said |= {
        node.value.value
        for node in source()
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and [name.id for name in node.targets if isinstance(name, ast.Name)] == ["reason"]
    }
    assert len(said) > 20
    assert "Leftover" in said, "those of exceptions are attributes"
    assert said - documented() - GOOD == set()


def test_no_reason_is_made_up() -> None:
    texts = {node.value for node in source() if isinstance(node, ast.Constant)}
    assert documented() - texts == set()
