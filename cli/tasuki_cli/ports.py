"""Free ports on this machine."""

import random
import socket

from tasuki_common.errors import ConfigError

_SHARED_OUT = range(18000, 32000)  # below the ephemeral ports, which clients take at any moment


def free_ports(host: str, count: int) -> list[int]:
    """Distinct ports nobody listens on now.

    Raises:
        ConfigError: there are not that many.
    """
    ports: list[int] = []
    for port in random.sample(_SHARED_OUT, len(_SHARED_OUT)):
        if len(ports) == count:
            break
        if _is_free(host, port):
            ports.append(port)
    if len(ports) < count:
        raise ConfigError(f"{host} has fewer than {count} free ports from 18000 to 31999.")
    return ports


def claim(host: str, port: int) -> int:
    """`port` when it is free, a free one for 0.

    Raises:
        ConfigError: something listens there.
    """
    if port == 0:
        return free_ports(host, 1)[0]
    if not _is_free(host, port):
        raise ConfigError(
            f"Port {port} of {host} cannot be listened on; something may hold it. "
            "Choose another with --port, or --port 0 for a free one."
        )
    return port


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True
