"""Bytes that are pulled are the bytes that were offered, on each backend, in whatever order."""

import asyncio

import pytest
from fresh_seed import fresh_seed
from transfer_peers import SHAPES, pair

from tasuki_transfer.base import TransferError

BACKENDS = ["tcp", pytest.param("nixl", marks=pytest.mark.nixl)]


@pytest.mark.parametrize("backend", BACKENDS)
async def test_wanted_rows_hold_the_givers_bytes_and_no_other_row_changes(backend):
    async with pair(fresh_seed(), [backend]) as both:
        for turn, share in enumerate((1.0, 0.5, 0.1, 0.0)):
            for rows in both.target.values():
                rows.zero_()
            spans = both.spans(full=60, window=7, state=1)
            wanted = both.want(spans, share)
            ticket = both.ticket(f"r{turn}")
            both.giver.offer(ticket.request_id, spans)
            both.giver.complete(ticket.request_id)
            pulled = await both.taker.pull(ticket, wanted, 20)
            both.assert_moved(spans, wanted)
            assert pulled.backend == backend
            assert pulled.spans == sum(map(len, wanted.values()))
            assert pulled.bytes == sum(len(rows) * SHAPES[pool][1] for pool, rows in wanted.items())
            assert both.ends.of[ticket.request_id] == ["released"]


@pytest.mark.parametrize("backend", BACKENDS)
async def test_spans_arrive_while_the_giver_still_computes(backend):
    async with pair(fresh_seed(), [backend], lease_seconds=60) as both:
        spans = both.spans(full=40, window=4, state=1)
        wanted = both.want(spans)
        ticket = both.ticket("r")
        pull = asyncio.create_task(both.taker.pull(ticket, wanted, 60))
        first_row = wanted["full"][0]
        for start in range(0, 40, 8):
            both.giver.offer("r", spans[start : start + 8])
            await asyncio.sleep(0.05)
        async with asyncio.timeout(30):
            while not both.target["full"][first_row].any():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert not pull.done()
        assert both.giver.leases() == 1
        both.giver.offer("r", spans[40:])
        both.giver.complete("r")
        await pull
        both.assert_moved(spans, wanted)


async def test_calls_from_the_engines_thread_take_effect_in_their_order():
    async with pair(fresh_seed()) as both:
        spans = both.spans(full=90, state=2)
        wanted = both.want(spans)
        ticket = both.ticket("r")

        def engine() -> None:
            for span in spans:
                both.giver.offer("r", [span])
            both.giver.complete("r")

        pull = asyncio.create_task(both.taker.pull(ticket, wanted, 20))
        await asyncio.to_thread(engine)
        await pull
        both.assert_moved(spans, wanted)


async def test_a_pull_that_wants_nothing_still_proves_the_lease():
    async with pair(fresh_seed()) as both:
        ticket = both.ticket("r")
        both.giver.complete("r")
        pulled = await both.taker.pull(ticket, {}, 5)
        assert (pulled.bytes, pulled.spans) == (0, 0)
        assert both.ends.of["r"] == ["released"]


@pytest.mark.nixl
async def test_a_giver_without_nixl_is_read_over_tcp():
    async with pair(fresh_seed(), ["nixl", "tcp"]) as both:
        both.giver._nixl, nixl = None, both.giver._nixl
        spans = both.spans(full=9)
        wanted = both.want(spans)
        ticket = both.ticket("r")
        both.giver.offer("r", spans)
        both.giver.complete("r")
        assert (await both.taker.pull(ticket, wanted, 20)).backend == "tcp"
        both.assert_moved(spans, wanted)
        both.giver._nixl = nixl


async def test_no_common_transport_is_refused():
    async with pair(fresh_seed()) as both:
        both.taker._backends = ()
        with pytest.raises(TransferError) as failure:
            await both.taker.pull(both.ticket("r"), {}, 5)
        assert failure.value.reason == "no_backend"
