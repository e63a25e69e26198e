"""The kernels that draw, interpreted, against the torch reference: the same tokens and filters.

The distribution that the reference draws from, and the noise, are tests/engine/test_sampler.py's.
"""

import math
import random
from typing import Any

import pytest
import torch
from fresh_seed import fresh_seed

from tasuki_kernels import argmax, draw_floors, sampling, sizes
from tasuki_kernels.backend import interpreted

FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.3},
    "tiny temperature": {"temperature": 1.1e-5},
    "endless temperature": {"temperature": 1e300},
    "min_p": {"min_p": 0.05},
    "top_k": {"top_k": 20},
    "top_k 1": {"top_k": 1, "top_p": 0.5},
    "top_k of all": {"top_k": 10**6},
    "top_p": {"top_p": 0.9},
    "tiny top_p": {"top_p": 1e-9},
    "wide top_p": {"top_p": 0.9999},
    "usual": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "hot": {"temperature": 3.0, "top_k": 700, "top_p": 0.99},
    "tight": {"min_p": 1.0, "top_k": 5, "top_p": 0.5},
    "all": {"temperature": 1.3, "min_p": 0.01, "top_k": 50, "top_p": 0.8},
}


def columns(chosen: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {
        "temperatures": [one.get("temperature", 1.0) for one in chosen],
        "min_ps": [one.get("min_p", 0.0) for one in chosen],
        "top_ks": [one.get("top_k", 0) for one in chosen],
        "top_ps": [one.get("top_p", 1.0) for one in chosen],
    }


def compare(
    logits: torch.Tensor, rows: list[int], keys: list[int], chosen: list[dict[str, Any]]
) -> torch.Tensor:
    """The tokens, which are those of the reference."""
    likeliest = argmax.greedy(logits)
    wide = torch.full((len(logits), logits.shape[1] + 3), math.nan)
    wide[:, : logits.shape[1]] = logits
    expected = sampling.draw(logits, likeliest, rows, keys, **columns(chosen))
    with interpreted():
        found = sampling.draw(wide[:, :-3], likeliest, rows, keys, **columns(chosen))
    assert found.tolist() == expected.tolist()
    return found


@pytest.mark.parametrize("size", [1, 2, 1024, 1025, 3000])
def test_tokens_are_those_of_the_reference(size: int) -> None:
    rng = random.Random(fresh_seed())
    names = [*FILTERS, *FILTERS]
    rng.shuffle(names)
    logits = 3 * torch.randn(len(names) + 2, size, generator=torch.Generator().manual_seed(size))
    rows = rng.sample(range(len(logits)), len(names))
    keys = [rng.randrange(-(2**63), 2**63) for _ in rows]
    found = compare(logits, rows, keys, [FILTERS[name] for name in names])
    if size > 1000:
        assert (found != logits.argmax(dim=-1)).sum() > 5


@pytest.mark.parametrize("room", [8, 3000])
@pytest.mark.parametrize("name", ["top_k", "top_p", "wide top_p", "usual", "hot", "all"])
def test_what_the_filters_keep_is_what_the_reference_keeps(
    monkeypatch: pytest.MonkeyPatch, name: str, room: int
) -> None:
    monkeypatch.setattr(draw_floors, "_ROOM", room)
    generator = torch.Generator().manual_seed(fresh_seed())
    logits = torch.randn(5, 3000, generator=generator)
    logits *= torch.tensor([0.0, 1e-3, 1.0, 4.0, 30.0])[:, None]
    logits[2:4] = (logits[2:4] * 4).round() / 4  # ties abound
    logits[3, :1500] = -math.inf
    chosen = [FILTERS[name]] * len(logits)
    wanted = columns(chosen)
    likeliest = argmax.greedy(logits)
    scaled = sampling.scale(logits, likeliest, wanted.pop("temperatures"))
    lowest = sampling.floors(scaled, **wanted)
    assert lowest is not None
    with interpreted():
        rows = list(range(len(logits)))
        table, limited = sampling._table(3000, rows, rows, **columns(chosen), device=logits.device)
        reach = draw_floors.reach(logits, likeliest, table, limited)
    assert limited == len(logits)
    kept = (scaled >= -reach[:, None]).sum(dim=-1)
    expected = (scaled >= lowest).sum(dim=-1)
    # Where float32 sums decide: by no more than tokens that weigh nothing together.
    for i in range(len(logits)):
        between = (scaled[i] >= -reach[i]) != (scaled[i] >= lowest[i])
        assert scaled[i][between].double().exp().sum() <= 1e-6 * scaled[i].double().exp().sum(), (
            f"row {i}: {kept[i]} kept, {expected[i]} expected"
        )


def test_rows_without_a_distribution_get_no_token_and_a_single_token_left_wins() -> None:
    logits = torch.randn(5, 1500)
    logits[0, 77] = math.nan
    logits[1, 1400] = math.inf
    logits[2:4] = -math.inf
    logits[3, 1222] = -5.0
    logits[4] = -200.0  # weights that float32 cannot hold
    logits[4, 1111] = 0.0
    for name in ("plain", "tiny temperature", "top_k", "top_p", "all"):
        found = compare(logits, list(range(5)), list(range(5)), [FILTERS[name]] * 5)
        assert found.tolist() == [-1, -1, -1, 1222, 1111]


def test_rows_that_are_not_drawn_keep_their_token() -> None:
    logits = torch.randn(6, 300)
    found = compare(logits, [4, 1], [1, 2], [FILTERS["top_k"], FILTERS["plain"]])
    kept = [0, 2, 3, 5]
    assert found[kept].tolist() == logits.argmax(dim=-1)[kept].tolist()


def test_a_token_drawn_in_parts_is_the_one_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 2 * torch.randn(4, 2100)
    chosen = [FILTERS[name] for name in ("plain", "top_p", "usual", "all")]
    found = []
    for programs in (1, 8, 264):
        monkeypatch.setattr(sizes, "_PROGRAMS", programs)
        found.append(compare(logits, list(range(4)), list(range(4)), chosen).tolist())
    assert found[0] == found[1] == found[2]
