"""Chat templates: messages to prompt text, as the model's makers wrote it down.

Renders what transformers renders (the same sandbox, filters and globals), without importing it.
Templates come with a model or with a request, so they run in jinja2's sandbox on plain JSON data.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tasuki_common.errors import ConfigError, RequestError

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "

Message = dict[str, Any]


class ChatTemplate:
    """The chat template(s) of one model."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`templates` by name ("default", "tool_use", ...); may be empty."""
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_files(
        cls, files: Mapping[str, bytes], special_tokens: Mapping[str, str]
    ) -> "ChatTemplate":
        """From `ModelCard.files`: chat_template.jinja, else tokenizer_config.json.

        `special_tokens`: `Tokenizer.special_tokens`.

        Raises:
            ConfigError: the tokenizer_config.json has something else under `chat_template`.
        """
        if "chat_template.jinja" in files:
            return cls({"default": files["chat_template.jinja"].decode()}, special_tokens)
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        declared = config.get("chat_template")
        if declared is None:
            return cls({}, special_tokens)
        if isinstance(declared, str):
            return cls({"default": declared}, special_tokens)
        try:
            named = {entry["name"]: entry["template"] for entry in declared}
        except (TypeError, KeyError) as error:
            raise ConfigError(
                "chat_template in tokenizer_config.json must be a string or a list of "
                "{name, template}."
            ) from error
        return cls(named, special_tokens)

    @property
    def names(self) -> frozenset[str]:
        """Of the model's templates."""
        return frozenset(self._templates)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt; it holds its special tokens, so encode it without adding any.

        `chat_template`: a template, or the name of one of the model's.
        `continue_final_message`: leave the last message open, for the model to go on with it.

        Raises:
            RequestError: the messages are not what the template, or chat, can take.
        """
        source = self._select(chat_template, bool(tools))
        param = "messages" if chat_template is None else "chat_template"
        chat = [_plain_message(i, message) for i, message in enumerate(messages)]
        if continue_final_message:
            _check_continuable(chat, add_generation_prompt)
            final = chat[-1]["content"]
            chat[-1] = chat[-1] | {"content": final + _CONTINUE_TAG}
        context = {
            **self._special_tokens,
            **(chat_template_kwargs or {}),
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        text = _render(source, context, param)
        return _cut_at_tag(text, final) if continue_final_message else text

    def _select(self, chosen: str | None, has_tools: bool) -> str:
        if chosen is not None:
            return self._templates.get(chosen, chosen)
        name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise RequestError(
                "this model has no default chat template; send a prompt to /v1/completions, or a "
                "chat_template with the request.",
                param="messages",
            )
        return self._templates[name]


def _render(source: str, context: dict[str, Any], param: str) -> str:
    try:
        return _compile(source).render(context)
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template refuses: {error}", param=param) from error
    except Exception as error:  # a template is foreign code and may raise anything
        raise RequestError(
            f"the chat template fails on these messages: {type(error).__name__}: {error}",
            param=param,
        ) from error


def _plain_message(i: int, message: Any) -> Message:
    """The message as templates expect it: text content, tool arguments as objects."""
    if not isinstance(message, dict):
        raise RequestError(f"messages[{i}] must be an object.", param=f"messages[{i}]")
    if not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{i}].role must be a string.", param=f"messages[{i}].role")
    plain = dict(message)
    plain["content"] = _plain_content(f"messages[{i}].content", message.get("content"))
    calls = message.get("tool_calls")
    if calls:
        where = f"messages[{i}].tool_calls"
        if not isinstance(calls, list):
            raise RequestError(f"{where} must be a list.", param=where)
        plain["tool_calls"] = [_plain_tool_call(f"{where}[{j}]", c) for j, c in enumerate(calls)]
    return plain


def _plain_content(where: str, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts.", param=where)
    texts: list[str] = []
    for j, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(
                f"{where}[{j}].type is {kind!r}; this model takes text parts only.",
                param=f"{where}[{j}].type",
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{j}].text must be a string.", param=f"{where}[{j}].text")
        texts.append(part["text"])
    return "\n".join(texts)


def _plain_tool_call(where: str, call: Any) -> dict[str, Any]:
    """OpenAI's clients send arguments as JSON text; templates print them as objects."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function must be an object.", param=f"{where}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except ValueError as error:
            raise RequestError(
                f"{where}.function.arguments is not JSON: {error}.",
                param=f"{where}.function.arguments",
            ) from error
    return {**call, "function": function | {"arguments": arguments}}


def _check_continuable(chat: Sequence[Message], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise RequestError(
            "continue_final_message needs add_generation_prompt to be false.",
            param="continue_final_message",
        )
    if not chat or not isinstance(chat[-1]["content"], str):
        raise RequestError(
            "continue_final_message needs a last message with text content.",
            param="continue_final_message",
        )


def _cut_at_tag(text: str, final: str) -> str:
    """The rendered text up to the end of the final message; a template may have trimmed it."""
    at = text.rfind(_CONTINUE_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise RequestError(
            "the chat template does not keep the last message as it is, so it cannot be continued.",
            param="continue_final_message",
        )
    kept = text.startswith(_CONTINUE_TAG, at)
    return text[:at] if kept else text[:at].rstrip()


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what training learns; for rendering it is nothing but its body."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)
