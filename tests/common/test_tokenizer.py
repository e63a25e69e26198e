"""The tokenizer and what the files beside tokenizer.json say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_tokenizers
from tiny_tokenizers import KINDS, TEXTS, tokenizer
from transformers import PreTrainedTokenizerFast

from tasuki_common import tokenizer as module
from tasuki_common.errors import ConfigError, RequestError
from tasuki_common.tokenizer import Tokenizer


def with_files(**content: object) -> Tokenizer:
    extra = {f"{name}.json": json.dumps(value).encode() for name, value in content.items()}
    return Tokenizer.from_files(tiny_tokenizers.files("byte_level") | extra)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(kind: str) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizers.inner(kind))
    made = tokenizer(kind)
    for text in [*TEXTS, "", " ", "<|start|>user<|end|>"]:
        for special in (True, False):
            ids = made.encode(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert made.decode(ids, skip_special_tokens=skip) == reference.decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )
    assert made.vocab_size == len(reference)


def test_bos_is_what_the_post_processor_adds() -> None:
    made = tokenizer("byte_level")
    assert made.encode("x")[0] == made.token_to_id("<|bos|>")
    assert made.encode("x")[1:] == made.encode("x", add_special_tokens=False)
    assert made.bos_token == "<|bos|>"


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({}, ["<|eos|>"]),
        ({"generation_config": {"eos_token_id": 3}}, ["<|eos|>", "<|end|>"]),
        ({"generation_config": {"eos_token_id": [3, 1, 0]}}, ["<|eos|>", "<|end|>", "<|bos|>"]),
        ({"config": {"eos_token_id": 3}}, ["<|eos|>", "<|end|>"]),
        (
            {"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": 0}},
            ["<|eos|>", "<|bos|>"],
        ),
        ({"tokenizer_config": {}, "generation_config": {"eos_token_id": 3}}, ["<|end|>"]),
        ({"tokenizer_config": {}}, []),
    ],
)
def test_eos_ids_are_the_tokenizers_and_the_generation_configs(
    files: dict[str, object], names: list[str]
) -> None:
    made = with_files(**files)
    assert [made.id_to_token(token_id) for token_id in made.eos_token_ids] == names


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_ids_that_cannot_be_are_refused(token_id: int) -> None:
    with pytest.raises(RequestError, match="token ids must be from 0 to"):
        tokenizer("byte_level").decode([token_id])
    assert tokenizer("byte_level").decode([2**32 - 1]) == ""


def test_default_sampling_is_what_the_generation_config_sets() -> None:
    config = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "pad_token_id": 0}
    assert with_files(generation_config=config).default_sampling == {
        "temperature": 0.6,
        "top_k": 20,
    }
    assert with_files().default_sampling == {}


def test_special_tokens_may_be_strings_or_objects() -> None:
    made = with_files(
        tokenizer_config={"eos_token": {"content": "<|eos|>", "lstrip": False}, "pad_token": None},
        special_tokens_map={"bos_token": "<|bos|>", "pad_token": "<|end|>"},
    )
    assert made.special_tokens == {"eos_token": "<|eos|>", "bos_token": "<|bos|>"}


def test_truncation_and_padding_of_the_file_are_off() -> None:
    inner = tiny_tokenizers.inner("byte_level")
    content = json.loads(inner.to_str())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    made = Tokenizer.from_files({"tokenizer.json": json.dumps(content).encode()})
    assert made.decode(made.encode(TEXTS[0])) == TEXTS[0]


def test_a_folder_is_read_as_its_files(tmp_path: Path) -> None:
    for name, content in tiny_tokenizers.files("byte_level").items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(b"not text")
    assert module.read_files(tmp_path) == tiny_tokenizers.files("byte_level")
    made = Tokenizer.from_folder(tmp_path)
    assert made.encode(TEXTS[0]) == tokenizer("byte_level").encode(TEXTS[0])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": b"{"}, "tokenizer.json of the model cannot be read"),
        ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json of the model cannot be read"),
        ({"tokenizer_config.json": b"{"}, "tokenizer_config.json of the model is not JSON"),
        ({"generation_config.json": b"[]"}, "generation_config.json of the model must be"),
    ],
)
def test_files_that_cannot_work_are_refused_with_a_sentence(
    files: dict[str, bytes], words: str
) -> None:
    if files and "tokenizer.json" not in files:
        files = tiny_tokenizers.files("byte_level") | files
    with pytest.raises(ConfigError, match=words):
        Tokenizer.from_files(files)


def test_text_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, tasuki_common.text_stream, tasuki_common.chat;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
