"""From a client's prompt to token ids, held against the model's vocabulary and context."""

import asyncio
from typing import Any

import msgspec

from tasuki_common.errors import RequestError
from tasuki_gateway import bodies, sampling
from tasuki_gateway.config import GatewayConfig
from tasuki_gateway.models import ModelText


async def completion_prompts(
    body: bodies.Completion, text: ModelText, config: GatewayConfig
) -> list[list[int]]:
    """The token ids of each prompt of a /v1/completions request.

    Raises:
        RequestError: a prompt has the wrong type, is empty, or holds ids that do not exist.
    """
    prompt = body.prompt
    if prompt is None:
        raise RequestError("prompt is required.", param="prompt")
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], list | str)
    prompts = prompt if several else [prompt]
    if len(prompts) > config.max_prompts:
        raise RequestError(
            f"prompt holds {len(prompts)} prompts; at most {config.max_prompts} go into one "
            "request.",
            param="prompt",
        )
    special = body.add_special_tokens is not False
    ids = []
    for one in prompts:
        ids.append(await _token_ids(one, text, add_special_tokens=special))
        await asyncio.sleep(0)  # a short prompt is tokenized on the spot; many are not short
    return ids


async def chat_prompt(
    body: bodies.Chat | bodies.Tokenize, text: ModelText, config: GatewayConfig
) -> list[int]:
    """The token ids of messages, through the model's chat template.

    Raises:
        RequestError: the template refuses the messages, or is the client's own and not trusted.
    """
    if not body.messages:
        raise RequestError("messages is empty.", param="messages")
    named = body.chat_template is None or body.chat_template in text.template.names
    if not named and not config.trust_request_chat_template:
        raise RequestError(
            "chat_template is served as the name of one of the model's templates only: this "
            "gateway runs no templates of its clients (--trust-request-chat-template).",
            param="chat_template",
        )
    rendered = text.template.render(
        body.messages,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    ids = await text.encode(rendered, add_special_tokens=body.add_special_tokens is True)
    if not ids:
        raise RequestError("messages give an empty prompt.", param="messages")
    return ids


async def _token_ids(prompt: Any, text: ModelText, *, add_special_tokens: bool) -> list[int]:
    if isinstance(prompt, str):
        ids = await text.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        try:
            ids = msgspec.convert(prompt, list[int])
        except msgspec.ValidationError as error:
            raise RequestError(
                "prompt must be a string, a list of strings, a list of token ids, or a list of "
                f"lists of token ids ({error}).",
                param="prompt",
            ) from error
        if ids and (min(ids) < 0 or max(ids) >= text.card.vocab_size):
            sampling.check_ids("prompt", ids, text.card.vocab_size)
    if not ids:
        raise RequestError("prompt is empty.", param="prompt")
    return ids


def check_length(prompts: list[list[int]], most: int | None, param: str) -> None:
    """Holds prompts against the `most` tokens that the model's policy allows (None: any).

    Raises:
        RequestError: one is longer.
    """
    longest = max(map(len, prompts))
    if most is not None and longest > most:
        raise RequestError(
            f"The prompt has {longest} tokens; this model takes {most} at most.", param=param
        )


def check_context(prompts: list[list[int]], max_tokens: int | None, limit: int, param: str) -> None:
    """Holds prompts and the tokens asked for against the context of `limit` tokens.

    Raises:
        RequestError: they do not fit together; it names both numbers.
    """
    longest = max(map(len, prompts))
    wanted = 1 if max_tokens is None else max_tokens
    if longest + wanted > limit:
        raise RequestError(
            f"This model's context is {limit} tokens; the request has {longest} tokens in its "
            f"prompt and asks for {'at least ' if max_tokens is None else ''}{wanted} more.",
            param=param,
        )
