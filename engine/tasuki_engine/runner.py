"""From the scheduler's parts to tensors, through the model and the sampler, back to tokens."""

import dataclasses
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from tasuki_engine import sampler
from tasuki_engine.block_tables import BlockTables
from tasuki_engine.models import Model
from tasuki_engine.request import TokenLogprobs
from tasuki_engine.scheduler import Part
from tasuki_engine.sequence import Sequence
from tasuki_engine.step import AttentionInput, Checkpoint, StepInput
from tasuki_engine.storage import Storage


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """The token that a sequence got in a step."""

    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None


class Runner:
    """Runs one step at a time; adds the prompt log-probabilities it finds to their sequences."""

    def __init__(
        self, model: Model, storage: Storage, tables: BlockTables, block_size: int
    ) -> None:
        self._model = model
        self._storage = storage
        self._tables = tables
        self._block_size = block_size

    @torch.inference_mode()
    def run(self, parts: list[Part]) -> list[Sampled]:
        """Computes all parts; a token for each sequence that reaches its target and wants one."""
        ends = np.cumsum([part.num_tokens for part in parts])
        sampling = [i for i, part in enumerate(parts) if _samples(part)]
        scored = [i for i, part in enumerate(parts) if _scored_rows(part)]
        rows = [ends[sampling] - 1]
        rows += [ends[i] - parts[i].num_tokens + np.arange(_scored_rows(parts[i])) for i in scored]
        logits = self._model.forward(
            self._step_input(parts, np.concatenate(rows)), self._storage.caches
        )
        self._score_prompts([parts[i] for i in scored], logits[len(sampling) :])
        if not sampling:
            self._wait_for_device()
            return []
        sequences = [parts[i].sequence for i in sampling]
        result = sampler.sample(logits[: len(sampling)], [seq.sampler_row for seq in sequences])
        return [
            Sampled(seq, token_id, logprobs)
            for seq, token_id, logprobs in zip(
                sequences, result.token_ids, result.logprobs, strict=True
            )
        ]

    def _wait_for_device(self) -> None:
        """Sampling reads its tokens; a step that samples nothing must be waited for as well.

        What it wrote is offered to other pods from other streams, and what it freed is written by
        them.
        """
        if self._model.device.type == "cuda":
            torch.cuda.current_stream(self._model.device).synchronize()

    def _step_input(self, parts: list[Part], logits_rows: npt.NDArray[np.int64]) -> StepInput:
        sequences = [part.sequence for part in parts]
        query_lens = [part.num_tokens for part in parts]
        computed = np.array([seq.num_computed for seq in sequences])
        lens = np.array(query_lens)
        context = computed + lens
        start = np.zeros(len(parts) + 1, np.int32)
        np.cumsum(lens, out=start[1:])
        token_ids = _tokens(parts)
        owner = np.repeat(np.arange(len(parts)), lens)
        positions = np.arange(len(owner)) + (computed - start[:-1])[owner]
        rows = np.array([seq.row for seq in sequences])
        num_blocks = int(-(-context.max() // self._block_size))
        shared = np.array([seq.num_shared for seq in sequences])
        state_slots = None
        if self._storage.caches.ssm is not None:
            state_slots = self._tensor(np.array([seq.slot for seq in sequences]))
        return StepInput(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            num_decodes=query_lens.count(1),
            query_start=self._tensor(start),
            query_lens=query_lens,
            context_lens=self._tensor(context.astype(np.int32)),
            context_lens_host=context.tolist(),
            full=self._attention(self._tables.full, rows, owner, positions, num_blocks, shared),
            window=self._attention(self._tables.window, rows, owner, positions, num_blocks, None),
            state_slots=state_slots,
            has_state=[seq.num_computed > 0 for seq in sequences],
            checkpoints=[
                Checkpoint(i, planned.boundary - part.sequence.num_computed, planned.slot)
                for i, part in enumerate(parts)
                for planned in part.checkpoints
            ],
            logits_rows=self._tensor(logits_rows),
        )

    def _attention(
        self,
        table: npt.NDArray[np.int32] | None,
        rows: npt.NDArray[np.int64],
        owner: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        num_blocks: int,
        shared: npt.NDArray[np.int64] | None,
    ) -> AttentionInput | None:
        """Table and write positions; what others' blocks hold already goes to the null block."""
        if table is None:
            return None
        block_table = table[rows, :num_blocks]
        blocks = block_table[owner, positions // self._block_size].astype(np.int64)
        if shared is not None:
            blocks[positions < shared[owner]] = 0
        slots = blocks * self._block_size + positions % self._block_size
        return AttentionInput(self._tensor(block_table), self._tensor(slots))

    def _tensor(self, array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._model.device, non_blocking=True)

    def _score_prompts(self, parts: list[Part], logits: torch.Tensor) -> None:
        first = 0
        for part in parts:
            seq, count = part.sequence, _scored_rows(part)
            top = seq.request.sampling.prompt_logprobs
            next_tokens = seq.tokens[seq.num_computed + 1 : seq.num_computed + 1 + count]
            seq.prompt_logprobs += sampler.prompt_logprobs(
                logits[first : first + count], next_tokens, top or 0
            )
            first += count


def _tokens(parts: list[Part]) -> npt.NDArray[np.int64]:
    if all(part.num_tokens == 1 for part in parts):
        return np.array([part.sequence.tokens[part.sequence.num_computed] for part in parts])
    pieces = (
        part.sequence.tokens[
            part.sequence.num_computed : part.sequence.num_computed + part.num_tokens
        ]
        for part in parts
    )
    return np.fromiter(chain.from_iterable(pieces), np.int64)


def _samples(part: Part) -> bool:
    seq = part.sequence
    return (
        seq.num_computed + part.num_tokens == len(seq.tokens)
        and not seq.request.hand_over
        and len(seq.output) < seq.max_tokens
    )


def _scored_rows(part: Part) -> int:
    """How many of the part's rows predict a prompt token whose log-probabilities are wanted."""
    seq = part.sequence
    if seq.prompt_logprobs_sent or seq.request.hand_over:
        return 0
    last = min(seq.num_computed + part.num_tokens, len(seq.request.prompt_token_ids) - 1)
    return max(0, last - seq.num_computed)
