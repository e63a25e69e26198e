"""Many pulls at once, and nothing left behind."""

import asyncio

import pytest
import torch
from fresh_seed import fresh_seed
from transfer_peers import SHAPES, Pair, busy_threads, open_files, pair

from tasuki_transfer.base import TransferError


async def one(both: Pair, name: str, room: asyncio.Semaphore) -> None:
    """A progressive hand-over of a few spans into rows of its own; one in five is aborted."""
    async with room:
        await hand_over(both, name, abort=both.random.random() < 0.2)


async def hand_over(both: Pair, name: str, *, abort: bool) -> None:
    """The same; an aborted one is cancelled by the taker and failed by the giver."""
    ticket = both.ticket(name)
    spans = both.spans(full=both.random.randint(1, 6))
    rows = [both.rows.pop() for _ in spans]
    wanted = {"full": dict(enumerate(rows))}
    pull = asyncio.create_task(both.taker.pull(ticket, wanted, 30))
    for span in spans:
        both.giver.offer(name, [span])
        await asyncio.sleep(both.random.random() * 0.01)
    if abort:
        pull.cancel()
    both.giver.complete(name)
    (outcome,) = await asyncio.gather(pull, return_exceptions=True)
    if abort:
        both.giver.fail(name, "The client left.")
    else:
        assert not isinstance(outcome, BaseException), outcome
        for span, row in zip(spans, rows, strict=True):
            assert torch.equal(both.target["full"][row], both.source["full"][span.index])
    both.rows += rows


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tcp", pytest.param("nixl", marks=pytest.mark.nixl)])
async def test_200_pulls_at_once_all_end_right_and_leave_nothing(backend):
    baseline = None
    for _ in range(3):
        async with pair(fresh_seed(), [backend]) as both:
            both.rows = list(range(SHAPES["full"][0]))
            room = asyncio.Semaphore(len(both.rows) // 6)
            await asyncio.gather(*(one(both, f"r{number}", room) for number in range(200)))
            await asyncio.sleep(0.05)
            assert both.giver.leases() == 0
            assert sorted(both.ends.of) == sorted(f"r{number}" for number in range(200))
            assert all(len(ends) == 1 for ends in both.ends.of.values())
            assert sorted(both.rows) == list(range(SHAPES["full"][0]))
        assert not busy_threads()
        assert len(asyncio.all_tasks()) == 1
        if baseline is None:
            baseline = open_files()
    assert open_files() == baseline


async def test_many_takers_of_one_giver_and_cancelled_connects_leave_no_descriptor():
    async with pair(fresh_seed()) as both:
        await both.taker.pull(_complete(both, "warm"), {}, 5)
        before = open_files()
        for turn in range(20):
            other = Pair(turn, ["tcp"])
            ticket = _complete(both, f"r{turn}")
            pull = asyncio.create_task(other.taker.pull(ticket, {}, 5))
            if turn % 2:
                await asyncio.sleep(both.random.random() * 0.003)
                pull.cancel()
            await asyncio.gather(pull, return_exceptions=True)
            await other.taker.close()
        for _ in range(200):
            await asyncio.sleep(0.05)
            if open_files() == before:
                break
        assert open_files() == before


async def test_givers_that_come_and_go_leave_no_descriptor_and_no_task_with_the_taker():
    async with pair(fresh_seed()) as both:
        counts = []
        for turn in range(4):
            other = Pair(turn, ["tcp"], incarnation=f"incarnation-{turn}")
            await other.giver.start("127.0.0.1", 0)
            ticket, spans = other.ticket("r"), other.spans(full=8)
            other.giver.offer("r", spans)
            other.giver.complete("r")
            await both.taker.pull(ticket, {"full": dict(enumerate(range(8)))}, 5)
            counts.append((open_files(), len(asyncio.all_tasks())))
            await other.close()
            await asyncio.sleep(0.05)
        assert counts[-1] == counts[1]


@pytest.mark.parametrize("connected", [True, False])
async def test_closing_the_taker_fails_what_is_under_way(connected):
    async with pair(fresh_seed()) as both:
        pull = asyncio.create_task(both.taker.pull(both.ticket("r"), {}, 60))
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            while connected and not both.giver._leases.get("r").watchers:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await both.taker.close()
        with pytest.raises(TransferError) as error:
            await pull
        assert error.value.reason == "truncated"


def _complete(both: Pair, name: str):
    ticket = both.ticket(name)
    both.giver.complete(name)
    return ticket
