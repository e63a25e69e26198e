"""Settings that cannot work stop the gateway with a sentence."""

import pytest

from tasuki_common.errors import ConfigError
from tasuki_gateway.config import GatewayConfig
from tasuki_gateway.main import main


@pytest.mark.parametrize(
    "seed", ["127.0.0.1:8000", "https://pod:1", "http://", "http://pod:x", "http://pod/path"]
)
def test_a_seed_that_is_no_base_url_is_refused(seed: str) -> None:
    with pytest.raises(ConfigError, match="seeds"):
        GatewayConfig(seeds=(seed,))


@pytest.mark.parametrize("seed", ["http://pod", "http://10.0.0.1:8000/", "http://[::1]:80"])
def test_a_seed_is_a_base_url(seed: str) -> None:
    assert GatewayConfig(seeds=(seed,)).seeds == (seed,)


@pytest.mark.parametrize("url", ["localhost:6379", "http://x", "redis://host:port"])
def test_an_index_url_that_names_no_redis_is_status_2_and_a_sentence(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--redis-url", url]) == 2
    assert "redis_url" in capsys.readouterr().err
