"""One prompt's way through the pods: prefill, decode, and another pod when one is lost.

    route ─► POST /prefill on P ─► ticket ─► POST /generate on D ─► frames ─► client
      ▲          any trouble: no ticket            │ connection, cut, silence, RETRY
      └──────────── prompt + journal ◄─────────────┘

Prefill is an optimisation: without a ticket the decode pod computes the prompt itself. A lost
decode pod is replaced, itself restarted included; the next one goes on from the journal, and the
client sees neither a gap nor a token twice. When the pods' settings are changed under it, a request
goes on with pods of the new settings; pods of another model it only begins on, tokenized anew.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from tasuki_common import frames, hashing, logs, tracing
from tasuki_common.errors import DeadlineError, OverloadedError
from tasuki_common.messages import GenerateRequest, PrefillRequest, Ticket, Usage
from tasuki_gateway import answers, metrics, routing
from tasuki_gateway.answers import PodLost
from tasuki_gateway.config import GatewayConfig
from tasuki_gateway.fleet import Burden, Fleet, Group, Pod
from tasuki_gateway.http_client import (
    BrokenError,
    ConnectError,
    HttpClient,
    Response,
    SilentError,
    UpstreamError,
)
from tasuki_gateway.journal import Journal
from tasuki_index import Index, IndexUnavailable

log = logs.get("tasuki.gateway")

Sink = Callable[[bytes], Awaitable[None]]

_BACKOFF = (0.0, 0.1, 0.5, 2.0)
_BUSY_SECONDS = 0.5
_GOODBYE_SECONDS = 2.0
_PREFILL_TRIES = 2
_encode = msgspec.msgpack.Encoder().encode
_ticket_decoder = msgspec.msgpack.Decoder(Ticket)
_REASONS: dict[type[UpstreamError], str] = {
    ConnectError: "connect",
    BrokenError: "cut",
    SilentError: "silent",
}


class AllBusyError(OverloadedError):
    """Every decode pod is at its limits."""


class ReplacedError(OverloadedError):
    """The model that the request was tokenized for has gone, and another one has its name."""


class PodsLeftError(Exception):
    """Pods that were thought ready take no requests any more; others are to be looked for."""


class Legs:
    """What all relays share: the way to the pods and the way to choose among them."""

    def __init__(
        self, config: GatewayConfig, fleet: Fleet, client: HttpClient, index: Index | None
    ) -> None:
        self.config = config
        self.fleet = fleet
        self.client = client
        self.index = index
        self._goodbyes: set[asyncio.Task[None]] = set()

    async def choose(
        self, group: Group, tokens: Sequence[int], salt: str | None, *, hand_over: bool
    ) -> routing.Choice[Pod]:
        """Pods for a prompt, by what they hold and how loaded they are."""
        prefill = group.prefill if hand_over else []
        depths: dict[str, int] = {}
        if prefill or len(group.decode) > 1:
            depths = await self._depths(group, tokens, salt)
        threshold = group.served.policy.prefill_threshold
        choice = routing.choose(
            group.decode,
            prefill,
            tokens=len(tokens),
            depths=depths,
            threshold=self.config.prefill_threshold if threshold is None else threshold,
        )
        metrics.routed.labels(choice.kind).inc()
        metrics.hit_depth_tokens.observe(choice.depth)
        return choice

    async def _depths(
        self, group: Group, tokens: Sequence[int], salt: str | None
    ) -> dict[str, int]:
        if self.index is None:
            return {}
        member = group.member
        algorithm, size = member.hash_algorithm, member.block_size
        shared = tokens[: routing.handed_over(len(tokens), size)]
        root = hashing.root_hash(algorithm, member.hash_revision, salt)
        hashes = hashing.block_hashes(algorithm, root, shared, size)
        try:
            blocks = await self.index.lookup(member.fingerprint, hashes, member.needs_checkpoint)
        except IndexUnavailable:
            metrics.index_failures.inc()
            return {}
        return {pod: depth * size for pod, depth in blocks.items()}

    async def post(self, pod: Pod, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and whole answer of a short exchange."""
        timeout = self.config.admit_timeout
        response = await self.client.request("POST", pod.member.url + path, body, silence=timeout)
        try:
            return response.status, await response.body()
        finally:
            response.close()

    def release(self, pod: Pod, request_id: str) -> None:
        """Tells a prefill pod, without waiting, that nobody will come for a prefix."""
        task = asyncio.create_task(self._release(pod, request_id))
        self._goodbyes.add(task)
        task.add_done_callback(self._goodbyes.discard)

    async def _release(self, pod: Pod, request_id: str) -> None:
        url = f"{pod.member.url}/requests/{request_id}"
        with contextlib.suppress(UpstreamError):  # its lease will run out
            response = await self.client.request("DELETE", url, silence=_GOODBYE_SECONDS)
            response.close()


class Relay:
    """Brings one prompt from its pods to `sink`, in payloads of whole server-sent events."""

    def __init__(
        self, legs: Legs, model: str, request: GenerateRequest, sink: Sink, deadline: float
    ) -> None:
        """`model`: a served name; `deadline`: on the clock of `time.monotonic`."""
        self._legs = legs
        self._model = model
        self._request = request
        self._sink = sink
        self._deadline = deadline
        self._journal = Journal(request.sampling.n)
        self._numbers = ""
        """`hash_revision` of the pods it was for last: those of another compute other tokens."""
        self._tries = 0
        self._reads = 0
        self._first_read = self._last_read = 0.0
        self.failovers = 0
        self.pods: list[tuple[str | None, str]] = []
        """Of each attempt: the prefill pod that gave a ticket, the decode pod that took it."""

    async def run(self) -> Usage:
        """Relays until the stream is complete.

        Raises:
            OverloadedError: no decode pod took it.
            ReplacedError: its model was; where nothing was sent it can begin anew.
            DeadlineError: its time was up.
            PodError: a pod refused or failed the request itself.
        """
        while True:
            try:
                usage = await self._attempt()
                break
            except PodLost as lost:
                self._note(lost)
                if self._journal.finished:  # only the usage is missing
                    usage = self._own_usage()
                    break
                await asyncio.sleep(_BACKOFF[min(self.failovers, len(_BACKOFF)) - 1])
            except PodsLeftError:
                continue
            except AllBusyError:
                patient = time.monotonic() < self._last_read + self._legs.config.patience
                if not (self._journal.begun and patient):
                    raise
                await asyncio.sleep(_BUSY_SECONDS)
        if self._reads > 1:
            mean = (self._last_read - self._first_read) / (self._reads - 1)
            metrics.inter_token_seconds.observe(mean)
        return usage

    def _note(self, lost: PodLost) -> None:
        self.failovers += 1
        metrics.failovers.labels(lost.reason).inc()
        log.warning(
            "failover",
            request_id=self._request.request_id,
            reason=lost.reason,
            error=str(lost),
            tokens=self._journal.num_tokens,
        )
        if self.failovers >= self._legs.config.attempts:
            raise OverloadedError(
                f"{self.failovers} decode pods were lost over this request; the last: {lost}"
            ) from lost

    def _own_usage(self) -> Usage:
        prompt = len(self._request.prompt_token_ids)
        done = self._journal.num_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=done, cached_tokens=0)

    async def _attempt(self) -> Usage:
        """One route from prefill to the last token; the pods' refusals lead to the next best."""
        group = await self._group()
        legs, request = self._legs, self._request
        tokens = request.prompt_token_ids + self._journal.only
        choice = await legs.choose(
            group,
            tokens,
            request.cache_salt,
            hand_over=request.sampling.prompt_logprobs is None,
        )
        name = f"{request.request_id}-{self._tries}"
        self._tries += 1
        prefilled = await self._prefill(choice, name, tokens)
        try:
            with tracing.span("decode", request_id=name) as leg:
                request = msgspec.structs.replace(
                    request,
                    request_id=name,
                    timeout=self._remaining(),
                    ticket=prefilled.ticket if prefilled else None,
                    resume=self._journal.resume(),
                    trace=leg.header,
                )
                pod, response = await self._admit(choice.decode, request)
                leg.note(pod=pod.member.pod)
                self.pods.append((prefilled.giver if prefilled else None, pod.member.pod))
                burden = pod.carry(0 if prefilled else len(tokens) - choice.depth)
                try:
                    return await self._stream(response, burden, prefilled)
                except (UpstreamError, PodLost) as error:
                    raise self._lost(pod, error) from error
                finally:
                    response.close()
                    burden.end()
        finally:
            if prefilled:
                prefilled.leave()

    def _lost(self, pod: Pod, error: UpstreamError | PodLost) -> PodLost:
        """Takes the pod out of routing until it answers again."""
        self._legs.fleet.suspect(pod)
        reason = error.reason if isinstance(error, PodLost) else _REASONS[type(error)]
        return PodLost(reason, f"{pod.member.pod}: {error}")

    async def _group(self) -> Group:
        """The pods that serve the model; where the last was lost a moment ago, waits for one.

        Raises:
            ReplacedError: only pods that compute other tokens are ready.
            OverloadedError: none is.
        """
        fleet, name, patience = self._legs.fleet, self._model, self._legs.config.patience
        until = min(time.monotonic() + patience, self._deadline)
        while (group := fleet.group(name, self._request.fingerprint)) is None:
            left = until - time.monotonic()
            if (successor := fleet.groups.get(name)) is not None:
                if successor.member.hash_revision == self._numbers:
                    group = successor
                    break
                awaited = self._journal.begun and fleet.awaits(name, self._request.fingerprint)
                if left <= 0 or not awaited:
                    raise ReplacedError(f"{name} was replaced by another version; send it again.")
            elif left <= 0 or not fleet.served(name, within=patience):
                raise OverloadedError(f"No decode pod of {name} is ready.", retry_after=5.0)
            await fleet.changed(left)
        self._numbers = group.member.hash_revision
        fingerprint = group.member.fingerprint
        self._request = msgspec.structs.replace(self._request, fingerprint=fingerprint)
        return group

    def _remaining(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError("The request's time was up before it was done.")
        return left

    async def _prefill(
        self, choice: routing.Choice[Pod], name: str, tokens: list[int]
    ) -> "_Prefilled | None":
        """A ticket from the best prefill pod that gives one; None: the decode pod prefills."""
        legs, request = self._legs, self._request
        for pod in choice.prefill[:_PREFILL_TRIES]:
            body = PrefillRequest(
                request_id=name,
                prompt_token_ids=tokens,
                cache_salt=request.cache_salt,
                priority=request.priority,
                timeout=self._remaining(),
            )
            prefilled = _Prefilled(legs, pod, name, len(tokens) - choice.depth)
            try:
                with tracing.span("prefill", request_id=name, pod=pod.member.pod) as leg:
                    body = msgspec.structs.replace(body, trace=leg.header)
                    status, answer = await legs.post(pod, "/prefill", _encode(body))
                    leg.note(status=status)
                if status == 200:
                    prefilled.ticket = _ticket_decoder.decode(answer)
                    return prefilled
                reason = "busy" if status in answers.BUSY else "refused"
                if answers.unavailable(answer):
                    legs.fleet.suspect(pod)
            except UpstreamError as error:
                reason = _REASONS[type(error)]
                if not isinstance(error, SilentError):
                    legs.fleet.suspect(pod)
            except msgspec.MsgspecError:
                reason = "unreadable"
            finally:
                if prefilled.ticket is None:
                    prefilled.leave()
            metrics.prefill_leg_failures.labels(reason).inc()
            log.warning("no_ticket", request_id=name, pod=pod.member.pod, reason=reason)
        return None

    async def _admit(self, pods: Sequence[Pod], request: GenerateRequest) -> tuple[Pod, Response]:
        """The first pod that takes the request, with its answer begun.

        Raises:
            PodLost: a pod could not be reached, or failed; it is out of routing for now.
            PodError: a pod says that the request cannot be served.
            AllBusyError: none has room.
            PodsLeftError: some are no longer among those to ask.
        """
        body = _encode(request)
        left = False
        for pod in pods:
            url = pod.member.url + "/generate"
            try:
                response = await self._legs.client.request(
                    "POST", url, body, silence=self._remaining()
                )
                if response.status == 200:
                    return pod, response
                try:
                    answer = await response.body()
                finally:
                    response.close()
                if response.status not in answers.BUSY:
                    raise answers.refusal(response.status, answer)
                if answers.unavailable(answer):
                    self._legs.fleet.suspect(pod)
                    left = True
            except (UpstreamError, PodLost) as error:
                raise self._lost(pod, error) from error
        if left:
            raise PodsLeftError
        raise AllBusyError(f"All decode pods of {self._model} are busy.")

    async def _stream(
        self, response: Response, burden: Burden, prefilled: "_Prefilled | None"
    ) -> Usage:
        """Relays the frames of one pod to the sink."""
        response.allow(self._remaining())
        decoder, journal = frames.Decoder(), self._journal
        fresh = True
        while data := await response.read():
            payloads, end, broken = [], None, None
            try:
                for frame in decoder.feed(data):
                    if frame.kind > frames.Kind.FINISH:
                        end = frame
                        break
                    payloads.append(journal.take(frame))
            except (ValueError, IndexError) as error:
                broken = BrokenError(f"it sent a frame that is none ({error}).")
            if payload := b"".join(payloads):
                await self._sink(payload)
                self._last_read = time.monotonic()
                self._reads += 1
                self._first_read = self._first_read or self._last_read
                if fresh:
                    fresh = False
                    burden.computed()
                    if prefilled:
                        prefilled.taken()
                    response.allow(self._legs.config.stall_timeout)
            if broken is not None:  # what is journaled has been sent
                raise broken
            if end is not None:
                return await answers.ended(end, response)
        raise BrokenError("its stream ended before it was complete.")


class _Prefilled:
    """A prefix that a prefill pod computes for one request."""

    def __init__(self, legs: Legs, pod: Pod, name: str, missing: int) -> None:
        self.ticket: Ticket | None = None
        self._legs, self._pod, self._name = legs, pod, name
        self._burden = pod.carry(missing)
        self.giver = pod.member.pod
        self._wanted = True

    def taken(self) -> None:
        """The decode pod has it: its tokens flow."""
        self._wanted = False
        self._burden.end()

    def leave(self) -> None:
        """The request is over; a prefix that nobody took is given back."""
        self._burden.end()
        if self._wanted:
            self._wanted = False
            self._legs.release(self._pod, self._name)
