"""Limits of a request."""

import asyncio

import pytest

from tasuki_gateway.exchange import end_now


async def test_what_ends_already_may_be_told_again_to_end() -> None:
    async def request() -> None:
        async with asyncio.timeout(60) as limit:
            end_now(limit)
            try:
                await asyncio.sleep(60)
            finally:  # not yet reported: a shutdown or the client's leave may come right now
                end_now(limit)

    with pytest.raises(TimeoutError):
        await request()
