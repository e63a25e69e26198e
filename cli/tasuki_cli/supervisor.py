"""Keeps processes running, and stops them in order.

Each child leads a session of its own, so a Ctrl-C in the terminal reaches only the supervisor, and
what a child started is ended with it. The kernel ends the children of a supervisor that was killed.

The end, as a story: 1. gateway, decode pods, prefill pods, Redis are stopped one after the other,
all of one part at once; 2. each gets SIGTERM and its time to finish; 3. what is left of its group
gets SIGKILL. A second signal goes to step 3 at once.
"""

import asyncio
import contextlib
import dataclasses
import enum
import os
import signal
import time
from collections.abc import Callable, Sequence

from tasuki_cli.plan import STOP_ORDER, Process
from tasuki_cli.probe import Probe
from tasuki_common.errors import TasukiError
from tasuki_common.processes import die_with_parent

LineSink = Callable[[str, str], None]
"""Takes the name of a process and one line of its output."""

CONFIG_ERROR_STATUS = 2
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0
_SETTLED_SECONDS = 60.0
_STARTS = 5
_POLL_STARTING, _POLL_READY = 0.1, 1.0
_LONGEST_LINE = 1 << 16
_LAST_WORDS_SECONDS = 1.0


class State(enum.Enum):
    """Where a child is in its life."""

    STARTING = "starting"
    READY = "ready"
    UNREADY = "not ready"
    WAITING = "restarting"
    STOPPED = "stopped"


class GaveUpError(TasukiError):
    """A process cannot be brought up; the message says which and why."""


class Child:
    """One process, started again whenever it ends by itself."""

    def __init__(self, process: Process, probe: Probe, lines: LineSink) -> None:
        self.process = process
        self.state = State.STOPPED
        self.pid: int | None = None
        self.restarts = 0
        self.requests: int | None = None
        self._probe = probe
        self._lines = lines
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._was_ready = self._ever_ready = False
        self.ready = asyncio.Event()

    async def keep_running(self) -> None:
        """Runs until `stop`; raises GaveUpError when the process never becomes ready."""
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            status = await self._run_once()
            if self._stopping.is_set():
                break
            if self._was_ready and time.monotonic() - started > _SETTLED_SECONDS:
                failures = 0
            failures += 1
            self._check_hope(status, failures)
            delay = min(_FIRST_DELAY * 2 ** (failures - 1), _LONGEST_DELAY)
            self._say(f"ended with {_describe(status)}; starts again in {delay:g} s")
            self._enter(State.WAITING)
            self.restarts += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
        self._enter(State.STOPPED)

    async def stop(self) -> None:
        """Ends the process: SIGTERM, its time to finish, SIGKILL to its group."""
        self._stopping.set()
        if self.pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(self._ended.wait(), self.process.stop_seconds)
        except TimeoutError:
            self._say(f"did not stop in {self.process.stop_seconds:g} s and is killed")
            self.kill()
            await self._ended.wait()

    def kill(self) -> None:
        """SIGKILL to the process and all that it started."""
        self._stopping.set()
        if self.pid is not None:
            _kill_group(self.pid)

    async def _run_once(self) -> int:
        """One life of the process; its exit status, negative for a signal."""
        reading, writing = os.pipe()
        try:
            running = await asyncio.create_subprocess_exec(
                *self.process.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                env={**os.environ, **self.process.environ},
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self.pid = running.pid
        self._ended.clear()
        self._enter(State.STARTING)
        if self._stopping.is_set():  # asked to stop while it was being started
            _kill_group(running.pid)
        output = asyncio.create_task(self._pass_on(reading))
        watch = asyncio.create_task(self._watch())
        try:
            status = await running.wait()
        finally:
            _kill_group(running.pid)
            self.pid, self.requests = None, None
            watch.cancel()
            await asyncio.wait([output], timeout=_LAST_WORDS_SECONDS)
            output.cancel()  # something outside the group still holds its end
            await asyncio.gather(watch, output, return_exceptions=True)
            self._ended.set()
        return status

    async def _pass_on(self, descriptor: int) -> None:
        """Hands on the output line by line, until nobody holds its other end."""
        reader = asyncio.StreamReader()
        pipe = os.fdopen(descriptor, "rb", 0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        rest = b""
        try:
            while data := await reader.read(_LONGEST_LINE):
                *whole, rest = (rest + data).split(b"\n")
                if len(rest) > _LONGEST_LINE:
                    whole, rest = [*whole, rest], b""
                for line in whole:
                    self._lines(self.process.name, line.decode(errors="replace"))
            if rest:
                self._lines(self.process.name, rest.decode(errors="replace"))
        finally:
            transport.close()

    async def _watch(self) -> None:
        """Follows the process's own word on whether it is ready."""
        self._was_ready = False
        while True:
            if await self._probe.ready(self.process):
                self._was_ready = self._ever_ready = True
                self._enter(State.READY)
                self.requests = await self._probe.requests(self.process)
            elif self._was_ready:
                self._enter(State.UNREADY)
            await asyncio.sleep(_POLL_READY if self._was_ready else _POLL_STARTING)

    def _check_hope(self, status: int, failures: int) -> None:
        if self._ever_ready:
            return
        if status == CONFIG_ERROR_STATUS:
            raise GaveUpError(f"{self.process.name} refuses its configuration (see above).")
        if failures >= _STARTS:
            raise GaveUpError(
                f"{self.process.name} ended {failures} times before it was ready, "
                f"last with {_describe(status)} (see above)."
            )

    def _enter(self, state: State) -> None:
        self.state = state
        if state is State.READY:
            self.ready.set()
        else:
            self.ready.clear()

    def _say(self, text: str) -> None:
        self._lines("up", f"{self.process.name} {text}")


@dataclasses.dataclass
class Supervisor:
    """All children of one deployment."""

    children: Sequence[Child]
    on_ready: Callable[[], None]
    """Called once, when every child has become ready."""

    async def run(self, stop: asyncio.Event, force: asyncio.Event) -> None:
        """Runs the children until `stop` is set; `force` ends a slow stop.

        Raises:
            GaveUpError: a process cannot be brought up; the others are stopped then.
        """
        keeping = [asyncio.create_task(child.keep_running()) for child in self.children]
        announcing = asyncio.create_task(self._announce())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([*keeping, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            announcing.cancel()
            forcing = asyncio.create_task(self._force(force))
            await self._stop_in_order()
            forcing.cancel()
            stopping.cancel()
            outcomes = await asyncio.gather(*keeping, return_exceptions=True)
            await asyncio.gather(announcing, forcing, stopping, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _announce(self) -> None:
        while not all(child.ready.is_set() for child in self.children):
            for child in self.children:
                await child.ready.wait()
        self.on_ready()

    async def _stop_in_order(self) -> None:
        for part in STOP_ORDER:
            leaving = [child.stop() for child in self.children if child.process.part == part]
            await asyncio.gather(*leaving)

    async def _force(self, force: asyncio.Event) -> None:
        await force.wait()
        for child in self.children:
            child.kill()


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _describe(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
