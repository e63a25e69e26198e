"""From the scheduler's parts to tensors, through the model and the sampler, back to tokens.

`launch` sends a step to the device and returns at once: one copy of numbers there, a kernel that
makes the model's inputs of them, the model, the sampler, one copy back. Tokens are fed back on the
device, so that a step can follow before the host has read the tokens of the one before. `collect`
waits for a step and reads what came of it.
"""

import dataclasses

import torch

from tasuki_engine import sampler
from tasuki_engine.decode_graphs import DecodeGraphs
from tasuki_engine.flights import Part
from tasuki_engine.memory import MemoryPlan
from tasuki_engine.models import Model
from tasuki_engine.prompt_graphs import MAX_TOKENS, PAD, PromptGraphs
from tasuki_engine.request import TokenLogprobs
from tasuki_engine.sampler import Draft, Scores
from tasuki_engine.sequence import Sequence
from tasuki_engine.staging import Staged, scored_rows_of, stage
from tasuki_engine.step import AttentionInput, Checkpoint, StepInput
from tasuki_engine.storage import Storage
from tasuki_kernels import argmax, step_inputs
from tasuki_kernels.step_inputs import Inputs, Tables


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """The token that a sequence got in a step."""

    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None


@dataclasses.dataclass(frozen=True, slots=True)
class Flight:
    """A step that was sent to the device, and what it will bring."""

    sampling: list[Part]
    draft: Draft | None
    scored: list[tuple[Part, Scores]]
    ended: torch.cuda.Event | None


class Runner:
    """Runs steps in the order of their launch."""

    def __init__(self, model: Model, storage: Storage, plan: MemoryPlan, block_size: int) -> None:
        self._model = model
        self._storage = storage
        self._block_size = block_size
        self._on_cuda = model.device.type == "cuda"
        spec = model.cache_spec
        self._tables = Tables.empty(
            plan.max_num_seqs,
            -(-plan.max_model_len // block_size),
            full=spec.full is not None,
            window=spec.window is not None,
            device=model.device,
        )
        self._inputs = Inputs.empty(
            max(plan.max_step_tokens, plan.max_num_seqs), plan.max_num_seqs, self._tables
        )
        self._graphs = DecodeGraphs(plan.max_num_seqs) if self._on_cuda else None
        self._prompt_graphs = PromptGraphs() if self._on_cuda else None

    @torch.inference_mode()
    def launch(self, parts: list[Part]) -> Flight:
        """Sends a step to the device: every part computed, a token drawn where one is due."""
        staged = stage(parts)
        packed = sampler.to_device(staged.numbers, torch.int32, self._model.device)
        draft: Draft | None
        scored: list[tuple[Part, Scores]] = []
        graphs = self._graphs
        if graphs is not None and staged.is_plain_decode and len(parts) <= graphs.largest:
            draft = self._launch_decodes(graphs, staged, packed)
        else:
            draft, scored = self._launch_mixed(parts, staged, packed)
        if staged.sources.start != staged.sources.stop:
            self._storage.copy_states(packed[staged.sources], packed[staged.targets])
        ended = None
        if self._on_cuda:
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ended.record()
        return Flight(staged.sampling, draft, scored, ended)

    def collect(self, flight: Flight) -> list[Sampled]:
        """Waits for the step; its tokens. Adds prompt log-probabilities to their sequences."""
        if flight.ended is not None:
            flight.ended.synchronize()
        for part, scores in flight.scored:
            part.sequence.prompt_logprobs += scores.entries()
        if flight.draft is None:
            return []
        result = flight.draft.result()
        return [
            Sampled(part.sequence, token_id, logprobs)
            for part, token_id, logprobs in zip(
                flight.sampling, result.token_ids, result.logprobs, strict=True
            )
        ]

    def wait(self) -> None:
        """Until all that was launched has ended."""
        if self._on_cuda:
            torch.cuda.current_stream(self._model.device).synchronize()

    def _launch_decodes(self, graphs: DecodeGraphs, staged: Staged, packed: torch.Tensor) -> Draft:
        """One token each: padded to a size whose graph may be there."""
        count = staged.num_tokens
        size = graphs.padded(count)
        self._expand(packed, count, size)
        logits, tokens = graphs.run(size, self._decode)
        rows = [part.sequence.sampler_row for part in staged.sampling]
        draft = sampler.launch(logits[:count], rows, tokens[:count])
        if draft.tokens.data_ptr() != tokens.data_ptr():
            self._feed_back(self._inputs.rows[:count], draft.tokens)
        return draft

    def _launch_mixed(
        self, parts: list[Part], staged: Staged, packed: torch.Tensor
    ) -> tuple[Draft | None, list[tuple[Part, Scores]]]:
        self._expand(packed, len(parts), len(parts))
        contexts = [part.end for part in parts]
        # The reference copies tables; narrow ones are cheap.
        width = None if self._on_cuda else -(-max(contexts) // self._block_size)
        step = dataclasses.replace(
            self._step_input(len(parts), staged.num_tokens, staged.num_decodes, width),
            query_lens=[part.num_tokens for part in parts],
            context_lens_host=contexts,
            checkpoints=_inner_checkpoints(parts),
            logits_rows=packed[staged.logits_rows],
        )
        logits = self._forward(step, staged)
        count = len(staged.sampling)
        scored = self._score_prompts(staged.scored, logits[count:])
        if not count:
            return None, scored
        rows = [part.sequence.sampler_row for part in staged.sampling]
        draft = sampler.launch(logits[:count], rows)
        self._feed_back(packed[staged.sampled_rows].long(), draft.tokens)
        return draft, scored

    def _forward(self, step: StepInput, staged: Staged) -> torch.Tensor:
        """Logits of a step with prompts; short ones go through a graph."""
        tokens = -(-staged.num_tokens // PAD) * PAD
        short = staged.num_tokens > 1 and tokens <= min(MAX_TOKENS, len(self._inputs.token_ids))
        if self._prompt_graphs is None or not short or len(step.query_lens) > 1:
            return self._model.forward(step, self._storage.caches)
        for slots in (self._inputs.full_slots, self._inputs.window_slots):
            slots[staged.num_tokens : tokens].zero_()
        padded = dataclasses.replace(
            self._step_input(1, tokens, 0),
            query_lens=step.query_lens,
            context_lens_host=step.context_lens_host,
            checkpoints=step.checkpoints,
        )
        caches = self._storage.caches

        def forward(planned: tuple[object, torch.Tensor]) -> torch.Tensor:
            plan, rows = planned
            return self._model.forward(
                dataclasses.replace(padded, plan=plan, logits_rows=rows), caches
            )

        planned = (self._model.plan(padded, caches), step.logits_rows)
        return self._prompt_graphs.run(tokens, planned, forward)

    def _decode(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and greedy tokens of `size` expanded decodes; tokens are fed back."""
        step = self._step_input(size, size, size)
        logits = self._model.forward(step, self._storage.caches)
        rows = self._inputs.rows[:size]
        return logits, argmax.greedy(logits, rows, self._tables.last_tokens)

    def _feed_back(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        self._tables.last_tokens.index_copy_(0, rows, tokens)

    def _expand(self, packed: torch.Tensor, num_seqs: int, padded: int) -> None:
        step_inputs.expand(
            packed,
            self._tables,
            self._inputs,
            num_seqs=num_seqs,
            padded=padded,
            block_size=self._block_size,
        )

    def _step_input(
        self, num_seqs: int, num_tokens: int, num_decodes: int, num_blocks: int | None = None
    ) -> StepInput:
        """The first places of the inputs, as a step without host lists."""
        inputs = self._inputs

        def group(table: torch.Tensor | None, slots: torch.Tensor) -> AttentionInput | None:
            if table is None:
                return None
            return AttentionInput(table[:num_seqs, :num_blocks], slots[:num_tokens])

        return StepInput(
            token_ids=inputs.token_ids[:num_tokens],
            positions=inputs.positions[:num_tokens],
            num_decodes=num_decodes,
            query_start=inputs.query_start[: num_seqs + 1],
            query_lens=[],
            context_lens=inputs.context_lens[:num_seqs],
            context_lens_host=[],
            full=group(inputs.full_table, inputs.full_slots),
            window=group(inputs.window_table, inputs.window_slots),
            state_slots=inputs.state_slots[:num_seqs]
            if self._model.cache_spec.state is not None
            else None,
            checkpoints=[],
            logits_rows=None,
        )

    def _score_prompts(self, parts: list[Part], logits: torch.Tensor) -> list[tuple[Part, Scores]]:
        scored: list[tuple[Part, Scores]] = []
        first = 0
        for part in parts:
            seq, count = part.sequence, scored_rows_of(part)
            following = seq.tokens[part.start + 1 : part.start + 1 + count]
            token_ids = sampler.to_device(following, torch.int64, logits.device)
            top = seq.request.sampling.prompt_logprobs or 0
            scored.append((part, sampler.score(logits[first : first + count], token_ids, top)))
            first += count
        return scored


def _inner_checkpoints(parts: list[Part]) -> list[Checkpoint]:
    """Those that lie within a part; the state at a part's end is copied after the step."""
    return [
        Checkpoint(i, planned.boundary - part.start, planned.slot)
        for i, part in enumerate(parts)
        for planned in part.checkpoints
        if planned.boundary < part.end
    ]
