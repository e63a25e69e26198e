"""Waiting for threads and for several coroutines such that nothing is left running behind."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(
    executor: Executor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """`function`'s result from a thread; a cancellation is delivered only once the thread is done.

    So the caller may reuse what the thread wrote to. `function` must be short.
    """
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(executor, lambda: function(*args, **kwargs))
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()
        raise cancelled
    return future.result()


async def all_of(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all together; at the first failure cancel and await the others, then raise it."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
