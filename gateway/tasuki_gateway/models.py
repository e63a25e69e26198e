"""What the gateway knows of each model: its card, tokenizer and chat template."""

import asyncio

import msgspec

from tasuki_common.chat import ChatTemplate
from tasuki_common.errors import ConfigError
from tasuki_common.messages import ModelCard
from tasuki_common.tokenizer import Tokenizer
from tasuki_gateway import word_cache


class ModelText:
    """Text to tokens and back for one model, built from a pod's card."""

    def __init__(self, card: ModelCard, *, inline_characters: int) -> None:
        self.tokenizer = Tokenizer.from_files(card.files, origin=card.model)
        self.template = ChatTemplate.from_files(card.files, self.tokenizer.special_tokens)
        self.card = msgspec.structs.replace(card, files={})
        self._inline_characters = inline_characters
        cached = word_cache.applies(card.files.get("tokenizer.json", b""))
        self._words = word_cache.WordCache(self.tokenizer) if cached else None

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids; a long text goes to a thread, so that others' streams go on meanwhile."""
        if len(text) > self._inline_characters:
            return await asyncio.to_thread(self.tokenizer.encode_aside, text, add_special_tokens)
        if self._words is not None and not add_special_tokens:
            return self._words.encode(text)
        return self.tokenizer.encode(text, add_special_tokens)


async def load(packed: bytes, *, inline_characters: int) -> ModelText:
    """The model text of a packed `ModelCard`; building a tokenizer takes long, so in a thread.

    Raises:
        msgspec.MsgspecError: it is no card.
        ConfigError: the model's files are not what we can read.
    """
    card = msgspec.msgpack.decode(packed, type=ModelCard)
    try:
        return await asyncio.to_thread(ModelText, card, inline_characters=inline_characters)
    except ConfigError:
        raise
    except Exception as error:  # files of a model may hold anything; other models must go on
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the files of {card.model} cannot be read: {reason}") from error
