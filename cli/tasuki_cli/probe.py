"""Is a process ready, how busy is it, how much memory does it hold."""

import asyncio
import contextlib
import os
from pathlib import Path

import httpx
import msgspec

from tasuki_cli.plan import Process
from tasuki_common.messages import Member

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_REDIS_SECONDS = 1.0


class Probe:
    """Asks processes over HTTP, and Redis over its socket; every question has a deadline."""

    def __init__(self, timeout: float = 2.0) -> None:
        self._http = httpx.AsyncClient(timeout=timeout, trust_env=False)

    async def ready(self, process: Process) -> bool:
        """True when the process would serve now."""
        if process.part == "redis":
            return await _redis_answers(process.address)
        try:
            answer = await self._http.get(f"{process.address}/ready")
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def requests(self, process: Process) -> int | None:
        """Requests in a pod, running and waiting; None where that cannot be told."""
        if process.part not in ("prefill", "decode"):
            return None
        try:
            answer = await self._http.get(f"{process.address}/member")
            member = msgspec.msgpack.decode(answer.content, type=Member)
        except (httpx.HTTPError, msgspec.DecodeError):
            return None
        return member.load.running + member.load.waiting

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()


async def _redis_answers(path: str) -> bool:
    try:
        async with asyncio.timeout(_REDIS_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(b"PING\r\n")
                return await reader.readline() == b"+PONG\r\n"
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants; 0 when it is gone."""
    total, todo = 0, [pid]
    while todo:
        process = Path("/proc") / str(todo.pop())
        with contextlib.suppress(OSError, ValueError):
            total += int((process / "statm").read_text().split()[1]) * _PAGE_BYTES
            for task in (process / "task").iterdir():
                todo += map(int, (task / "children").read_text().split())
    return total
