"""From logits to tokens: bias, masks, penalties, temperature, filters, and one draw per row.

The order is vLLM's: log-probabilities are of the raw logits; then `min_tokens` mask, `logit_bias`,
repetition (prompt and output), frequency and presence penalty (output); an argmax for greedy rows;
for the others temperature, min_p, top_k, top_p (each on what the one before left) and the draw.

A filter is a threshold: it keeps all tokens that are at least as likely as the last one it must
keep. So ties are kept together, and the outcome depends neither on a sort's order nor on the rest
of the batch.

A draw inverts the distribution function at `uniform(seed, sample_index, position)`. No state is
carried from token to token, so any pod continues any other's sequence with the same draws.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch

from tasuki_common.sampling import SamplingParams
from tasuki_engine.request import Logprob, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy, as in vLLM: the division would overflow."""

_CANDIDATES = 1024
"""Likeliest tokens that are sorted first; a nucleus that reaches further costs a full sort."""
_MASK64 = (1 << 64) - 1


@dataclasses.dataclass
class SamplerRow:
    """One row of logits: the request behind it. Keep it from step to step; lists grow in place."""

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    seed: int
    sample_index: int
    stop_ids: tuple[int, ...]
    """Masked until `min_tokens` are out: eos unless ignore_eos, and stop_token_ids."""
    _seen: "_Seen | None" = dataclasses.field(default=None, init=False, repr=False)

    @property
    def greedy(self) -> bool:
        """The likeliest token, no draw."""
        return self.params.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Tokens seen so far change the logits."""
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )

    @property
    def masks_stops(self) -> bool:
        """Too early to stop."""
        return len(self.output_token_ids) < self.params.min_tokens and bool(self.stop_ids)


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """One token per row, and its log-probabilities where the row asks for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class _Seen:
    """Per-token counts of one row, kept on the device and updated by what is new.

    in_prompt: bool [V]; counts: float32 [V], output only.
    """

    def __init__(self, row: SamplerRow, vocab_size: int, device: torch.device) -> None:
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.in_prompt[torch.tensor(row.prompt_token_ids, dtype=torch.int64, device=device)] = True
        self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self.num_counted = 0

    def update(self, output_token_ids: list[int]) -> None:
        new = output_token_ids[self.num_counted :]
        if new:
            ids = torch.tensor(new, dtype=torch.int64, device=self.counts.device)
            self.counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
            self.num_counted = len(output_token_ids)


def sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> SampleResult:
    """One token per row of `logits` [R, V] float32, which is left as it is."""
    adjusted = _adjust(logits, rows)
    tokens = adjusted.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.greedy]
    if drawn:
        _draw_rows(adjusted, rows, drawn, tokens)
    token_ids: list[int] = tokens.tolist()
    return SampleResult(token_ids, _logprobs_of_rows(logits, rows, token_ids))


def prompt_logprobs(
    logits: torch.Tensor, next_token_ids: Sequence[int], top: int
) -> list[TokenLogprobs]:
    """For each row of `logits` [T, V]: log-probability and rank of the token that came next.

    `top`: how many of the likeliest tokens to list beside it.
    """
    logprobs = logits.log_softmax(dim=-1)
    ids = torch.tensor(next_token_ids, dtype=torch.int64, device=logits.device)[:, None]
    own = logprobs.gather(1, ids)
    ranks = (logprobs > own).sum(dim=-1).add_(1).tolist()
    values, indices = logprobs.topk(min(top, logits.shape[1]), dim=-1)
    best = zip(indices.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(
            Logprob(token_id, value, rank),
            [Logprob(t, v, r) for r, (t, v) in enumerate(zip(*top_row, strict=True), 1)],
        )
        for token_id, value, rank, top_row in zip(
            next_token_ids, own[:, 0].tolist(), ranks, best, strict=True
        )
    ]


def uniform(seed: int, sample_index: int, position: int) -> float:
    """A number in [0, 1) of 52 random bits that depends on its arguments alone.

    The splitmix64 generator (Steele, Lea, Flood 2014) at step `position`, started from a hash of
    seed and sample. 52 bits, so that `u * total < total` in float64.
    """
    state = _mix64(_mix64(seed & _MASK64) + sample_index)
    return (_mix64(state + position * 0x9E3779B97F4A7C15) >> 12) * 2.0**-52


def _mix64(value: int) -> int:
    """splitmix64's output function of `value` one step on."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _logprobs_of_rows(
    logits: torch.Tensor, rows: Sequence[SamplerRow], token_ids: list[int]
) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(rows)
    asked = [(i, row.params.logprobs) for i, row in enumerate(rows)]
    wanted = [(i, top) for i, top in asked if top is not None]
    if wanted:
        indices = [i for i, _ in wanted]
        chosen = logits if len(wanted) == len(rows) else logits[indices]
        most = max(top for _, top in wanted)
        entries = prompt_logprobs(chosen, [token_ids[i] for i in indices], most)
        for (i, top), entry in zip(wanted, entries, strict=True):
            result[i] = entry if top == most else TokenLogprobs(entry.token, entry.top[:top])
    return result


def _adjust(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """Logits after masks, bias and penalties; a copy if there are any, else `logits`."""
    masked = [(i, token) for i, row in enumerate(rows) if row.masks_stops for token in row.stop_ids]
    biased = [
        (i, token, bias)
        for i, row in enumerate(rows)
        for token, bias in (row.params.logit_bias or {}).items()
    ]
    penalised = [i for i, row in enumerate(rows) if row.penalised]
    if not (masked or biased or penalised):
        return logits
    logits = logits.clone()
    device = logits.device
    if masked:
        logits[tuple(torch.tensor(masked, device=device).T)] = -math.inf
    if biased:
        at = torch.tensor([entry[:2] for entry in biased], device=device).T
        bias = torch.tensor([entry[2] for entry in biased], dtype=logits.dtype, device=device)
        logits.index_put_(tuple(at), bias, accumulate=True)
    if penalised:
        logits[penalised] = _penalise(logits[penalised], [rows[i] for i in penalised])
    return logits


def _penalise(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """[R, V] after repetition, frequency and presence penalty."""
    seen = [_seen_by(row, logits) for row in rows]
    counts = torch.stack([entry.counts for entry in seen])
    in_output = counts > 0
    repeated = in_output | torch.stack([entry.in_prompt for entry in seen])
    repetition = _column(logits, [row.params.repetition_penalty for row in rows])
    frequency = _column(logits, [row.params.frequency_penalty for row in rows])
    presence = _column(logits, [row.params.presence_penalty for row in rows])
    shrunk = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(repeated, shrunk, logits) - frequency * counts - presence * in_output


def _seen_by(row: SamplerRow, logits: torch.Tensor) -> _Seen:
    if row._seen is None:
        row._seen = _Seen(row, logits.shape[1], logits.device)
    row._seen.update(row.output_token_ids)
    return row._seen


def _column(like: torch.Tensor, values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _draw_rows(
    adjusted: torch.Tensor, rows: Sequence[SamplerRow], drawn: list[int], tokens: torch.Tensor
) -> None:
    """Puts a random token for each of the rows `drawn` into `tokens` [R] int64."""
    chosen = [rows[i] for i in drawn]
    logits = adjusted if len(drawn) == len(rows) else adjusted[drawn]
    temperature = _column(logits, [row.params.temperature for row in chosen])
    # The maximum goes first: then no temperature overflows, and the likeliest token weighs 1.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    weights = _filter(scaled, [row.params for row in chosen])
    draws = [uniform(row.seed, row.sample_index, len(row.output_token_ids)) for row in chosen]
    points = torch.tensor(draws, dtype=torch.float64, device=logits.device)
    picked = invert_cdf(weights, points)
    if len(drawn) == len(rows):
        tokens.copy_(picked)
    else:
        tokens[drawn] = picked


def invert_cdf(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """[R] int64: where the running sum of `weights` [R, V] first exceeds `points` [R] of its total.

    weights: float32, not negative, some positive; points: float64 in [0, 1 - 2**-52].
    """
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cdf, points[:, None] * cdf[:, -1:], right=True)[:, 0]


def _filter(scaled: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Weights exp(`scaled`) [R, V], 0 for what min_p, top_k, top_p exclude; row maxima are 0."""
    weights = scaled.exp()
    vocab_size = scaled.shape[1]
    if any(p.min_p > 0.0 for p in params):
        floors = [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params]
        weights.masked_fill_(scaled < _column(scaled, floors), 0.0)
    top_ks = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    by_rank = [i for i, k in enumerate(top_ks) if k < vocab_size]
    by_mass = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if by_rank:
        _keep_top_k(weights, by_rank, [top_ks[i] for i in by_rank])
    if by_mass:
        _keep_top_p(weights, by_mass, [params[i].top_p for i in by_mass])
    return weights


def _keep_top_k(weights: torch.Tensor, indices: list[int], top_ks: list[int]) -> None:
    part = weights[indices]
    best = part.topk(max(top_ks), dim=-1).values
    ranks = torch.tensor(top_ks, device=weights.device)[:, None] - 1
    weights[indices] = part.masked_fill_(part < best.gather(1, ranks), 0.0)


def _keep_top_p(weights: torch.Tensor, indices: list[int], top_ps: list[float]) -> None:
    part = weights[indices]
    mass = _column(part, top_ps).double() * part.sum(dim=-1, keepdim=True, dtype=torch.float64)
    best = part.topk(min(_CANDIDATES, part.shape[1]), dim=-1).values
    before = best.cumsum(dim=-1, dtype=torch.float64) - best
    if bool((before[:, -1:] + best[:, -1:] < mass).any()):
        best = part.sort(dim=-1, descending=True).values
        before = best.cumsum(dim=-1, dtype=torch.float64) - best
    last = (before < mass).sum(dim=-1, keepdim=True).clamp_(min=1) - 1
    weights[indices] = part.masked_fill_(part < best.gather(1, last), 0.0)
