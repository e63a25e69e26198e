"""What the models of an InferenceDeployment are made of: a strict base, and kinds of values."""

from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import Field
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema

MAX_REPLICAS = 1000

Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\s,]+$")]
ObjectName = Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Label = Annotated[str, Field(max_length=63)]
Quantity = Annotated[
    int | str,
    Field(
        json_schema_extra={
            "x-kubernetes-int-or-string": True,
            "pattern": r"^\d+(\.\d+)?([num]|[kMGTPE]|[KMGTPE]i|[eE]\d+)?$",
        }
    ),
]
"""An amount as Kubernetes writes it: 2, "500m", "16Gi"."""
KubernetesObject = Annotated[
    dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
]
"""A piece of a Kubernetes object that is passed on as it is."""


class Model(pydantic.BaseModel):
    """Camel case outside, nothing converted, nothing unknown; a field's docstring describes it."""

    _rules: ClassVar[tuple[tuple[str, str], ...]] = ()
    """CEL expressions that must hold, each with the sentence for when it does not."""

    model_config = pydantic.ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        strict=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> dict[str, Any]:
        result = handler.resolve_ref_schema(handler(core))
        if cls._rules:
            rules = [{"rule": rule, "message": message} for rule, message in cls._rules]
            result["x-kubernetes-validations"] = rules
        return result


class SecretKey(Model):
    """One entry of a Secret in the deployment's namespace."""

    name: ObjectName
    """Of the Secret."""
    key: str = Field(min_length=1, max_length=253)
    """Of the entry in its data."""
