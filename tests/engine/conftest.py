"""What the tests of the engine's policy, books and verbs share: each runs at both depths."""

import functools
import random

import pytest
from fresh_seed import fresh_seed
from history_engine import MakeEngine, make


@pytest.fixture(params=[0, 1], ids=["in turn", "one ahead"])
def run_ahead(request: pytest.FixtureRequest) -> int:
    """Steps that are launched before the oldest is collected."""
    return int(request.param)


@pytest.fixture
def make_engine(run_ahead: int) -> MakeEngine:
    """Engines on the history model, of one depth."""
    return functools.partial(make, run_ahead)


@pytest.fixture
def rng() -> random.Random:
    """Other numbers each run; the seed is shown when a test fails."""
    return random.Random(fresh_seed())
