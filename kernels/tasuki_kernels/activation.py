"""Activations of feed-forward layers."""

import torch
import torch.nn.functional as F


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where gate and up are the halves of the last dimension (Shazeer 2020).

    gate_up: [tokens, 2 * d]; returns [tokens, d].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def relu2_(x: torch.Tensor) -> torch.Tensor:
    """relu(x) ** 2, in place (So et al. 2021)."""
    return x.relu_().square_()
