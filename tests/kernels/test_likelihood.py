"""The kernel of log-probabilities, interpreted, against float64."""

import math

import pytest
import torch
from fresh_seed import fresh_seed

from tasuki_kernels import likelihood
from tasuki_kernels.backend import interpreted


@pytest.mark.parametrize("top", [0, 1, 5, 10**4])
@pytest.mark.parametrize("size", [1, 7, 1024, 1025, 3000])
def test_log_probabilities_and_ranks_are_those_of_float64(size: int, top: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed())
    logits = torch.randn(4, size + 5, generator=generator)[:, :size]
    logits *= torch.tensor([0.0, 1.0, 5.0, 40.0])[:, None]
    logits[1] += 1000.0
    logits[2, size // 2 :] = logits[2, 0]  # ties
    logits[3, : size // 3] = -math.inf
    tokens = torch.randint(size, (4,), generator=generator)
    with interpreted():
        own, ranks, ids, values = likelihood.score(logits, tokens, top)
    exact = logits.double().log_softmax(dim=-1)
    chosen = exact.gather(1, tokens[:, None])
    torch.testing.assert_close(own.double(), chosen[:, 0], atol=1e-4, rtol=1e-5)
    assert ranks.tolist() == ((logits > logits.gather(1, tokens[:, None])).sum(dim=-1) + 1).tolist()
    assert ids.shape == values.shape == (4, min(top, size))
    best = exact.topk(min(top, size), dim=-1).values
    torch.testing.assert_close(values.double(), best, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(exact.gather(1, ids), best, atol=1e-4, rtol=1e-5)
