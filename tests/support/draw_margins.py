"""How near a text's tokens came to being others, by transformers' word and naive arithmetic.

Tests that demand equal texts of two pods take another prompt where the margin is below `SAFE`: two
right answers in float32 may differ there. A negative margin is a token that was not the one to
take, by so much; only within `greedy.TIE` of 0 may that be rounding.
"""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import naive_sampling
import numpy as np
import numpy.typing as npt
import tiny_models
from greedy import TIE, random_prompt

from tasuki_common.sampling import SamplingParams
from tasuki_engine.sampler import SamplerRow

TRIES = 10
"""So many texts, of some hundred tokens each, never all come near another."""
SAFE = 2e-4
"""Ten times what float32 leaves between two batches, for each of two logits."""
_FAR = 10.0
"""Logits apart: nothing that is tested for moves so far."""

Array = npt.NDArray[np.float64]


def is_settled(
    model: Path, prompt: list[int], choices: Mapping[int, list[int]], options: Mapping[str, Any]
) -> bool:
    """Whether each of `choices` of a request is safe from rounding; its other options are ignored.

    Raises:
        AssertionError: one is not what transformers' logits and the seed make it.
    """
    fields = {name: options[name] for name in SamplingParams.__struct_fields__ if name in options}
    params = SamplingParams(**fields)
    margins = [draw_margin(model, prompt, choices[i], params, i) for i in sorted(choices)]
    print(f"the tokens of {fields} are {min(margins):.2e} from being others")
    assert min(margins) > -TIE, f"{choices} of {fields} is not what was to be drawn"
    return min(margins) >= SAFE


def settled_prompt(rng: random.Random, model: Path, length: int, count: int) -> list[int]:
    """A random prompt with `count` greedy tokens after it that are safe from rounding."""
    for _ in range(TRIES):
        prompt = random_prompt(rng, length)
        if greedy_margin(model, prompt, count) >= SAFE:
            return prompt
    raise AssertionError(f"each of {TRIES} prompts has a token that rounding decides")


def greedy_margin(model: Path, prompt: list[int], count: int) -> float:
    """`draw_margin` of the greedy tokens; end tokens do not end them."""
    tokens = tiny_models.reference_greedy(model, prompt, count)
    return draw_margin(model, prompt, tokens, SamplingParams(temperature=0.0))


def draw_margin(
    model: Path, prompt: list[int], tokens: list[int], params: SamplingParams, sample_index: int = 0
) -> float:
    """By how much logits must move against each other for one of `tokens` to be another.

    tokens: what sample `sample_index` of `params` (with its seed) said after `prompt`.
    """
    table = tiny_models.reference_logits(model, prompt + tokens)[len(prompt) - 1 : -1].tolist()
    eos = () if params.ignore_eos else (tiny_models.EOS_TOKEN_ID, tiny_models.END_TOKEN_ID)
    stop_ids = tuple({*eos, *(params.stop_token_ids or ())})
    margin = math.inf
    for position, (logits, token) in enumerate(zip(table, tokens, strict=True)):
        output = tokens[:position]
        row = SamplerRow(params, prompt, output, params.seed or 0, sample_index, stop_ids)
        margin = min(margin, of_row(logits, row, token))
    return margin


def of_row(logits: list[float], row: SamplerRow, token: int) -> float:
    """`draw_margin` of one token: how far `logits` of `row` are from giving another.

    A filter's border matters where the token itself could fall out, or one come in that would win.
    """
    params = row.params
    values = np.array(naive_sampling.adjusted_logits(logits, row))
    if values[token] == -math.inf:
        return -math.inf
    if row.greedy:
        return float(values[token] - np.delete(values, token).max(initial=-math.inf))
    key = (row.seed, row.sample_index, len(row.output_token_ids))
    noise = np.array([naive_sampling.noise(*key, each) for each in range(len(values))])
    scores = values + params.temperature * noise
    inside = _depth(values, params, token)
    for each in np.argsort(-scores).tolist():
        if each == token:
            continue
        ahead = float(scores[token] - scores[each])
        if ahead >= inside:
            break
        # It does not win: it is behind, or kept out. The safer of the two counts.
        inside = min(inside, max(ahead, -_depth(values, params, each)))
    return inside


def _depth(values: Array, params: SamplingParams, token: int) -> float:
    """How far inside all filters the token is, in logits; negative outside."""
    own, others = values[token], np.delete(values, token)
    best, heat = values.max(), params.temperature
    depth = _FAR
    least = best + heat * math.log(params.min_p) if params.min_p > 0 else -math.inf
    if params.min_p > 0 and own < best:
        depth = min(depth, own - least)
    cut = -math.inf
    if 0 < params.top_k < len(values):
        depth = min(depth, own - np.sort(others)[-params.top_k])
        cut = np.sort(values)[-params.top_k]
    if params.top_p < 1:
        rest = others[others >= max(cut, least)]
        depth = min(depth, _nucleus_depth(rest, own, heat, params.top_p))
        if params.min_p > 0:  # one more or less at its border, and the nucleus is another
            near = float(np.abs(values[values < best] - least).min(initial=_FAR))
            depth = min(depth, near) if depth >= 0 else max(depth, -near)
    return float(depth)


def _nucleus_depth(rest: Array, own: float, heat: float, top_p: float) -> float:
    """How far a token with logit `own` is inside the nucleus that it shares with `rest`.

    It is inside while those ahead of it hold less than `top_p` of all. Moved by `shift` against it,
    others come ahead, and the odds of those ahead change by its exponential.
    """
    top = max(own, rest.max(initial=-math.inf))
    weights = np.exp((rest - top) / heat)
    total = weights.sum() + math.exp((own - top) / heat)

    def inside(shift: float) -> bool:
        share = weights[rest > own - shift].sum() / total
        return bool(share * (1 - top_p) * math.exp(shift / heat) < (1 - share) * top_p)

    sign = 1.0 if inside(0.0) else -1.0
    near, far = 0.0, _FAR
    while far - near > 1e-7:
        middle = (near + far) / 2
        if inside(sign * middle) == (sign > 0):
            near = middle
        else:
            far = middle
    return sign * near
