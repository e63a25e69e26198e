"""What the sampler should do, one row and one token at a time, in float64 Python."""

import math
from collections import Counter

from tasuki_engine.sampler import SamplerRow

_MASK64 = (1 << 64) - 1


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def noise(seed: int, sample_index: int, position: int, token: int) -> float:
    """What the token gets in the race for this place of the text."""
    key = _mix((_mix((_mix(seed & _MASK64) + sample_index) & _MASK64) + position) & _MASK64)
    bits = _mix((key + token * 0x9E3779B97F4A7C15) & _MASK64)
    share = ((bits & (1 << 63) - 1) | 1) / 2**64
    return -math.log(-math.log(share) if bits >> 63 else -math.log1p(-share))


def adjusted_logits(logits: list[float], row: SamplerRow) -> list[float]:
    """After min_tokens mask, logit_bias and penalties."""
    params, prompt, output = row.params, row.prompt_token_ids, row.output_token_ids
    result = list(logits)
    if len(output) < params.min_tokens:
        for token in row.stop_ids:
            result[token] = -math.inf
    for token, bias in (params.logit_bias or {}).items():
        result[token] += bias
    for token in {*prompt, *output}:
        penalty = params.repetition_penalty
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token, count in Counter(output).items():
        result[token] -= params.frequency_penalty * count + params.presence_penalty
    return result


def _normalised(weights: list[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def probabilities(logits: list[float], row: SamplerRow) -> tuple[list[float], float]:
    """The distribution of the row's token, and how near a filter came to deciding otherwise.

    The second is a difference of probabilities: below float32's precision the choice is open.
    """
    params = row.params
    values = adjusted_logits(logits, row)
    best = max(values)
    if params.temperature == 0:
        return [float(i == values.index(best)) for i in range(len(values))], 1.0
    probs = _normalised([math.exp((value - best) / params.temperature) for value in values])
    margin = 1.0
    if params.min_p > 0:
        floor = params.min_p * max(probs)
        margin = min(margin, *(abs(p - floor) for p in probs))
        probs = _normalised([p if p >= floor else 0.0 for p in probs])
    if 0 < params.top_k < len(probs):
        floor = sorted(probs)[-params.top_k]
        margin = min([margin, *(abs(p - floor) for p in probs if p != floor)])
        probs = _normalised([p if p >= floor else 0.0 for p in probs])
    if params.top_p < 1:
        ordered = sorted(probs, reverse=True)
        sums = [math.fsum(ordered[: i + 1]) for i in range(len(ordered))]
        margin = min(margin, *(abs(total - params.top_p) for total in sums))
        enough = (i for i, total in enumerate(sums) if total >= params.top_p)
        floor = ordered[next(enough, len(ordered) - 1)]
        margin = min([margin, *(abs(p - floor) for p in probs if p != floor)])
        probs = _normalised([p if p >= floor else 0.0 for p in probs])
    return probs, margin
