"""Token ids to text, a few at a time: no character is ever split, nothing is said twice.

For any way of cutting the ids, what `push` returns and what `flush` returns join to exactly what
`tokenizers` decodes from all ids at once. How, depends on the kind of decoder:

    byte-level       a token is some bytes; bytes that may begin a character wait for the rest
    byte fallback    a token is text, or one byte as `<0xE2>`; a run of bytes is UTF-8 as a whole,
                     or else all of it becomes replacement characters, so it waits for its end
    any other        decoded again with the tokens before it as context
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """One stream of tokens turning into text."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens complete."""

    def flush(self) -> str:
        """Text that was still waiting; the stream ends here."""


Factory = Callable[[bool, bool], Detokenizer]
"""(skip_special_tokens, at_start) -> Detokenizer."""


def factory(inner: tokenizers.Tokenizer) -> Factory:
    """How to make detokenizers for `inner`; tables are shared by all streams.

    `at_start`: the first token begins the text. Decoders of the sentencepiece kind drop one space
    there, which text that goes on from a prompt must keep.
    """
    # The decoder's own JSON: that of the whole tokenizer is tens of megabytes.
    decoder = json.loads(inner.decoder.__getstate__()) if inner.decoder else {}
    if decoder.get("type") == "ByteLevel":
        tables = [ByteLevelPieces(inner, skip) for skip in (False, True)]
        return lambda skip, at_start: ByteLevelDetokenizer(tables[skip])
    steps = _fallback_steps(decoder)
    if steps is not None:
        texts = [FallbackPieces(inner, skip, steps) for skip in (False, True)]
        strip = steps.strip
        return lambda skip, at_start: FallbackDetokenizer(texts[skip], strip if at_start else 0)
    return lambda skip, at_start: WindowDetokenizer(inner, skip)


def _specials(inner: tokenizers.Tokenizer) -> frozenset[int]:
    return frozenset(i for i, token in inner.get_added_tokens_decoder().items() if token.special)


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


class ByteLevelPieces(dict[int, bytes]):
    """Token id -> its bytes, filled as tokens are met; unknown and skipped ids are empty."""

    def __init__(self, inner: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._inner = inner
        self._skipped = _specials(inner) if skip_special_tokens else frozenset()

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._inner.id_to_token(token_id)
        if token is None:
            piece = b""
        elif all(char in BYTE_OF_CHAR for char in token):
            piece = bytes(BYTE_OF_CHAR[char] for char in token)
        else:
            piece = token.encode()
        self[token_id] = piece
        return piece


class ByteLevelDetokenizer:
    """Of byte-level BPE."""

    def __init__(self, pieces: ByteLevelPieces) -> None:
        self.pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens complete."""
        pieces = self.pieces
        return self._decoder.decode(b"".join([pieces[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        """Replacement characters for bytes that never became a character."""
        return self._decoder.decode(b"", True)


class FallbackSteps:
    """The steps of a byte-fallback decoder: replacements, then one strip of the whole text."""

    def __init__(self, replaces: list[tuple[str, str]], strip: int) -> None:
        self.replaces = replaces
        self.strip = strip


def _fallback_steps(decoder: dict[str, Any]) -> FallbackSteps | None:
    """`decoder` as Replace*, ByteFallback, Fuse, [Strip leading spaces]; None if it is not that."""
    steps = list(decoder.get("decoders", ())) if decoder.get("type") == "Sequence" else []
    replaces: list[tuple[str, str]] = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replaces.append((step["pattern"]["String"], step["content"]))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteFallback", "Fuse"]:
        return FallbackSteps(replaces, 0)
    if kinds == ["ByteFallback", "Fuse", "Strip"]:
        strip = steps[-1]
        if strip["content"] == " " and strip["stop"] == 0:
            return FallbackSteps(replaces, strip["start"])
    return None


class FallbackPieces(dict[int, str | int]):
    """Token id -> its text, or its byte as an int."""

    def __init__(
        self, inner: tokenizers.Tokenizer, skip_special_tokens: bool, steps: FallbackSteps
    ) -> None:
        super().__init__()
        self._inner = inner
        self._skipped = _specials(inner) if skip_special_tokens else frozenset()
        self._replaces = steps.replaces

    def __missing__(self, token_id: int) -> str | int:
        piece: str | int
        token = None if token_id in self._skipped else self._inner.id_to_token(token_id)
        for pattern, content in self._replaces:
            token = token and token.replace(pattern, content)
        byte = _BYTE_TOKEN.fullmatch(token or "")
        piece = int(byte[1], 16) if byte else token or ""
        self[token_id] = piece
        return piece


class FallbackDetokenizer:
    """Of sentencepiece-like BPE, where a character that has no token is spelled in bytes."""

    def __init__(self, pieces: FallbackPieces, strip: int) -> None:
        self.pieces = pieces
        self._strip = strip
        self._run = bytearray()

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens complete."""
        pieces, out = self.pieces, []
        for token_id in token_ids:
            piece = pieces[token_id]
            if isinstance(piece, int):
                self._run.append(piece)
            elif piece:
                if self._run:
                    out.append(self._end_run())
                out.append(piece)
        return self._stripped("".join(out))

    def flush(self) -> str:
        """The last run of bytes."""
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class WindowDetokenizer:
    """Of any decoder in which the tokens of the last piece decide how the next one reads."""

    def __init__(self, inner: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._inner = inner
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._waiting: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens complete."""
        return "".join([self._push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """Text that was held because it might have changed."""
        return self._decode(self._context + self._waiting)[len(self._context_text) :]

    def _push(self, token_id: int) -> str:
        self._waiting.append(token_id)
        text = self._decode(self._context + self._waiting)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._context_text):
            return ""
        delta = text[len(self._context_text) :]
        self._context, self._waiting = self._waiting, []
        self._context_text = self._decode(self._context)
        return delta

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._inner.decode(token_ids, skip_special_tokens=self._skip)
