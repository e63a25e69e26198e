"""Text of a model: long prompts do not hold up the streams of others."""

import asyncio
import time

import fake_pods
import msgspec
import pytest

from tasuki_common.errors import ConfigError
from tasuki_common.messages import ModelCard
from tasuki_gateway.models import ModelText, load

TEXT = "the quick brown fox jumps über die Brücke 日本語; x=3\n" * 8000


def card(**files: bytes) -> ModelCard:
    """Of a model with the fake pods' tokenizer; `files`: __ stands for a dot."""
    return ModelCard(
        model="fake",
        fingerprint="f",
        root="r",
        vocab_size=600,
        created=1,
        files={"tokenizer.json": fake_pods.tokenizer_json()}
        | {name.replace("__", "."): content for name, content in files.items()},
    )


@pytest.fixture(scope="module")
def text() -> ModelText:
    """Of the fake pods' model."""
    return ModelText(card(), inline_characters=1000)


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": b"\xff"},
        {"tokenizer_config__json": b"{"},
        {"tokenizer_config__json": b'{"eos_token": [1]}'},
        {"generation_config__json": b'{"eos_token_id": [[1]]}'},
    ],
)
async def test_files_that_cannot_be_read_are_one_kind_of_error(files: dict[str, bytes]) -> None:
    packed = msgspec.msgpack.encode(card(**files))
    with pytest.raises(ConfigError):
        await load(packed, inline_characters=1000)


async def test_a_long_prompt_is_tokenized_while_others_go_on(text: ModelText) -> None:
    expected = text.tokenizer.encode(TEXT, add_special_tokens=False)
    shares = []
    for _ in range(5):  # a busy machine holds this process up now and then; what blocks, always
        worst, began = 0.0, time.monotonic()
        task = asyncio.create_task(text.encode(TEXT, add_special_tokens=False))
        while not task.done():
            before = time.monotonic()
            await asyncio.sleep(0.002)
            worst = max(worst, time.monotonic() - before)
        shares.append(worst / (time.monotonic() - began))
        assert task.result() == expected
    assert min(shares) < 0.5


async def test_short_and_long_prompts_give_the_tokenizers_ids(text: ModelText) -> None:
    for size in (1, 10, 999, 1000, 1001, 5000):
        for special in (True, False):
            expected = text.tokenizer.encode(TEXT[:size], special)
            assert await text.encode(TEXT[:size], add_special_tokens=special) == expected
