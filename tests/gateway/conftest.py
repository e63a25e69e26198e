"""A gateway between a client and fake pods, all real processes."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_pods
import httpx
import pytest
from redis_server import free_port


class Stack:
    """One gateway, its pods, and a client to it."""

    def __init__(self, folder: Path, prefill: int, decode: int, arguments: tuple[str, ...]) -> None:
        self.log = folder / "gateway.log"
        self.prefill = [fake_pods.Process("prefill", f"prefill-{i}") for i in range(prefill)]
        self.decode = [fake_pods.Process("decode", f"decode-{i}") for i in range(decode)]
        seeds = ",".join(pod.url for pod in self.pods)
        self.gateway = fake_pods.GatewayProcess(
            "--seeds", seeds, *arguments, port=free_port(), log=self.log
        )
        self.url = self.gateway.url
        self.client = httpx.Client(base_url=self.url, timeout=30)
        self.gateway.wait_ready()

    @property
    def pods(self) -> list[fake_pods.Process]:
        """All of them."""
        return [*self.prefill, *self.decode]

    def fault(self, **what: object) -> None:
        """The same fault for every decode pod; nothing: none."""
        for pod in self.decode:
            pod.fault(**what)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def stop(self) -> None:
        """Ends all."""
        self.client.close()
        self.gateway.stop()
        for pod in self.pods:
            pod.stop()


Starter = Callable[..., Stack]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts stacks that end with the module."""
    with contextlib.ExitStack() as stack:

        def starter(*arguments: str, prefill: int = 1, decode: int = 2) -> Stack:
            folder = tmp_path_factory.mktemp("gateway")
            started = Stack(folder, prefill, decode, arguments)
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
