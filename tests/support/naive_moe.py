"""A small mixture of experts, and what it should compute, token by token in float64."""

import torch
from fresh_seed import fresh_seed

from tasuki_engine.layers.moe import SparseMoe

EXPERTS, HIDDEN, INNER, TOP_K = 8, 32, 16, 2


def make(device):
    torch.manual_seed(fresh_seed())
    router = torch.randn(EXPERTS, HIDDEN, device=device)
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, device=device) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, device=device) / INNER**0.5
    return SparseMoe(router, gate_up, down, TOP_K), down


def exact(moe, down, residual, x, scale):
    best, experts = (x.double() @ moe.router.double().t()).topk(TOP_K, dim=-1)
    share = torch.softmax(best, dim=-1)
    result = residual.double()
    for token in range(len(x)):
        for expert, weight in zip(experts[token].tolist(), share[token], strict=True):
            gate, up = (moe.gate_up[expert].double() @ x[token].double()).chunk(2)
            inner = gate * torch.sigmoid(gate) * up
            result[token] += scale * weight * (down[expert].double() @ inner)
    return result
