"""A server that listens everywhere is reached by IPv4 and by IPv6, as a cluster has them."""

import socket

import pytest

from tasuki_common.errors import ConfigError
from tasuki_common.listening import EVERYWHERE, listen


def is_reached(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def test_everywhere_is_both_families() -> None:
    with listen(EVERYWHERE, 0, 8) as server:
        port = server.getsockname()[1]
        assert is_reached("127.0.0.1", port)
        assert is_reached("::1", port) == socket.has_dualstack_ipv6()


def test_everywhere_is_ipv4_on_a_machine_without_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with listen(EVERYWHERE, 0, 8) as server:
        assert server.family == socket.AF_INET
        assert is_reached("127.0.0.1", server.getsockname()[1])


@pytest.mark.parametrize(("host", "other"), [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
def test_an_address_is_that_one_alone(host: str, other: str) -> None:
    reached = []
    for _ in range(3):  # another test's server may have the same port at the other address
        with listen(host, 0, 8) as server:
            port = server.getsockname()[1]
            assert is_reached(host, port)
            reached.append(is_reached(other, port))
    assert not all(reached)


def test_a_port_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0, 8) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1"):
            listen("127.0.0.1", port, 8)
