"""A NIXL read that does not end: what was measured of it, and what the agent does about it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transfer_peers

SCENARIO = """
import asyncio, os, signal, sys, time
import transfer_peers as peers
from tasuki_transfer.base import TransferError

async def main():
    counts = {"full": 96, "state": 4}
    async with peers.pair(1, ["nixl"]) as both:
        both.taker._backends = ("nixl",)
        stopped, healthy = (peers.GiverProcess(seed, "nixl", counts) for seed in (2, 3))
        wanted = both.want(both.spans(**counts))
        for child in (stopped, healthy):
            await both.taker.pull(child.warm, {}, 20)
        agent = both.taker._nixl.result()
        pull = asyncio.create_task(both.taker.pull(stopped.ticket, wanted, 1.0))
        while not agent._reads:
            await asyncio.sleep(0)
        stopped.signal(signal.SIGSTOP)
        started = time.monotonic()
        (outcome,) = await asyncio.gather(pull, return_exceptions=True)
        assert isinstance(outcome, TransferError), outcome
        assert outcome.reason == "timeout", outcome.reason
        assert time.monotonic() - started < 6
        assert agent.given_up
        for rows in both.target.values():
            rows.fill_(7)
        stopped.signal(signal.SIGCONT)
        await asyncio.sleep(1)
        assert all(bool((rows == 7).all()) for rows in both.target.values())
        await both.taker.pull(healthy.ticket, wanted, 20)
        stopped.end(), healthy.end()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.nixl
def test_a_read_that_never_ends_costs_its_agent_and_no_other_giver():
    support = str(Path(transfer_peers.__file__).parent)
    environment = os.environ | {"UCX_TLS": "tcp", "PYTHONPATH": support}
    subprocess.run([sys.executable, "-c", SCENARIO], env=environment, check=True, timeout=240)
