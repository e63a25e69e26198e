"""The chunked scan and the one-token update against the recurrence in float64, token by token."""

import random

import fresh_seed
import pools
import pytest
import torch

from tasuki_kernels import ssd

SLOTS = 24


def recurrence(x, dt, A, B, C, D, state):
    """y [t, heads, head_dim] and the state after every token, float64."""
    x, dt, A, B, C, D, state = (v.double() for v in (x, dt, A, B, C, D, state))
    repeat = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeat, 1), C.repeat_interleave(repeat, 1)
    outputs, states = [], []
    for t in range(len(x)):
        state = state * torch.exp(dt[t] * A)[:, None, None]
        state = state + (dt[t][:, None] * x[t])[:, :, None] * B[t][:, None, :]
        outputs.append((state * C[t][:, None, :]).sum(-1) + D[:, None] * x[t])
        states.append(state)
    return torch.stack(outputs), states


def inputs(tokens, heads, head_dim, groups, size):
    return (
        torch.randn(tokens, heads, head_dim),
        torch.rand(tokens, heads) * 0.5,
        -torch.rand(heads) * 2,
        torch.randn(tokens, groups, size),
        torch.randn(tokens, groups, size),
        torch.randn(heads),
    )


def close(actual, expected):
    assert actual.shape == expected.shape
    off = (actual.double() - expected).abs() / (1 + expected.abs())
    assert off.quantile(0.99) <= 2e-5
    assert off.max() <= 1e-4


SHAPES = [(4, 8, 1, 16), (6, 12, 2, 20), (3, 16, 3, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_prefills_equal_the_recurrence_and_leave_its_states(shape):
    seed = fresh_seed.fresh_seed()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads, head_dim, _, size = shape
    lens = [2, 63, 64, 65, 1, 200, draw.randrange(1, 300)]
    states = pools.nan_pool(SLOTS, heads, head_dim, size, gap=draw.randrange(7))
    free = draw.sample(range(SLOTS), SLOTS)
    slots = [free.pop() for _ in lens]
    starts = torch.randn(len(lens), heads, head_dim, size)
    starts[2] = 0
    states[slots] = starts
    marks = [(1, 16), (1, 48), (3, 64), (5, 16), (5, 64), (5, 128), (5, 199)]
    checkpoints = [(seq, tokens, free.pop()) for seq, tokens in marks]
    x, dt, A, B, C, D = inputs(sum(lens), *shape)

    plan = ssd.plan(lens, slots, checkpoints, x.device)
    y = ssd.chunk_scan(x, dt, A, B, C, D, states, plan)

    row = 0
    for seq, length in enumerate(lens):
        part = slice(row, row + length)
        expected, after = recurrence(x[part], dt[part], A, B[part], C[part], D, starts[seq])
        close(y[part], expected)
        close(states[slots[seq]], after[-1])
        for other, tokens, slot in checkpoints:
            if other == seq:
                close(states[slot], after[tokens - 1])
        row += length
    assert states[free].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_decodes_equal_the_recurrence_and_touch_only_their_slots(shape):
    seed = fresh_seed.fresh_seed()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads, head_dim, _, size = shape
    seqs = 5
    states = pools.nan_pool(SLOTS, heads, head_dim, size, gap=draw.randrange(7))
    slots = draw.sample(range(SLOTS), seqs)
    starts = torch.randn(seqs, heads, head_dim, size)
    states[slots] = starts
    x, dt, A, B, C, D = inputs(seqs, *shape)
    y = ssd.selective_state_update(states, slots, x, dt, A, B, C, D)
    for seq in range(seqs):
        one = slice(seq, seq + 1)
        expected, after = recurrence(x[one], dt[one], A, B[one], C[one], D, starts[seq])
        close(y[one], expected)
        close(states[slots[seq]], after[-1])
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert states[others].isnan().all()


def test_slow_decay_over_many_chunks_does_not_drift():
    """States that hardly forget, over 2,000 tokens: prefill and decode stay within 2e-5."""
    torch.manual_seed(fresh_seed.fresh_seed())
    tokens, heads, head_dim, size = 2000, 2, 8, 8
    x, dt, _, B, C, D = inputs(tokens, heads, head_dim, 1, size)
    dt, A = dt * 0.02, torch.tensor([-0.01, -1.0])
    states = torch.zeros(2, heads, head_dim, size)
    plan = ssd.plan([tokens], [0], [], x.device)
    scanned = ssd.chunk_scan(x, dt, A, B, C, D, states, plan)
    for t in range(tokens):
        one = slice(t, t + 1)
        stepped = ssd.selective_state_update(states, [1], x[one], dt[one], A, B[one], C[one], D)
        torch.testing.assert_close(stepped, scanned[one], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(states[0], states[1], rtol=2e-5, atol=2e-5)


def test_positive_dt_is_softplus_within_limits():
    torch.manual_seed(fresh_seed.fresh_seed())
    raw, bias = torch.randn(50, 4) * 10, torch.randn(4)
    expected = torch.log1p(torch.exp((raw + bias).double()))
    close(ssd.positive_dt(raw, bias, (0.0, float("inf"))), expected)
    close(ssd.positive_dt(raw, bias, (0.5, 3.0)), expected.clamp(0.5, 3.0))
