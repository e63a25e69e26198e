"""From logits to tokens: bias, masks, penalties, temperature, filters, and one draw per row.

The order is vLLM's: log-probabilities are of the raw logits; then `min_tokens` mask, `logit_bias`,
repetition (prompt and output), frequency and presence penalty (output); an argmax for greedy rows;
for the others temperature, min_p, top_k, top_p (each on what the one before left) and the draw.

A draw depends on (seed, sample, position) and the row's own logits; nothing is carried from token
to token or between rows. So any pod continues any other's sequence with the same draws, in any
batch. The maths is in `tasuki_kernels.sampling`.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tasuki_common.sampling import SamplingParams
from tasuki_engine.request import Logprob, TokenLogprobs
from tasuki_kernels import sampling

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy, as in vLLM: the division would overflow."""


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
    """The distinct tokens of one row, and how often each is in the output; grows in place."""

    def __init__(self, prompt_token_ids: list[int]) -> None:
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt_token_ids))}
        self._ids = np.fromiter(self._slots, np.int64, len(self._slots))
        self._counts = np.zeros(len(self._slots), np.float32)
        self._num_counted = 0

    def update(self, output_token_ids: list[int]) -> None:
        """Counts the tokens that came since the last call."""
        for token in output_token_ids[self._num_counted :]:
            slot = self._slots.setdefault(token, len(self._slots))
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros(64 + slot, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(64 + slot, np.float32)])
            self._ids[slot] = token
            self._counts[slot] += 1
        self._num_counted = len(output_token_ids)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Distinct tokens of prompt and output."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """Of `ids`, in the output."""
        return self._counts[: len(self._slots)]


def sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> SampleResult:
    """One token per row of `logits` [R, V] float32, which is left as it is.

    The token is -1 where the logits are no distribution (NaN or infinite): the model failed there.
    """
    adjusted = _adjust(logits, rows)
    tokens = adjusted.argmax(dim=-1)  # NaN counts as the greatest
    failed = ~adjusted.gather(1, tokens[:, None])[:, 0].isfinite()
    drawn = [i for i, row in enumerate(rows) if not row.greedy]
    if drawn:
        chosen = [rows[i] for i in drawn]
        weights = _weigh(adjusted if len(drawn) == len(rows) else adjusted[drawn], chosen)
        draws = [
            sampling.uniform(row.seed, row.sample_index, len(row.output_token_ids))
            for row in chosen
        ]
        points = torch.tensor(draws, dtype=torch.float64, device=logits.device)
        tokens[drawn] = sampling.invert_cdf(weights, points)
    token_ids: list[int] = tokens.masked_fill_(failed, -1).tolist()
    return SampleResult(token_ids, _logprobs_of_rows(logits, rows, token_ids))


def distribution(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """[R, V] float32: in proportion to the probability with which `sample` gives each token.

    Rows must not be greedy.
    """
    return _weigh(_adjust(logits, rows), rows)


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


def _logprobs_of_rows(
    logits: torch.Tensor, rows: Sequence[SamplerRow], token_ids: list[int]
) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(rows)
    asked = [(i, row.params.logprobs) for i, row in enumerate(rows)]
    wanted = [(i, top) for i, top in asked if top is not None and token_ids[i] >= 0]
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
        _penalise(logits, rows, penalised)
    return logits


def _penalise(logits: torch.Tensor, rows: Sequence[SamplerRow], indices: list[int]) -> None:
    """Repetition, frequency and presence penalty of rows `indices`, in place."""
    seen = [_seen_by(rows[i]) for i in indices]
    lengths = [len(entry.ids) for entry in seen]

    def spread(values: list[float]) -> torch.Tensor:
        repeated = np.repeat(np.array(values, np.float32), lengths)
        return torch.from_numpy(repeated).to(logits.device)

    row = torch.from_numpy(np.repeat(np.array(indices), lengths)).to(logits.device)
    column = torch.from_numpy(np.concatenate([entry.ids for entry in seen])).to(logits.device)
    counts = torch.from_numpy(np.concatenate([entry.counts for entry in seen])).to(logits.device)
    repetition = spread([rows[i].params.repetition_penalty for i in indices])
    frequency = spread([rows[i].params.frequency_penalty for i in indices])
    presence = spread([rows[i].params.presence_penalty for i in indices])
    values = logits[row, column]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[row, column] = values - frequency * counts - presence * (counts > 0)


def _seen_by(row: SamplerRow) -> _Seen:
    if row._seen is None:
        row._seen = _Seen(row.prompt_token_ids)
    row._seen.update(row.output_token_ids)
    return row._seen


def _weigh(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    params = [row.params for row in rows]
    return sampling.weigh(
        logits,
        temperatures=[p.temperature for p in params],
        min_ps=[p.min_p for p in params],
        top_ks=[p.top_k for p in params],
        top_ps=[p.top_p for p in params],
    )
