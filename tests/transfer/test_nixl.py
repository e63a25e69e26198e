"""A NIXL read that does not end: what was measured of it, and what the agent does about it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transfer_peers

from tasuki_operator import names

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


PORTS = """
import asyncio, sys
import psutil, transfer_peers as peers

async def main(first, last):
    counts = {"full": 4, "state": 1}
    async with peers.pair(1, ["nixl"]) as both:
        both.taker._backends = ("nixl",)
        ticket, spans = both.ticket("r"), both.spans(**counts)
        both.giver.offer("r", spans)
        both.giver.complete("r")
        await both.taker.pull(ticket, both.want(spans), 20)
        own = ticket.port
        sockets = [one for one in psutil.Process().net_connections("inet") if one.laddr]
        listening = {one.laddr.port for one in sockets if one.status == "LISTEN"} - {own}
        assert listening and all(first <= port <= last for port in listening), listening
        for one in sockets:
            if one.raddr and own not in (one.laddr.port, one.raddr.port):
                assert listening & {one.laddr.port, one.raddr.port}, one

asyncio.run(main(*map(int, sys.argv[1:])))
"""


@pytest.mark.slow
@pytest.mark.nixl
def test_over_tcp_nixl_keeps_to_the_ports_that_network_policies_let_through():
    support = str(Path(transfer_peers.__file__).parent)
    first, last = map(str, names.NIXL_PORTS)
    ucx = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "UCX_TCP_PORT_RANGE": f"{first}-{last}"}
    environment = os.environ | ucx | {"PYTHONPATH": support}
    subprocess.run(
        [sys.executable, "-c", PORTS, first, last], env=environment, check=True, timeout=120
    )
