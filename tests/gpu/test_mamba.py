"""The Mamba2 kernels at the sizes of real models, on CUDA, against float64 token by token."""

import fresh_seed
import pytest
import torch
from mamba_cases import Part, Sizes, Step

from tasuki_kernels import mamba2
from tasuki_kernels.state_copy import copy_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]

GRANITE, NEMOTRON = Sizes(64, 64, 1, 128), Sizes(128, 64, 8, 128)
ODD = Sizes(6, 24, 2, 80, kernel=3)
MIXED = [
    Part(1, 1),
    Part(1, 900),
    Part(2, 18, (1,)),
    Part(300, 300, (16, 256)),
    Part(1700, 1705, (251, 507, 1696)),
]
FLOAT32 = 2e-4  # of the largest value; sums of 1,700 terms in another order
BFLOAT16 = 0.03
DRIFT = {torch.float32: 2e-5, torch.bfloat16: 0.01}
"""Of states, chunks against single tokens: in bfloat16 the chunks' products take rounded terms."""


def check(step, bound, slot_dtype=torch.int64):
    """Errors are measured against the largest expected value of each tensor."""
    expected, written = step.expected()
    actual = step.run(slot_dtype)
    errors = {"y": error(actual, expected)}
    for slot, (window, state) in written.items():
        assert torch.equal(step.conv[slot].double(), window)
        errors[f"state {slot}"] = error(step.ssm[slot], state)
    assert max(errors.values()) <= bound, errors
    assert step.untouched(written)


def error(actual, expected):
    assert not actual.isnan().any()
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("sizes", [GRANITE, ODD])
def test_float32_mixed_steps_equal_float64(sizes):
    check(Step(sizes, MIXED, seed=fresh_seed.fresh_seed(), device="cuda"), FLOAT32, torch.int32)


@pytest.mark.parametrize("sizes", [GRANITE, NEMOTRON, ODD])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_mixed_steps_stay_within_their_bound(sizes, state_dtype):
    step = Step(
        sizes,
        MIXED,
        seed=fresh_seed.fresh_seed(),
        device="cuda",
        dtype=torch.bfloat16,
        state_dtype=state_dtype,
    )
    check(step, BFLOAT16)


def test_a_captured_decode_step_reads_its_slots_and_lengths_at_replay():
    parts = [Part(1, 5), Part(1, 1), Part(1, 0), Part(1, 77)]
    step = Step(NEMOTRON, parts, seed=fresh_seed.fresh_seed(), device="cuda", dtype=torch.bfloat16)
    batch = step.plan()
    step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = mamba2.mix(step.projected, step.conv, step.ssm, step.mixer, batch)
    step.restore()
    batch.slots.copy_(batch.slots.flip(0))
    batch.context_lens.copy_(batch.context_lens.flip(0))
    graph.replay()
    step.slots.reverse()
    step.parts.reverse()
    expected, written = step.expected()
    assert error(actual, expected) <= BFLOAT16
    for slot, (window, state) in written.items():
        assert torch.equal(step.conv[slot].double(), window)
        assert error(step.ssm[slot], state) <= BFLOAT16
    assert step.untouched(written)


@pytest.mark.parametrize("dtype", DRIFT)
def test_states_of_chunks_and_of_single_tokens_drift_apart_within_the_stated_bound(dtype):
    length = 500
    step = Step(
        GRANITE, [Part(length, length)], seed=fresh_seed.fresh_seed(), dtype=dtype, device="cuda"
    )
    slot = step.slots[0]
    scanned = step.run()
    state = step.ssm[slot].clone()
    step.restore()
    single = mamba2.plan(
        slots=torch.tensor([slot], device="cuda"),
        context_lens=torch.ones(1, device="cuda", dtype=torch.int32),
        query_start=torch.arange(2, device="cuda", dtype=torch.int32),
        num_decodes=1,
        query_lens=None,
        checkpoints=[],
        kernel=GRANITE.kernel,
        heads=GRANITE.heads,
    )
    stepped = []
    for row in range(length):
        token = step.projected[row : row + 1]
        stepped.append(mamba2.mix(token, step.conv, step.ssm, step.mixer, single))
        single.context_lens.add_(1)
    drift = error(step.ssm[slot], state.double())
    assert drift <= DRIFT[dtype]
    assert error(torch.cat(stepped), scanned.double()) <= max(DRIFT[dtype], BFLOAT16)
    print(f"drift of the state over {length} tokens in {dtype}: {drift:.1e}")


def test_slots_are_copied_in_pairs():
    torch.manual_seed(fresh_seed.fresh_seed())
    region = torch.randint(0, 256, (9, 16 * 1031), dtype=torch.uint8, device="cuda")
    expected = region.clone()
    expected[[5, 2]] = region[[1, 8]]
    sources, targets = torch.tensor([[1, 8, 0], [5, 2, 0]], device="cuda", dtype=torch.int32)
    copy_slots(region, sources, targets)
    assert torch.equal(region, expected)
