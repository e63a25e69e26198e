"""`tasuki up` measured from outside: start, memory, and time to first token by way.

    python benchmarks/relay.py [--starts 3] [--repeats 30] [--json FILE] [--plot FILE]

Ways, each with prompts never seen before, taking turns so that the machine's load falls on all:
    relay       client → gateway → prefill pod → decode pod
    one pod     client → decode pod, which computes the prompt itself
    gateway     client → gateway → decode pod, which computes the prompt itself
and a repeated long prompt (`hit`) beside a fresh one (`miss`) through the relay.
"""

import argparse
import contextlib
import datetime
import http.client
import json
import os
import platform
import random
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from tasuki_common.frames import Decoder
from tasuki_common.messages import GenerateRequest
from tasuki_common.sampling import SamplingParams
from tasuki_common.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
FILE = ROOT / "examples" / "demo.yaml"
MODEL = ROOT / "examples" / "models" / "demo"
SHORT, LONG = 200, 1500
START_SECONDS = 120.0
PAUSE = 0.15
"""Between requests: what a pod caches is in the index then."""


class Up:
    """A running `tasuki up`."""

    def __init__(self) -> None:
        started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tasuki_cli", "up", str(FILE), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("ready "):
            raise RuntimeError(f"tasuki up did not become ready; run `tasuki up {FILE}`.")
        self.seconds = time.monotonic() - started
        self.gateway = line.split()[1].removeprefix("http://").removesuffix("/v1")

    def processes(self) -> dict[str, psutil.Process]:
        """What runs under it, by name; an engine beside its pod."""
        found = {"tasuki up": psutil.Process(self._process.pid)}
        for child in found["tasuki up"].children():
            arguments = child.cmdline()
            verbs = [verb for verb in ("prefill", "decode", "gateway") if verb in arguments]
            name = verbs[0] if verbs else "redis"
            found[name] = child
            for engine in child.children():
                found[f"{name}, engine"] = engine
        return found

    def flag(self, process: str, name: str) -> str:
        """The value of a flag that a process was started with."""
        arguments = self.processes()[process].cmdline()
        return arguments[arguments.index(name) + 1]

    def stop(self) -> None:
        """Ctrl-C, and waits until all are gone."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def local_gateway(up: Up) -> Iterator[str]:
    """A second gateway over the same pods that never hands a prompt over."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tasuki_cli", "gateway", "--port", str(port)]
    command += ["--seeds", up.flag("gateway", "--seeds"), "--prefill-threshold", "1000000"]
    command += ["--redis-url", up.flag("gateway", "--redis-url")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"http://127.0.0.1:{port}/ready"):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError("the second gateway did not become ready.")
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
        process.terminate()
        process.wait(START_SECONDS)


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class Prompts:
    """English of exactly so many tokens, never the same twice."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_folder(MODEL)
        self._words = (ROOT / "README.md").read_text().split()
        self._random = random.Random()

    def fresh(self, length: int) -> str:
        """A text of `length` tokens."""
        text = " ".join(self._random.choices(self._words, k=length // 2))
        while (missing := length - len(self.tokenizer.encode(text))) != 0:
            words = text.split(" ")
            cut = words[: -max(1, -missing // 2)] if missing < 0 else words
            text = " ".join([*cut, self._random.choice(self._words)])
        return text


def through_gateway(connection: http.client.HTTPConnection, prompt: str) -> float:
    """Seconds to the first token of a streamed completion."""
    body = {"model": "demo", "prompt": prompt, "stream": True, "max_tokens": 4, "temperature": 0}
    started = time.perf_counter()
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
    )
    response = connection.getresponse()
    line = response.readline()
    seconds = time.perf_counter() - started
    if response.status != 200 or b'"text"' not in line:
        raise RuntimeError(f"{response.status}: {line.decode()}")
    response.read()
    return seconds


def from_pod(connection: http.client.HTTPConnection, tokens: list[int]) -> float:
    """The same from a decode pod, asked as a gateway asks it, without a ticket."""
    request = GenerateRequest(
        request_id=secrets.token_hex(8),
        model="demo",
        endpoint="completion",
        response_id="cmpl",
        created=0,
        prompt_token_ids=tokens,
        sampling=SamplingParams(temperature=0.0, max_tokens=4, seed=0),
    )
    started = time.perf_counter()
    connection.request("POST", "/generate", msgspec.msgpack.encode(request))
    response = connection.getresponse()
    decoder = Decoder()
    while not any(frame.tokens for frame in decoder.feed(response.read1())):
        if response.status != 200 or response.isclosed():
            raise RuntimeError(f"the decode pod answered {response.status} and no token.")
    seconds = time.perf_counter() - started
    response.read()
    return seconds


def time_to_first_token(up: Up, repeats: int) -> dict[str, list[float]]:
    """Seconds by way; the first round warms up and does not count."""
    prompts = Prompts()
    pod = up.flag("gateway", "--seeds").split(",")[1].removeprefix("http://")
    found: dict[str, list[float]] = {}
    with local_gateway(up) as second, contextlib.ExitStack() as stack:

        def connect(address: str) -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection(address, timeout=60)
            stack.callback(connection.close)
            return connection

        def note(way: str, seconds: float) -> None:
            found.setdefault(way, []).append(seconds)
            time.sleep(PAUSE)

        for _ in range(repeats + 1):
            relay, local, direct = connect(up.gateway), connect(second), connect(pod)
            for length in (SHORT, LONG):
                ids = prompts.tokenizer.encode(prompts.fresh(length))
                note(f"relay, {length}", through_gateway(relay, prompts.fresh(length)))
                note(f"one pod, {length}", from_pod(direct, ids))
                note(f"gateway, {length}", through_gateway(local, prompts.fresh(length)))
            prompt = prompts.fresh(LONG)
            note("miss", through_gateway(relay, prompt))
            note("hit", through_gateway(relay, prompt))
    return {name: values[1:] for name, values in found.items()}


def ms(seconds: list[float]) -> dict[str, float]:
    """Median and 90th percentile in milliseconds."""
    ordered = sorted(seconds)
    return {
        "median": 1000 * statistics.median(ordered),
        "p90": 1000 * ordered[int(0.9 * (len(ordered) - 1))],
    }


def memory(up: Up) -> dict[str, dict[str, float]]:
    """Resident and unshared memory of each process in MiB."""
    return {
        name: {"rss": info.rss / (1 << 20), "uss": info.uss / (1 << 20)}
        for name, process in up.processes().items()
        for info in [process.memory_full_info()]
    }


def measure(starts: int, repeats: int) -> dict[str, Any]:
    """All results."""
    seconds = []
    for number in range(starts):
        up = Up()
        try:
            seconds.append(up.seconds)
            if number == starts - 1:
                first_tokens = time_to_first_token(up, repeats)
                resident = memory(up)
        finally:
            up.stop()
    return {"start": seconds, "memory": resident, "first_token": first_tokens}


def table(results: dict[str, Any]) -> str:
    """What was found beside its goals, for people."""
    first, resident = results["first_token"], results["memory"]
    medians = {name: ms(values)["median"] for name, values in first.items()}
    rows = [("", "found", "goal")]
    rows.append(("seconds to ready, median", f"{statistics.median(results['start']):.1f}", "15"))
    rows += [
        (f"MiB resident (unshared), {name}", f"{one['rss']:.0f} ({one['uss']:.0f})", _room(name))
        for name, one in resident.items()
    ]
    for name, values in first.items():
        goal = "500" if name == f"relay, {SHORT}" else ""
        both = ms(values)
        rows.append(
            (
                f"first token, {name}: ms, median (p90)",
                f"{both['median']:.1f} ({both['p90']:.1f})",
                goal,
            )
        )
    for length, goal in ((SHORT, "1.3"), (LONG, "")):
        ratio = medians[f"relay, {length}"] / medians[f"one pod, {length}"]
        rows.append((f"relay / one pod, {length} tokens", f"{ratio:.2f}", goal))
    rows.append(("hit / miss, 1500 tokens", f"{medians['hit'] / medians['miss']:.2f}", ""))
    return "\n".join(f"{name:<46}{found:>16}{goal:>8}" for name, found, goal in rows)


def _room(name: str) -> str:
    if name == "gateway":
        return "150"
    return "800" if name.startswith(("prefill", "decode")) else ""


def plot(results: dict[str, Any], path: Path) -> None:
    """Each time to first token as a dot, medians as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = results["first_token"]
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    names = list(first)
    for place, name in enumerate(names):
        values = [1000 * value for value in first[name]]
        axes.scatter(values, [place] * len(values), s=10, alpha=0.4, linewidths=0)
        axes.plot([statistics.median(values)] * 2, [place - 0.35, place + 0.35], color="black")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time to first token, ms (bar: median)")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="writes the results here")
    parser.add_argument("--plot", type=Path, help="writes a PNG here")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    results = measure(options.starts, options.repeats)
    print(
        f"examples/demo.yaml, {os.cpu_count()} cores, load before {load:.1f}, after "
        f"{os.getloadavg()[0]:.1f}, {datetime.date.today()}, Python {platform.python_version()}; "
        f"{options.starts} starts, {options.repeats} fresh prompts a way\n"
    )
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    sys.exit(main())
