"""Feed-forward layers."""

import torch

from tasuki_engine.layers.linear import Linear
from tasuki_kernels.gemm import Activation


class _Mlp:
    """down(activation(up)); a norm before belongs to `up`."""

    activation: Activation

    def __init__(self, up: Linear, down: Linear) -> None:
        self.up = up
        self.down = down

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """residual += scale * mlp(x); x, residual: [tokens, hidden], may be the same."""
        self.down.add_to(residual, self.up(x, self.activation), scale)


class GatedMlp(_Mlp):
    """down(silu(gate) * up); `up` is one matrix, with the gate's rows first."""

    activation = "swiglu"


class Relu2Mlp(_Mlp):
    """down(relu(up)**2)."""

    activation = "relu2"
