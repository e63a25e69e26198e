"""What the gateway does with each kind of request."""

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable

import msgspec

from tasuki_common import logs, tracing
from tasuki_common.errors import DeadlineError, NotFoundError, OverloadedError, RequestError
from tasuki_common.messages import Endpoint, GenerateRequest, Usage
from tasuki_gateway import bodies, chunks, metrics, prompts, sampling
from tasuki_gateway.access import Access
from tasuki_gateway.config import GatewayConfig
from tasuki_gateway.exchange import ClientGone, Exchange, end_now
from tasuki_gateway.failures import TooManyRequestsError, failure
from tasuki_gateway.fleet import Fleet, Served
from tasuki_gateway.models import ModelText
from tasuki_gateway.relay import Legs, Relay, ReplacedError, Sink

log = logs.get("tasuki.gateway")

_CLIENT_LEFT = 499
_LAST_WORDS_SECONDS = 2.0
_LOOK_SECONDS = 3.0
"""A model may be served since a moment ago; a refresh takes longer only while pods are silent."""
_PARALLEL_PROMPTS = 64
"""Prompts of one request that are relayed at a time."""
_ID_PREFIX: dict[Endpoint, str] = {"chat": "chatcmpl-", "completion": "cmpl-"}


class Record:
    """What log and metrics say of a request."""

    def __init__(self) -> None:
        self.model = ""
        self.usage: Usage | None = None
        self.failovers = 0
        self.pods: list[tuple[str | None, str]] = []


Handler = Callable[[Exchange, Record], Awaitable[None]]


class Service:
    """The endpoints of the OpenAI API over a fleet of pods."""

    def __init__(self, config: GatewayConfig, fleet: Fleet, legs: Legs) -> None:
        self.config = config
        self.fleet = fleet
        self._legs = legs
        self._access = Access(config.api_key, fleet)
        self._active: set[asyncio.Timeout] = set()
        self._ending = False

    def end_streams(self) -> None:
        """Ends what still runs, each with an error its client can read."""
        self._ending = True
        for scope in self._active:
            end_now(scope)

    async def serve(self, name: str, handler: Handler, exchange: Exchange) -> None:
        """Runs a handler: limits, deadline, errors, log and metrics."""
        record = Record()
        metrics.in_flight.inc()
        with tracing.span(
            "request", exchange.trace, request_id=exchange.request_id, endpoint=name
        ) as leg:
            try:
                await self._within_limits(handler, exchange, record)
            except ClientGone:
                exchange.gone = True
            except Exception as error:
                answer = failure(error)
                if answer.status == 500:
                    log.exception("request_failed", request_id=exchange.request_id)
                with contextlib.suppress(TimeoutError):  # the client no longer reads
                    async with asyncio.timeout(_LAST_WORDS_SECONDS):
                        await exchange.fail(answer)
            finally:
                metrics.in_flight.dec()
                self._account(name, exchange, record, leg)

    async def _within_limits(self, handler: Handler, exchange: Exchange, record: Record) -> None:
        await self._access.enter(exchange.key)
        if len(self._active) >= self.config.max_requests:
            raise TooManyRequestsError(
                f"The gateway serves {self.config.max_requests} requests at a time; try again."
            )
        scope = asyncio.timeout(self.config.request_timeout)
        try:
            async with scope:
                self._active.add(scope)
                exchange.limit = scope
                await handler(exchange, record)
        except TimeoutError:
            if exchange.gone or not scope.expired():
                if not exchange.gone:
                    raise
            elif self._ending:
                raise OverloadedError("The gateway is shutting down; try again.") from None
            else:
                seconds = self.config.request_timeout
                raise DeadlineError(f"The request took more than {seconds:g} s.") from None
        finally:
            self._active.discard(scope)

    def _account(self, name: str, exchange: Exchange, record: Record, leg: tracing.Span) -> None:
        seconds = time.monotonic() - exchange.began
        status = _CLIENT_LEFT if exchange.gone else exchange.status
        metrics.requests.labels(record.model, name, status).inc()
        metrics.request_seconds.labels(name).observe(seconds)
        if exchange.first_write:
            first = exchange.first_write - exchange.began
            metrics.time_to_first_token_seconds.labels(name).observe(first)
        usage = record.usage
        if usage is not None:
            metrics.prompt_tokens.inc(usage.prompt_tokens)
            metrics.completion_tokens.inc(usage.completion_tokens)
        leg.note(model=record.model, status=status, failovers=record.failovers)
        log.info(
            "request_done",
            request_id=exchange.request_id,
            endpoint=name,
            model=record.model,
            status=status,
            seconds=round(seconds, 4),
            usage=usage,
            failovers=record.failovers,
            pods=record.pods,
        )

    async def model(self, exchange: Exchange, name: str | None) -> tuple[str, Served]:
        """The served name a client asks for, and what is known of it; now, if it was not yet.

        Raises:
            RequestError: none was named, and there is not just one.
            NotFoundError: nobody serves it.
            AuthenticationError: the client's key does not open it.
        """
        if name is None:
            models = {served.model for served in self.fleet.names.values()}
            if len(models) != 1:
                raise RequestError("model is required.", param="model")
            name = models.pop()
        if name not in self.fleet.names:
            await self.fleet.look(_LOOK_SECONDS)
        served = self.fleet.names.get(name)
        if served is None:
            raise NotFoundError(f"The model {name!r} is not served here; /v1/models lists what is.")
        self._access.check(exchange.key, served)
        return name, served

    async def completions(self, exchange: Exchange, record: Record) -> None:
        """POST /v1/completions."""
        body = bodies.parse(await exchange.body(self.config.max_body_bytes), bodies.Completion)

        async def tokenize(text: ModelText) -> list[list[int]]:
            return await prompts.completion_prompts(body, text, self.config)

        await self._generate(exchange, record, "completion", body, tokenize)

    async def chat(self, exchange: Exchange, record: Record) -> None:
        """POST /v1/chat/completions."""
        body = bodies.parse(await exchange.body(self.config.max_body_bytes), bodies.Chat)

        async def tokenize(text: ModelText) -> list[list[int]]:
            return [await prompts.chat_prompt(body, text, self.config)]

        await self._generate(exchange, record, "chat", body, tokenize)

    async def _generate(
        self,
        exchange: Exchange,
        record: Record,
        endpoint: Endpoint,
        body: bodies.Completion | bodies.Chat,
        tokenize: Callable[[ModelText], Awaitable[list[list[int]]]],
    ) -> None:
        """Answers; anew when another model gets the name before anything of the answer was sent."""
        while True:
            name, served = await self.model(exchange, body.model)
            record.model = served.model
            try:
                with self._access.room(served):
                    ids = await tokenize(served.text)
                    await self._answer(exchange, record, endpoint, body, name, served, ids)
                return
            except ReplacedError:
                if exchange.status:
                    raise
                log.info("replaced", request_id=exchange.request_id, model=name)

    async def _answer(
        self,
        exchange: Exchange,
        record: Record,
        endpoint: Endpoint,
        body: bodies.Completion | bodies.Chat,
        name: str,
        served: Served,
        ids: list[list[int]],
    ) -> None:
        card, policy = served.text.card, served.policy
        params = sampling.sampling_params(
            body,
            defaults=served.text.tokenizer.default_sampling,
            vocab_size=card.vocab_size,
            most=policy.max_output_tokens,
        )
        param = "messages" if endpoint == "chat" else "prompt"
        prompts.check_length(ids, policy.max_prompt_tokens, param)
        prompts.check_context(ids, params.max_tokens, served.max_model_len, param)
        options = body.stream_options or bodies.StreamOptions()
        first = GenerateRequest(
            request_id=f"{exchange.request_id}.{secrets.token_hex(4)}",
            model=name,
            endpoint=endpoint,
            response_id=_ID_PREFIX[endpoint] + uuid.uuid4().hex,
            created=int(time.time()),
            prompt_token_ids=ids[0],
            sampling=params,
            fingerprint=card.fingerprint,
            echo=isinstance(body, bodies.Completion) and body.echo,
            return_token_ids=body.return_token_ids,
            return_tokens_as_token_ids=body.return_tokens_as_token_ids,
            continuous_usage=options.continuous_usage_stats,
            cache_salt=body.cache_salt,
            priority=body.priority,
        )
        head = (first.response_id, first.created, name)
        with exchange.watching():
            if body.stream:
                usage = await self._relay(exchange, record, first, ids, exchange.write)
                include = options.include_usage
                tail = chunks.usage_event(endpoint, *head, usage) if include else b""
                await exchange.finish(tail + chunks.DONE)
            else:
                merger = chunks.Merger(endpoint)
                usage = await self._relay(exchange, record, first, ids, merger.take)
                await exchange.answer(merger.response(*head, usage))
        record.usage = usage

    async def _relay(
        self,
        exchange: Exchange,
        record: Record,
        first: GenerateRequest,
        ids: list[list[int]],
        sink: Sink,
    ) -> Usage:
        """Relays each prompt, some at a time; the choices' numbers tell their chunks apart."""
        deadline = exchange.began + self.config.request_timeout
        relays = [Relay(self._legs, first.model, first, sink, deadline)]
        for number, prompt in enumerate(ids[1:], start=1):
            request = msgspec.structs.replace(
                first,
                request_id=f"{first.request_id}-p{number}",
                prompt_token_ids=prompt,
                choice_offset=number * first.sampling.n,
            )
            relays.append(Relay(self._legs, first.model, request, sink, deadline))
        try:
            if len(relays) == 1:
                return await relays[0].run()
            return await _together(relays)
        finally:
            record.failovers = sum(relay.failovers for relay in relays)
            record.pods = [pair for relay in relays for pair in relay.pods]

    async def tokenize(self, exchange: Exchange, record: Record) -> None:
        """POST /tokenize: a prompt or messages to token ids."""
        body = bodies.parse(await exchange.body(self.config.max_body_bytes), bodies.Tokenize)
        _, served = await self.model(exchange, body.model)
        record.model, text = served.model, served.text
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Either prompt or messages is required.", param="prompt")
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            ids = await text.encode(body.prompt, add_special_tokens=special)
        else:
            ids = await prompts.chat_prompt(body, text, self.config)
        answer = {"count": len(ids), "max_model_len": served.max_model_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [text.tokenizer.id_to_token(token) for token in ids]
        await exchange.answer(msgspec.json.encode(answer))

    async def detokenize(self, exchange: Exchange, record: Record) -> None:
        """POST /detokenize: the inverse of /tokenize."""
        body = bodies.parse(await exchange.body(self.config.max_body_bytes), bodies.Detokenize)
        _, served = await self.model(exchange, body.model)
        record.model, text = served.model, served.text
        sampling.check_ids("tokens", body.tokens, text.card.vocab_size)
        decoded = text.tokenizer.decode(body.tokens, skip_special_tokens=False)
        await exchange.answer(msgspec.json.encode({"prompt": decoded}))

    async def models(self, exchange: Exchange, record: Record) -> None:
        """GET /v1/models: served names, aliases among them, that the client's key opens."""
        data = [
            _model_object(name, served)
            for name, served in sorted(self.fleet.names.items())
            if self._access.opens(exchange.key, served)
        ]
        await exchange.answer(msgspec.json.encode({"object": "list", "data": data}))

    async def one_model(self, exchange: Exchange, record: Record) -> None:
        """GET /v1/models/{id}."""
        name, served = await self.model(exchange, exchange.path_params["model"])
        await exchange.answer(msgspec.json.encode(_model_object(name, served)))


async def _together(relays: list[Relay]) -> Usage:
    """Runs relays side by side; the first error ends all."""
    room = asyncio.Semaphore(_PARALLEL_PROMPTS)

    async def run(relay: Relay) -> Usage:
        async with room:
            return await relay.run()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(relay)) for relay in relays]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return chunks.total([task.result() for task in tasks])


def _model_object(name: str, served: Served) -> dict[str, object]:
    card = served.text.card
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "tasuki",
        "root": card.root,
        "parent": None if name == served.model else served.model,
        "max_model_len": served.max_model_len,
    }
