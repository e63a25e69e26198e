"""The engine: requests in, steps, results out; and the verbs of a hand-over.

It is driven from one thread. `step()` collects one batch and returns all that came of it; on CUDA
the next one is launched before, so that the device never waits for the host. Everything that was
taken is given back when its request has ended, and `check_integrity()` proves it.
"""

import os
import time
from collections import deque
from collections.abc import Sequence as Seq

import torch

from tasuki_common import logs
from tasuki_engine import census, dry_run, identity, models
from tasuki_engine.admission import Admission
from tasuki_engine.block_pool import IntegrityError
from tasuki_engine.config import EngineConfig
from tasuki_engine.deadlines import Deadlines
from tasuki_engine.hand_overs import HandOvers
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
from tasuki_engine.runner import Flight, Runner, Sampled
from tasuki_engine.scheduler import Limits, Scheduler, UnsettledError
from tasuki_engine.sequence import Sequence, State
from tasuki_engine.storage import allocate

__all__ = ["Engine", "IntegrityError"]

log = logs.get("tasuki.engine")


class Engine:
    """One model with its caches and its requests."""

    def __init__(
        self, config: EngineConfig, model: Model | None = None, *, _run_ahead: int | None = None
    ) -> None:
        """Loads the model unless it is given, and takes the memory of the pools.

        `_run_ahead` is for tests: steps launched before the oldest is collected (CUDA 1, CPU 0).

        Raises:
            ConfigError: when the model or the sizes cannot work.
        """
        self.config = config
        # Oversubscribed OpenMP threads spin against each other: several engines share a machine.
        torch.set_num_threads(config.cpu_threads or max(1, (os.cpu_count() or 1) // 2))
        self.model = models.load(config) if model is None else model
        spec, device = self.model.cache_spec, self.model.device
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels are launched on the thread's current one
        self.plan = dry_run.fitted_plan(config, self.model)
        log.info("engine_memory", device=str(device), **self.plan.ledger())
        self._cache = PrefixCache(
            num_blocks=self.plan.num_blocks,
            num_window_blocks=self.plan.num_window_blocks,
            num_slots=self.plan.num_slots,
            block_size=config.block_size,
            window=spec.window.window if spec.window is not None else None,
            keep=config.enable_prefix_caching,
        )
        self._storage = allocate(
            spec, units=self.plan.units, block_size=config.block_size, device=torch.device(device)
        )
        limits = Limits(
            max_num_seqs=self.plan.max_num_seqs,
            max_num_batched_tokens=self.plan.max_num_batched_tokens,
            max_step_tokens=self.plan.max_step_tokens,
            checkpoint_interval=config.checkpoint_interval,
        )
        self._scheduler = Scheduler(self._cache, limits, self._storage.copy_state)
        self._runner = Runner(self.model, self._storage, self.plan, config.block_size)
        self._run_ahead = int(device.type == "cuda") if _run_ahead is None else _run_ahead
        self._in_flight: deque[Flight] = deque()
        self._imports = Imports(self._cache)
        self._admission = Admission(config, self.model, self.max_model_len)
        self._sequences: dict[str, Sequence] = {}
        self._hand_overs = HandOvers(self._cache, self._scheduler)
        self._deadlines = Deadlines()
        self._result = StepResult()
        self._counters = EngineStats()
        self._failure: str | None = None
        """The error that left a step half done."""
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
        return identity.hash_revision(self.model)

    @property
    def fingerprint(self) -> str:
        """Equal for two engines that can use each other's spans."""
        return identity.fingerprint(self.model, self.config.block_size)

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
            RuntimeError: an earlier step failed.
        """
        self._demand_whole()
        seq = self._admission.admit(request, self._sequences, self._scheduler)
        self._sequences[seq.id] = seq
        self._deadlines.add(seq)
        self._scheduler.add(seq)
        if request.hand_over:
            self._hand_overs.add(seq)
        elif len(seq.output) >= seq.max_tokens and not seq.wants_prompt_logprobs:
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
            or self._in_flight
            or self._result.outputs
            or self._result.hand_overs
        )

    def step(self) -> StepResult:
        """Launches what can be launched, collects the oldest step; returns what is new since.

        An error, or an interrupt, leaves a step half done: it is the engine's last one.

        Raises:
            RuntimeError: an earlier step failed.
        """
        self._demand_whole()
        try:
            return self._step()
        except BaseException as error:
            self._failure = repr(error)
            raise

    def _demand_whole(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"An earlier step failed ({self._failure}), so the engine's caches are not known to"
                " be right; make a new engine."
            )

    def _step(self) -> StepResult:
        started = time.perf_counter()
        self._end_overdue()
        while len(self._in_flight) <= self._run_ahead and self._launch():
            pass
        collected = bool(self._in_flight)
        if collected:
            self._collect()
            self._counters.steps += 1
            self._counters.step_seconds += time.perf_counter() - started
        self._result.hand_overs += self._hand_overs.progress()
        self._end_failed()
        idle = not collected and not self._result.outputs and not self._result.hand_overs
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
        names = self._admission.prefix_names(token_ids, num_tokens, cache_salt)
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
        return census.take(self._counters, self._scheduler, self._cache)

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

    def _launch(self) -> bool:
        """Schedules a step and sends it to the device; False: nothing to do, or not yet."""
        try:
            parts = self._scheduler.schedule()
        except UnsettledError:
            return False
        if parts:
            self._in_flight.append(self._runner.launch(parts))
            self._scheduler.launch(parts)
        elif self._scheduler.flights.copies:
            self._runner.wait()
            self._scheduler.flights.copies_done()
        return bool(parts)

    def _collect(self) -> None:
        """Waits for the oldest step in flight, and books it."""
        sampled = self._runner.collect(self._in_flight.popleft())
        for one in sampled:
            if one.token_id < 0 and one.sequence.state is State.RUNNING:  # before others find it
                self._cache.forget(one.sequence.names)
                message = "The model's logits for it are not finite numbers."
                self._end(one.sequence, "error", message)
        for part in self._scheduler.settle():
            seq = part.sequence
            prompt_left = len(seq.request.prompt_token_ids) - part.start
            self._counters.prompt_tokens += max(0, min(part.num_tokens, prompt_left))
            done = seq.num_settled == len(seq.tokens) and len(seq.output) >= seq.max_tokens
            if seq.state is State.RUNNING and done and not seq.request.hand_over:
                self._end(seq, "length")
        for one in sampled:
            if one.sequence.state is State.RUNNING and not one.sequence.request.hand_over:
                self._accept(one)

    def _accept(self, sampled: Sampled) -> None:
        seq, token = sampled.sequence, sampled.token_id
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
            self._remove(seq)

    def _output(self, seq: Sequence) -> TokenOutput:
        output = TokenOutput(request_id=seq.id, num_cached_tokens=seq.num_cached or 0)
        prompt_computed = seq.num_settled >= len(seq.request.prompt_token_ids)
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
        self._remove(seq)

    def _remove(self, seq: Sequence) -> None:
        self._scheduler.remove(seq)
        self._sequences.pop(seq.id, None)
        self._hand_overs.discard(seq)

    def _end_overdue(self) -> None:
        for seq in self._deadlines.overdue(time.monotonic(), len(self._sequences)):
            self._end(seq, "deadline", f"Its deadline of {seq.request.timeout} s passed.")

    def _end_failed(self) -> None:
        for seq, message in self._scheduler.failed:
            self._end(seq, "error", message)
        self._scheduler.failed.clear()

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
