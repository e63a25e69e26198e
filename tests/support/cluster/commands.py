"""Commands whose failure is an exception with the command and the end of its output."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL = 4000
PAUSE_SECONDS = 5.0


class CommandError(RuntimeError):
    """A command failed or took too long; the message ends with what it printed last."""


def run(
    command: Sequence[object],
    *,
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    tries: int = 1,
) -> str:
    """Standard output of `command`; CommandError when it fails or takes over `timeout` seconds.

    One that downloads gets several `tries`, with pauses, before its failure counts.
    """
    words = [str(word) for word in command]
    for number in range(1, tries + 1):
        try:
            done = subprocess.run(
                words,
                cwd=cwd,
                env=env,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise CommandError(f"`{' '.join(words)}` took over {timeout:.0f} s") from error
        if done.returncode == 0:
            return done.stdout
        if number < tries:
            time.sleep(PAUSE_SECONDS * number)
    said = (done.stdout + done.stderr)[-TAIL:]
    raise CommandError(f"`{' '.join(words)}` ended with {done.returncode}:\n{said}")
