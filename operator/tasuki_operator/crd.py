"""The CustomResourceDefinition and its reference page, both from the models in `schema`.

Kubernetes wants *structural* schemas: no references, no unions with null, defaults at every level.
What a model says beyond a schema, its CEL `_rules`, becomes `x-kubernetes-validations`.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from tasuki_operator import schema

GROUP, VERSION, PLURAL = "tasuki.dev", "v1alpha1", "inferencedeployments"
FILE = f"{GROUP}_{PLURAL}.yaml"
_ROOT_RULES = (
    (
        f"size(self.metadata.name) <= {schema.MAX_NAME}",
        f"metadata.name must have at most {schema.MAX_NAME} characters",
    ),
    (
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name must begin with a letter and hold lower-case letters, digits and dashes",
    ),
)
_READY = '.status.conditions[?(@.type=="Ready")]'
_COLUMNS = (
    ("Model", "string", ".status.model", 0, "Name that clients send."),
    ("Prefill", "string", ".status.prefill.summary", 0, "Prefill pods, ready/wanted."),
    ("Decode", "string", ".status.decode.summary", 0, "Decode pods, ready/wanted."),
    ("Ready", "string", _READY + ".status", 0, "A request would be answered."),
    ("Reason", "string", _READY + ".reason", 0, "Why, or why not."),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Since it was made."),
    ("Endpoint", "string", ".status.endpoint", 1, "Base URL for OpenAI clients."),
    ("Fingerprint", "string", ".status.fingerprint", 1, "Of weights, dtype and cache layout."),
    ("Transfer", "string", ".status.transfer", 1, "Transport that the pods use."),
    ("Message", "string", _READY + ".message", 1, "In a sentence."),
)
_HEADER = "# Generated from operator/tasuki_operator/schema.py by `./dev manifests`. Do not edit.\n"


def manifest() -> dict[str, Any]:
    """The CustomResourceDefinition."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": "InferenceDeployment",
                "listKind": "InferenceDeploymentList",
                "plural": PLURAL,
                "singular": "inferencedeployment",
                "shortNames": ["infd"],
                "categories": ["all", "tasuki"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root()},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.decode.replicas",
                            "statusReplicasPath": ".status.decode.replicas",
                            "labelSelectorPath": ".status.decode.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        {
                            "name": name,
                            "type": kind,
                            "jsonPath": path,
                            "priority": priority,
                            "description": text,
                        }
                        for name, kind, path, priority, text in _COLUMNS
                    ],
                }
            ],
        },
    }


def as_yaml() -> str:
    """The file in crds/."""
    return _HEADER + yaml.safe_dump(manifest(), sort_keys=False, width=100)


def reference() -> str:
    """docs/crd.md: every field with its type, default and meaning."""
    lines = [
        "<!-- Generated from operator/tasuki_operator/schema.py by `./dev manifests`. -->",
        "# InferenceDeployment",
        "",
        f"`apiVersion: {GROUP}/{VERSION}`, short name `infd`. Only `spec.model.source` is needed.",
        "`kubectl explain infd.spec` shows the same text.",
        "",
    ]
    _section(lines, _spec(), "spec")
    return "\n".join(lines).rstrip() + "\n"


def _root() -> dict[str, Any]:
    return {
        "type": "object",
        "description": schema.InferenceDeployment.__doc__,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": _spec(),
            "status": _status(),
        },
        "x-kubernetes-validations": _validations(_ROOT_RULES),
    }


def _spec() -> dict[str, Any]:
    plain = schema.Spec.model_json_schema()
    result: dict[str, Any] = _structural(plain, plain["$defs"])
    return result


def _structural(node: Any, defs: dict[str, Any]) -> Any:
    """A JSON schema as Kubernetes takes it."""
    if isinstance(node, list):
        return [_structural(item, defs) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return _structural({**defs[name], **{k: v for k, v in node.items() if k != "$ref"}}, defs)
    if "x-kubernetes-int-or-string" in node:
        node = {key: value for key, value in node.items() if key != "anyOf"}
    if "anyOf" in node:  # a value or null, which Kubernetes says by leaving the field out
        kept = next(item for item in node["anyOf"] if item.get("type") != "null")
        rest = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
        return _structural({**kept, **rest}, defs)
    result = {
        key: {name: _structural(value, defs) for name, value in content.items()}
        if key == "properties"
        else _structural(content, defs)
        for key, content in node.items()
        if key not in ("title", "$defs") and not (key == "additionalProperties" and not content)
    }
    if "exclusiveMinimum" in result:
        result["minimum"], result["exclusiveMinimum"] = result["exclusiveMinimum"], True
    if "x-kubernetes-preserve-unknown-fields" in result:
        result.pop("additionalProperties", None)
    if "description" in result:
        result["description"] = " ".join(str(result["description"]).split())
    if "properties" in result and "default" in result:
        ruled = "x-kubernetes-validations" in result  # rules must hold for the bare default
        result["default"] = _without_nulls(result["default"]) if ruled else {}
    return result


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _validations(rules: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"rule": rule, "message": message} for rule, message in rules]


def _status() -> dict[str, Any]:
    def text(description: str) -> dict[str, Any]:
        return {"type": "string", "description": description}

    def count(description: str) -> dict[str, Any]:
        return {"type": "integer", "format": "int32", "description": description}

    role = {
        "type": "object",
        "description": "Pods of one role.",
        "properties": {
            "desired": count("Pods wanted."),
            "replicas": count("Pods there are."),
            "ready": count("Pods that would serve a request."),
            "updated": count("Pods of the newest revision."),
            "summary": text("ready/wanted."),
            "selector": text("Label selector of the pods, for autoscalers."),
        },
    }
    condition = {
        "type": "object",
        "required": ["type", "status", "lastTransitionTime", "reason", "message"],
        "properties": {
            "type": text("What the condition is about."),
            "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
            "reason": text("One word, for programs."),
            "message": text("A sentence, for people."),
            "observedGeneration": {"type": "integer", "format": "int64"},
            "lastTransitionTime": {"type": "string", "format": "date-time"},
        },
    }
    return {
        "type": "object",
        "description": "What the operator sees; written by it alone.",
        "properties": {
            "observedGeneration": {
                "type": "integer",
                "format": "int64",
                "description": "Generation of the spec that the rest of the status is about.",
            },
            "model": text("Name that clients send as `model`."),
            "names": {
                "type": "array",
                "description": "Its own, aliases too: no other deployment gets them meanwhile.",
                "items": {"type": "string"},
                "x-kubernetes-list-type": "set",
            },
            "endpoint": text("Base URL for OpenAI clients inside the cluster."),
            "fingerprint": text("Of weights, dtype and cache layout of the pods that serve."),
            "transfer": text("Transport that prefill and decode pods use."),
            "prefill": role,
            "decode": role,
            "conditions": {
                "type": "array",
                "description": "Ready is true only when a request would be answered.",
                "items": condition,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
            },
        },
    }


def _section(lines: list[str], node: dict[str, Any], path: str) -> None:
    lines += [f"## {path}", "", node["description"], ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    below: list[tuple[str, dict[str, Any]]] = []
    for name, field in node["properties"].items():
        inner = field.get("items", field)
        if "properties" in inner:
            below.append((f"{path}.{name}" + "[]" * ("items" in field), inner))
        default = "needed" if name in node.get("required", []) else _shown(field.get("default"))
        text = field["description"].replace("|", "\\|")
        lines.append(f"| `{name}` | {_kind(field)} | {default} | {text} |")
    rules = [rule["message"] for rule in node.get("x-kubernetes-validations", [])]
    lines += ["", *(f"- {_rule(message, node)}." for message in rules)]
    lines += [""] * bool(rules)
    for name, inner in below:
        _section(lines, inner, name)


def _rule(message: str, node: dict[str, Any]) -> str:
    """A rule as a sentence; a field that it begins with keeps its name."""
    first, _, rest = message.partition(" ")
    return f"`{first}` {rest}" if first in node["properties"] else message[0].upper() + message[1:]


def _kind(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "x-kubernetes-int-or-string" in field:
        return "quantity"
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}"
    if isinstance(field.get("additionalProperties"), dict):
        return f"map to {_kind(field['additionalProperties'])}"
    return str(field["type"])


def _shown(default: Any) -> str:
    return "" if default in (None, {}, []) else f"`{json.dumps(default)}`"


def main() -> int:
    """Writes both files into the repository that is the working folder."""
    for path, text in ((Path("crds") / FILE, as_yaml()), (Path("docs/crd.md"), reference())):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
