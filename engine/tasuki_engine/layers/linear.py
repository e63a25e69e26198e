"""Matrix products with weights."""

import torch

from tasuki_engine.loader import Weights
from tasuki_kernels.gemm import Activation, add_linear_, linear
from tasuki_kernels.norm import RmsNorm


class Linear:
    """y = x W^T + b, with a norm before and an activation after where the caller has them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        # On the CPU, products of few rows are a third faster with the transposed matrix in memory.
        self.weight = weight.t().contiguous().t() if weight.device.type == "cpu" else weight
        self.bias = bias

    @classmethod
    def load(cls, weights: Weights, *names: str) -> "Linear":
        """From `{name}.weight` and, where there is one, `{name}.bias`; several names are fused."""
        return cls(
            weights.fuse(*(f"{name}.weight" for name in names)),
            weights.fuse_optional(*(f"{name}.bias" for name in names)),
        )

    def __call__(
        self, x: torch.Tensor, norm: RmsNorm | None = None, activation: Activation | None = None
    ) -> torch.Tensor:
        """activation(norm(x) W^T + b); x: [tokens, in], returns [tokens, out]."""
        return linear(x, self.weight, self.bias, norm=norm, activation=activation)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """residual += scale * (x W^T + b), in place."""
        add_linear_(residual, x, self.weight, self.bias, scale)
