"""Rotary frequencies of a model, with the context extensions that checkpoints ask for."""

import math
from typing import Any

import torch

from tasuki_common.errors import ConfigError
from tasuki_engine.model_config import ModelConfig
from tasuki_kernels.rope import RopeStep, rope_tables


class Rope:
    """Rotations for positions below `max_model_len`, from a checkpoint's rope parameters.

    Raises:
        ConfigError: when the scaling is not one of default, linear, llama3, yarn.
    """

    def __init__(self, config: ModelConfig, device: torch.device, max_model_len: int) -> None:
        fields = config.rope()
        kind = fields["rope_type"]
        if kind not in _SCALINGS:
            raise ConfigError(f"rope_type is {kind!r}; known: {', '.join(_SCALINGS)}.")
        rotary_dim = int(config.head_dim * float(fields.get("partial_rotary_factor", 1.0)))
        max_len = int(config.get("max_position_embeddings"))
        self.frequencies, self.scale = _SCALINGS[kind](rotary_dim, fields, max_len)
        self.by_position: tuple[torch.Tensor, torch.Tensor] | None = None
        if device.type == "cuda":
            # Made on the CPU, so that both have the same numbers.
            cos, sin = rope_tables(torch.arange(max_model_len), self.frequencies, self.scale)
            self.by_position = cos.to(device), sin.to(device)

    def tables(self, positions: torch.Tensor) -> RopeStep:
        """The rotations of one step's tokens; positions: [tokens]."""
        if self.by_position is not None:
            return RopeStep(*self.by_position, positions)
        return RopeStep(*rope_tables(positions, self.frequencies, self.scale), None)


def _default(dim: int, fields: dict[str, Any], max_len: int) -> tuple[torch.Tensor, float]:
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / float(fields["rope_theta"]) ** exponents, 1.0


def _linear(dim: int, fields: dict[str, Any], max_len: int) -> tuple[torch.Tensor, float]:
    frequencies, scale = _default(dim, fields, max_len)
    return frequencies / float(fields["factor"]), scale


def _llama3(dim: int, fields: dict[str, Any], max_len: int) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, between: blended."""
    frequencies, scale = _default(dim, fields, max_len)
    factor = float(fields["factor"])
    low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
    turns = float(fields["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor), scale


def _yarn(dim: int, fields: dict[str, Any], max_len: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023): a ramp over dimensions between interpolation and none."""
    frequencies, _ = _default(dim, fields, max_len)
    theta = float(fields["rope_theta"])
    original = int(fields.get("original_max_position_embeddings") or max_len)
    factor = float(fields.get("factor") or max_len / original)

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(float(fields.get("beta_fast", 32.0)))
    high = dimension_of(float(fields.get("beta_slow", 1.0)))
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    kept = 1.0 - ramp.clamp(0.0, 1.0)
    # In this order the rounding is transformers': far positions multiply the last bit.
    scaled = frequencies / factor * (1.0 - kept) + frequencies * kept
    return scaled, _yarn_attention_factor(fields, factor)


def _yarn_attention_factor(fields: dict[str, Any], factor: float) -> float:
    if "attention_factor" in fields:
        return float(fields["attention_factor"])

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if "mscale" in fields and "mscale_all_dim" in fields:
        return temperature(float(fields["mscale"])) / temperature(float(fields["mscale_all_dim"]))
    return temperature(1.0)


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
