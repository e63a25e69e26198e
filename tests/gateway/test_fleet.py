"""The fleet: which models and pods a gateway knows."""

from collections.abc import Iterator

import fake_pods
import pytest

from tasuki_gateway import fleet as fleet_module
from tasuki_gateway.fleet import Fleet
from tasuki_gateway.http_client import HttpClient


@pytest.fixture
def pod() -> Iterator[fake_pods.Process]:
    """One decode pod."""
    process = fake_pods.Process("decode", "d")
    yield process
    process.stop()


async def test_a_model_that_is_gone_for_good_is_forgotten(
    pod: fake_pods.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = HttpClient(connect_timeout=1.0)
    fleet = Fleet(client, None, [pod.url], 1000)
    await fleet.refresh()
    assert fleet.names.keys() == fleet.groups.keys() == {"fake", "fake-alias"}
    pod.stop()
    await fleet.refresh()
    assert fleet.names.keys() == {"fake", "fake-alias"}
    assert not fleet.groups
    monkeypatch.setattr(fleet_module, "FORGET_SECONDS", 0.0)
    await fleet.refresh()
    await fleet.refresh()
    assert not fleet.names
    assert not fleet._texts
    client.close()
