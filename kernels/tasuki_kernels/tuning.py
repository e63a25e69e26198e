"""Kernel choices that were measured once: a table per device ships with the package.

A table is JSON, kernel -> key -> choice; a table of the same form on disk goes before the shipped
one. `benchmarks/tune_kernels.py` writes tables; nothing is ever tuned at start or in service.
"""

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

Choice = Mapping[str, int]
"""Values of a kernel's constants by name."""

Table = Mapping[str, Mapping[str, Choice]]

_SHIPPED = Path(__file__).parent / "tuned"


def choice(device: torch.device, kernel: str, *key: int | str) -> Choice | None:
    """What was measured best for `kernel` at `key` on this device; None where nothing was.

    Raises:
        ValueError: when a table on disk is not one that `benchmarks/tune_kernels.py` wrote.
    """
    name = "/".join(str(part) for part in key)
    for table in tables(_device_name(device)):
        found = table.get(kernel, {}).get(name)
        if found is not None:
            return found
    return None


@functools.cache
def tables(device_name: str) -> tuple[Table, ...]:
    """The tables for a device, the user's own first; read once."""
    file = re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"
    return tuple(_read(folder / file) for folder in (cache_folder(), _SHIPPED))


def cache_folder() -> Path:
    """Where a user's own tables lie."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tasuki" / "tuned"


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _read(path: Path) -> Table:
    if not path.exists():
        return {}
    try:
        table: Table = json.loads(path.read_bytes())
        well_formed = all(
            isinstance(value, int)
            for choices in table.values()
            for found in choices.values()
            for value in found.values()
        )
    except (json.JSONDecodeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise ValueError(f"{path} is no table of kernel choices; delete it, or tune again.")
    return table
