"""`tasuki ask QUESTION`: streams one answer from an OpenAI endpoint to the terminal."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from tasuki_common import settings
from tasuki_common.errors import ConfigError

_CONNECT_SECONDS, _SILENCE_SECONDS = 5.0, 60.0
_NO_PROXY: dict[str, httpx.BaseTransport | None] = dict.fromkeys(
    ("all://127.0.0.1", "all://localhost", "all://[::1]")
)
"""A proxy from the environment cannot reach what runs on this machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskSettings:
    """Streams one answer from an endpoint."""

    question: str = dataclasses.field(metadata={"help": "What to ask.", "positional": True})
    url: str = dataclasses.field(
        default="http://127.0.0.1:8000/v1", metadata={"help": "Base URL of the endpoint."}
    )
    model: str | None = dataclasses.field(
        default=None, metadata={"help": "Served name; none: the first that is listed."}
    )
    max_tokens: int = dataclasses.field(default=256, metadata={"help": "Longest answer."})
    temperature: float = dataclasses.field(default=0.7, metadata={"help": "0: the likeliest."})
    api_key: str | None = dataclasses.field(
        default=None, metadata={"help": "Key of the endpoint.", "secret": True}
    )


def main(argv: Sequence[str]) -> int:
    """Runs the verb; 1 when the endpoint does not answer."""
    chosen = settings.load(AskSettings, argv, prog="tasuki ask")
    headers = {"Authorization": f"Bearer {chosen.api_key}"} if chosen.api_key else {}
    timeout = httpx.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS)
    try:
        with httpx.Client(
            base_url=chosen.url, headers=headers, timeout=timeout, mounts=_NO_PROXY
        ) as client:
            for text in _answer(client, chosen):
                sys.stdout.write(text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except httpx.HTTPError as error:
        sys.stderr.write(f"{chosen.url} does not answer: {error}.\n")
        return 1
    except AnswerError as error:
        sys.stderr.write(f"{chosen.url} answers: {error}\n")
        return 1
    sys.stdout.write("\n")
    return 0


class AnswerError(Exception):
    """The endpoint answered with an error; the message is its own."""


def _answer(client: httpx.Client, chosen: AskSettings) -> Iterator[str]:
    body = {
        "model": chosen.model or _first_model(client),
        "messages": [{"role": "user", "content": chosen.question}],
        "max_tokens": chosen.max_tokens,
        "temperature": chosen.temperature,
        "stream": True,
    }
    with client.stream("POST", "chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise AnswerError(_message(response.text))
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise AnswerError(_message(data))
            for choice in chunk["choices"]:
                yield choice["delta"].get("content") or ""


def _first_model(client: httpx.Client) -> str:
    response = client.get("models")
    if response.status_code != 200:
        raise AnswerError(_message(response.text))
    models: list[dict[str, Any]] = response.json()["data"]
    if not models:
        raise ConfigError(f"{client.base_url} serves no model yet.")
    return str(models[0]["id"])


def _message(body: str) -> str:
    """The sentence of an error body in OpenAI's shape, or the body."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body
