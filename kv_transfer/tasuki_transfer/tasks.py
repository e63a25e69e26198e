"""Waiting such that nothing is left running behind: not by a cancellation, not by a failure."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def to_the_end(future: asyncio.Future[T], on_cancel: Callable[[], None] | None = None) -> T:
    """The future's result; a cancellation calls `on_cancel` and is raised once the future is done.

    So the caller may reuse what the future wrote to.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            if on_cancel is not None:
                on_cancel()
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # retrieved: the cancellation goes first
        raise cancelled
    return future.result()


async def in_thread(
    executor: Executor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """`function`'s result from a thread, see `to_the_end`; it must be short."""
    loop = asyncio.get_running_loop()
    return await to_the_end(loop.run_in_executor(executor, lambda: function(*args, **kwargs)))


async def all_of(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all together; at the first failure cancel and await the others, then raise it."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
