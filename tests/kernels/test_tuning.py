"""Choices come from the shipped table, unless the user's own table knows better."""

import json

import pytest
import torch

from tasuki_kernels import tuning

CPU = torch.device("cpu")


@pytest.fixture
def own_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "tasuki" / "tuned"
    folder.mkdir(parents=True)
    tuning.tables.cache_clear()
    yield folder
    tuning.tables.cache_clear()


def test_nothing_measured_is_no_choice(own_tables):
    assert tuning.choice(CPU, "gemm_vector", 1, 2, 3) is None


def test_a_table_on_disk_goes_before_the_shipped_one(own_tables, monkeypatch, tmp_path):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tuning, "_SHIPPED", shipped)
    table = {"gemm_vector": {"1/2/3": {"BLOCK": 1}, "4/5/6": {"BLOCK": 2}}}
    (shipped / "cpu.json").write_text(json.dumps(table))
    (own_tables / "cpu.json").write_text('{"gemm_vector": {"1/2/3": {"BLOCK": 8}}}')
    assert tuning.choice(CPU, "gemm_vector", 1, 2, 3) == {"BLOCK": 8}
    assert tuning.choice(CPU, "gemm_vector", 4, 5, 6) == {"BLOCK": 2}
    assert tuning.choice(CPU, "other", 1, 2, 3) is None


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": 1}', '{"a": {"b": 1}}', '{"a": {"b": {"c": "d"}}}']
)
def test_a_spoiled_table_is_named(own_tables, content):
    (own_tables / "cpu.json").write_text(content)
    with pytest.raises(ValueError, match=r"cpu\.json is no table of kernel choices"):
        tuning.choice(CPU, "gemm_vector", 1)


def test_the_shipped_tables_are_well_formed():
    files = list(tuning._SHIPPED.glob("*.json"))
    assert files
    for file in files:
        assert tuning.tables(file.stem)[1]


def test_the_shipped_pieces_divide_their_products_and_fit_on_a_multiprocessor():
    entries = tuning.tables("NVIDIA H200")[1]["gemm_split"]
    assert entries
    for key, choice in entries.items():
        rows, _, inputs = map(int, key.split("/")[:3])
        part = inputs // choice["SPLIT"]
        assert part * choice["SPLIT"] == inputs, key
        assert part % choice["BLOCK_IN"] == 0, key
        assert choice["PREFETCH"] <= part, key
        stage = 2 * choice["BLOCK_IN"] * (choice["BLOCK_OUT"] + rows)
        assert choice["STAGES"] * stage <= 227 << 10, key
