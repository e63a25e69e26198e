"""The folder in which programs and images of test clusters stay between runs."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_SECONDS = 5400.0


def folder() -> Path:
    """`TASUKI_CLUSTER_CACHE`, else `~/.cache/tasuki-cluster`; made when missing."""
    chosen = os.environ.get("TASUKI_CLUSTER_CACHE") or Path.home() / ".cache" / "tasuki-cluster"
    path = Path(chosen).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time is in here, for each `name`; the kernel frees it when it dies."""
    path = folder() / f"{name}.lock"
    deadline = time.monotonic() + LOCK_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is held by another run for too long") from None
                time.sleep(0.2)
        yield
