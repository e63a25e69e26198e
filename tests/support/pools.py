"""Pools for kernel tests: one contiguous span per block or slot, NaN where nobody wrote."""

import torch


def nan_pool(count: int, *shape: int, gap: int = 0) -> torch.Tensor:
    """float32 [count, *shape], NaN; each entry contiguous, `gap` elements between entries."""
    size = torch.Size(shape).numel()
    return torch.full((count, size + gap), float("nan"))[:, :size].unflatten(1, shape)
