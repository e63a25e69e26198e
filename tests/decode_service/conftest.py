"""One prefill and one decode pod per family and transport, started once for all tests."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import tiny_models
from fresh_seed import fresh_seed
from pods import PodProcess, running


@pytest.fixture(scope="session")
def seed() -> int:
    return fresh_seed()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pods")


@pytest.fixture(scope="session")
def model(folders: Path, seed: int) -> Path:
    """A hybrid: recurrent layers and attention."""
    return tiny_models.make("granite_hybrid", folders, seed)


@pytest.fixture(scope="session")
def prefill_pod(folders: Path, model: Path) -> Iterator[PodProcess]:
    with running(PodProcess("prefill", model, folders / "prefill.log")) as (pod,):
        yield pod


@pytest.fixture(scope="session")
def decode_pod(folders: Path, model: Path) -> Iterator[PodProcess]:
    with running(PodProcess("decode", model, folders / "decode.log")) as (pod,):
        yield pod


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60.0) as client:
        yield client
