"""Matrix products with weights."""

import torch

from tasuki_engine.loader import Weights


class Linear:
    """y = x W^T + b."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        # On the CPU, products of few rows are a third faster with the transposed matrix in memory.
        transposed = weight.t()
        self.weight = transposed.contiguous() if weight.device.type == "cpu" else transposed
        self.bias = bias

    @classmethod
    def load(cls, weights: Weights, *names: str) -> "Linear":
        """From `{name}.weight` and, where there is one, `{name}.bias`; several names are fused."""
        return cls(
            weights.fuse(*(f"{name}.weight" for name in names)),
            weights.fuse_optional(*(f"{name}.bias" for name in names)),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in]; returns [tokens, out]."""
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """residual += scale * y, in place and as one operation where there is no bias."""
        if self.bias is None:
            residual.addmm_(x, self.weight, alpha=scale)
        else:
            residual.add_(self(x), alpha=scale)
