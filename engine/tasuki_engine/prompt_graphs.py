"""CUDA graphs of short prompts, and of the short rests that prefix hits leave to compute.

Such a step has hundreds of small kernels and one sequence: without a graph its time is the host's,
who starts them one by one. Tokens are padded to a multiple of PAD; what depends on lengths is in
the step's plan, which is made anew each time and copied to where the graph reads it. A graph serves
all steps whose plans have one shape. The second step of a shape is captured, in ten milliseconds.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

PAD = 16
MAX_TOKENS = 64
"""Above, the device is busy enough while the host starts the next kernels."""
_MAX_GRAPHS = 32
"""Each keeps what attention needs between its parts: up to 18 MB with 8 KV heads of 128."""


@dataclasses.dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    places: list[torch.Tensor]
    """The plan's tensors that the graph reads."""
    kept: object
    result: torch.Tensor


class PromptGraphs:
    """Graphs by the shape of what they read; the least recently used one goes."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._graphs: OrderedDict[Any, _Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def run(
        self, tokens: int, plan: object, forward: Callable[[Any], torch.Tensor]
    ) -> torch.Tensor:
        """`forward(plan)` of a step with `tokens` tokens; the result stands until the next call.

        plan: dataclasses, sequences, tensors and constants; forward reads the device's memory that
        the plan names, and nothing else that changes from call to call.
        """
        tensors: list[torch.Tensor] = []
        shape = (tokens, _shape(plan, tensors))
        captured = self._graphs.get(shape)
        if captured is None:
            if shape not in self._seen:
                self._seen.add(shape)
                return forward(plan)
            captured = self._capture(plan, tensors, forward)
            self._graphs[shape] = captured
            if len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)
        else:
            self._graphs.move_to_end(shape)
            moved = [
                (place, tensor)
                for place, tensor in zip(captured.places, tensors, strict=True)
                if place.data_ptr() != tensor.data_ptr()
            ]
            for place, tensor in moved:
                place.copy_(tensor)
        captured.graph.replay()
        return captured.result

    def _capture(
        self, plan: object, tensors: list[torch.Tensor], forward: Callable[[Any], torch.Tensor]
    ) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = forward(plan)
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return _Captured(graph, tensors, plan, result)


def _shape(value: object, tensors: list[torch.Tensor]) -> Any:
    """All of a plan but its tensors' content, as something to compare; collects the tensors."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.dtype, tuple(value.shape), value.stride()
    if dataclasses.is_dataclass(value):
        return tuple(
            _shape(getattr(value, field.name), tensors) for field in dataclasses.fields(value)
        )
    if isinstance(value, list | tuple):
        return tuple(_shape(item, tensors) for item in value)
    return value
