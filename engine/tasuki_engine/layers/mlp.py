"""Feed-forward layers."""

import torch

from tasuki_engine.layers.linear import Linear
from tasuki_kernels.gemm import Activation
from tasuki_kernels.norm import RmsNorm


class _Mlp:
    """down(activation(up)), behind a norm."""

    activation: Activation

    def __init__(self, up: Linear, down: Linear) -> None:
        self.up = up
        self.down = down

    def add_to(
        self, residual: torch.Tensor, x: torch.Tensor, norm: RmsNorm | None, scale: float = 1.0
    ) -> None:
        """residual += scale * mlp(norm(x)); x, residual: [tokens, hidden], may be the same."""
        self.down.add_to(residual, self.up(x, norm, self.activation), scale)


class GatedMlp(_Mlp):
    """down(silu(gate) * up); `up` is one matrix, with the gate's rows first."""

    activation = "swiglu"


class Relu2Mlp(_Mlp):
    """down(relu(up)**2)."""

    activation = "relu2"
