"""Requests of all kinds that come and are aborted at random moments leave the books balanced."""

import random

import pytest
from history_engine import MODELS, MakeEngine, family, make_request, random_prompt
from relay import merge, run

from tasuki_engine.engine import Engine
from tasuki_engine.request import TokenOutput


class _Storm:
    """Requests of all kinds that come and are aborted at random moments."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.merged: dict[str, TokenOutput] = {}
        self.aborted = 0
        self._engine, self._rng = engine, rng
        self._prompts = family(rng, 40, 150)
        self._alive: list[str] = []
        self._reserved: list[str] = []
        self._started = 0

    def go_on(self) -> None:
        for _ in range(self._rng.randrange(8)):
            self._start(self._rng.choice(self._prompts))
        if self._rng.random() < 0.8:
            self._step()
        if self._reserved and self._rng.random() < 0.5:
            self._engine.cancel(self._reserved.pop())
        for _ in range(min(len(self._alive), self._rng.randrange(8))):
            self._engine.abort(self._alive.pop(self._rng.randrange(len(self._alive))))
            self.aborted += 1

    def end(self) -> None:
        for name in self._alive:
            self._engine.abort(name)
        for name in self._reserved:
            self._engine.cancel(name)
        while self._engine.has_work():
            self._step()

    def _start(self, prompt: list[int]) -> None:
        name, kind = str(self._started), self._rng.random()
        self._started += 1
        depth = len(prompt) // 8 * 8
        if kind < 0.2 and self._engine.reserve(name, prompt, depth) is not None:
            self._reserved.append(name)
        self._engine.add_request(make_request(name, prompt, hand_over=kind > 0.8))
        self._alive.append(name)

    def _step(self) -> None:
        for output in self._engine.step().outputs:
            merge(self.merged, output)


@pytest.mark.parametrize("model", MODELS)
def test_a_thousand_aborts_at_random_moments_leave_no_unit_behind(
    model: str, make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, history = make_engine(
        model, num_blocks=60, num_window_blocks=40, num_state_slots=20, max_num_seqs=8
    )
    storm = _Storm(engine, rng)
    while storm.aborted < 1000:
        storm.go_on()
        if rng.random() < 0.1:
            engine.check_integrity()
    storm.end()
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
    assert (stats.blocks_used, stats.window_blocks_used, stats.slots_used) == (0, 0, 0)
    assert {output.finish_reason for output in storm.merged.values()} <= {"abort", "length"}
    prompt = random_prompt(rng, 100)
    output = run(engine, [make_request("after", prompt)])["after"]
    assert output.token_ids == history.continuation(prompt, 16)
