"""A gateway between a client and fake pods, all real processes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_pods
import httpx
from redis_server import free_port


class Stack:
    """One gateway, its pods, and a client to it."""

    def __init__(
        self,
        folder: Path,
        prefill: int,
        decode: int,
        arguments: tuple[str, ...],
        redis_url: str | None = None,
        pod_arguments: tuple[str, ...] = (),
    ) -> None:
        """Without `redis_url` the gateway learns of its pods by asking them."""
        self.log = folder / "gateway.log"
        index = ("--redis-url", redis_url) if redis_url else ()
        common = (*index, *pod_arguments)
        self.prefill = [
            fake_pods.Process("prefill", f"prefill-{i}", *common, port=free_port())
            for i in range(prefill)
        ]
        self.decode = [
            fake_pods.Process("decode", f"decode-{i}", *common, port=free_port())
            for i in range(decode)
        ]
        found = index or ("--seeds", ",".join(pod.url for pod in self.pods))
        self.gateway = fake_pods.GatewayProcess(*found, *arguments, port=free_port(), log=self.log)
        self.url = self.gateway.url
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self.gateway.wait_ready()

    @property
    def pods(self) -> list[fake_pods.Process]:
        """All of them."""
        return [*self.prefill, *self.decode]

    def stream_while(self, happens: Callable[[], None], body: dict[str, Any]) -> str:
        """All of a streamed completion; `happens` is called once it has begun."""
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            parts = answer.iter_text()
            begun = next(parts)
            happens()
            return begun + "".join(parts)

    def fault(self, **what: object) -> None:
        """The same fault for every decode pod; nothing: none."""
        for pod in self.decode:
            pod.fault(**what)

    def wait_idle(self, seconds: float = 30.0) -> None:
        """Until no decode pod works any more."""
        deadline = time.monotonic() + seconds
        while any(pod.call("/seen")["running"] for pod in self.decode):
            assert time.monotonic() < deadline, "a pod still computes for nobody"
            time.sleep(0.02)

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
