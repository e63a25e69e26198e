"""A model whose next token depends on every token it can see, exactly, through each cache.

It keeps token ids in its KV blocks and a polynomial hash of all tokens in its state slot. The next
token is a hash of what it reads back from all three, so a block, a window or a state that is not
what it should be changes the output at once. `expected` computes the same from the plain list. What
is no number in a cache (NaN) makes no number of all that is computed from it, as in any model.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from tasuki_engine.step import (
    AttentionInput,
    AttentionSpec,
    Caches,
    CacheSpec,
    StateSpec,
    StepInput,
)

VOCAB_SIZE = 211
_PRIME = 65521


def _hash(tokens: Iterable[float], start: float = 0) -> float:
    """A whole number, exact in a float, unless one of them is NaN."""
    for token in tokens:
        start = (start * 257 + token + 1) % _PRIME
    return start


class HistoryModel:
    """Any mix of full attention, a sliding window and a recurrent state."""

    def __init__(
        self,
        *,
        full: bool = True,
        window: int | None = None,
        state: bool = True,
        max_len: int = 512,
    ) -> None:
        attention = AttentionSpec(num_layers=1, num_kv_heads=1, head_dim=1)
        self.cache_spec = CacheSpec(
            full=attention if full else None,
            window=None
            if window is None
            else AttentionSpec(num_layers=1, num_kv_heads=1, head_dim=1, window=window),
            state=StateSpec(1, 1, 2, 1, 1, 2, torch.float32, torch.float32) if state else None,
            kv_dtype=torch.float32,
        )
        self.vocab_size = VOCAB_SIZE
        self.max_model_len = max_len
        self.eos_token_ids: tuple[int, ...] = (0,)
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.folder = Path()
        self.revision = "history"
        self.steps: list[StepInput] = []
        self.keep_steps = False

    def expected(self, tokens: list[int]) -> int:
        """The token after `tokens`."""
        total = 0.0
        if self.cache_spec.full is not None:
            total += _hash(tokens)
        if self.cache_spec.window is not None:
            total += 3 * _hash(tokens[-(self.cache_spec.window.window or 0) :])
        if self.cache_spec.state is not None:
            total += 7 * _hash(tokens)
        return int(total) % VOCAB_SIZE

    def continuation(self, prompt: list[int], length: int) -> list[int]:
        """What greedy decoding gives, eos ignored."""
        tokens = list(prompt)
        for _ in range(length):
            tokens.append(self.expected(tokens))
        return tokens[len(prompt) :]

    def forward(self, step: StepInput, caches: Caches) -> torch.Tensor:
        """Float32 logits [rows, vocabulary]: 10 for the token that comes next, 0 elsewhere."""
        if self.keep_steps:
            slots = step.state_slots
            kept = slots.clone() if slots is not None else None  # the next step writes there
            self.steps.append(dataclasses.replace(step, state_slots=kept))
        totals = [0.0] * len(step.token_ids)
        starts = step.query_start.tolist()
        for group, cache, factor, width in (
            (step.full, caches.full, 1, None),
            (step.window, caches.window, 3, self.cache_spec.window),
        ):
            if group is None or cache is None:
                continue
            seen = width.window if width is not None else None
            self._attend(step, group, cache, factor, seen, starts, totals)
        if step.state_slots is not None:
            self._recur(step, caches, starts, totals)
        assert step.logits_rows is not None
        logits = torch.zeros(len(step.logits_rows), VOCAB_SIZE)
        for row, token_row in enumerate(step.logits_rows.tolist()):
            total = totals[token_row]
            if math.isnan(total):
                logits[row] = math.nan
            else:
                logits[row, int(total) % VOCAB_SIZE] = 10.0
        return logits

    def _attend(
        self,
        step: StepInput,
        group: AttentionInput,
        cache: torch.Tensor,
        factor: int,
        seen: int | None,
        starts: list[int],
        totals: list[float],
    ) -> None:
        block_size = cache.shape[4]
        keys = cache[:, 0, 0, 0, :, 0]
        keys[group.slot_mapping // block_size, group.slot_mapping % block_size] = (
            step.token_ids.float()
        )
        table = group.block_table.tolist()
        for seq, context in enumerate(step.context_lens_host):
            length = step.query_lens[seq]
            for i in range(length):
                end = context - length + i + 1
                begin = 0 if seen is None else max(0, end - seen)
                read = [
                    float(keys[table[seq][p // block_size], p % block_size])
                    for p in range(begin, end)
                ]
                totals[starts[seq] + i] += factor * _hash(read)

    def _recur(
        self, step: StepInput, caches: Caches, starts: list[int], totals: list[float]
    ) -> None:
        assert step.state_slots is not None
        assert caches.conv is not None
        assert caches.ssm is not None
        wanted = {(c.seq, c.num_tokens): c.slot for c in step.checkpoints}
        for seq, slot in enumerate(step.state_slots.tolist()):
            started = step.context_lens_host[seq] > step.query_lens[seq]
            value = float(caches.ssm[slot, 0, 0, 0, 0]) if started else 0.0
            for i in range(step.query_lens[seq]):
                token = int(step.token_ids[starts[seq] + i])
                value = _hash([token], value)
                totals[starts[seq] + i] += 7 * value
                if (seq, i + 1) in wanted:
                    caches.ssm[wanted[seq, i + 1], 0, 0, 0, 0] = value
                    caches.conv[wanted[seq, i + 1]] = token
            caches.ssm[slot, 0, 0, 0, 0] = value
