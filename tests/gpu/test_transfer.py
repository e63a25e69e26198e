"""Hand-over between regions in device memory: their bytes, their checksums, their damage."""

import asyncio

import pytest
import torch
from fresh_seed import fresh_seed
from transfer_peers import pair

from tasuki_kernels.checksum import row_checksums
from tasuki_transfer.base import TransferError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]
BACKENDS = ["tcp", pytest.param("nixl", marks=pytest.mark.nixl)]


def test_the_device_gives_the_cpus_checksums():
    generator = torch.Generator().manual_seed(fresh_seed())
    for row_bytes in (8, 8184, 131072, 3 << 20):
        rows = torch.randint(0, 256, (9, row_bytes), dtype=torch.uint8, generator=generator)
        chosen = [8, 0, 3, 3, 5]
        assert row_checksums(rows.cuda(), chosen) == row_checksums(rows, chosen)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_wanted_rows_hold_the_givers_bytes_and_no_other_row_changes(backend):
    async with pair(fresh_seed(), [backend], device="cuda") as both:
        ticket = both.ticket("r")
        spans = both.spans(full=60, window=8, state=2)
        wanted = both.want(spans, 0.7)
        both.giver.offer("r", spans)
        both.giver.complete("r")
        pulled = await both.taker.pull(ticket, wanted, 30)
        assert pulled.backend == backend
        torch.cuda.synchronize()
        both.assert_moved(spans, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_bit_flipped_after_the_offer_is_found(backend):
    async with pair(fresh_seed(), [backend], device="cuda") as both:
        ticket = both.ticket("r")
        spans = both.spans(full=20, state=1)
        both.giver.offer("r", spans)
        both.giver.complete("r")
        await asyncio.sleep(1.0)
        span = both.random.choice(spans)
        at = both.random.randrange(both.source[span.pool].shape[1])
        both.source[span.pool][span.index, at] ^= 1 << both.random.randrange(8)
        torch.cuda.synchronize()
        with pytest.raises(TransferError) as error:
            await both.taker.pull(ticket, both.want(spans), 30)
        assert error.value.reason == "checksum"
