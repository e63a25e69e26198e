"""The supervisor restarts what dies, stops in order, and leaves nothing; with real children.

What the pods do when they are stopped is tested with the pods.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from tasuki_cli import plan, ports, supervisor
from tasuki_cli.probe import Probe, resident_bytes
from tasuki_common.errors import ConfigError

SCRIPT = Path(__file__).parent.parent / "support" / "ready_server.py"


class Rig:
    """A supervisor of some children, with all their lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.ready = asyncio.Event()
        self.stop, self.force = asyncio.Event(), asyncio.Event()
        self.probe = Probe()
        self.children: list[supervisor.Child] = []

    def add(self, name: str, *manner: str, part: plan.Part = "decode", stop: float = 5.0) -> None:
        (port,) = ports.free_ports("127.0.0.1", 1)
        process = plan.Process(
            name=name,
            part=part,
            command=(sys.executable, str(SCRIPT), str(port), *manner),
            environ={},
            address=f"http://127.0.0.1:{port}",
            stop_seconds=stop,
        )
        sink: supervisor.LineSink = lambda who, line: self.lines.append((who, line))  # noqa: E731
        self.children.append(supervisor.Child(process, self.probe, sink))

    def start(self) -> "asyncio.Task[None]":
        supervising = supervisor.Supervisor(self.children, self.ready.set)
        return asyncio.create_task(supervising.run(self.stop, self.force))

    def said(self, text: str) -> bool:
        return any(text in line for _, line in self.lines)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    await rig.probe.close()


async def until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - what is watched lies outside this process
            await asyncio.sleep(0.02)


def pid_of(child: supervisor.Child) -> int:
    assert child.pid is not None
    return child.pid


async def within(seconds: float, what: Awaitable[None]) -> None:
    await asyncio.wait_for(what, seconds)


async def test_ready_is_told_once_and_a_killed_child_comes_back(rig: Rig) -> None:
    rig.add("decode-0")
    rig.add("gateway", part="gateway")
    running = rig.start()
    await within(10, rig.ready.wait())
    rig.ready.clear()
    child = rig.children[0]
    first = pid_of(child)
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.pid not in (None, first) and child.state is supervisor.State.READY)
    assert child.restarts == 1
    assert rig.said("decode-0 ended with SIGKILL; starts again in 0.5 s")
    assert not rig.ready.is_set()
    rig.stop.set()
    await within(10, running)


async def test_stopping_leaves_no_process_not_even_a_grandchild(rig: Rig) -> None:
    rig.add("decode-0", "grandchild")
    running = rig.start()
    await within(10, rig.ready.wait())
    grandchild = next(int(line.split()[1]) for _, line in rig.lines if "grandchild" in line)
    leader = pid_of(rig.children[0])
    assert resident_bytes(leader) > psutil.Process(grandchild).memory_info().rss
    rig.stop.set()
    await within(10, running)
    assert not psutil.pid_exists(leader)
    await until(lambda: not _lives(grandchild))


async def test_a_killed_childs_own_children_go_with_it(rig: Rig) -> None:
    rig.add("decode-0", "grandchild")
    running = rig.start()
    await within(10, rig.ready.wait())
    grandchild = next(int(line.split()[1]) for _, line in rig.lines if "grandchild" in line)
    os.kill(pid_of(rig.children[0]), signal.SIGKILL)
    await until(lambda: not _lives(grandchild))
    rig.stop.set()
    await within(10, running)


async def test_parts_stop_in_order_gateway_first(rig: Rig) -> None:
    for part in ("redis", "prefill", "decode", "gateway"):
        rig.add(part, part=part)
    ended: list[str] = []
    running = rig.start()
    await until(lambda: all(child.pid for child in rig.children))
    for child in rig.children:
        kept = child.stop

        async def stop(
            child: supervisor.Child = child, kept: Callable[[], Awaitable[None]] = kept
        ) -> None:
            await kept()
            ended.append(child.process.name)

        child.stop = stop  # type: ignore[method-assign]
    rig.stop.set()
    await within(20, running)
    assert ended == ["gateway", "decode", "prefill", "redis"]


async def test_a_child_that_ignores_sigterm_is_killed_after_its_time(rig: Rig) -> None:
    rig.add("decode-0", "stubborn", stop=0.3)
    running = rig.start()
    await within(10, rig.ready.wait())
    rig.stop.set()
    await within(5, running)
    assert rig.said("did not stop in 0.3 s and is killed")


async def test_a_second_signal_does_not_wait(rig: Rig) -> None:
    rig.add("decode-0", "stubborn", stop=60.0)
    running = rig.start()
    await within(10, rig.ready.wait())
    rig.stop.set()
    rig.force.set()
    await within(5, running)


async def test_a_refused_configuration_ends_everything_with_a_sentence(rig: Rig) -> None:
    rig.add("decode-0")
    rig.add("prefill-0", "status", "2", part="prefill")
    with pytest.raises(supervisor.GaveUpError, match="prefill-0 refuses its configuration"):
        await within(10, rig.start())
    assert all(child.pid is None for child in rig.children)
    assert ("prefill-0", "cannot go on") in rig.lines


@pytest.mark.slow
async def test_a_child_that_never_becomes_ready_is_given_up(rig: Rig) -> None:
    rig.add("decode-0", "status", "7")
    with pytest.raises(supervisor.GaveUpError, match=r"ended 5 times .* exit status 7"):
        await within(60, rig.start())


async def test_a_child_that_is_stopped_while_it_starts_is_gone(rig: Rig) -> None:
    rig.add("decode-0", "silent")
    running = rig.start()
    await asyncio.sleep(0)
    rig.stop.set()
    await within(10, running)
    assert rig.children[0].pid is None


def test_children_die_with_a_supervisor_that_is_killed() -> None:
    program = """
import asyncio, subprocess, sys
from tasuki_common.processes import die_with_parent
async def main():
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import time; time.sleep(600)", preexec_fn=die_with_parent())
    sys.stdout.write(f"{process.pid}\\n"); sys.stdout.flush()
    await process.wait()
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _lives(child)
        parent.kill()
    deadline = time.monotonic() + 5
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(child)


def test_a_taken_port_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"Port {port} .* --port 0"):
            ports.claim("127.0.0.1", port)


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
