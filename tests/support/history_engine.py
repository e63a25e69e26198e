"""Engines on the history model, and requests for them."""

import random
from typing import Any, Protocol

from faulty_model import FaultyModel
from history_model import VOCAB_SIZE
from relay import GREEDY

from tasuki_engine.config import EngineConfig
from tasuki_engine.engine import Engine
from tasuki_engine.request import EngineRequest

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"state": False},
    "hybrid": {},
    "windows": {"full": False, "window": 20, "state": False},
    "all": {"window": 20},
    "recurrent": {"full": False},
}
"""By the caches that they have."""
BLOCK = 8
SIZES: dict[str, Any] = {
    "block_size": BLOCK,
    "checkpoint_interval": 32,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "max_model_len": 256,
    "num_blocks": 400,
    "num_window_blocks": 200,
    "num_state_slots": 60,
}
"""Room for all that a test does not make short itself."""


class MakeEngine(Protocol):
    """What the fixture `make_engine` gives: an engine of the test's run-ahead, and its model."""

    def __call__(self, model: str = "hybrid", **settings: Any) -> tuple[Engine, FaultyModel]: ...


def make(run_ahead: int, model: str = "hybrid", **settings: Any) -> tuple[Engine, FaultyModel]:
    """An engine that launches `run_ahead` steps before it collects; `settings` go over SIZES."""
    history = FaultyModel(**MODELS[model])
    config = EngineConfig(model="history", **(SIZES | settings))
    return Engine(config, history, _run_ahead=run_ahead), history


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Tokens that may be anything."""
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def family(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    """Prompts of which many begin alike."""
    prompts = [random_prompt(rng, rng.randrange(1, longest))]
    while len(prompts) < count:
        base = rng.choice(prompts)
        shared = base[: rng.randrange(len(base) + 1)]
        prompts.append((shared + random_prompt(rng, rng.randrange(1, 40)))[: longest - 1])
    return prompts


def make_request(name: str, prompt: list[int], **fields: Any) -> EngineRequest:
    """Greedy and 16 tokens long, unless `fields` say otherwise."""
    return EngineRequest(
        **{"request_id": name, "prompt_token_ids": prompt, "sampling": GREEDY, **fields}
    )
