"""Programs that are no Python package: found, else installed where possible, else a skip."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import cache, needs
from cluster.commands import CommandError


def run(*command: str | Path, timeout: float = 60) -> str:
    """The command's output; a failing command fails the test with what it said."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


@functools.cache
def debian(program: str, package: str) -> str:
    """Path of a program of a Debian package; skips the test where there is no way to it."""
    with cache.locked("packages"):
        if found := shutil.which(program):
            return found
        try:
            needs.install([package])
        except CommandError as error:
            pytest.skip(f"{program} is not on PATH: {error}")
    found = shutil.which(program)
    assert found is not None, f"{package} has no {program}"
    return found


@functools.cache
def kubectl() -> str:
    """Path of kubectl: from PATH, else the one that the cluster tests built."""
    cache = os.environ.get("TASUKI_CLUSTER_CACHE", "~/.cache/tasuki-cluster")
    built = sorted(Path(cache).expanduser().glob("bin/**/kubectl"))
    found = shutil.which("kubectl") or (str(built[-1]) if built else None)
    if found is None:
        pytest.skip("kubectl is neither on PATH nor built by the cluster tests")
    return found
