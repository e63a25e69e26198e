"""A mixture of experts on CUDA: few tokens in a graph, many by expert."""

import pytest
import torch
from naive_moe import HIDDEN, exact, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]


def test_a_decode_step_is_captured_and_a_prompt_takes_the_other_way():
    moe, down = make("cuda")
    for tokens in (1, 40, 300):
        x = torch.randn(tokens, HIDDEN, device="cuda")
        residual = torch.randn(tokens, HIDDEN, device="cuda")
        expected = exact(moe, down, residual, x, 0.5)
        start = residual.clone()
        moe.add_to(residual, x, 0.5)
        torch.testing.assert_close(residual.double(), expected, rtol=1e-4, atol=1e-5)
        if tokens <= 40:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                moe.add_to(residual, x, 0.5)
            residual.copy_(start)
            graph.replay()
            torch.testing.assert_close(residual.double(), expected, rtol=1e-4, atol=1e-5)
