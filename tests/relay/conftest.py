"""A relay of a hybrid model for each file, and whatever each family needs.

Not for the whole session: on the CPU NIXL's progress thread polls, at the other tests' cost.
"""

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import tiny_models
from fresh_seed import fresh_seed
from relays import SHORT_DRAIN_SECONDS, Relay, running


@pytest.fixture(scope="session")
def seed() -> int:
    return fresh_seed()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("relay")


@pytest.fixture(scope="module")
def model(folders: Path, seed: int) -> Path:
    """A hybrid: recurrent layers and attention."""
    return tiny_models.make("granite_hybrid", folders, seed)


@pytest.fixture(scope="module")
def relay(folders: Path, model: Path) -> Iterator[Relay]:
    """One prefill pod, two decode pods; every prompt is handed over. Tests leave it whole."""
    with running(Relay(folders / "shared", model)) as relay:
        yield relay


@pytest.fixture(scope="module")
def mistreated_relay(folders: Path, model: Path) -> Iterator[Relay]:
    with running(
        Relay(
            folders / "mistreated",
            model,
            engine={"num_blocks": 1600, "num_state_slots": 80},
            prefill_engine={"max_num_batched_tokens": 4},
            lease_seconds=6.0,
            drain_seconds=SHORT_DRAIN_SECONDS,
        )
    ) as relay:
        yield relay


@pytest.fixture
def mistreated(mistreated_relay: Relay) -> Iterator[Relay]:
    """A relay whose processes a test may kill: long prompts in small steps, short leases."""
    yield mistreated_relay
    mistreated_relay.heal()


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with httpx.AsyncClient(timeout=90.0, limits=limits) as client:
        yield client


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """Other numbers for each test, from the session's seed."""
    return random.Random(f"{seed} {request.node.name}")
