"""What a product with its norm and activation is, in float64."""

import torch


def exact(x, weight, bias, norm, activation):
    x, y = x.double(), weight.double()
    if norm is not None:
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + norm.eps)
        x = x if norm.weight is None else x * norm.weight.double()
    y = x @ y.t() + (0.0 if bias is None else bias.double())
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up
    return y.clamp(min=0).square() if activation == "relu2" else y
