"""While steps fly, no unit that they touch changes hands, whatever is asked of the engine.

The CPU computes a step when it is launched, so a unit given back too early would not show in the
tokens. Here the units of every step are noted at its launch and watched until it is collected. Some
steps leave no numbers in what they write: no token comes of that, and it is forgotten in the end.
"""

import random
from collections import deque
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from faulty_model import FaultyModel
from fresh_seed import fresh_seed
from history_engine import BLOCK, MODELS, make_request
from history_model import VOCAB_SIZE, HistoryModel
from relay import compute_hand_over, merge, move, run

from tasuki_common.sampling import SamplingParams
from tasuki_engine.block_pool import NULL, Pool
from tasuki_engine.config import EngineConfig
from tasuki_engine.engine import Engine
from tasuki_engine.flights import Part
from tasuki_engine.request import EngineRequest, TokenOutput
from tasuki_engine.runner import Flight, Runner, Sampled

SIZES: dict[str, Any] = {
    "block_size": BLOCK,
    "checkpoint_interval": 32,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 6,
    "max_model_len": 200,
    "num_blocks": 64,
    "num_window_blocks": 40,
    "num_state_slots": 16,
}
PINNED = 2
"""Hand-overs at a time; more would leave no room for anything else."""


class _Watch:
    """Notes the units of each step in flight, and how often each had been given out."""

    def __init__(self, engine: Engine) -> None:
        self._pools = engine._cache.pools()
        self._first_seen = engine._cache.first_window_block
        self._flying: deque[list[tuple[Pool, int, int]]] = deque()
        self._copied: list[tuple[Pool, int, int]] = []
        runner: Runner = engine._runner
        launch, collect = runner.launch, runner.collect
        copy_state = engine._scheduler._copy_state

        def watched_launch(parts: list[Part]) -> Flight:
            self._flying.append([*self._copied, *self._touched(parts)])
            self._copied = []
            return launch(parts)

        def watched_collect(flight: Flight) -> list[Sampled]:
            self.check()
            self._flying.popleft()
            return collect(flight)

        def watched_copy(source: int, target: int) -> None:
            self._copied += self._noted("state", [source, target])
            copy_state(source, target)

        runner.launch, runner.collect = watched_launch, watched_collect  # type: ignore[method-assign]
        engine._scheduler._copy_state = watched_copy

    def check(self) -> None:
        for units in self._flying:
            for pool, unit, generation in units:
                where = f"{pool.name} {unit}"
                assert pool._references[unit] > 0, f"{where} was given back under a step in flight"
                assert pool.generation[unit] == generation, f"{where} changed hands"

    def _touched(self, parts: list[Part]) -> Iterable[tuple[Pool, int, int]]:
        for part in parts:
            seq, end = part.sequence, -(-part.end // BLOCK)
            yield from self._noted("full", seq.full[:end])
            yield from self._noted("window", seq.window[self._first_seen(part.start) : end])
            yield from self._noted("state", [seq.slot, *(c.slot for c in part.checkpoints)])

    def _noted(self, name: str, units: list[int]) -> list[tuple[Pool, int, int]]:
        pool = self._pools.get(name)
        if pool is None:
            return []
        assert NULL not in units
        return [(pool, unit, pool.generation[unit]) for unit in units]


class _Storm:
    """Every verb at random moments; imports write into their room at once, as transfers do."""

    def __init__(
        self, engine: Engine, model: FaultyModel, giver: Engine, rng: random.Random
    ) -> None:
        self.merged: dict[str, TokenOutput] = {}
        self.requests: dict[str, EngineRequest] = {}
        self._engine, self._model, self._giver, self._rng = engine, model, giver, rng
        self._watch = _Watch(engine)
        bases = [[rng.randrange(1, VOCAB_SIZE) for _ in range(150)] for _ in range(4)]
        self.prompts = [
            base[: rng.randrange(1, 150)] + [rng.randrange(1, VOCAB_SIZE) for _ in range(3)]
            for base in bases
            for _ in range(6)
        ]
        self._alive: list[str] = []
        self._imports: list[str] = []
        self._pinned: list[str] = []

    def go_on(self) -> None:
        act = self._rng.choice(
            [self._add, self._add, self._hand_over, self._import, self._cancel, self._abort]
            + [self._step] * 12
            + [self._spoil] * (self._rng.random() < 0.1)
        )
        act()
        self._watch.check()

    def end(self) -> None:
        self._model.spoils = 0
        for prefix_id in self._imports:
            self._engine.cancel(prefix_id)
        for name in self._alive:
            if self.requests[name].hand_over:
                self._engine.abort(name)
        while self._engine.has_work():
            self._step()
            self._watch.check()

    def compared(self) -> Iterable[tuple[str, EngineRequest, TokenOutput]]:
        """What came of requests whose tokens the model alone decides."""
        for name, output in self.merged.items():
            request = self.requests[name]
            if not (request.hand_over or request.sampling.presence_penalty):
                yield name, request, output

    def _new(self, **fields: Any) -> str:
        name = str(len(self.requests))
        request = EngineRequest(
            request_id=name, prompt_token_ids=self._rng.choice(self.prompts), **fields
        )
        self.requests[name] = request
        self._engine.add_request(request)
        self._alive.append(name)
        return name

    def _add(self) -> None:
        rng = self._rng
        penalty = rng.choice([0.0, 0.0, 0.0, 0.0, 0.5])
        params = SamplingParams(
            temperature=0.0,
            max_tokens=rng.choice([0, 1, 2, 9, 40]),
            ignore_eos=rng.random() < 0.5,
            presence_penalty=penalty,
            prompt_logprobs=rng.choice([None, None, None, 0]),
            stop_token_ids=rng.choice([None, list(range(0, VOCAB_SIZE, 9))]),
        )
        timeout = 0.002 if rng.random() < 0.05 else None
        self._new(sampling=params, priority=rng.randrange(3), timeout=timeout)

    def _hand_over(self) -> None:
        if len(self._pinned) == PINNED:
            self._engine.release(self._pinned.pop(0))
        self._pinned.append(self._new(hand_over=True))

    def _import(self) -> None:
        prompt = self._rng.choice(self.prompts)
        prefix_id = f"import {len(self.requests)} {self._rng.random()}"
        depth = (len(prompt) - 1) // BLOCK * BLOCK
        reservation = self._engine.reserve(prefix_id, prompt, depth)
        if reservation is None:
            return
        self._imports.append(prefix_id)
        if self._rng.random() < 0.3:
            for pool, units in reservation.wanted.items():
                for unit in units.values():
                    self._engine.regions()[pool][unit].view(torch.float32).fill_(7777.0)
            return
        reports = compute_hand_over(self._giver, prefix_id, prompt)
        spans = [span for report in reports for span in report.spans]
        move(self._giver, self._engine, spans, reservation)
        self._giver.release(prefix_id)
        self._engine.commit(prefix_id)

    def _cancel(self) -> None:
        if self._imports:
            self._engine.cancel(self._imports.pop(self._rng.randrange(len(self._imports))))

    def _spoil(self) -> None:
        self._model.spoils = 1

    def _abort(self) -> None:
        if self._alive:
            self._engine.abort(self._alive.pop(self._rng.randrange(len(self._alive))))

    def _step(self) -> None:
        for output in self._engine.step().outputs:
            merge(self.merged, output)
        if self._rng.random() < 0.1:
            self._engine.check_integrity()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_no_unit_changes_hands_under_a_step_in_flight(model: str, caching: bool) -> None:
    rng = random.Random(fresh_seed())
    history = FaultyModel(**MODELS[model])
    config = EngineConfig(model="history", enable_prefix_caching=caching, **SIZES)
    engine = Engine(config, history, _run_ahead=1)
    giver = Engine(EngineConfig(model="history", **SIZES), HistoryModel(**MODELS[model]))
    storm = _Storm(engine, history, giver, rng)
    acts = 0
    while acts < 700 or sum(len(output.token_ids) for *_, output in storm.compared()) <= 100:
        storm.go_on()
        acts += 1
    storm.end()
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.blocks_used, stats.window_blocks_used, stats.slots_used) == (0, 0, 0)
    for name, request, output in storm.compared():
        expected = history.continuation(request.prompt_token_ids, len(output.token_ids))
        assert output.token_ids == expected, f"request {name} of {output.finish_reason}"
        assert output.finish_reason is not None
    for prompt in storm.prompts:
        history.spoils = rng.randrange(2)
        (first,) = run(engine, [make_request("first", prompt)]).values()
        (second,) = run(engine, [make_request("second", prompt)]).values()
        assert first.error or first.token_ids == second.token_ids
        assert second.token_ids == history.continuation(prompt, 16), "spoilt units are still found"
