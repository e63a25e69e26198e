"""The CRD and its page are what the models say, and the API server's rules say the same."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasuki_operator import crd, schema

ROOT = Path(__file__).parents[2]


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(node, dict):
        return
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        yield from nodes(node.get(key), f"{path}[]")


def whole() -> dict[str, Any]:
    version: dict[str, Any] = crd.manifest()["spec"]["versions"][0]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return found


@pytest.mark.parametrize(
    ("path", "text"), [(f"crds/{crd.FILE}", crd.as_yaml()), ("docs/crd.md", crd.reference())]
)
def test_the_generated_files_are_those_of_the_models(path: str, text: str) -> None:
    assert (ROOT / path).read_text("utf-8") == text, "run ./dev manifests"


def test_the_schema_is_structural() -> None:
    for path, node in nodes(whole()):
        assert not {"$ref", "$defs", "anyOf", "oneOf", "allOf", "title"} & set(node), path
        if "x-kubernetes-int-or-string" not in node:
            assert "type" in node, path
        assert node.get("additionalProperties") not in (True, False), path


def test_every_field_of_the_spec_is_described() -> None:
    for path, node in nodes(whole()["properties"]["spec"], "spec"):
        if not path.endswith("[]"):
            assert len(node["description"]) > 10, path


def test_defaults_of_mappings_are_left_to_their_fields() -> None:
    for path, node in nodes(whole()["properties"]["spec"]):
        if "properties" in node and "default" in node:
            assert node["default"] == {} or "x-kubernetes-validations" in node, path


@pytest.mark.parametrize(
    ("amount", "is_one"),
    [
        *((text, True) for text in ("2", "0.5", "500m", "64Ki", "16Gi", "1.5Ti", "100k", "1e9")),
        *((text, False) for text in ("", "many", "16GB", "64ki", "2mi", "-1", "1 Gi", "Gi")),
    ],
)
def test_amounts_are_those_that_kubernetes_writes(amount: str, is_one: bool) -> None:
    resources = whole()["properties"]["spec"]["properties"]["decode"]["properties"]["resources"]
    pattern = resources["properties"]["limits"]["additionalProperties"]["pattern"]
    assert bool(re.search(pattern, amount)) == is_one


def test_the_smallest_spec_is_a_source() -> None:
    needed = [
        path
        for path, node in nodes(whole()["properties"]["spec"])
        for name in node.get("required", [])
        if not path.endswith(("Secret", "[]"))
        if name
    ]
    assert needed == ["", ".model"]
    schema.Spec.model_validate({"model": {"source": "hf://org/name"}})
