"""A sparse mixture of gated experts: each token goes through its `top_k` best."""

import torch

from tasuki_kernels.activation import swiglu
from tasuki_kernels.gemm import add_linear_, linear

MAX_DENSE_TOKENS = 256
"""So few tokens are computed by all experts: no host looks at who chose whom."""


class SparseMoe:
    """router: [experts, hidden]; gate_up: [experts, 2 * d, hidden]; down: [experts, hidden, d]."""

    def __init__(
        self, router: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int
    ) -> None:
        self.router = router
        self.gate_up = gate_up
        self.top_k = top_k
        experts, hidden, inner = down.shape
        self.wide_down = None
        if down.is_cuda:
            self.wide_down = down.transpose(0, 1).reshape(hidden, experts * inner)
            down = self.wide_down.view(hidden, experts, inner).transpose(0, 1)
        self.down = down

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """residual += scale * sum over chosen experts, weighted by softmax over the chosen.

        x, residual: [tokens, hidden]. A step of few tokens on CUDA can be captured in a graph.
        """
        best, experts = linear(x, self.router).float().topk(self.top_k, dim=-1)
        share = torch.softmax(best, dim=-1).to(x.dtype)
        if self.wide_down is not None and len(x) <= MAX_DENSE_TOKENS:
            self._add_all(residual, x, experts, share, scale, self.wide_down)
        else:
            self._add_chosen(residual, x, experts, share.mul_(scale))

    def _add_all(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        experts: torch.Tensor,
        share: torch.Tensor,
        scale: float,
        wide_down: torch.Tensor,
    ) -> None:
        """As two products with the matrices of all experts side by side."""
        count, doubled, hidden = self.gate_up.shape
        shares = share.new_zeros(len(x), count).scatter_(1, experts, share)
        gate_up = linear(x, self.gate_up.view(count * doubled, hidden))
        inner = swiglu(gate_up.view(len(x) * count, doubled)).mul_(shares.view(-1, 1))
        add_linear_(residual, inner.view(len(x), -1), wide_down, scale=scale)

    def _add_chosen(
        self, residual: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, share: torch.Tensor
    ) -> None:
        """Tokens grouped by expert, one pair of products each."""
        order = experts.flatten().argsort(stable=True)
        counts = torch.bincount(experts.flatten(), minlength=self.router.shape[0]).tolist()
        for expert, chosen in enumerate(torch.split(order, counts)):
            if len(chosen):
                tokens = chosen // self.top_k
                hidden = swiglu(x[tokens] @ self.gate_up[expert].t())
                output = (hidden @ self.down[expert].t()).mul_(share.flatten()[chosen, None])
                residual.index_add_(0, tokens, output)
