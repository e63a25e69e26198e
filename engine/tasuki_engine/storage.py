"""The memory of the pools: one uint8 tensor per pool, one contiguous span per unit.

Kernels see typed, strided views of it (`Caches`), the transfer sees the bytes.
"""

import dataclasses
import math

import torch

from tasuki_engine.block_pool import NULL
from tasuki_engine.step import AttentionSpec, Caches, CacheSpec, StateSpec
from tasuki_kernels import state_copy

LAYOUT_VERSION = 1
"""Goes up when the bytes of a span change their meaning; part of the fingerprint."""
_ALIGNMENT = 16


def block_bytes(spec: AttentionSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block: [layers, 2, kv_heads, block_size, head_dim]."""
    elements = spec.num_layers * 2 * spec.num_kv_heads * block_size * spec.head_dim
    return elements * dtype.itemsize


def _conv_shape(spec: StateSpec) -> tuple[int, int, int]:
    return spec.num_layers, spec.conv_kernel - 1, spec.conv_dim


def _ssm_shape(spec: StateSpec) -> tuple[int, int, int, int]:
    return spec.num_layers, spec.num_heads, spec.head_dim, spec.state_size


def _conv_bytes(spec: StateSpec) -> int:
    size = math.prod(_conv_shape(spec)) * spec.conv_dtype.itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def slot_bytes(spec: StateSpec) -> int:
    """Bytes of one state slot: the convolution windows of all layers, then their SSM states."""
    size = _conv_bytes(spec) + math.prod(_ssm_shape(spec)) * spec.ssm_dtype.itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Storage:
    """Backing tensors by pool name, uint8 [units, span bytes], and the kernels' views of them."""

    regions: dict[str, torch.Tensor]
    caches: Caches

    @torch.inference_mode()
    def copy_state(self, source: int, target: int) -> None:
        """Copies one state slot onto another, ordered before the next step's kernels."""
        region = self.regions["state"]
        region[target].copy_(region[source])

    @torch.inference_mode()
    def copy_states(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies many at once; [n] int32 on the device. No target is another pair's source."""
        state_copy.copy_slots(self.regions["state"], sources, targets)


def allocate(
    spec: CacheSpec, *, units: dict[str, int], block_size: int, device: torch.device
) -> Storage:
    """Memory for `units[pool]` units of each pool, the null units (zeroed) among them.

    The rest is not touched, so that an operating system that commits pages lazily gives only those
    that are used.
    """
    regions: dict[str, torch.Tensor] = {}

    def region(name: str, span_bytes: int) -> torch.Tensor:
        memory = torch.empty((units[name], span_bytes), dtype=torch.uint8, device=device)
        memory[NULL].zero_()
        regions[name] = memory
        return memory

    def blocks(name: str, group: AttentionSpec | None) -> torch.Tensor | None:
        if group is None:
            return None
        memory = region(name, block_bytes(group, block_size, spec.kv_dtype))
        shape = (group.num_layers, 2, group.num_kv_heads, block_size, group.head_dim)
        return memory.view(spec.kv_dtype).view(units[name], *shape)

    full, window = blocks("full", spec.full), blocks("window", spec.window)
    conv = ssm = None
    if spec.state is not None:
        memory = region("state", slot_bytes(spec.state))
        conv_shape, ssm_shape = _conv_shape(spec.state), _ssm_shape(spec.state)
        conv_end = math.prod(conv_shape) * spec.state.conv_dtype.itemsize
        ssm_start = _conv_bytes(spec.state)
        ssm_end = ssm_start + math.prod(ssm_shape) * spec.state.ssm_dtype.itemsize
        conv = memory[:, :conv_end].view(spec.state.conv_dtype).view(-1, *conv_shape)
        ssm = memory[:, ssm_start:ssm_end].view(spec.state.ssm_dtype).view(-1, *ssm_shape)
    return Storage(regions, Caches(full=full, window=window, conv=conv, ssm=ssm))
