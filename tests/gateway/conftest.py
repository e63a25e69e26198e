"""Stacks of a gateway and fake pods."""

import contextlib
from collections.abc import Iterator

import pytest
from gateway_stack import Stack, Starter


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts stacks that end with the module."""
    with contextlib.ExitStack() as stack:

        def starter(
            *arguments: str,
            prefill: int = 1,
            decode: int = 2,
            redis_url: str | None = None,
            pod_arguments: tuple[str, ...] = (),
        ) -> Stack:
            folder = tmp_path_factory.mktemp("gateway")
            started = Stack(folder, prefill, decode, arguments, redis_url, pod_arguments)
            stack.callback(started.stop)
            return started

        yield starter


@pytest.fixture(scope="module")
def module_stack(start: Starter) -> Stack:
    """One prefill pod, two decode pods, no index."""
    return start()


@pytest.fixture
def stack(module_stack: Stack) -> Iterator[Stack]:
    """The module's stack without faults."""
    yield module_stack
    for pod in module_stack.pods:
        pod.fault()
