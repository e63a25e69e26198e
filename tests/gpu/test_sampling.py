"""Draws and log-probabilities on CUDA: the tokens of the CPU, in any batch, and nobody waits."""

import random

import pytest
import torch
from fresh_seed import fresh_seed

from tasuki_common.sampling import SamplingParams
from tasuki_engine import sampler
from tasuki_engine.sampler import SamplerRow
from tasuki_kernels import likelihood

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]

KINDS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3, "min_p": 0.05},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"top_p": 0.9, "logprobs": 3},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 50.0, "top_k": 20_000, "top_p": 0.5},
    {"top_k": 1, "logprobs": 0},
    {"min_p": 0.01, "top_k": 50, "top_p": 0.8, "repetition_penalty": 1.2, "logit_bias": {5: 3.0}},
]


def batch(count, size):
    seed = fresh_seed()
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, size, generator=generator)
    rows = [
        SamplerRow(
            SamplingParams(**KINDS[i % len(KINDS)]), [1, 2], [3], draw.getrandbits(63), 0, ()
        )
        for i in range(count)
    ]
    return logits, rows


@pytest.mark.parametrize("size", [1000, 32_768, 151_936, 262_144])
@pytest.mark.parametrize("count", [1, 9, 100])
def test_tokens_on_cuda_are_those_of_the_cpu(count, size):
    logits, rows = batch(count, size)
    expected = sampler.sample(logits, rows)
    found = sampler.sample(logits.cuda(), rows)
    assert found.token_ids == expected.token_ids
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.token.rank == other.token.rank
            assert one.token.logprob == pytest.approx(other.token.logprob, abs=1e-4)


def test_a_row_gets_the_same_token_in_any_batch_and_every_time():
    logits, rows = batch(64, 151_936)
    device = logits.cuda()
    together = sampler.sample(device, rows).token_ids
    assert together == sampler.sample(device, rows).token_ids
    alone = [sampler.sample(device[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]
    assert together == [one.token_ids[0] for one in alone]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_launch_does_not_wait_for_the_device():
    logits, rows = batch(18, 32_768)
    device = logits.cuda()
    sampler.sample(device, rows)  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        draft = sampler.launch(device, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert draft.result().token_ids == sampler.sample(logits, rows).token_ids


def test_log_probabilities_are_those_of_float64():
    logits = 5 * torch.randn(7, 151_936, device="cuda")
    tokens = torch.randint(151_936, (7,), device="cuda")
    own, ranks, ids, values = likelihood.score(logits, tokens, 5)
    exact = logits.double().log_softmax(dim=-1)
    torch.testing.assert_close(
        own.double(), exact.gather(1, tokens[:, None])[:, 0], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(values.double(), exact.gather(1, ids), atol=1e-4, rtol=0)
    assert (ranks == (logits > logits.gather(1, tokens[:, None])).sum(dim=-1) + 1).all()
