"""Checkpoints load in old and new spellings, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fresh_seed
import paged
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from tasuki_common.errors import ConfigError
from tasuki_engine import hub, loader, models
from tasuki_engine.config import EngineConfig
from tasuki_engine.model_config import ModelConfig

TOKENS = list(range(5, 60))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def seed() -> int:
    return fresh_seed.fresh_seed()


@pytest.fixture
def copy(base, seed, tmp_path):
    """A checkpoint of the family that the test may change."""

    def make(family: str) -> Path:
        return Path(shutil.copytree(tiny_models.make(family, base, seed), tmp_path / family))

    return make


def load(folder: Path, **fields):
    return models.load(EngineConfig(model=str(folder), **fields))


def logprobs(folder: Path, **fields) -> torch.Tensor:
    harness = paged.PagedModel(load(folder, **fields), seed=1)
    return harness.logprobs([paged.Chunk(harness.new_sequence(), TOKENS)])[0]


def edit_config(folder: Path, removed: tuple[str, ...] = (), **added) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_bytes())
    for name in removed:
        del fields[name]
    path.write_text(json.dumps(fields | added))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_llamas_old_rope_and_dtype_fields_mean_the_same(copy):
    folder = copy("llama")
    expected = logprobs(folder)
    rope = json.loads((folder / "config.json").read_bytes())["rope_parameters"]
    theta = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    edit_config(
        folder,
        ("rope_parameters", "dtype"),
        rope_theta=theta,
        rope_scaling=rope,
        torch_dtype="float32",
    )
    assert torch.equal(logprobs(folder), expected)


def test_granites_old_layer_types_and_infinity_mean_the_same(copy):
    folder = copy("granite_hybrid")
    expected = logprobs(folder)
    fields = json.loads((folder / "config.json").read_bytes())
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    types = [names.get(name, name) for name in fields["layer_types"]]
    assert "mamba" in types
    edit_config(
        folder,
        ("layer_types",),
        layers_block_type=types,
        time_step_limit=[0.0, float("inf")],
    )
    assert "Infinity]" in (folder / "config.json").read_text()
    assert torch.equal(logprobs(folder), expected)


def test_nemotrons_pattern_means_the_same_as_its_list(copy):
    folder = copy("nemotron_h")
    expected = logprobs(folder)
    edit_config(folder, ("layers_block_type",), hybrid_override_pattern="M-M*-M")
    assert torch.equal(logprobs(folder), expected)


def test_a_window_without_layer_types_starts_at_max_window_layers(copy):
    folder = copy("qwen2")
    edit_config(
        folder, ("layer_types",), use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    spec = load(folder).cache_spec
    assert spec.full is not None
    assert spec.window is not None
    assert (spec.full.num_layers, spec.window.num_layers, spec.window.window) == (1, 3, 8)


def test_shards_load_like_one_file(copy):
    folder = copy("granite_hybrid_moe")
    expected = logprobs(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, start in enumerate(range(0, len(names), 20)):
        shard = f"model-{number}.safetensors"
        part = names[start : start + 20]
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logprobs(folder), expected)
    (folder / "model-0.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks model-0\.safetensors"):
        load(folder)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_bfloat16_runs_and_stays_near_float32(copy, family):
    folder = copy(family)
    expected = logprobs(folder)
    actual = logprobs(folder, dtype="bfloat16")
    assert actual.dtype == torch.float32
    assert torch.isfinite(actual).all()
    bound = 0.4 if family.endswith("moe") else 0.2  # rounding sends some tokens to other experts
    assert (actual - expected).abs().mean() < bound


def test_weights_stored_in_bfloat16_are_computed_in_float32_on_the_cpu(copy):
    folder = copy("qwen3")

    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    edit_weights(folder, halve)
    edit_config(folder, dtype="bfloat16")
    model = load(folder)
    assert model.dtype == torch.float32
    reference = tiny_models.reference_logprobs(folder, TOKENS)
    torch.testing.assert_close(logprobs(folder), reference, rtol=0, atol=1e-4)


def test_a_missing_weight_is_named(copy):
    folder = copy("qwen3")
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(
        ConfigError, match=r"no weight named model\.layers\.2\.mlp\.up_proj\.weight"
    ):
        load(folder)


def test_an_unexpected_weight_is_named(copy):
    folder = copy("qwen3")
    edit_weights(folder, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    with pytest.raises(ConfigError, match=r"does not know, among them model\.extra\.weight"):
        load(folder)


def test_an_unknown_architecture_is_refused_with_the_known_ones(copy):
    folder = copy("qwen3")
    edit_config(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(ConfigError, match="MambaForCausalLM, which is not known") as caught:
        load(folder)
    for known in models.ARCHITECTURES:
        assert known in str(caught.value)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ("nemotron_h", {"layers_block_type": ["moe"] * 6}, "layer 0 is of type moe"),
        ("granite_hybrid", {"layer_types": ["conv"] * 5}, "layer types .'conv'."),
        ("qwen3", {"hidden_size": None}, "lacks hidden_size|no weight"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(copy, family, fields, message):
    folder = copy(family)
    if fields.get("hidden_size", 0) is None:
        edit_config(folder, ("hidden_size", "head_dim"))
    else:
        edit_config(folder, **fields)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_folders_that_hold_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        load(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ConfigError, match="is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8})
    )
    with pytest.raises(ConfigError, match="no safetensors files"):
        load(tmp_path)


def test_a_context_longer_than_the_models_is_refused(copy):
    with pytest.raises(ConfigError, match=r"max_model_len is 4096; .* at most 2048"):
        load(copy("qwen3"), max_model_len=4096)
    assert load(copy("qwen2"), max_model_len=100).max_model_len == 100


def test_end_tokens_are_the_tokenizers_and_those_of_the_configurations(copy):
    folder = copy("qwen3")
    assert load(folder).eos_token_ids == (0, 2)
    (folder / "generation_config.json").unlink()
    assert load(folder).eos_token_ids == (0,)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": tiny_models.SPECIAL_TOKENS[1]}))
    assert load(folder).eos_token_ids == (1, 0)


def test_the_revision_tells_contents_apart_and_not_places(copy, tmp_path):
    folder = copy("qwen3")
    first = loader.content_revision(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert loader.content_revision(moved) == first
    edit_weights(moved, lambda tensors: tensors["model.norm.weight"].add_(1.0))
    second = loader.content_revision(moved)
    edit_config(folder, rope_theta=1.0)
    assert len({first, second, loader.content_revision(folder)}) == 3


def test_a_model_name_is_a_folder_or_a_file_url(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path.resolve()
    assert hub.resolve(f"file://{tmp_path}") == tmp_path.resolve()
    for absent in ("file:///absent/folder", "no-such-model", "./a/b", "/absent"):
        with pytest.raises(ConfigError, match="there is no folder"):
            hub.resolve(absent)


@pytest.mark.parametrize("name", ["hf://org/name", "org/name", "hf://not a name"])
def test_a_model_that_the_hub_does_not_give_is_refused(name, tmp_path):
    code = f"""
from tasuki_common.errors import ConfigError
from tasuki_engine import hub
try:
    hub.resolve({name!r})
except ConfigError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "which the Hub did not give: " in done.stdout, done.stderr


def test_null_and_missing_fields_are_the_same():
    config = ModelConfig({"a": None}, "config.json")
    assert config.get("a", 3) == config.get("b", 3) == 3
    with pytest.raises(ConfigError, match=r"config\.json lacks a"):
        config.get("a")
