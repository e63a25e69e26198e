"""A sparse mixture of gated experts: each token goes through its `top_k` best."""

import torch

from tasuki_kernels.activation import swiglu


class SparseMoe:
    """Experts' weights stacked: gate_up [experts, 2 * d, hidden], down [experts, hidden, d]."""

    def __init__(
        self, router: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int
    ) -> None:
        self.router = router
        self.gate_up = gate_up
        self.down = down
        self.top_k = top_k

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
        """residual += scale * sum over chosen experts, weighted by softmax over the chosen.

        x, residual: [tokens, hidden]. Tokens are grouped by expert, one pair of products each.
        """
        logits = torch.nn.functional.linear(x, self.router).float()
        best, experts = logits.topk(self.top_k, dim=-1)
        share = torch.softmax(best, dim=-1).to(x.dtype).mul_(scale).flatten()
        order = experts.flatten().argsort(stable=True)
        counts = torch.bincount(experts.flatten(), minlength=self.router.shape[0]).tolist()
        for expert, chosen in enumerate(torch.split(order, counts)):
            if len(chosen):
                tokens = chosen // self.top_k
                hidden = swiglu(x[tokens] @ self.gate_up[expert].t())
                output = (hidden @ self.down[expert].t()).mul_(share[chosen, None])
                residual.index_add_(0, tokens, output)
