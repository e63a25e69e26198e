"""GET from servers of this machine, for tests that ask again and again."""

from typing import Any

import httpx


def get(url: str, *, timeout: float = 30.0, **options: Any) -> httpx.Response:
    """The answer. Without TLS: for that httpx loads all certificates anew, 50 ms of CPU a call."""
    return httpx.get(url, timeout=timeout, verify=False, **options)


def metric(url: str, name: str, labels: dict[str, str]) -> float:
    """The sum of those samples of a metric at `url`/metrics that have these labels."""
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in get(f"{url}/metrics").text.splitlines()
        if line.startswith((f"{name}{{", f"{name} "))
        and all(f'{key}="{value}"' in line for key, value in labels.items())
    )
