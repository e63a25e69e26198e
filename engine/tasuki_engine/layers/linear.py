"""Matrix products with weights."""

import torch
import torch.nn.functional as F

from tasuki_engine.loader import Weights


class Linear:
    """y = x W^T + b."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
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
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """residual += scale * y, in place and as one operation where there is no bias."""
        if self.bias is None:
            residual.addmm_(x, self.weight.t(), alpha=scale)
        else:
            residual.add_(self(x), alpha=scale)
