"""The pieces between the engine's socket and a request: cutting reports, collecting outputs."""

import asyncio
import itertools
from pathlib import Path

import pytest
import tiny_models
from fresh_seed import fresh_seed
from hypothesis import given, strategies as st

from tasuki_engine.config import EngineConfig
from tasuki_engine.request import EngineRequest, TokenOutput
from tasuki_pod.engine_client import EngineClient, EngineLostError, Mailbox, _Receiver
from tasuki_pod.wire import Admitted, PrefixEnded, Report, Start, Stepped, pack

OUTPUTS = st.builds(
    TokenOutput, request_id=st.text(max_size=5), token_ids=st.lists(st.integers(0, 99), max_size=9)
)
REPORTS = st.lists(
    st.one_of(
        st.builds(Admitted, st.text(max_size=20)),
        st.builds(Stepped, outputs=st.lists(OUTPUTS, max_size=5)),
    ),
    max_size=8,
)


@given(reports=REPORTS, cuts=st.lists(st.integers(0, 500)))
def test_reports_are_the_same_however_the_bytes_are_cut(
    reports: list[Report], cuts: list[int]
) -> None:
    received: list[Report] = []
    receiver = _Receiver(received.append, lambda reason: None)
    data = b"".join(map(pack, reports))
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        receiver.data_received(data[start:end])
    assert received == reports


async def test_a_mailbox_gives_what_came_before_the_loss_and_then_the_loss() -> None:
    mailbox = Mailbox()
    first, second, late = (TokenOutput(request_id="r", token_ids=[i]) for i in range(3))
    taking = asyncio.ensure_future(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(first)
    mailbox.put(second)
    mailbox.fail(EngineLostError("The engine process is gone."))
    mailbox.put(late)
    assert await taking == [first, second]
    with pytest.raises(EngineLostError):
        await mailbox.take()


async def test_a_prefix_that_ended_leaves_nothing_in_the_client(tmp_path: Path) -> None:
    model = tiny_models.make("granite_hybrid", tmp_path, fresh_seed())
    engine = {"num_blocks": 40, "num_state_slots": 6, "cpu_threads": 1}
    ended: asyncio.Queue[PrefixEnded] = asyncio.Queue()
    client = EngineClient(
        on_cache_events=lambda events: None, on_prefix_ended=lambda end: ended.put_nowait(end)
    )
    await client.start(
        Start(
            engine=EngineConfig(model=str(model), **engine),
            role="prefill",
            pod="p",
            deployment="",
            incarnation="i",
            transfer_key=b"k" * 32,
            transfer_backends=("tcp",),
            transfer_host="127.0.0.1",
            transfer_port=0,
            lease_seconds=0.2,
            log_level="warning",
        )
    )
    try:
        await client.ready()
        request = EngineRequest(request_id="r", prompt_token_ids=[5] * 50, hand_over=True)
        await client.admit("r", [request], Mailbox())
        async with asyncio.timeout(10):
            assert await ended.get() == PrefixEnded("r", "expired")
        assert client.open_requests == 0
    finally:
        await client.stop(5.0)
