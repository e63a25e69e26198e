"""The attention kernels on a GPU against dense attention in float64."""

import random

import paged_attention
import pytest
import torch
from fresh_seed import fresh_seed

from tasuki_kernels import attention_prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of values of size one; half precision rounds q, k, v, the weights of values, and the result."""


def step(draw: random.Random) -> tuple[list[int], list[int]]:
    decodes = [1, 2, 16, 17, 0, 64, 65, draw.randrange(1, 400), 2500]
    chunks = [(2, 0), (16, 0), (130, 31), (1500, 0), (64, 1200), (333, 500)]
    query_lens = [1] * len(decodes) + [length for length, _ in chunks]
    return query_lens, decodes + [length + before for length, before in chunks]


def check(case: paged_attention.Case, scale: float, **options: object) -> None:
    poison = torch.full((1 << 24,), torch.nan, device="cuda")
    del poison  # What `attend` allocates is NaN until it is written.
    actual = case.run(scale, **options).double().cpu()
    on_cpu = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    bound = BOUNDS[case.cache.dtype]
    torch.testing.assert_close(actual, case.expected(scale, **on_cpu), rtol=bound, atol=bound)
    assert case.wrong_places() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim", "window"),
    [(16, 8, 128, 128, None), (32, 8, 64, 0, None), (8, 1, 256, 64, 200), (14, 2, 80, 80, 900)],
)
def test_mixed_steps_equal_float64(heads, kv_heads, head_dim, rotary_dim, window, dtype):
    seed = fresh_seed()
    torch.manual_seed(seed)
    draw = random.Random(seed)
    case = paged_attention.make(
        draw, *step(draw), heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=window,
        dtype=dtype, device="cuda", with_norm=rotary_dim > 0, rotary_dim=rotary_dim,
    )  # fmt: skip
    check(case, head_dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_softcap_and_sinks_equal_float64(dtype):
    seed = fresh_seed()
    torch.manual_seed(seed)
    draw = random.Random(seed)
    case = paged_attention.make(
        draw, *step(draw), heads=16, kv_heads=4, head_dim=64, dtype=dtype, device="cuda"
    )
    check(case, 0.125, softcap=2.0, sinks=torch.randn(16, device="cuda"))


@pytest.mark.parametrize(
    "lengths", [[2048], [1024, 1024], [2048 + 40], [1, 1024], [1, 1024, 1024, 17]]
)
def test_prompts_alone_equal_float64(lengths):
    seed = fresh_seed()
    torch.manual_seed(seed)
    case = paged_attention.make(
        random.Random(seed), lengths, lengths, heads=16, kv_heads=8, head_dim=128,
        dtype=torch.bfloat16, device="cuda", with_norm=True, rotary_dim=128,
    )  # fmt: skip
    check(case, 0.1)


def test_results_do_not_depend_on_who_comes_last():
    seed = fresh_seed()
    torch.manual_seed(seed)
    lens = [1] * 3, [2500, 30, 900]
    case = paged_attention.make(
        random.Random(seed), *lens, heads=16, kv_heads=8, head_dim=128, dtype=torch.bfloat16,
        device="cuda",
    )  # fmt: skip
    first = case.run(0.1)
    assert all(torch.equal(case.run(0.1), first) for _ in range(50))


def test_heads_of_prompts_go_to_cudnn_in_whole_units():
    unit = attention_prefill.DENSE_UNIT
    lengths = [(unit + 476, 0), (unit, unit), (unit, 0), (unit, 0), (2 * unit, 0)]
    chunks, row = [], 0
    for seq, (length, before) in enumerate(lengths):
        chunks.append(attention_prefill.Chunk(seq, row, length, before + length))
        row += length
    cache = torch.zeros(4, 1, 2, 8, 16, 128, dtype=torch.bfloat16, device="cuda")
    table = torch.zeros(len(chunks), 256, dtype=torch.int32, device="cuda")
    plan = attention_prefill.plan(cache, table, chunks, None, 2, plain=True)
    third = 2 * unit + 476
    assert plan.dense == [(0, unit, 1), (third, unit, 2), (third + 2 * unit, 2 * unit, 1)]
    tiles = {(row, count) for _, row, count, *_ in plan.tasks.tolist()}
    covered = {row + i for row, count in tiles for i in range(count)}
    assert covered == {*range(unit, third)}
