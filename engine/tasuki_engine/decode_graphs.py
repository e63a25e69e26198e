"""CUDA graphs of decode steps, captured when a batch size first comes.

The first step of a size runs as it is, which also loads and warms its kernels, and is captured
while the device computes it, which takes ten milliseconds; from then on it is replayed. All graphs
share one pool of memory: they never run at the same time.
"""

import bisect
from collections.abc import Callable

import torch

from tasuki_common import logs

MAX_SEQUENCES = 256
"""Above, the device is busy for long enough while the host starts the next step, and a mixture of
experts asks the host who chose whom, which no graph can."""

log = logs.get("tasuki.engine")

Decode = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Computes as many decodes as it is told, from fixed places; returns logits and tokens."""


class DecodeGraphs:
    """Graphs by padded batch size."""

    def __init__(self, largest: int) -> None:
        self.largest = min(largest, MAX_SEQUENCES)
        """Decodes that a graph has room for."""
        self._sizes = sizes(self.largest)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def padded(self, count: int) -> int:
        """The size in which `count` decodes run."""
        return self._sizes[bisect.bisect_left(self._sizes, count)]

    def run(self, size: int, decode: Decode) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and greedy tokens of `decode(size)`; they stand until the next call."""
        if size not in self._graphs:
            first = decode(size)
            self._graphs[size] = self._capture(size, decode)
            return first
        graph, logits, tokens = self._graphs[size]
        graph.replay()
        return logits, tokens

    def _capture(
        self, size: int, decode: Decode
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        # Not torch.cuda.graph: it waits for the device and empties the cache of freed memory.
        # Other threads copy and compute meanwhile: only what this one does is captured.
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits, tokens = decode(size)
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        log.debug("graph_captured", sequences=size)
        return graph, logits, tokens


def sizes(largest: int) -> list[int]:
    """Batch sizes up to `largest`, itself included: close together where steps are short."""
    steps = [1, 2, 4, *range(8, 32, 8), *range(32, 128, 16), *range(128, largest, 32)]
    return [size for size in steps if size < largest] + [largest]
