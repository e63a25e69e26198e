"""A small harness that runs a model over paged caches without a scheduler.

Blocks and slots are each one contiguous span of bytes in one pool, given out in random order, and
everything that nobody wrote is NaN: what must not be read shows.
"""

import dataclasses
import random

import torch

from tasuki_engine.step import (
    AttentionInput,
    AttentionSpec,
    Caches,
    CacheSpec,
    Checkpoint,
    StateSpec,
    StepInput,
)

BLOCK_SIZE = 16


@dataclasses.dataclass
class Sequence:
    """One sequence's place in the caches."""

    slot: int = 0
    num_tokens: int = 0
    full: list[int] = dataclasses.field(default_factory=list)
    window: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Chunk:
    """Tokens of one sequence to compute in one step; checkpoints: (tokens, slot)."""

    sequence: Sequence
    tokens: list[int]
    checkpoints: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class PagedModel:
    """A model with pools of its own; `step` computes any mix of chunks."""

    def __init__(self, model, seed: int, num_blocks: int = 512, num_slots: int = 64) -> None:
        self.model = model
        spec: CacheSpec = model.cache_spec
        draw = random.Random(seed)
        self.free_blocks = draw.sample(range(1, num_blocks), num_blocks - 1)
        self.free_slots = draw.sample(range(1, num_slots), num_slots - 1)
        self.caches = allocate(spec, num_blocks, num_slots, model.device)

    def new_sequence(self) -> Sequence:
        return Sequence(slot=self.new_slot())

    def new_slot(self) -> int:
        return self.free_slots.pop()

    def fork(self, sequence: Sequence, num_tokens: int, slot: int) -> Sequence:
        """A sequence that shares the blocks before `num_tokens` and starts from a checkpoint."""
        blocks = num_tokens // BLOCK_SIZE
        assert num_tokens % BLOCK_SIZE == 0
        return Sequence(slot, num_tokens, sequence.full[:blocks], sequence.window[:blocks])

    def logprobs(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        """Log-probabilities [tokens, vocab] of every token of every chunk, in their order."""
        order = sorted(range(len(chunks)), key=lambda i: len(chunks[i].tokens) > 1)
        ordered = [chunks[i] for i in order]
        step = self._step_input(ordered)
        logits = self.model.forward(step, self.caches)
        for chunk in chunks:
            for tokens, slot in chunk.checkpoints:
                if tokens == len(chunk.tokens):
                    self._copy_state(chunk.sequence.slot, slot)
        parts = torch.log_softmax(logits, dim=-1).split([len(c.tokens) for c in ordered])
        result: list[torch.Tensor] = [torch.empty(0)] * len(chunks)
        for place, part in zip(order, parts, strict=True):
            result[place] = part.cpu()
        return result

    def _copy_state(self, source: int, target: int) -> None:
        for cache in (self.caches.conv, self.caches.ssm):
            if cache is not None:
                cache[target] = cache[source]

    def _step_input(self, chunks: list[Chunk]) -> StepInput:
        device = self.model.device
        lens = [len(chunk.tokens) for chunk in chunks]
        starts = [chunk.sequence.num_tokens for chunk in chunks]
        positions = [p for s, n in zip(starts, lens, strict=True) for p in range(s, s + n)]
        contexts = [start + length for start, length in zip(starts, lens, strict=True)]
        spec: CacheSpec = self.model.cache_spec
        step = StepInput(
            token_ids=torch.tensor([t for c in chunks for t in c.tokens], device=device),
            positions=torch.tensor(positions, device=device),
            num_decodes=sum(length == 1 for length in lens),
            query_start=torch.tensor([0, *lens], dtype=torch.int32, device=device).cumsum(0).int(),
            query_lens=lens,
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            context_lens_host=contexts,
            full=self._group(chunks, contexts, "full") if spec.full else None,
            window=self._group(chunks, contexts, "window", spec.window) if spec.window else None,
            state_slots=torch.tensor([c.sequence.slot for c in chunks], device=device)
            if spec.state
            else None,
            checkpoints=[
                Checkpoint(seq, tokens, slot)
                for seq, chunk in enumerate(chunks)
                for tokens, slot in sorted(chunk.checkpoints)
                if tokens < len(chunk.tokens)
            ],
            logits_rows=torch.arange(sum(lens), device=device),
        )
        for chunk, context in zip(chunks, contexts, strict=True):
            chunk.sequence.num_tokens = context
        return step

    def _group(
        self,
        chunks: list[Chunk],
        contexts: list[int],
        name: str,
        spec: AttentionSpec | None = None,
    ) -> AttentionInput:
        tables, places = [], []
        for chunk, context in zip(chunks, contexts, strict=True):
            table: list[int] = getattr(chunk.sequence, name)
            while len(table) * BLOCK_SIZE < context:
                table.append(self.free_blocks.pop())
            start = context - len(chunk.tokens)
            places += [
                table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, context)
            ]
            behind = 0
            if spec is not None and spec.window is not None:
                behind = max(0, start - spec.window + 1) // BLOCK_SIZE
            tables.append([0] * behind + table[behind:])
        width = max(len(table) for table in tables)
        padded = [table + [0] * (width - len(table)) for table in tables]
        device = self.model.device
        return AttentionInput(
            block_table=torch.tensor(padded, dtype=torch.int32, device=device),
            slot_mapping=torch.tensor(places, device=device),
        )


def allocate(spec: CacheSpec, num_blocks: int, num_slots: int, device: torch.device) -> Caches:
    """Pools with one contiguous span per block and slot, filled with NaN."""
    conv, ssm = _state(spec.state, num_slots, device) if spec.state else (None, None)
    return Caches(
        full=_blocks(spec.full, spec.kv_dtype, num_blocks, device) if spec.full else None,
        window=_blocks(spec.window, spec.kv_dtype, num_blocks, device) if spec.window else None,
        conv=conv,
        ssm=ssm,
    )


def _blocks(
    spec: AttentionSpec, dtype: torch.dtype, count: int, device: torch.device
) -> torch.Tensor:
    shape = (count, spec.num_layers, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def _state(spec: StateSpec, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ssm_shape = (count, spec.num_layers, spec.num_heads, spec.head_dim, spec.state_size)
    conv_shape = (count, spec.num_layers, spec.conv_kernel - 1, spec.conv_dim)
    conv_bytes = torch.Size(conv_shape[1:]).numel() * spec.conv_dtype.itemsize
    conv_bytes += -conv_bytes % 16
    ssm_bytes = torch.Size(ssm_shape[1:]).numel() * spec.ssm_dtype.itemsize
    pool = torch.zeros(count, conv_bytes + ssm_bytes, dtype=torch.uint8, device=device)
    conv = pool[:, : torch.Size(conv_shape[1:]).numel() * spec.conv_dtype.itemsize]
    conv = conv.view(spec.conv_dtype).unflatten(1, conv_shape[1:])
    ssm = pool[:, conv_bytes:].view(spec.ssm_dtype).unflatten(1, ssm_shape[1:])
    return conv.fill_(float("nan")), ssm.fill_(float("nan"))
