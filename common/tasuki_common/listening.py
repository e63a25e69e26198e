"""Sockets that listen where a setting `host` says."""

import socket

from tasuki_common.errors import ConfigError

EVERYWHERE = "::"
"""All addresses of the machine, of IPv4 and IPv6, as far as it has them."""


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A listening TCP socket; port 0: a free one.

    Raises:
        ConfigError: the port cannot be used there.
    """
    both = host == EVERYWHERE and socket.has_dualstack_ipv6()
    if host == EVERYWHERE and not both:
        host = "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=backlog, dualstack_ipv6=both
        )
    except OSError as error:
        raise ConfigError(
            f"port {port} on {host} cannot be used ({error.strerror}); choose another --port."
        ) from error
