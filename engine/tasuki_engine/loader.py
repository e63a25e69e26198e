"""Weights from safetensors files: read in parallel, taken by name, none forgotten."""

import contextlib
import hashlib
import json
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

from tasuki_common.errors import ConfigError
from tasuki_engine import device_reader

_THREADS = 8
_SAMPLE_BYTES = 4096

_Read = Callable[[Path, list[str]], dict[str, torch.Tensor]]


class Weights:
    """Tensors of a checkpoint by their names on disk; each is taken once and converted then.

    Raises:
        ConfigError: when a taken name is missing, or `finish` finds names that nobody took.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype, source: str) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._source = source

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor, in `dtype` or the model's."""
        try:
            return self._tensors.pop(name).to(dtype or self._dtype)
        except KeyError:
            raise ConfigError(f"{self._source} has no weight named {name}.") from None

    def take_optional(self, name: str) -> torch.Tensor | None:
        """The tensor, or None where the checkpoint has none (a bias)."""
        return self.take(name) if name in self else None

    def fuse(self, *names: str) -> torch.Tensor:
        """Several tensors joined along their first dimension, as one matrix product wants them."""
        return torch.cat([self.take(name) for name in names]) if names[1:] else self.take(names[0])

    def fuse_optional(self, *names: str) -> torch.Tensor | None:
        """The same for biases; None where the checkpoint has none of them."""
        return self.fuse(*names) if any(name in self for name in names) else None

    def drop(self, *names: str) -> None:
        """Forget weights that are known and not used, where they are there."""
        for name in names:
            self._tensors.pop(name, None)

    def finish(self) -> None:
        """Check that nothing is left over."""
        if self._tensors:
            some = ", ".join(sorted(self._tensors)[:5])
            raise ConfigError(
                f"{self._source} has {len(self._tensors)} weights that its architecture does not "
                f"know, among them {some}."
            )


def load_weights(folder: Path, device: torch.device, dtype: torch.dtype, progress: bool) -> Weights:
    """All tensors of the folder's safetensors files on `device`; `dtype` is what `take` gives.

    Reads with several threads; `progress` shows a bar where standard error is a terminal.
    """
    files = _weight_files(folder)
    names: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names.update(dict.fromkeys(opened.keys(), file))
    batches = _batches(names)
    tensors: dict[str, torch.Tensor] = {}
    read = _reader(files, device)
    with (
        _progress_bar(progress and sys.stderr.isatty(), len(names)) as advance,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for loaded in pool.map(lambda batch: read(batch[0], batch[1]), batches):
            tensors.update(loaded)
            advance(len(loaded))
    return Weights(tensors, dtype, str(folder))


def content_revision(folder: Path) -> str:
    """A name for the checkpoint's content, 32 hex digits.

    sha256 over config.json and, per weight file, its header and the first 4 KiB of every tensor: it
    tells checkpoints of one architecture apart without reading them whole.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in _weight_files(folder):
        with file.open("rb", buffering=0) as opened:
            size = struct.unpack("<Q", opened.read(8))[0]
            header = opened.read(size)
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    length = min(_SAMPLE_BYTES, end - begin)
                    digest.update(os.pread(opened.fileno(), length, 8 + size + begin))
    return digest.hexdigest()[:32]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).exists())
        if missing:
            raise ConfigError(f"{folder} lacks {', '.join(missing)}, which its index names.")
        return [folder / shard for shard in sorted(shards)]
    whole = folder / "model.safetensors"
    if not whole.exists():
        raise ConfigError(f"{folder} has no safetensors files; other formats are not read.")
    return [whole]


def _batches(names: dict[str, Path]) -> list[tuple[Path, list[str]]]:
    """Pieces of work of some tensors each, within one file."""
    per_file: dict[Path, list[str]] = {}
    for name, file in names.items():
        per_file.setdefault(file, []).append(name)
    size = max(1, len(names) // (4 * _THREADS))
    return [
        (file, listed[start : start + size])
        for file, listed in per_file.items()
        for start in range(0, len(listed), size)
    ]


def _reader(files: list[Path], device: torch.device) -> _Read:
    """Mapped memory on the CPU; on CUDA each thread has pinned buffers of its own."""
    if device.type != "cuda":
        return _read_mapped
    tables = {file: device_reader.entries(file) for file in files}
    own = threading.local()

    def read(file: Path, names: list[str]) -> dict[str, torch.Tensor]:
        if not hasattr(own, "reader"):
            own.reader = device_reader.Reader(device)
        loaded: dict[str, torch.Tensor] = own.reader.read(
            file, {name: tables[file][name] for name in names}
        )
        return loaded

    return read


def _read_mapped(file: Path, names: list[str]) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


@contextlib.contextmanager
def _progress_bar(shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading weights", total=total)
        yield lambda count: bar.advance(task, count)
