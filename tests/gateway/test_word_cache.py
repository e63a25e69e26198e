"""Remembered words give the tokenizer's own ids, or are not used."""

import json
import random

import pytest
import tokenizers
from fresh_seed import fresh_seed
from hypothesis import given, strategies as st
from tokenizers import pre_tokenizers

from tasuki_common.tokenizer import Tokenizer
from tasuki_gateway import word_cache

TEXT = "It's the 1st time I've seen 20 foxes, y'all; über die Brücke 日本語 \n\n x=3  a  b\tc "
LLAMA = next(pattern for pattern in word_cache._KNOWN if "{1,3}" in pattern)
QWEN = next(pattern for pattern in word_cache._KNOWN if "{1,3}" not in pattern)


def trained(pattern: str | None, *special: tokenizers.AddedToken) -> bytes:
    """tokenizer.json of a small BPE that cuts by `pattern`, or by ByteLevel's own."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    inner.pre_tokenizer = byte_level
    if pattern is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|im_start|>"],
        show_progress=False,
    )
    inner.train_from_iterator([TEXT * 8], trainer)
    inner.add_tokens(list(special))
    return inner.to_str().encode()


FILES = {"gpt-2": trained(None), "llama 3": trained(LLAMA), "qwen 2": trained(QWEN)}
TOKENIZERS = {kind: Tokenizer.from_files({"tokenizer.json": FILES[kind]}) for kind in FILES}
PARTS = [
    *("a", "I've", "B2", "7", " ", "  ", "\n", "\t", "'s", "<|im_start|>", "über", "日本", "!?"),
    *(" fox", " 3", " x=", "\u017f", "\u0301", "\xa0", "²", " Ǆ", "\r\n "),
]


@pytest.mark.parametrize("kind", FILES)
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=20).map("".join))
def test_the_ids_are_the_tokenizers_own(kind: str, text: str) -> None:
    assert word_cache.applies(FILES[kind])
    cache = word_cache.WordCache(TOKENIZERS[kind])
    expected = TOKENIZERS[kind].encode(text, add_special_tokens=False)
    assert cache.encode(text) == expected
    assert cache.encode(text) == expected


def test_a_full_cache_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_MAX_WORDS", 10)
    cache = word_cache.WordCache(TOKENIZERS["gpt-2"])
    draw = random.Random(fresh_seed())
    for _ in range(50):
        text = " ".join(draw.choices(["fox", "time", "seen", "I've", "20", "die", "xyz"], k=30))
        assert cache.encode(text) == TOKENIZERS["gpt-2"].encode(text, add_special_tokens=False)
        assert len(cache._known) <= 10


@pytest.mark.parametrize(
    "file",
    [
        trained(r"\w+|\W+"),
        trained(None, tokenizers.AddedToken("new york")),
        trained(None, tokenizers.AddedToken("<x>", lstrip=True)),
        FILES["gpt-2"]
        .replace(b'"type": "BPE"', b'"type": "Unigram"')
        .replace(b'"type":"BPE"', b'"type":"Unigram"'),
        json.dumps(json.loads(FILES["gpt-2"]) | {"normalizer": {"type": "Lowercase"}}).encode(),
        json.dumps(json.loads(FILES["gpt-2"]) | {"pre_tokenizer": None}).encode(),
        b"{}",
    ],
)
def test_a_tokenizer_that_may_cut_elsewhere_is_used_as_it_is(file: bytes) -> None:
    assert not word_cache.applies(file)
