"""`tasuki gateway`: starts, serves, and leaves in order.

Leaving (SIGTERM, SIGINT), each step with a deadline:
    1. /ready says no, so that balancers look elsewhere;
    2. no new connections; idle ones are closed;
    3. requests that run get `drain_timeout` seconds to finish;
    4. what still runs ends with an error its client can read;
    5. the connections to pods and index are closed.
A second signal skips to 5.
"""

import asyncio
import contextlib
import math
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn

from tasuki_common import logs, settings, tracing
from tasuki_common.errors import ConfigError
from tasuki_common.listening import listen
from tasuki_gateway.app import Gateway
from tasuki_gateway.config import GatewayConfig

log = logs.get("tasuki.gateway")

_BACKLOG = 4096
_LAST_WORDS_SECONDS = 5
_KEEP_ALIVE_SECONDS = 75
"""Longer than balancers keep idle connections (60 s): whoever closes first must be the client."""


class _Server(uvicorn.Server):
    """uvicorn, with the gateway told of the shutdown and of its deadline."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, drain_timeout: float) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain_timeout = drain_timeout

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves by returning; uvicorn's own way ends the process by the signal again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gateway.draining = True
        log.info("draining", seconds=self._drain_timeout)
        loop = asyncio.get_running_loop()
        end = loop.call_later(self._drain_timeout, self._gateway.service.end_streams)
        await super().shutdown(sockets)
        end.cancel()
        log.info("stopped")


def main(argv: Sequence[str]) -> int:
    """Serves until a signal; returns the exit status."""
    try:
        config = settings.load(GatewayConfig, argv, prog="tasuki gateway")
        logs.setup("gateway", config.log_level)
        tracing.setup("gateway", socket.gethostname())
        gateway = Gateway(config)
        listener = listen(config.host, config.port, _BACKLOG)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    log.info("starting", **settings.describe(config))
    server = _Server(
        uvicorn.Config(
            gateway.app,
            loop="uvloop",
            http="httptools",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(config.drain_timeout) + _LAST_WORDS_SECONDS,
        ),
        gateway,
        config.drain_timeout,
    )
    server.run(sockets=[listener])
    return 0
