"""Ports given to servers of tests, by test processes that run beside each other."""

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

SUPPORT = Path(__file__).parents[1] / "support"
DRAW = "import redis_server as r; print(*(r.free_port() for _ in range(300)), flush=True); input()"


def test_no_port_is_given_out_twice_while_its_taker_lives() -> None:
    draw = [sys.executable, "-c", DRAW]
    ports: list[str] = []
    with (
        subprocess.Popen(draw, cwd=SUPPORT, stdin=PIPE, stdout=PIPE, text=True) as first,
        subprocess.Popen(draw, cwd=SUPPORT, stdin=PIPE, stdout=PIPE, text=True) as second,
    ):
        for process in (first, second):
            assert process.stdout is not None
            ports += process.stdout.readline().split()
        for process in (first, second):
            process.communicate("\n")
    assert len(ports) == len(set(ports)) == 600
