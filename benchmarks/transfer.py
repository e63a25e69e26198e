"""Hand-over rate by transport, beside what this machine's memory and links give in the same run.

    python benchmarks/transfer.py [--repeats 7] [--plot transfer.png]
    python benchmarks/transfer.py --giver cuda:0 --taker cuda:1

Giver and taker are two processes, each with its regions on its device. Every pull is checked byte
by byte before its rate counts. The rate includes subscription, offers, data, checksums over what
landed, and the release; the giver has made its own checksums before, as a prefill does while it
computes the next chunk.
"""

import argparse
import asyncio
import multiprocessing
import secrets
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from tasuki_common.messages import Ticket
from tasuki_kernels.checksum import row_checksums
from tasuki_transfer.base import Backend, Regions
from tasuki_transfer.giver import Giver
from tasuki_transfer.spans import Span
from tasuki_transfer.taker import Taker

MIB = 1 << 20
BACKENDS: tuple[Backend, ...] = ("tcp", "nixl")
TOTAL = 128 * MIB
"""Bytes of one hand-over in host memory, and of a baseline's pass."""
CUDA_TOTAL = 1024 * MIB


class Shape(NamedTuple):
    """A region: spans of one size, half of them moved, in random order on both sides."""

    name: str
    span_bytes: int
    total: int = TOTAL

    @property
    def moved(self) -> int:
        """Spans in one hand-over."""
        return max(1, min(self.total // self.span_bytes, 8192))

    @property
    def rows(self) -> int:
        """Spans in the region."""
        return 2 * self.moved


SHAPES = (
    Shape("4 KiB", 4096),
    Shape("64 KiB", 65536),
    Shape("1 MiB", MIB),
    Shape("57 MiB", 57 * MIB),
)
CUDA_SHAPES = (
    Shape("128 KiB", 128 << 10, CUDA_TOTAL),  # a block of Granite-4.0-H-Micro
    Shape("1.75 MiB", 7 * MIB // 4, CUDA_TOTAL),  # of Qwen3-0.6B
    Shape("76 MiB", 76 * MIB, CUDA_TOTAL),  # a state slot of Granite-4.0-H-Micro, float32
)


def shapes_on(device: torch.device) -> tuple[Shape, ...]:
    """What is moved where."""
    return CUDA_SHAPES if device.type == "cuda" else SHAPES


def regions(seed: int | None, device: torch.device) -> Regions:
    """Random content, equal for equal seeds and kinds of device, or zeros for the taking side."""
    generator = torch.Generator(device).manual_seed(seed or 0)
    made = {}
    for shape in shapes_on(device):
        rows = torch.zeros(shape.rows, shape.span_bytes, dtype=torch.uint8, device=device)
        if seed is not None:
            words = rows.view(torch.int64)
            words.random_(generator=generator)
        made[shape.name] = rows
    return made


def order(seed: int, shape: Shape) -> list[int]:
    """Which rows, in which order."""
    return np.random.default_rng(seed).permutation(shape.rows)[: shape.moved].tolist()


def giver_process(pipe: Connection, seed: int, key: bytes, device: torch.device) -> None:
    """Opens and completes a lease for each (request, shape) that comes in."""

    async def serve() -> None:
        giver = Giver(
            regions=regions(seed, device),
            fingerprint="bench",
            incarnation=secrets.token_hex(4),
            key=key,
            backends=BACKENDS[::-1],
            lease_seconds=60,
            on_end=lambda request_id, outcome: None,
        )
        await giver.start("127.0.0.1", 0)
        while (order_of := await asyncio.to_thread(pipe.recv)) is not None:
            request_id, shape = order_of
            fields = giver.open(request_id, 16)
            rows = order(seed, shape)
            giver.offer(request_id, [Span(shape.name, row, at, 0) for at, row in enumerate(rows)])
            giver.complete(request_id)
            await asyncio.sleep(0.2)  # checksums: the offers of a long prefill are made meanwhile
            pipe.send(fields)
        await giver.close()

    asyncio.run(serve())


async def hand_overs(
    devices: tuple[torch.device, torch.device],
    repeats: int,
    report: Callable[[str, str, list[float]], None],
) -> None:
    """GB/s of each backend and shape, one list per pair; from the first device to the second."""
    seed, key = secrets.randbits(31), secrets.token_bytes(32)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=giver_process, args=(theirs, seed, key, devices[0]))
    child.start()
    # The giver's content once more, where it can be compared with what arrives.
    source, target = regions(seed, devices[1]), regions(None, devices[1])
    for backend in BACKENDS:
        taker = Taker(regions=target, fingerprint="bench", key=key, backends=[backend])
        for shape in shapes_on(devices[1]):
            rows, places = order(seed, shape), order(seed + 1, shape)
            rates = []
            for turn in range(repeats + 1):
                target[shape.name].zero_()
                pipe.send((f"{backend}-{shape.name}-{turn}", shape))
                ticket = Ticket(pod="giver", **await asyncio.to_thread(pipe.recv))
                pulled = await taker.pull(ticket, {shape.name: dict(enumerate(places))}, 60)
                if not torch.equal(target[shape.name][places], source[shape.name][rows]):
                    raise SystemExit(f"{backend} moved wrong bytes: no rate is reported.")
                rates.append(pulled.bytes / pulled.seconds / 1e9)
            report(backend, shape.name, rates[1:])
        await taker.close()
    pipe.send(None)
    child.join()


def memcpy(repeats: int) -> list[float]:
    """GB/s of one thread copying memory that is in no cache of its own."""
    source, target = np.ones(TOTAL, np.uint8), np.zeros(TOTAL, np.uint8)
    return [TOTAL / _timed(lambda: np.copyto(target, source)) / 1e9 for _ in range(repeats)]


def checksum(repeats: int) -> list[float]:
    """GB/s of one thread's xxh3."""
    source = np.ones(TOTAL, np.uint8)
    return [TOTAL / _timed(lambda: xxhash.xxh3_64_intdigest(source)) / 1e9 for _ in range(repeats)]


def device_copy(devices: tuple[torch.device, torch.device], repeats: int) -> dict[str, list[float]]:
    """GB/s of one large copy from device to device, and of the checksum kernel on the second."""
    torch.cuda.set_device(devices[1])
    source = torch.ones(CUDA_TOTAL, dtype=torch.uint8, device=devices[0])
    target = torch.zeros(CUDA_TOTAL, dtype=torch.uint8, device=devices[1])
    rows = target.view(-1, MIB)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize(devices[1])

    def sums() -> None:
        row_checksums(rows, range(len(rows)))

    copy()  # the first opens the way between the devices, and compiles the kernel
    sums()
    return {
        "copy": [CUDA_TOTAL / _timed(copy) / 1e9 for _ in range(repeats)],
        "mix64": [CUDA_TOTAL / _timed(sums) / 1e9 for _ in range(repeats)],
    }


def _send_raw(port: int, repeats: int) -> None:
    data = memoryview(np.ones(TOTAL, np.uint8)).cast("B")
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for _ in range(repeats):
            sock.sendall(data)
            sock.recv(1)


def loopback(repeats: int) -> list[float]:
    """GB/s of one blocking socket between two processes, without checksums or scatter."""
    buffer = memoryview(np.zeros(TOTAL, np.uint8)).cast("B")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        child = multiprocessing.get_context("spawn").Process(
            target=_send_raw, args=(port, repeats + 1)
        )
        child.start()
        sock, _ = server.accept()
        with sock:
            rates = [
                TOTAL / _timed(lambda: _receive(sock, buffer)) / 1e9 for _ in range(repeats + 1)
            ]
        child.join()
    return rates[1:]


def _receive(sock: socket.socket, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        done += sock.recv_into(buffer[done:])
    sock.send(b".")


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def plot(path: str, results: dict[tuple[str, str], float]) -> None:
    """Bars by span size, with the machine's own rates as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, backend in enumerate(BACKENDS):
        at = np.arange(len(SHAPES)) + 0.4 * number - 0.2
        axes.bar(at, [results[backend, shape.name] for shape in SHAPES], 0.38, label=backend)
    for style, name in (("-", "memcpy"), ("--", "loopback"), (":", "xxh3")):
        axes.axhline(results[name, ""], linestyle=style, color="black", linewidth=1, label=name)
    axes.set_xticks(range(len(SHAPES)), [shape.name for shape in SHAPES])
    axes.set(xlabel="span", ylabel="GB/s", title="Hand-over between two processes of one machine")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> int:
    """Print the table; plot it on demand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--giver", type=torch.device, default="cpu", metavar="DEVICE")
    parser.add_argument("--taker", type=torch.device, default="cpu", metavar="DEVICE")
    parser.add_argument("--plot", metavar="PNG")
    arguments = parser.parse_args()
    results: dict[tuple[str, str], float] = {}

    def report(name: str, shape: str, rates: list[float]) -> None:
        results[name, shape] = statistics.median(rates)
        sys.stdout.write(
            f"{name:<10}{shape:<8}{results[name, shape]:8.2f} GB/s   "
            f"{min(rates):6.2f} to {max(rates):.2f}\n"
        )
        sys.stdout.flush()

    devices = torch.device(arguments.giver), torch.device(arguments.taker)
    if devices[0].type != devices[1].type or (arguments.plot and devices[0].type != "cpu"):
        parser.error("both devices are of one kind, and the plot is of host memory")
    if devices[0].type == "cuda":
        for name, rates in device_copy(devices, arguments.repeats).items():
            report(name, "", rates)
    else:
        for baseline in (memcpy, checksum, loopback):
            name = "xxh3" if baseline is checksum else baseline.__name__
            report(name, "", baseline(arguments.repeats))
    asyncio.run(hand_overs(devices, arguments.repeats, report))
    if arguments.plot:
        plot(arguments.plot, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
