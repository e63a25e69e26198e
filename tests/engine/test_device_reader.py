"""Weights read piece by piece are byte for byte those of the file (here into host memory)."""

import random
from pathlib import Path

import pytest
import torch
from fresh_seed import fresh_seed
from safetensors.torch import save_file

from tasuki_common.errors import ConfigError
from tasuki_engine.device_reader import Reader, entries

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    rng = random.Random(fresh_seed())
    shapes = [(), (1,), (0, 4), (7, 9), (64, 64), (3, 5, 11), (1000,)]
    return {
        str(i): torch.randint(0, 2, shape, dtype=torch.int64).to(rng.choice(DTYPES))
        for i, shape in enumerate(shapes * 4)
    }


@pytest.mark.parametrize("piece", [1, 100, 4096, 1 << 20])
def test_pieces_of_any_size_make_the_same_tensors(
    tmp_path: Path, tensors: dict[str, torch.Tensor], piece: int
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    found = Reader(torch.device("cpu"), piece).read(file, entries(file))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_file_cut_short_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    whole = entries(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="within a tensor"):
        Reader(torch.device("cpu")).read(file, whole)
