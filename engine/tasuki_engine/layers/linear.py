"""Matrix products with weights."""

import torch

from tasuki_engine.loader import Weights
from tasuki_kernels.gemm import Activation, add_linear_, linear
from tasuki_kernels.norm import RmsNorm


class Linear:
    """y = norm(x) W^T + b, with a norm before where there is one."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        norm: RmsNorm | None = None,
    ) -> None:
        """The norm's weight is multiplied into `weight`, on a GPU in place."""
        # On the CPU, products of few rows are a third faster with the transposed matrix in memory.
        self.weight = weight.t().contiguous().t() if weight.device.type == "cpu" else weight
        self.norm = norm.fold_into_(self.weight) if norm else None
        self.bias = bias

    @classmethod
    def load(cls, weights: Weights, *names: str, norm: RmsNorm | None = None) -> "Linear":
        """From `{name}.weight` and, where there is one, `{name}.bias`; several names are fused."""
        return cls(
            weights.fuse(*(f"{name}.weight" for name in names)),
            weights.fuse_optional(*(f"{name}.bias" for name in names)),
            norm,
        )

    def __call__(self, x: torch.Tensor, activation: Activation | None = None) -> torch.Tensor:
        """activation(norm(x) W^T + b); x: [tokens, in], returns [tokens, out]."""
        return linear(x, self.weight, self.bias, norm=self.norm, activation=activation)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """residual += scale * (x W^T + b), in place; of a product without a norm."""
        add_linear_(residual, x, self.weight, self.bias, scale)
