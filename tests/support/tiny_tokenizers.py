"""Tokenizers of every decoder kind, trained in a moment on a few sentences of several scripts."""

import functools
import json

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tasuki_common.tokenizer import Tokenizer

TEXTS = (
    "The relay hands a prompt from one runner to the next; nobody runs it twice.",
    "Größere Züge fahren über die Brücke, naïve façade, señor, Ærø, Łódź.",
    "日本語の文章を書く。中文也可以。한국어도 된다.",
    "Привет, мир! Καλημέρα κόσμε. नमस्ते दुनिया",
    "def f(x):\n    return x  # 😀 👩‍👩‍👧 🇯🇵\n\n\t<end>",
)
SPECIALS = ["<|bos|>", "<|eos|>", "<|start|>", "<|end|>"]


def _byte_level() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    inner.add_tokens([AddedToken("    ", special=False), AddedToken("Ġx é", special=False)])
    return inner


def _byte_fallback(strip: bool) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        if strip
        else [normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=40,
        show_progress=False,
    )
    inner.train_from_iterator((text.replace(" ", "▁") for text in TEXTS), trainer)
    # Trained special tokens are not part of the bytes' story: only SPECIALS are special.
    content = json.loads(inner.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _metaspace() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    return inner


def _word_piece() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|[^\w\s]"), "isolated")
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIALS], show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    return inner


_MAKERS = {
    "byte_level": _byte_level,
    "byte_fallback_strip": lambda: _byte_fallback(strip=True),
    "byte_fallback": lambda: _byte_fallback(strip=False),
    "metaspace": _metaspace,
    "word_piece": _word_piece,
}
KINDS = tuple(_MAKERS)


@functools.cache
def inner(kind: str) -> tokenizers.Tokenizer:
    """The `tokenizers` object of one of `KINDS`, beginning texts with <|bos|>."""
    made = _MAKERS[kind]()
    bos = made.token_to_id("<|bos|>")
    made.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    return made


@functools.cache
def files(kind: str) -> dict[str, bytes]:
    """The files of a model folder with that tokenizer."""
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>", "special": True}}
    return {
        "tokenizer.json": inner(kind).to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """Ours, of one of `KINDS`."""
    return Tokenizer.from_files(files(kind))
