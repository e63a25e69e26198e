"""A checkpoint's config.json, read so that old and new spellings mean the same.

Published files and those that a recent transformers saves differ: `Infinity` against
`{"__float__": "Infinity"}`, `rope_theta` + `rope_scaling` against `rope_parameters`, `torch_dtype`
against `dtype`, "mamba"/"attention" against "linear_attention"/"full_attention".
"""

import json
from pathlib import Path
from typing import Any

import torch

from tasuki_common.errors import ConfigError

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LAYER_TYPES = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "sliding_attention": "sliding_attention",
    "mlp": "mlp",
    "moe": "moe",
}
_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_MISSING = object()


class ModelConfig:
    """Fields of one config.json.

    Raises:
        ConfigError: on reading a field that is missing or malformed; the message names it.
    """

    def __init__(self, fields: dict[str, Any], source: str) -> None:
        self._fields = fields
        self._source = source

    @classmethod
    def read(cls, folder: Path) -> "ModelConfig":
        """The config of the checkpoint in `folder`."""
        path = folder / "config.json"
        try:
            fields = json.loads(path.read_bytes(), object_hook=_plain_float)
        except FileNotFoundError:
            raise ConfigError(f"{folder} has no config.json; give a checkpoint's folder.") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path} must hold a JSON object.")
        return cls(fields, str(path))

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The field; null counts as missing. Without a default it must be there."""
        value = self._fields.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise ConfigError(f"{self._source} lacks {name}, which this architecture needs.")
        return default

    def refuse(self, name: str, *supported: Any) -> None:
        """Raise unless the field is missing, null or one of `supported`."""
        value = self._fields.get(name)
        if value is not None and value not in supported:
            listed = ", ".join(repr(item) for item in supported)
            raise ConfigError(f"{self._source} has {name} = {value!r}; supported: {listed}.")

    @property
    def architecture(self) -> str:
        """Name of the model class, as in `architectures`."""
        names = self.get("architectures")
        return str(names[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; float32 where the file does not say."""
        return self.dtype_of("dtype" if self.get("dtype", None) else "torch_dtype", "float32")

    def dtype_of(self, name: str, default: str) -> torch.dtype:
        """The field, as a dtype of torch."""
        value = str(self.get(name, default)).removeprefix("torch.")
        if value not in _DTYPES:
            raise ConfigError(
                f"{self._source} has {name} = {value!r}; supported: {', '.join(_DTYPES)}."
            )
        return _DTYPES[value]

    @property
    def head_dim(self) -> int:
        """Of attention: given, or hidden_size / num_attention_heads."""
        given = self.get("head_dim", None)
        return int(given or self.get("hidden_size") // self.get("num_attention_heads"))

    def layer_types(self) -> list[str]:
        """One of "mamba", "attention", "sliding_attention", "mlp", "moe" per layer."""
        pattern = self.get("hybrid_override_pattern", None)
        names = self.get("layer_types", None) or self.get("layers_block_type", None)
        if names is None and pattern is not None:
            names = [_PATTERN.get(mark, mark) for mark in pattern]
        if names is None:
            names = ["attention"] * int(self.get("num_hidden_layers"))
        unknown = sorted({name for name in names if name not in _LAYER_TYPES})
        if unknown:
            raise ConfigError(f"{self._source} has layer types {unknown} that are not known here.")
        return [_LAYER_TYPES[name] for name in names]

    def rope(self) -> dict[str, Any]:
        """`rope_type`, `rope_theta` and the scaling's own fields, in today's spelling."""
        merged = {"rope_type": "default", "rope_theta": self.get("rope_theta", 10000.0)}
        for name in ("rope_scaling", "rope_parameters"):
            merged |= {k: v for k, v in self.get(name, {}).items() if v is not None}
        merged["rope_type"] = merged.pop("type", merged["rope_type"])
        return merged

    def time_step_limit(self) -> tuple[float, float]:
        """Bounds of Mamba2's dt after softplus."""
        low, high = self.get("time_step_limit", (0.0, float("inf")))
        return float(low), float(high)


def _plain_float(fields: dict[str, Any]) -> Any:
    return float(fields["__float__"]) if fields.keys() == {"__float__"} else fields
