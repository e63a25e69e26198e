"""Text to token ids and back, from the files of a model folder, without torch or transformers."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from tasuki_common import detokenizer
from tasuki_common.errors import ConfigError, RequestError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
"""The text files of a model folder that tokenizing, templates and defaults need."""

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_files(folder: Path) -> dict[str, bytes]:
    """Those of `FILES` that exist in `folder`: what `Tokenizer.from_files` takes."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


class Tokenizer:
    """A fast tokenizer (`tokenizer.json`) with what its neighbour files say about it."""

    def __init__(self, inner: tokenizers.Tokenizer, files: Mapping[str, bytes]) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._make_detokenizer = detokenizer.factory(inner)
        self.config = _read_json(files, "tokenizer_config.json")
        self.special_tokens = _special_tokens(files, self.config)
        """By role, as templates know them: bos_token, eos_token, ... -> text."""
        generation = _read_json(files, "generation_config.json")
        self.default_sampling: dict[str, float] = {
            key: generation[key] for key in _SAMPLING_KEYS if generation.get(key) is not None
        }
        """Sampling defaults that the model's makers ask for."""
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(
            id_ for id_, token in inner.get_added_tokens_decoder().items() if token.special
        )
        self.eos_token_ids = eos_token_ids(files)
        """All ids that end a text, the tokenizer's own first."""
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Of the model in `folder`.

        Raises:
            ConfigError: there is no tokenizer.json, or a file does not parse.
        """
        return cls.from_files(read_files(Path(folder)), origin=str(folder))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], *, origin: str = "the model") -> "Tokenizer":
        """Of files by name (`ModelCard.files`); `origin` is for error sentences.

        Raises:
            ConfigError: there is no tokenizer.json, or a file does not parse.
        """
        if "tokenizer.json" not in files:
            raise ConfigError(
                f"{origin} has no tokenizer.json; only fast tokenizers are supported: convert it "
                "by loading and saving it once with transformers."
            )
        try:
            inner = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"tokenizer.json of {origin} cannot be read: {error}") from error
        return cls(inner, files)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens`: with bos and the like, as the post-processor says."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_aside(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode` for a thread of its own: others run meanwhile, where `encode` holds the GIL."""
        (found,) = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = found.ids
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; ids without a token say nothing.

        Raises:
            RequestError: an id is no u32.
        """
        try:
            return self._inner.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise RequestError(
                f"token ids must be from 0 to {self.vocab_size - 1}.", param="tokens"
            ) from error

    def detokenizer(
        self, *, skip_special_tokens: bool = True, at_start: bool = False
    ) -> detokenizer.Detokenizer:
        """A new stream; `at_start`: its first token begins the text, no prompt goes before it."""
        return self._make_detokenizer(skip_special_tokens, at_start)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling (`Ġthe`); None for an id without a token."""
        return self._inner.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The inverse of `id_to_token`."""
        return self._inner.token_to_id(token)

    def token_text(self, token_id: int) -> str:
        """What the token reads like within a text; parts of a character read as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The token's UTF-8 bytes, perhaps part of a character; none for an id without a token."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._bytes_of(token_id)
        return known

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text, if there is one."""
        return self.special_tokens.get("bos_token")

    def _bytes_of(self, token_id: int) -> bytes:
        stream = self.detokenizer(skip_special_tokens=False)
        if isinstance(stream, detokenizer.ByteLevelDetokenizer):
            return stream.pieces[token_id]
        if isinstance(stream, detokenizer.FallbackDetokenizer):
            piece = stream.pieces[token_id]
            return bytes([piece]) if isinstance(piece, int) else piece.encode()
        return (stream.push([token_id]) + stream.flush()).encode()


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _AddedTokens(msgspec.Struct):
    """Of tokenizer.json, what is quick to read."""

    added_tokens: list[_AddedToken] = []


def eos_token_ids(files: Mapping[str, bytes]) -> tuple[int, ...]:
    """All ids that end a text: the tokenizer's own, then what the configurations name.

    generation_config.json has precedence over config.json; both may be behind the tokenizer, whose
    own end is what a chat template writes.

    Raises:
        ConfigError: a file does not parse.
    """
    text = _special_tokens(files, _read_json(files, "tokenizer_config.json")).get("eos_token")
    try:
        added = msgspec.json.decode(files.get("tokenizer.json", b"{}"), type=_AddedTokens)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"tokenizer.json of the model cannot be read: {error}") from error
    ids = [token.id for token in added.added_tokens if token.content == text]
    for name in ("generation_config.json", "config.json"):
        declared = _read_json(files, name).get("eos_token_id")
        if declared is not None:
            ids += declared if isinstance(declared, list) else [declared]
            break
    return tuple(dict.fromkeys(ids))


def _read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise ConfigError(f"{name} of the model is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name} of the model must be a JSON object.")
    return content


def _special_tokens(files: Mapping[str, bytes], config: dict[str, Any]) -> dict[str, str]:
    declared = _read_json(files, "special_tokens_map.json") | config
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        token = declared.get(name)
        if isinstance(token, dict):  # an AddedToken
            token = token.get("content")
        if token and not isinstance(token, str):
            raise ConfigError(f"{name} of the model is {token!r}; it must be a string.")
        if token:
            tokens[name] = token
    return tokens
