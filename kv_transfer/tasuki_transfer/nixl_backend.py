"""One-sided reads through NIXL: RDMA, NVLink, shared memory or TCP, whatever UCX finds.

A giver only registers its regions; a taker reads rows by index from descriptor lists that are
prepared once per giver. All calls of one agent happen on one thread of its own: a post may copy the
bytes itself and block (shared memory does).

Releasing a read that is under way does not stop it: its bytes still land (measured, UCX over TCP
with a stopped giver). Only its end does, or the end of the agent. So a cancelled read is waited
for, and when it does not end, the agent is given up with all reads it has.
"""

import asyncio
import importlib.util
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from tasuki_transfer import wire
from tasuki_transfer.base import Backend, Landing, TransferError
from tasuki_transfer.memory import Region, describe
from tasuki_transfer.tasks import in_thread, to_the_end

P = ParamSpec("P")
T = TypeVar("T")

BATCH_BYTES, CUDA_BATCH_BYTES = 32 << 20, 512 << 20
"""One post: a cancelled pull waits for no more than that. GPUs read in milliseconds what takes a
CPU a tenth of a second; to each post go some 0.4 ms of waiting and threads."""
STUCK_SECONDS = 2.0
"""How long a read that nobody wants any more may take to end before its agent is given up."""
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 50e-6, 1e-3


def usable(backends: Sequence[Backend]) -> tuple[Backend, ...]:
    """Without `nixl` where its wheel is not installed; imports nothing."""
    installed = importlib.util.find_spec("nixl") is not None
    return tuple(name for name in backends if installed or name != "nixl")


class NixlAgent:
    """One NIXL agent with all regions registered: `create` it, `close` it."""

    def __init__(self, role: str, regions: dict[str, Region]) -> None:
        self.regions = regions
        self.given_up = False
        self.metadata = b""
        """What the other side's `source` needs."""
        self._serves = role == "giver"
        self._name = f"{role}-{secrets.token_hex(8)}"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tasuki-nixl")
        self._agent: Any = None
        self._registered: list[Any] = []
        self._rows: dict[tuple[str, str], Any] = {}
        self._reads = 0
        self._gone = asyncio.Event()

    @classmethod
    async def create(cls, role: str, regions: dict[str, Region]) -> "NixlAgent":
        """Start UCX and register the regions. Raises TransferError("backend")."""
        agent = cls(role, regions)
        try:
            await agent._call(agent._open)
        except TransferError:
            agent._thread.shutdown(wait=False)
            raise
        return agent

    async def connect(self, welcome: wire.Welcome) -> "NixlSource":
        """The way to a giver's memory. Raises TransferError("backend")."""
        return NixlSource(self, await self._call(self._add, welcome), welcome.pools)

    async def disconnect(self, remote: str) -> None:
        """Forget a giver."""
        if not self.given_up:
            await self._call(self._remove, remote)

    async def close(self) -> None:
        """End the agent; idempotent."""
        self.given_up = True
        await self._leave()
        self._thread.shutdown()

    async def read(self, remote: str, pool: str, landings: list[Landing]) -> None:
        """Read rows. Returns, raises or is cancelled only when nothing lands any more."""
        unwanted = asyncio.Event()
        reading = asyncio.create_task(self._read(remote, pool, landings, unwanted))
        await to_the_end(reading, unwanted.set)

    async def _read(
        self, remote: str, pool: str, landings: list[Landing], unwanted: asyncio.Event
    ) -> None:
        self._reads += 1
        handle, stuck_at, pause = None, float("inf"), _FIRST_POLL_SECONDS
        try:
            handle = await self._call(self._post, remote, pool, landings)
            while await self._call(self._under_way, handle):
                if self.given_up:
                    raise TransferError("backend", "The NIXL agent was given up.")
                if unwanted.is_set() and stuck_at == float("inf"):
                    stuck_at = time.monotonic() + STUCK_SECONDS
                self.given_up = time.monotonic() > stuck_at
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_POLL_SECONDS)
        finally:
            del handle
            self._reads -= 1
            if self.given_up:
                await self._leave()

    async def _leave(self) -> None:
        """Wait until all reads are done and the agent is gone; the last one ends it."""
        if not self._reads and not self._gone.is_set():
            await in_thread(self._thread, self._shut)
            self._gone.set()
        await self._gone.wait()

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await in_thread(self._thread, function, *args, **kwargs)
        except Exception as error:
            raise TransferError("backend", f"NIXL failed: {error}.") from error

    # On the agent's thread.

    def _open(self) -> None:
        from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t

        _quieten(logging.getLogger("nixl"))
        for device in {region.tensor.device for region in self.regions.values()}:
            if device.type == "cuda":
                # UCX offers copies between GPUs only to a thread that has a CUDA context, and reads
                # only over NVLink unless told so: else they go through TCP, 1,000 times slower.
                os.environ.setdefault("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "on")
                torch.cuda.set_device(device)
                torch.cuda.synchronize(device)
        config = nixl_agent_config(
            backends=["UCX"],
            enable_prog_thread=self._serves,  # it polls; a reader makes progress as it asks
            sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        self._agent = nixl_agent(self._name, config)
        for name, region in self.regions.items():
            self._registered.append(self._agent.register_memory(region.tensor))
            self._rows["", name] = self._prepare("NIXL_INIT_AGENT", describe(region))
        self.metadata = self._agent.get_agent_metadata()

    def _prepare(self, agent: str, pool: wire.Pool) -> Any:
        """A prepared descriptor list whose entry i is row i of the pool."""
        row = [pool.address, pool.span_bytes, max(pool.device, 0), pool.span_bytes, pool.count]
        memory = "DRAM" if pool.device < 0 else "VRAM"
        return self._agent.prep_xfer_dlist(agent, np.array([row], dtype=np.uint64), memory)

    def _add(self, welcome: wire.Welcome) -> str:
        remote: str = self._agent.add_remote_agent(welcome.nixl).decode()
        self._agent.make_connection(remote, ["UCX"])
        for pool in self.regions:
            self._rows[remote, pool] = self._prepare(remote, welcome.pools[pool])
        return remote

    def _remove(self, remote: str) -> None:
        for pool in self.regions:
            self._rows.pop((remote, pool)).release()
        self._agent.remove_remote_agent(remote)

    def _post(self, remote: str, pool: str, landings: list[Landing]) -> Any:
        here = np.array([landing.row for landing in landings], dtype=np.int32)
        there = np.array([landing.giver_row for landing in landings], dtype=np.int32)
        ours, theirs = self._rows["", pool], self._rows[remote, pool]
        handle = self._agent.make_prepped_xfer("READ", ours, here, theirs, there)
        _check(self._agent.transfer(handle))
        return handle

    def _under_way(self, handle: Any) -> bool:
        return _check(self._agent.check_xfer_state(handle))

    def _shut(self) -> None:
        for rows in self._rows.values():
            rows.release()
        self._rows.clear()
        for registered in self._registered:
            self._agent.deregister_memory(registered)
        self._registered.clear()
        self._agent = None


def _check(state: str) -> bool:
    """Whether a read in `state` is under way; TransferError when it failed."""
    if state == "ERR":
        raise TransferError("backend", "A NIXL read failed.")
    return state == "PROC"


def _quieten(logger: logging.Logger) -> None:
    """Its console handler writes to standard output; ours take its lines from the root."""
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)


class NixlSource:
    """Reads one giver's rows; see base.Source."""

    backend: Backend = "nixl"

    def __init__(self, agent: NixlAgent, remote: str, pools: dict[str, wire.Pool]) -> None:
        self._agent = agent
        self._remote = remote
        self._pools = pools
        self._failed = False

    @property
    def alive(self) -> bool:
        """See base.Source."""
        return not self._failed and not self._agent.given_up

    async def fetch(self, request_id: str, pool: str, landings: list[Landing]) -> None:
        """See base.Source."""
        if any(not 0 <= landing.giver_row < self._pools[pool].count for landing in landings):
            raise TransferError("protocol", f"{request_id!r} offers rows that {pool!r} lacks.")
        on_gpus = self._pools[pool].device >= 0 and self._agent.regions[pool].tensor.is_cuda
        batch_bytes = CUDA_BATCH_BYTES if on_gpus else BATCH_BYTES
        step = max(1, batch_bytes // self._pools[pool].span_bytes)
        try:
            for first in range(0, len(landings), step):
                await self._agent.read(self._remote, pool, landings[first : first + step])
        except TransferError:
            self._failed = True
            raise

    async def close(self) -> None:
        """See base.Source."""
        await self._agent.disconnect(self._remote)
