"""Feed-forward layers."""

import torch

from tasuki_engine.layers.linear import Linear
from tasuki_kernels.activation import relu2_, swiglu


class GatedMlp:
    """down(silu(gate) * up), with gate and up in one matrix."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """residual += scale * mlp(x); x, residual: [tokens, hidden]."""
        self.down.add_to(residual, swiglu(self.gate_up(x)), scale)


class Relu2Mlp:
    """down(relu(up)**2)."""

    def __init__(self, up: Linear, down: Linear) -> None:
        self.up = up
        self.down = down

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """residual += scale * mlp(x); x, residual: [tokens, hidden]."""
        self.down.add_to(residual, relu2_(self.up(x)), scale)
