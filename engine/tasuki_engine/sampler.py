"""From logits to tokens: bias, masks, penalties, temperature, filters, and one draw per row.

The order is vLLM's: log-probabilities are of the raw logits; then `min_tokens` mask, `logit_bias`,
repetition (prompt and output), frequency and presence penalty (output); an argmax for greedy rows;
for the others temperature, min_p, top_k, top_p (each on what the one before left) and the draw.

A draw depends on (seed, sample, position) and the row's own logits; nothing is carried from token
to token or between rows. So any pod continues any other's sequence with the same draws, in any
batch. The maths is in `tasuki_kernels`.

`launch` sends all of it to the device without waiting for it; `Draft.result` waits and reads.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tasuki_common.sampling import SamplingParams
from tasuki_engine.request import Logprob, TokenLogprobs
from tasuki_kernels import argmax, likelihood, sampling

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
    in_flight: int = 0
    """Tokens that were drawn and that the host has not read yet: the last ones of the output."""
    _seen: "_Seen | None" = dataclasses.field(default=None, init=False, repr=False)

    @property
    def num_output(self) -> int:
        """Tokens drawn so far: the position of the next draw."""
        return len(self.output_token_ids) + self.in_flight

    @property
    def greedy(self) -> bool:
        """The likeliest token, no draw."""
        return self.params.temperature < GREEDY_BELOW

    @functools.cached_property
    def plain(self) -> bool:
        """Its tokens are the argmax of the raw logits, and nothing else is asked for."""
        params = self.params
        always = self.greedy and not self.penalised and not params.logit_bias
        return always and params.min_tokens == 0 and params.logprobs is None

    @functools.cached_property
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
        return self.num_output < self.params.min_tokens and bool(self.stop_ids)


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """One token per row, and its log-probabilities where the row asks for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of some tokens, and the likeliest beside each; on their way to the host.

    token_ids, values, ranks: [rows]; top_ids, top_values: [rows, top], best first.
    """

    token_ids: torch.Tensor
    values: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor

    def entries(self) -> list[TokenLogprobs]:
        """One per row; the device must have ended."""
        tops = zip(self.top_ids.tolist(), self.top_values.tolist(), strict=True)
        return [
            TokenLogprobs(
                Logprob(token_id, value, rank),
                [Logprob(t, v, r) for r, (t, v) in enumerate(zip(*top, strict=True), 1)],
            )
            for token_id, value, rank, top in zip(
                self.token_ids.tolist(),
                self.values.tolist(),
                self.ranks.tolist(),
                tops,
                strict=True,
            )
        ]


@dataclasses.dataclass(frozen=True)
class Draft:
    """Tokens that are being drawn: on the device, and on their way to the host."""

    tokens: torch.Tensor
    """[rows] int64 on the device; -1 where the logits are no distribution."""
    on_host: torch.Tensor
    scored: list[tuple[int, int]]
    """Rows that ask for log-probabilities, and how many of the likeliest."""
    scores: Scores | None

    def result(self) -> SampleResult:
        """Reads what has arrived; the device must have ended."""
        token_ids: list[int] = self.on_host.tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        entries = self.scores.entries() if self.scores is not None else []
        for (row, top), entry in zip(self.scored, entries, strict=True):
            if token_ids[row] >= 0:
                logprobs[row] = TokenLogprobs(entry.token, entry.top[:top])
        return SampleResult(token_ids, logprobs)


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
    draft = launch(logits, rows)
    if logits.is_cuda:
        torch.cuda.current_stream(logits.device).synchronize()
    return draft.result()


def launch(
    logits: torch.Tensor, rows: Sequence[SamplerRow], greedy: torch.Tensor | None = None
) -> Draft:
    """`sample` without waiting. greedy: the argmax of the raw logits, where it is known already."""
    if greedy is not None and all(row.plain for row in rows):
        return Draft(greedy, to_host(greedy), [], None)
    adjusted = _adjust(logits, rows)
    tokens = greedy if greedy is not None and adjusted is logits else argmax.greedy(adjusted)
    drawn = [i for i, row in enumerate(rows) if not row.greedy]
    if drawn:
        chosen = [rows[i] for i in drawn]
        keys = [sampling.race_key(row.seed, row.sample_index, row.num_output) for row in chosen]
        tokens = sampling.draw(adjusted, tokens, drawn, keys, **_filters(chosen))
    asked = [(i, row.params.logprobs) for i, row in enumerate(rows)]
    scored = [(i, top) for i, top in asked if top is not None]
    scores = None
    if scored:
        indices = to_device([i for i, _ in scored], torch.int64, logits.device)
        part = logits if len(scored) == len(rows) else logits.index_select(0, indices)
        most = max(top for _, top in scored)
        scores = score(part, tokens.index_select(0, indices).clamp_(min=0), most)
    return Draft(tokens, to_host(tokens), scored, scores)


def to_device(
    values: Sequence[Any] | npt.NDArray[Any], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of host values that nobody waits for: CUDA copies it from pinned memory."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory that is complete when the device has come here."""
    return tensor.to("cpu", non_blocking=True)


def distribution(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """[R, V] float32: in proportion to the probability with which `sample` gives each token.

    Rows must not be greedy, logits not on a device.
    """
    filters = _filters(rows)
    adjusted = _adjust(logits, rows)
    scaled = sampling.scale(adjusted, argmax.greedy(adjusted), filters.pop("temperatures"))
    lowest = sampling.floors(scaled, **filters)
    return scaled.exp() if lowest is None else scaled.exp().masked_fill_(scaled < lowest, 0.0)


def prompt_logprobs(
    logits: torch.Tensor, next_token_ids: Sequence[int], top: int
) -> list[TokenLogprobs]:
    """For each row of `logits` [T, V]: log-probability and rank of the token that came next.

    `top`: how many of the likeliest tokens to list beside it.
    """
    scores = score(logits, to_device(next_token_ids, torch.int64, logits.device), top)
    if logits.is_cuda:
        torch.cuda.current_stream(logits.device).synchronize()
    return scores.entries()


def score(logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> Scores:
    """`prompt_logprobs` without waiting; token_ids: [T] int64."""
    values, ranks, top_ids, top_values = likelihood.score(logits, token_ids, top)
    return Scores(*map(to_host, (token_ids, values, ranks, top_ids, top_values)))


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
        at = to_device(masked, torch.int64, device).T
        logits.index_put_(tuple(at), logits.new_full((), -math.inf))
    if biased:
        at = to_device([entry[:2] for entry in biased], torch.int64, device).T
        bias = to_device([entry[2] for entry in biased], logits.dtype, device)
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
        return to_device(repeated, torch.float32, logits.device)

    device = logits.device
    row = to_device(np.repeat(np.array(indices), lengths), torch.int64, device)
    column = to_device(np.concatenate([entry.ids for entry in seen]), torch.int64, device)
    counts = to_device(np.concatenate([entry.counts for entry in seen]), torch.float32, device)
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


def _filters(rows: Sequence[SamplerRow]) -> dict[str, list[Any]]:
    """What `sampling.draw` wants of the rows' parameters."""
    params = [row.params for row in rows]
    return {
        "temperatures": [p.temperature for p in params],
        "min_ps": [p.min_p for p in params],
        "top_ks": [p.top_k for p in params],
        "top_ps": [p.top_p for p in params],
    }
