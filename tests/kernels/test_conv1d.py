"""The causal convolution against a float64 loop over tokens."""

import random

import fresh_seed
import pools
import pytest
import torch

from tasuki_kernels import conv1d

SLOTS = 20


def reference(x, window, weight, bias):
    """silu(convolution) [t, channels] and the window after every token, float64."""
    history = window.double()
    outputs, windows = [], []
    for token in x.double():
        history = torch.cat((history, token[None]))
        value = (history[-len(weight) :] * weight.double()).sum(0) + (
            0.0 if bias is None else bias.double()
        )
        outputs.append(value * torch.sigmoid(value))
        windows.append(history[1 - len(weight) :])
    return torch.stack(outputs), windows


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kernel", [2, 4])
def test_ragged_prefills_equal_the_loop_and_leave_its_windows(kernel, with_bias):
    seed = fresh_seed.fresh_seed()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels = 10
    lens = [1, 2, 3, 40, draw.randrange(1, 100)]
    states = pools.nan_pool(SLOTS, kernel - 1, channels, gap=draw.randrange(5))
    free = draw.sample(range(SLOTS), SLOTS)
    slots = [free.pop() for _ in lens]
    starts = torch.randn(len(lens), kernel - 1, channels)
    states[slots] = starts
    weight = torch.randn(kernel, channels)
    bias = torch.randn(channels) if with_bias else None
    checkpoints = [(3, tokens, free.pop()) for tokens in (1, 2, 16, 39)]
    x = torch.randn(sum(lens), channels + 6)[:, 2:-4]
    plan = conv1d.plan(lens, slots, checkpoints, kernel, x.device)
    y = conv1d.causal_conv1d(x, states, plan, weight, bias)
    row = 0
    for seq, length in enumerate(lens):
        expected, windows = reference(x[row : row + length], starts[seq], weight, bias)
        close(y[row : row + length], expected)
        close(states[slots[seq]], windows[-1])
        for other, tokens, slot in checkpoints:
            if other == seq:
                close(states[slot], windows[tokens - 1])
        row += length
    assert states[free].isnan().all()


@pytest.mark.parametrize("with_bias", [True, False])
def test_decodes_equal_the_loop_and_touch_only_their_slots(with_bias):
    seed = fresh_seed.fresh_seed()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    seqs, channels, kernel = 5, 10, 4
    states = pools.nan_pool(SLOTS, kernel - 1, channels, gap=3)
    slots = draw.sample(range(SLOTS), seqs)
    starts = torch.randn(seqs, kernel - 1, channels)
    states[slots] = starts
    weight = torch.randn(kernel, channels)
    bias = torch.randn(channels) if with_bias else None
    x = torch.randn(seqs, channels + 6)[:, 2:-4]
    y = conv1d.causal_conv1d_update(x, states, torch.tensor(slots), weight, bias)
    for seq in range(seqs):
        expected, windows = reference(x[seq : seq + 1], starts[seq], weight, bias)
        close(y[seq : seq + 1], expected)
        close(states[slots[seq]], windows[-1])
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert states[others].isnan().all()
