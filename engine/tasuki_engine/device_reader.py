"""Tensors of a safetensors file straight to a device, through pinned buffers.

Two buffers take turns: one is filled from the file while the other is on its way. A thread reads at
the rate of one core's copies; several threads, each with a reader, reach the bus's.
"""

import dataclasses
import json
import os
import struct
from pathlib import Path

import torch

from tasuki_common.errors import ConfigError

_PIECE_BYTES = 32 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file: bytes `begin` to `end`."""

    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


def entries(file: Path) -> dict[str, Entry]:
    """All tensors of a file by name.

    Raises:
        ConfigError: a tensor's type is not known.
    """
    with file.open("rb") as opened:
        size = struct.unpack("<Q", opened.read(8))[0]
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys())
    if unknown:
        raise ConfigError(f"{file} has tensors of types {', '.join(unknown)}, which are not read.")
    start = 8 + size
    return {
        name: Entry(
            _DTYPES[entry["dtype"]],
            entry["shape"],
            *(start + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
    }


class Reader:
    """One thread's buffers and stream."""

    def __init__(self, device: torch.device, piece_bytes: int = _PIECE_BYTES) -> None:
        self._device = device
        on_cuda = device.type == "cuda"
        self._buffers = [
            torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(2)
        ]
        self._stream = torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def read(self, file: Path, chosen: dict[str, Entry]) -> dict[str, torch.Tensor]:
        """The tensors `chosen` of a file; they are complete when this returns.

        Raises:
            ConfigError: the file ends before a tensor does.
        """
        tensors: dict[str, torch.Tensor] = {}
        with file.open("rb", buffering=0) as opened:
            for name, entry in chosen.items():
                target = torch.empty(
                    entry.end - entry.begin, dtype=torch.uint8, device=self._device
                )
                self._fill(opened.fileno(), file, entry.begin, target)
                tensors[name] = target.view(entry.dtype).view(entry.shape)
        if self._stream is not None:
            self._stream.synchronize()
        return tensors

    def _fill(self, descriptor: int, file: Path, begin: int, target: torch.Tensor) -> None:
        done, size = 0, len(target)
        while done < size:
            buffer, sent = self._buffers[self._turn], self._sent[self._turn]
            if sent is not None:
                sent.synchronize()
            wanted = buffer.numpy().data[: size - done]
            count = os.preadv(descriptor, [wanted], begin + done)
            if count == 0:
                raise ConfigError(f"{file} ends at byte {begin + done}, within a tensor.")
            self._send(buffer[:count], target[done : done + count])
            done += count

    def _send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if self._stream is None:
            target.copy_(source)
        else:
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
                self._sent[self._turn] = self._stream.record_event()
        self._turn = 1 - self._turn
