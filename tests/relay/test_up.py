"""`tasuki up` as a user has it: one command, real processes, answers over HTTP.

That streams themselves are right in every fault is tested with pods and gateway.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import tiny_models
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]

READY_SECONDS = 180.0


class Up:
    """A running `tasuki up`, its URL and all processes it ever had."""

    def __init__(self, file: Path, log: Path) -> None:
        self._log = log
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tasuki_cli", "up", str(file), "--port", "0"],
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TASUKI_PATIENCE": "120"},
            )
        self.seen: set[psutil.Process] = set()
        self.url = ""

    def wait_until_ready(self) -> None:
        """Reads the one line of standard output; ends the process when it does not come."""
        assert self.process.stdout is not None
        watchdog = threading.Timer(READY_SECONDS, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        assert re.fullmatch(r"ready http://127\.0\.0\.1:\d+/v1\n", line), self.said()
        self.url = line.split()[1]

    def all_processes(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        found = [root, *root.children(recursive=True)]
        self.seen.update(found)
        return found

    def leader(self, name: str) -> psutil.Process:
        """The HTTP process of the pod `name`."""
        for process in self.all_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in process.cmdline():
                    return process
        raise AssertionError(f"no process of {name}: {self._log.read_text()}")

    def said(self) -> str:
        return self._log.read_text()

    def ask(self) -> str:
        body = {"model": "tiny", "prompt": "The relay hands a prompt " * 4, "temperature": 0}
        answer = httpx.post(f"{self.url}/completions", json={**body, "max_tokens": 8}, timeout=150)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def nothing_left(self) -> bool:
        _, alive = psutil.wait_procs(list(self.seen), timeout=15)
        return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@contextlib.contextmanager
def started(tmp_path: Path, engine: str) -> Iterator[Up]:
    model = tiny_models.make("granite_hybrid", tmp_path, 1)
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "apiVersion: tasuki.dev/v1alpha1\nkind: InferenceDeployment\nmetadata: {name: tiny}\n"
        "spec:\n"
        f"  model: {{source: 'file://./{model.relative_to(tmp_path)}'}}\n"
        f"  gateway: {{prefillThreshold: 0}}\n  engine: {{{engine}}}\n"
    )
    running = Up(file, tmp_path / "up.log")
    try:
        running.wait_until_ready()
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.wait(30)
        assert running.process.stdout is not None
        running.process.stdout.close()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    with started(tmp_path, "numBlocks: 256, numStateSlots: 64") as running:
        yield running


def test_a_killed_decode_pod_comes_back_and_ctrl_c_leaves_nothing(up: Up) -> None:
    first = up.ask()
    killed = up.leader("decode-0")
    killed.kill()
    assert up.ask() == first
    assert "decode-0 ended with SIGKILL" in up.said()
    assert up.leader("decode-0").pid != killed.pid
    up.all_processes()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0, up.said()
    assert up.process.stdout is not None
    assert up.process.stdout.read() == "", "one ready line and nothing more"
    assert up.nothing_left()


def test_a_killed_supervisor_takes_all_its_processes_along(up: Up) -> None:
    assert len(up.all_processes()) >= 7, "up, redis, gateway, two pods and their engines"
    up.process.kill()
    up.process.wait(10)
    assert up.nothing_left()


def test_the_prompt_is_computed_on_one_pod_and_continued_on_the_other(up: Up) -> None:
    deadline = time.monotonic() + 60
    while "role=prefill" not in up.said():  # the gateway looks around once a second
        assert time.monotonic() < deadline
        time.sleep(0.1)
    up.ask()
    urls = dict(re.findall(r"pod_joined pod=(\S+) role=\w+ url=(\S+)", up.said()))
    prefill, decode = (
        httpx.get(f"{urls[name]}/metrics", timeout=60).text for name in ("prefill-0", "decode-0")
    )
    assert counter(prefill, "tasuki_prompt_tokens_computed_total") >= 16
    assert counter(prefill, "tasuki_generated_tokens_total") == 0
    assert counter(decode, "tasuki_generated_tokens_total") == 8
    assert counter(decode, "tasuki_prompt_tokens_computed_total") <= 16 + 8, (
        "no more than the last block"
    )
    assert counter(decode, "tasuki_transfer_bytes_total") > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pods_are_dealt_out_to_the_cards_and_share_their_memory(tmp_path: Path) -> None:
    cards = torch.cuda.device_count()
    with started(tmp_path, "memoryShare: 0.2") as up:
        up.ask()
        chosen = [
            up.leader(name).environ()["CUDA_VISIBLE_DEVICES"] for name in ("prefill-0", "decode-0")
        ]
        said = up.said()
    assert chosen == ["0", str(1 % cards)]
    assert "ended with" not in said
    share = (0.2 if cards > 1 else 0.1) * torch.cuda.get_device_properties(0).total_memory
    budgets = list(map(int, re.findall(r"engine_memory .*\bbudget_bytes=(\d+)", said)))
    assert len(budgets) == 2
    assert all(share / 2 < budget < share for budget in budgets), budgets


def counter(metrics: str, name: str) -> float:
    return sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", metrics, re.MULTILINE)))
