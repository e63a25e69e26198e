"""The routes of a prefill pod: compute a prompt's prefix, keep it under a lease, answer at once.

Spans go from the engine's steps straight to the giver, inside the engine process; this one only
admits, names and cancels.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from tasuki_common import logs, tracing
from tasuki_common.errors import DeadlineError, RequestError
from tasuki_common.messages import PrefillRequest, Ticket
from tasuki_engine.request import EngineRequest
from tasuki_pod.engine_client import Mailbox
from tasuki_pod.http import Endpoint, msgpack_response, read_message
from tasuki_pod.pod import Pod
from tasuki_pod.wire import PrefixEnded

log = logs.get("tasuki.prefill")


def routes(pod: Pod) -> Sequence[BaseRoute]:
    """What a prefill pod serves beside the common routes."""
    prefills = Prefills(pod)
    return [
        Route("/prefill", Endpoint(prefills.prefill), methods=["POST"]),
        Route("/requests/{request_id}", prefills.delete, methods=["DELETE"]),
    ]


class _Open(NamedTuple):
    """A prefix that is being computed or kept."""

    request_id: str
    """The gateway's."""
    num_tokens: int
    begun: float
    """Monotonic seconds."""
    leg: tracing.Span
    """Until it is released."""


class Prefills:
    """Prefixes that are being computed or kept, by the gateway's request id.

    The engine knows each under an id of its own, so that a gateway may ask twice with one id.
    """

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._decoder = msgspec.msgpack.Decoder(PrefillRequest)
        self._numbers = itertools.count()
        self._open: dict[str, _Open] = {}
        """By the engine's id."""
        pod.on_prefix_ended.append(self._on_ended)

    async def prefill(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /prefill: PrefillRequest → Ticket."""
        with self._pod.admission():
            request = await read_message(receive, self._decoder)
            try:
                async with asyncio.timeout(request.timeout):
                    ticket = await self._admit(request)
            except TimeoutError as over:
                raise DeadlineError("The deadline passed before the prompt was admitted.") from over
        await msgpack_response(ticket)(scope, receive, send)

    async def delete(self, request: Request) -> Response:
        """DELETE /requests/{id}: nothing of it is computed or kept any more."""
        name = request.path_params["request_id"]
        self._pod.client.abort([ours for ours, it in self._open.items() if it.request_id == name])
        return Response(status_code=204)

    async def _admit(self, request: PrefillRequest) -> Ticket:
        pod, engine, config = self._pod, self._pod.engine, self._pod.config
        prompt = request.prompt_token_ids
        covered = (len(prompt) - 1) // engine.block_size * engine.block_size
        if covered <= 0:
            raise RequestError(
                f"prompt_token_ids has {len(prompt)} tokens; there is nothing to hand over below "
                f"{engine.block_size + 1}.",
                param="prompt_token_ids",
            )
        name = f"{request.request_id}.{next(self._numbers)}"
        engine_request = EngineRequest(
            request_id=name,
            prompt_token_ids=prompt,
            priority=request.priority,
            timeout=request.timeout,
            cache_salt=request.cache_salt,
            hand_over=True,
        )
        leg = tracing.start(
            "prefix", request.trace, request_id=name, pod=config.pod_name, tokens=covered
        )
        self._open[name] = _Open(request.request_id, covered, time.monotonic(), leg)
        try:
            await pod.client.admit(name, [engine_request], Mailbox())
        except BaseException:
            self._end(name, "refused")
            raise
        return Ticket(
            request_id=name,
            num_tokens=covered,
            pod=config.pod_name,
            incarnation=pod.incarnation,
            fingerprint=engine.fingerprint,
            host=config.transfer_address,
            port=engine.transfer_port,
            backends=engine.transfer_backends,
            lease_seconds=config.lease_seconds,
            prefix_hash=pod.prefix_hash(prompt[:covered], request.cache_salt),
        )

    def _on_ended(self, ended: PrefixEnded) -> None:
        self._end(ended.request_id, ended.outcome)
        self._pod.metrics.request_ended("prefill")

    def _end(self, name: str, outcome: str) -> None:
        if (gone := self._open.pop(name, None)) is not None:
            log.info(
                "prefix_ended",
                request_id=gone.request_id,
                outcome=outcome,
                tokens=gone.num_tokens,
                seconds=round(time.monotonic() - gone.begun, 4),
            )
            gone.leg.note(outcome=outcome)
            gone.leg.end()
