"""The engine: requests in, steps, results out; and the verbs of a hand-over.

It is driven from one thread. `step()` computes one batch and returns all that came of it; nothing
happens between steps. Everything that was taken is given back when its request has ended, and
`check_integrity()` proves it.
"""

import hashlib
import heapq
import os
import random
import time
from collections.abc import Sequence as Seq

import msgspec
import torch

from tasuki_common import logs
from tasuki_common.errors import OverloadedError, RequestError
from tasuki_common.hashing import block_hashes, root_hash
from tasuki_engine import memory, models
from tasuki_engine.block_pool import NULL, IntegrityError
from tasuki_engine.block_tables import BlockTables
from tasuki_engine.config import EngineConfig
from tasuki_engine.imports import Imports
from tasuki_engine.models import Model
from tasuki_engine.prefix_cache import PrefixCache
from tasuki_engine.request import (
    CacheEvent,
    EngineRequest,
    EngineStats,
    FinishReason,
    HandOver,
    Reservation,
    StepResult,
    TokenOutput,
)
from tasuki_engine.runner import Runner, Sampled
from tasuki_engine.sampler import SamplerRow
from tasuki_engine.scheduler import Limits, Part, Scheduler
from tasuki_engine.sequence import Sequence, State
from tasuki_engine.storage import LAYOUT_VERSION, allocate
from tasuki_transfer.spans import Span

__all__ = ["Engine", "IntegrityError"]

log = logs.get("tasuki.engine")


class Engine:
    """One model with its caches and its requests."""

    def __init__(self, config: EngineConfig, model: Model | None = None) -> None:
        """Loads the model unless it is given, and takes the memory of the pools.

        Raises:
            ConfigError: when the model or the sizes cannot work.
        """
        self.config = config
        # Oversubscribed OpenMP threads spin against each other: several engines share a machine.
        torch.set_num_threads(config.cpu_threads or max(1, (os.cpu_count() or 1) // 2))
        self.model = models.load(config) if model is None else model
        spec, device = self.model.cache_spec, self.model.device
        self.plan = memory.plan(config, spec, model_max_len=self.model.max_model_len, device=device)
        log.info("engine_memory", device=str(device), **self.plan.ledger())
        units = {
            "full": self.plan.num_blocks,
            "window": self.plan.num_window_blocks,
            "state": self.plan.num_slots,
        }
        self._cache = PrefixCache(
            num_blocks=units["full"],
            num_window_blocks=units["window"],
            num_slots=units["state"],
            block_size=config.block_size,
            window=spec.window.window if spec.window is not None else None,
            keep=config.enable_prefix_caching,
        )
        self._storage = allocate(
            spec, units=units, block_size=config.block_size, device=torch.device(device)
        )
        tables = BlockTables(
            self.plan.max_num_seqs,
            -(-self.plan.max_model_len // config.block_size),
            full=spec.full is not None,
            window=spec.window is not None,
        )
        limits = Limits(
            self.plan.max_num_seqs, self.plan.max_num_batched_tokens, config.checkpoint_interval
        )
        self._scheduler = Scheduler(self._cache, tables, limits, self._storage.copy_state)
        self._runner = Runner(self.model, self._storage, tables, config.block_size)
        self._imports = Imports(self._cache)
        self._sequences: dict[str, Sequence] = {}
        self._hand_overs: dict[str, Sequence] = {}
        """Those that are not complete."""
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._result = StepResult()
        self._arrivals = 0
        self._counters = EngineStats()
        self.stalled = False
        """The last step could do nothing: what waits needs units that pins hold."""

    # Identity

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output that a request may have."""
        return self.plan.max_model_len

    @property
    def hash_revision(self) -> str:
        """What makes the numbers in a block, beside its tokens: weights and dtypes."""
        spec = self.model.cache_spec
        dtypes = [self.model.dtype, spec.kv_dtype]
        if spec.state is not None:
            dtypes += [spec.state.conv_dtype, spec.state.ssm_dtype]
        return "-".join([self.model.revision, *(str(d).removeprefix("torch.") for d in dtypes)])

    @property
    def fingerprint(self) -> str:
        """Equal for two engines that can use each other's spans."""
        parts = (
            self.hash_revision,
            self.config.block_size,
            self.model.cache_spec,
            LAYOUT_VERSION,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def regions(self) -> dict[str, torch.Tensor]:
        """The pools' memory by name, uint8 [units, span bytes]."""
        return self._storage.regions

    def generation(self, pool: str, index: int) -> int:
        """How often a unit was given out: its content is what it was while this stands."""
        return self._cache.pools()[pool].generation[index]

    # Requests

    def add_request(self, request: EngineRequest) -> None:
        """Admits a request to the queue.

        Raises:
            RequestError: when it cannot be served as it stands; `param` names the field.
            OverloadedError: when too many wait already.
        """
        self._validate(request)
        self._check_room(len(request.prompt_token_ids))
        params = request.sampling
        prompt, output = request.prompt_token_ids, list(request.output_token_ids)
        limit = self.max_model_len - len(prompt)
        eos = () if params.ignore_eos else self.model.eos_token_ids
        seed = random.getrandbits(63) if params.seed is None else params.seed
        stop_ids = tuple(dict.fromkeys((*eos, *(params.stop_token_ids or ()))))
        keep = self.config.enable_prefix_caching
        named = keep or request.prefix_id is not None
        self._arrivals += 1
        seq = Sequence(
            request,
            arrival=self._arrivals,
            deadline=None if request.timeout is None else time.monotonic() + request.timeout,
            block_size=self.config.block_size,
            hash_algorithm=self.config.hash_algorithm,
            parent=self._root(request.cache_salt) if named else None,
            writes_cache=keep,
            max_tokens=limit if params.max_tokens is None else min(limit, params.max_tokens),
            sampler_row=SamplerRow(params, prompt, output, seed, request.sample_index, stop_ids),
        )
        self._sequences[seq.id] = seq
        if seq.deadline is not None:
            heapq.heappush(self._deadlines, (seq.deadline, seq.arrival, seq))
        self._scheduler.add(seq)
        if request.hand_over:
            self._hand_overs[seq.id] = seq
        elif len(output) >= seq.max_tokens and not seq.wants_prompt_logprobs:
            self._end(seq, "length")

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; the next step reports it. An unknown id has ended before.

        A hand-over that is complete is released.
        """
        seq = self._sequences.get(request_id)
        if seq is not None:
            self._end(seq, "abort", "The request was aborted.")

    def has_work(self) -> bool:
        """Whether a step has something to do or to report."""
        return bool(
            self._scheduler.running
            or self._scheduler.num_waiting
            or self._result.outputs
            or self._result.hand_overs
        )

    def step(self) -> StepResult:
        """Computes one batch: schedule, run, book; returns all that is new since the last one."""
        started = time.perf_counter()
        self._end_overdue()
        parts = self._scheduler.schedule()
        if parts:
            sampled = self._runner.run(parts)
            self._scheduler.commit(parts)
            self._book(parts, sampled)
            self._counters.steps += 1
            self._counters.step_seconds += time.perf_counter() - started
        self._report_hand_overs()
        self._end_failed()
        idle = not parts and not self._result.outputs and not self._result.hand_overs
        self.stalled = idle and self.has_work() and not self._unblock()
        result, self._result = self._result, StepResult()
        return result

    # Hand-over

    def release(self, request_id: str) -> None:
        """Lets go what a complete hand-over pinned; one that still computes is aborted."""
        self.abort(request_id)

    def reserve(
        self, prefix_id: str, token_ids: Seq[int], num_tokens: int, cache_salt: str | None = None
    ) -> Reservation | None:
        """Makes room for the spans of the first `num_tokens` of `token_ids`; None: no room now.

        Raises:
            RequestError: when `num_tokens` is no block boundary within `token_ids`, or the id is
                taken.
        """
        if num_tokens % self.config.block_size or not 0 <= num_tokens <= len(token_ids):
            raise RequestError(
                f"num_tokens is {num_tokens}; it must be a multiple of {self.config.block_size} "
                f"and at most the {len(token_ids)} tokens given.",
                param="num_tokens",
            )
        names = block_hashes(
            self.config.hash_algorithm,
            self._root(cache_salt),
            token_ids[:num_tokens],
            self.config.block_size,
        )
        return self._imports.reserve(prefix_id, names)

    def commit(self, prefix_id: str) -> None:
        """Puts a reserved prefix, whose bytes arrived and were verified, into the prefix cache.

        It stays pinned until `cancel`.

        Raises:
            RequestError: when the id was never reserved or was cancelled.
        """
        self._imports.commit(prefix_id)

    def cancel(self, prefix_id: str) -> None:
        """Gives a reservation back, or unpins a committed prefix; an unknown id is no error."""
        self._imports.cancel(prefix_id)

    # What others watch

    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        scheduler, stats = self._scheduler, self._counters
        stats.running, stats.waiting = len(scheduler.running), scheduler.num_waiting
        stats.waiting_tokens = sum(
            max(0, len(seq.request.prompt_token_ids) - seq.num_computed)
            for seq in (*scheduler.running, *scheduler.waiting)
        )
        if (full := self._cache.full) is not None:
            stats.blocks_total, stats.blocks_used = full.total, full.used
            stats.blocks_cached = full.cached
        if (window := self._cache.window) is not None:
            stats.window_blocks_total, stats.window_blocks_used = window.total, window.used
        if (slots := self._cache.slots) is not None:
            stats.slots_total, stats.slots_used = slots.total, slots.used
            stats.slots_cached = slots.cached
        stats.prefix_query_tokens = scheduler.query_tokens
        stats.prefix_hit_tokens = scheduler.hit_tokens
        stats.preemptions = scheduler.num_preemptions
        return msgspec.structs.replace(stats)

    def take_cache_events(self) -> list[CacheEvent]:
        """What became findable in the prefix cache, or was forgotten, since the last call."""
        return self._cache.take_events()

    def check_integrity(self) -> None:
        """Proves between two steps that every unit is free, cached, or held by exactly its owners.

        Raises:
            IntegrityError: naming the pool and the unit.
        """
        pinned = [seq for seq in self._sequences.values() if seq.state is State.PINNED]
        held, imported = self._scheduler.owners(pinned), self._imports.owners()
        for name, pool in self._cache.pools().items():
            pool.check(held[name] + imported[name])

    # One step

    def _book(self, parts: list[Part], sampled: list[Sampled]) -> None:
        for part in parts:
            seq = part.sequence
            before = seq.num_computed - part.num_tokens
            prompt_left = len(seq.request.prompt_token_ids) - before
            self._counters.prompt_tokens += max(0, min(part.num_tokens, prompt_left))
            done = seq.num_computed == seq.target and len(seq.output) >= seq.max_tokens
            if done and not seq.request.hand_over:
                self._end(seq, "length")
        for one in sampled:
            self._accept(one)

    def _accept(self, sampled: Sampled) -> None:
        seq, token = sampled.sequence, sampled.token_id
        if token < 0:
            self._end(seq, "error", "The model's logits for it are not finite numbers.")
            return
        seq.append(token)
        self._counters.generated_tokens += 1
        output = self._output(seq)
        output.token_ids = [token]
        if sampled.logprobs is not None:
            output.logprobs = [sampled.logprobs]
        self._result.outputs.append(output)
        params = seq.request.sampling
        if token in self.model.eos_token_ids and not params.ignore_eos:
            output.finish_reason = "stop"
        elif token in (params.stop_token_ids or ()):
            output.finish_reason, output.stop_reason = "stop", token
        elif len(seq.output) >= seq.max_tokens:
            output.finish_reason = "length"
        if output.finish_reason is not None:
            self._forget(seq)

    def _output(self, seq: Sequence) -> TokenOutput:
        output = TokenOutput(request_id=seq.id, num_cached_tokens=seq.num_cached or 0)
        prompt_computed = seq.num_computed >= len(seq.request.prompt_token_ids)
        if seq.wants_prompt_logprobs and prompt_computed:
            output.prompt_logprobs = seq.prompt_logprobs
            seq.prompt_logprobs_sent = True
        return output

    def _end(self, seq: Sequence, reason: FinishReason, message: str | None = None) -> None:
        """Ends a sequence that is anywhere, and reports it unless it is a complete hand-over."""
        if seq.state is State.PINNED:
            pass
        elif seq.request.hand_over:
            self._result.hand_overs.append(HandOver(request_id=seq.id, error=message))
        else:
            output = self._output(seq)
            output.finish_reason = reason
            output.error = message if reason == "error" else None
            self._result.outputs.append(output)
        self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        self._scheduler.remove(seq)
        self._sequences.pop(seq.id, None)
        self._hand_overs.pop(seq.id, None)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = heapq.heappop(self._deadlines)[2]
            if seq.state in (State.WAITING, State.RUNNING):
                self._end(seq, "deadline", f"Its deadline of {seq.request.timeout} s passed.")
        if len(self._deadlines) > 2 * len(self._sequences) + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[2].id in self._sequences]
            heapq.heapify(self._deadlines)

    def _end_failed(self) -> None:
        for seq, message in self._scheduler.failed:
            self._end(seq, "error", message)
        self._scheduler.failed.clear()

    def _report_hand_overs(self) -> None:
        for seq in list(self._hand_overs.values()):
            if seq.state is State.RUNNING:
                self._report(seq)

    def _report(self, seq: Sequence) -> None:
        """Offers the spans of a hand-over that became final; at its target, pins them all."""
        block_size = self.config.block_size
        num_final = seq.num_computed // block_size
        spans = self._spans("full", seq.full, seq.num_offered, num_final)
        complete = seq.num_computed == seq.target
        if complete:
            spans += self._spans("window", seq.window, seq.first_window_block, num_final)
            if seq.slot != NULL:
                self._scheduler.publish_state(seq)
                spans += self._spans("state", [seq.slot], 0, 1)
            self._scheduler.remove(seq, State.PINNED)
            del self._hand_overs[seq.id]
        if num_final > seq.num_offered or complete:
            seq.num_offered = num_final
            self._result.hand_overs.append(
                HandOver(
                    request_id=seq.id,
                    spans=spans,
                    num_tokens=num_final * block_size,
                    complete=complete,
                    num_cached_tokens=seq.num_cached or 0,
                )
            )

    def _spans(self, pool: str, units: list[int], start: int, end: int) -> list[Span]:
        if pool not in self._cache.pools():
            return []
        generation = self._cache.pools()[pool].generation
        return [Span(pool, units[i], i, generation[units[i]]) for i in range(start, end)]

    def _unblock(self) -> bool:
        """Nothing moved: unpins an import, or ends what can never fit; False: leases must end."""
        head = self._scheduler.blocked
        if self._imports.give_up_one(but=None if head is None else head.request.prefix_id):
            return True
        if head is None or any(pool.used for pool in self._cache.pools().values()):
            return False
        message = f"Its {head.target} tokens need more KV blocks or state slots than there are."
        self._end(head, "error", message)
        return True

    # Admission

    def _root(self, salt: str | None) -> bytes:
        return root_hash(self.config.hash_algorithm, self.hash_revision, salt)

    def _check_room(self, num_tokens: int) -> None:
        config, scheduler = self.config, self._scheduler
        if scheduler.num_waiting >= config.max_queued_requests:
            raise OverloadedError(f"{scheduler.num_waiting} requests are waiting already.")
        if config.max_queued_tokens is not None:
            queued = sum(len(seq.tokens) for seq in scheduler.waiting)
            if queued and queued + num_tokens > config.max_queued_tokens:
                raise OverloadedError(f"{queued} prompt tokens are waiting already.")

    def _validate(self, request: EngineRequest) -> None:
        prompt, params = request.prompt_token_ids, request.sampling
        tokens = prompt + request.output_token_ids if request.output_token_ids else prompt
        vocab_size = self.model.vocab_size
        if request.request_id in self._sequences:
            raise RequestError(
                f"Request {request.request_id!r} is here already.", param="request_id"
            )
        if not prompt:
            raise RequestError("The prompt has no token; give at least one.", param="prompt")
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < vocab_size)
            raise RequestError(
                f"Token id {wrong} is outside the vocabulary of {vocab_size} tokens.",
                param="prompt",
            )
        room = 0 if request.hand_over or params.max_tokens == 0 else 1
        if len(tokens) + room > self.max_model_len:
            raise RequestError(
                f"The prompt has {len(tokens)} tokens; with at least {room} to generate it exceeds "
                f"the context length of {self.max_model_len} tokens.",
                param="prompt",
            )
        for field, ids in (
            ("logit_bias", params.logit_bias or {}),
            ("stop_token_ids", params.stop_token_ids or ()),
        ):
            outside = sorted(i for i in ids if not 0 <= i < vocab_size)
            if outside:
                raise RequestError(
                    f"{field} names token ids {outside}, which are outside the vocabulary of "
                    f"{vocab_size} tokens.",
                    param=field,
                )
