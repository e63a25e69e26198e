"""Rows of a region as something sockets can read and write, and their checksums.

Host memory is used in place. CUDA memory goes through pinned host buffers (torch caches them) on a
stream of its own, so that neither side waits for the model's kernels; its checksums are computed
where it lies.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import xxhash

from tasuki_common.errors import ConfigError
from tasuki_kernels.checksum import row_checksums
from tasuki_transfer import wire


class HostRegion:
    """A region in host memory; views are of the pool itself."""

    checksum: wire.Checksum = "xxh3"
    """The kind that costs least here."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.count, self.span_bytes = tensor.shape
        self._bytes = _view(tensor)

    def _row(self, index: int, start: int, stop: int) -> memoryview:
        at = index * self.span_bytes
        return self._bytes[at + start : at + stop]

    def readable(self, indices: Sequence[int], start: int, stop: int) -> list[memoryview]:
        """Bytes start..stop of each row, in order, as few views as neighbours allow."""
        if stop - start < self.span_bytes:
            return [self._row(index, start, stop) for index in indices]
        return [
            self._bytes[first * self.span_bytes : (last + 1) * self.span_bytes]
            for first, last in _runs(indices)
        ]

    def writable(
        self, indices: Sequence[int], start: int, stop: int
    ) -> tuple[list[memoryview], Callable[[], None]]:
        """Where to put the bytes, and what to call once they are there."""
        return self.readable(indices, start, stop), _nothing

    def checksums(self, indices: Sequence[int], kind: wire.Checksum) -> list[int]:
        """Of each whole row."""
        if kind == "mix64":
            return row_checksums(self.tensor, indices)
        digest = xxhash.xxh3_64_intdigest
        return [digest(self._row(index, 0, self.span_bytes)) for index in indices]


class CudaRegion:
    """A region in device memory, staged through pinned buffers.

    Offered rows must be final on the device: the engine has waited for the step that wrote them.
    """

    checksum: wire.Checksum = "mix64"
    """See HostRegion."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.count, self.span_bytes = tensor.shape
        self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]

    def _stage(self, indices: Sequence[int], start: int, stop: int) -> torch.Tensor:
        host = torch.empty(len(indices), stop - start, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._stream):
            for place, (first, last) in _places(indices):
                rows = self.tensor[first : last + 1, start:stop]
                host[place : place + last - first + 1].copy_(rows, non_blocking=True)
        self._stream.synchronize()
        return host

    def readable(self, indices: Sequence[int], start: int, stop: int) -> list[memoryview]:
        """See HostRegion; a copy of the rows as they are now."""
        return [_view(self._stage(indices, start, stop))]

    def writable(
        self, indices: Sequence[int], start: int, stop: int
    ) -> tuple[list[memoryview], Callable[[], None]]:
        """See HostRegion; the call copies to the device and waits for it."""
        host = torch.empty(len(indices), stop - start, dtype=torch.uint8, pin_memory=True)

        def land() -> None:
            with torch.cuda.stream(self._stream):
                for place, (first, last) in _places(indices):
                    rows = host[place : place + last - first + 1]
                    self.tensor[first : last + 1, start:stop].copy_(rows, non_blocking=True)
            self._stream.synchronize()

        return [_view(host)], land

    def checksums(self, indices: Sequence[int], kind: wire.Checksum) -> list[int]:
        """See HostRegion."""
        if kind == "mix64":
            with torch.cuda.stream(self._stream):
                return row_checksums(self.tensor, indices)
        host = self._stage(indices, 0, self.span_bytes)
        return [xxhash.xxh3_64_intdigest(row) for row in host.numpy()]


Region = HostRegion | CudaRegion


def open_region(name: str, tensor: torch.Tensor) -> Region:
    """The region over `tensor`, uint8 [count, span_bytes], contiguous; else ConfigError."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 2 or not tensor.is_contiguous():
        raise ConfigError(
            f"Region {name!r} is {tensor.dtype} {list(tensor.shape)}; it must be contiguous uint8 "
            "[count, span_bytes]."
        )
    return CudaRegion(tensor) if tensor.is_cuda else HostRegion(tensor)


def describe(region: Region) -> wire.Pool:
    """What a taker must know of a region."""
    device = region.tensor.get_device()
    return wire.Pool(region.count, region.span_bytes, region.tensor.data_ptr(), device)


def _view(tensor: torch.Tensor) -> memoryview:
    """The tensor's own memory; it lives as long as the view does."""
    return memoryview(tensor.numpy().reshape(-1).data)


def _nothing() -> None:
    return None


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each stretch of consecutive indices."""
    first = last = indices[0]
    for index in indices[1:]:
        if index != last + 1:
            yield first, last
            first = index
        last = index
    yield first, last


def _places(indices: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Runs with their place in the packed order."""
    place = 0
    for first, last in _runs(indices):
        yield place, (first, last)
        place += last - first + 1
