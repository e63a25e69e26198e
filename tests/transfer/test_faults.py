"""Whatever goes wrong has a name, comes in time, and leaves the taker's rows to the taker."""

import asyncio
import os
import resource
import signal
import socket
import time

import msgspec
import pytest
import torch
from fresh_seed import fresh_seed
from transfer_peers import (
    FINGERPRINT,
    KEY,
    CuttingProxy,
    GiverProcess,
    Pair,
    empty_regions,
    pair,
)

from tasuki_common.errors import ConfigError
from tasuki_transfer.base import TransferError
from tasuki_transfer.giver import Giver
from tasuki_transfer.taker import Taker

BACKENDS = ["tcp", pytest.param("nixl", marks=pytest.mark.nixl)]


def offered(both: Pair, request_id: str = "r", **counts: int):
    """A ticket of a complete lease, and what to want of it."""
    ticket = both.ticket(request_id)
    spans = both.spans(**(counts or {"full": 20, "state": 1}))
    both.giver.offer(request_id, spans)
    both.giver.complete(request_id)
    return ticket, spans, both.want(spans)


async def failure(taker: Taker, ticket, wanted, seconds=5.0) -> str:
    """The reason of a pull that must fail."""
    with pytest.raises(TransferError) as error:
        await taker.pull(ticket, wanted, seconds)
    assert str(error.value).endswith(".")
    return error.value.reason


async def assert_untouched(both: Pair) -> None:
    """Nothing is written into the taker's rows any more."""
    for rows in both.target.values():
        rows.fill_(7)
    await asyncio.sleep(0.3)
    for pool, rows in both.target.items():
        assert torch.all(rows == 7), pool


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_byte_flipped_after_the_offer_is_found(backend):
    async with pair(fresh_seed(), [backend]) as both:
        ticket, spans, wanted = offered(both)
        await asyncio.wrap_future(both.giver._hasher.submit(int))  # all before it is summed
        span = both.random.choice(spans)
        at = both.random.randrange(both.source[span.pool].shape[1])
        both.source[span.pool][span.index, at] ^= 1 << both.random.randrange(8)
        assert await failure(both.taker, ticket, wanted) == "checksum"
        assert both.giver.leases() == 1


async def test_a_taker_sums_as_its_giver_does(monkeypatch):
    async with pair(fresh_seed()) as both:
        monkeypatch.setattr(both.giver, "_checksum_kind", "mix64")
        ticket, spans, wanted = offered(both)
        await both.taker.pull(ticket, wanted, 10)
        both.assert_moved(spans, wanted)


async def test_a_span_given_out_again_under_its_lease_is_found():
    async with pair(fresh_seed()) as both:
        ticket, spans, wanted = offered(both)
        both.generations["full", spans[3].index] = 1
        assert await failure(both.taker, ticket, wanted) == "generation"
        assert both.ends.of["r"] == ["failed"]


async def test_a_stream_cut_anywhere_fails_and_the_lease_lives_on_for_another_try():
    async with pair(fresh_seed()) as both:
        total = 20 * 8192 + (3 << 20)
        for limit in (0, 1, 300, 5000, total // 2, total):
            request_id = f"cut{limit}"
            ticket, spans, wanted = offered(both, request_id)
            proxy = CuttingProxy(ticket.port, limit)
            cut = msgspec.structs.replace(ticket, port=await proxy.start())
            assert await failure(both.taker, cut, wanted) == "truncated"
            await assert_untouched(both)
            await proxy.close()
            for rows in both.target.values():
                rows.zero_()
            await both.taker.pull(ticket, wanted, 5)
            both.assert_moved(spans, wanted)


@pytest.mark.parametrize(
    ("key", "fingerprint", "reason"),
    [
        (b"another key, of the same length.", FINGERPRINT, "unauthorized"),
        (KEY, "other", "refused_fingerprint"),
    ],
)
async def test_a_stranger_is_refused(key, fingerprint, reason):
    async with pair(fresh_seed()) as both:
        ticket, _, wanted = offered(both)
        stranger = Taker(
            regions=empty_regions(), fingerprint=fingerprint, key=key, backends=["tcp"]
        )
        ticket = msgspec.structs.replace(ticket, fingerprint=fingerprint)
        assert await failure(stranger, ticket, wanted) == reason
        assert both.giver.leases() == 1
        await stranger.close()


async def test_a_ticket_of_another_fingerprint_is_refused_before_anyone_is_asked():
    async with pair(fresh_seed()) as both:
        ticket = msgspec.structs.replace(both.ticket("r"), fingerprint="other", port=1)
        assert await failure(both.taker, ticket, {}) == "refused_fingerprint"


async def test_a_giver_restarted_on_the_same_port_is_another_giver():
    async with pair(fresh_seed()) as both:
        ticket, _, wanted = offered(both)
        await both.giver.close()
        successor = Pair(fresh_seed(), ["tcp"], incarnation="second")
        await successor.giver.start("127.0.0.1", ticket.port)
        offered(successor)
        assert await failure(both.taker, ticket, wanted) == "refused_incarnation"
        await successor.close()


async def test_a_giver_short_of_descriptors_listens_again_when_there_are_some():
    async with pair(fresh_seed()) as both:
        ticket, spans, wanted = offered(both)
        caller = socket.socket()
        caller.setblocking(False)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            await asyncio.get_running_loop().sock_connect(caller, (ticket.host, ticket.port))
            await asyncio.sleep(0.2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            caller.close()
        await both.taker.pull(ticket, wanted, 5)
        both.assert_moved(spans, wanted)


async def test_a_port_in_use_is_a_sentence_that_names_it():
    async with pair(fresh_seed()) as both:
        second = Pair(fresh_seed(), ["tcp"])
        port = both.ticket("r").port
        with pytest.raises(ConfigError, match=f"transfer_port {port}"):
            await second.giver.start("127.0.0.1", port)
        await second.close()


async def test_nobody_listens_there():
    async with pair(fresh_seed()) as both:
        ticket, _, wanted = offered(both)
        await both.giver.close()
        assert await failure(both.taker, ticket, wanted) == "unreachable"


async def test_a_peer_that_never_answers_costs_no_more_than_the_timeout():
    async with pair(fresh_seed()) as both:
        silent = socket.create_server(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        ticket = msgspec.structs.replace(both.ticket("r"), port=port)
        started = time.monotonic()
        assert await failure(both.taker, ticket, {}, 0.3) == "timeout"
        assert time.monotonic() - started < 4
        silent.close()


async def test_a_lease_runs_out_once_and_a_late_taker_is_told():
    async with pair(fresh_seed(), lease_seconds=0.3) as both:
        ticket, _, wanted = offered(both)
        await asyncio.sleep(0.6)
        assert both.ends.of["r"] == ["expired"]
        assert await failure(both.taker, ticket, wanted) == "expired"
        both.giver.complete("r")
        both.giver.fail("r", "Too late.")
        await asyncio.sleep(0.05)
        assert both.ends.of["r"] == ["expired"]
        assert both.giver.leases() == 0


@pytest.mark.slow
async def test_heartbeats_keep_the_lease_while_the_taker_waits():
    async with pair(fresh_seed(), lease_seconds=2.0) as both:
        ticket = both.ticket("r")
        pull = asyncio.create_task(both.taker.pull(ticket, {}, 30))
        await asyncio.sleep(3.0)
        assert both.giver.leases() == 1
        pull.cancel()
        await asyncio.gather(pull, return_exceptions=True)
        assert both.giver.leases() == 1
        async with asyncio.timeout(20):
            while both.giver.leases():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert both.ends.of["r"] == ["expired"]


async def test_unknown_released_and_failed_tickets_say_so():
    async with pair(fresh_seed()) as both:
        ticket, _, wanted = offered(both)
        unknown = msgspec.structs.replace(ticket, request_id="other")
        assert await failure(both.taker, unknown, wanted) == "unknown_ticket"
        await both.taker.pull(ticket, wanted, 5)
        assert await failure(both.taker, ticket, wanted) == "unknown_ticket"
        failing = both.ticket("f")
        pull = asyncio.create_task(failure(both.taker, failing, {}))
        await asyncio.sleep(0.1)
        both.giver.fail("f", "The request was aborted.")
        assert await pull == "giver_failed"
        assert both.ends.of == {"r": ["released"], "f": ["failed"]}


async def test_what_was_never_offered_is_missed_at_once():
    async with pair(fresh_seed()) as both:
        ticket, _, wanted = offered(both)
        wanted["full"][20] = 95
        assert await failure(both.taker, ticket, wanted) == "incomplete"


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_giver_killed_in_mid_pull_ends_the_pull_at_once(backend):
    async with pair(fresh_seed(), [backend]) as both:
        counts = {"full": 96, "state": 4}
        for delay in (0.0, 0.002, 0.01):
            child = GiverProcess(fresh_seed(), backend, counts)
            wanted = both.want(both.spans(**counts))
            pull = asyncio.create_task(both.taker.pull(child.ticket, wanted, 60))
            await asyncio.sleep(delay)
            child.signal(signal.SIGKILL)
            started = time.monotonic()
            (outcome,) = await asyncio.gather(pull, return_exceptions=True)
            child.end()
            assert time.monotonic() - started < 20
            if isinstance(outcome, Exception):
                assert isinstance(outcome, TransferError)
                # no_backend: it was gone before the two NIXL agents had met.
                early = ("no_backend",) if backend == "nixl" else ()
                assert outcome.reason in ("truncated", "unreachable", "backend", *early)
            await assert_untouched(both)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_giver_that_stops_in_mid_pull_cannot_write_after_the_timeout(backend):
    async with pair(fresh_seed(), [backend]) as both:
        counts = {"full": 96, "state": 4}
        child = GiverProcess(fresh_seed(), backend, counts)
        wanted = both.want(both.spans(**counts))
        pull = asyncio.create_task(both.taker.pull(child.ticket, wanted, 0.5))
        await asyncio.sleep(0.005)
        child.signal(signal.SIGSTOP)
        (outcome,) = await asyncio.gather(pull, return_exceptions=True)
        if isinstance(outcome, Exception):
            assert isinstance(outcome, TransferError)
            assert outcome.reason == "timeout"
        child.signal(signal.SIGCONT)
        await assert_untouched(both)
        child.end()


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_cancelled_pull_writes_nothing_more_and_frees_only_what_has_arrived(backend):
    async with pair(fresh_seed(), [backend]) as both:
        for turn in range(12):
            ticket, spans, wanted = offered(both, f"r{turn}", full=96, state=4)
            pull = asyncio.create_task(both.taker.pull(ticket, wanted, 10))
            await asyncio.sleep(both.random.random() * 0.02)
            pull.cancel()
            await asyncio.gather(pull, return_exceptions=True)
            arrived = {pool: rows.clone() for pool, rows in both.target.items()}
            await assert_untouched(both)
            if released := both.ends.of.get(f"r{turn}"):  # it was cancelled with all verified
                assert released == ["released"]
                for pool, rows in both.target.items():
                    rows.copy_(arrived[pool])
            else:
                for rows in both.target.values():
                    rows.zero_()
                await both.taker.pull(ticket, wanted, 10)
            both.assert_moved(spans, wanted)
            for rows in both.target.values():
                rows.zero_()


async def test_drain_waits_for_leases_and_says_when_some_are_left():
    async with pair(fresh_seed()) as both:
        ticket, _, wanted = offered(both)
        assert not await both.giver.drain(0.1)
        drained = asyncio.create_task(both.giver.drain(5))
        await both.taker.pull(ticket, wanted, 5)
        assert await drained


async def test_closing_a_giver_ends_every_lease_once():
    both = Pair(fresh_seed(), ["tcp"])
    await both.giver.start("127.0.0.1", 0)
    both.ticket("a")
    offered(both, "b")
    await both.close()
    await both.close()
    assert both.ends.of == {"a": ["failed"], "b": ["failed"]}


async def test_one_request_cannot_hold_two_leases():
    async with pair(fresh_seed()) as both:
        both.ticket("r")
        with pytest.raises(ValueError, match="'r' holds a lease already"):
            both.ticket("r")


def test_a_short_key_is_refused_at_start():
    with pytest.raises(ConfigError, match="TASUKI_TRANSFER_KEY"):
        Giver(
            regions=empty_regions(),
            fingerprint=FINGERPRINT,
            incarnation="i",
            key=b"",
            backends=["tcp"],
            lease_seconds=1,
            on_end=lambda request_id, outcome: None,
        )
