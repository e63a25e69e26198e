"""The life of a pod's HTTP process: start the engine, serve, announce, drain, leave.

Start: the engine process loads while this one opens its port and reads the tokenizer; /health
answers at once, /ready when a request would be served.

Leaving (SIGTERM, SIGINT), each step with its own deadline; a second signal skips the waiting:
    1  /ready says no, and the index learns that the pod is draining
    2  new requests are answered 503, with Retry-After
    3  requests under way and leases of other pods are waited for, `drain_seconds` at most
    4  the pod withdraws from the index
    5  the engine stops; a stream that is still open ends with RETRY, so that another pod continues
    6  the HTTP server closes and the process exits with 0

An engine that dies takes its pod along: every stream ends with RETRY, the process exits with 1, and
whoever supervises it starts a new incarnation.
"""

import asyncio
import contextlib
import secrets
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from tasuki_common import logs
from tasuki_common.errors import UnavailableError
from tasuki_common.hashing import block_hashes, root_hash
from tasuki_common.messages import Load, Member, ModelCard, Role
from tasuki_pod.config import PodConfig
from tasuki_pod.engine_client import EngineClient
from tasuki_pod.http import msgpack_response
from tasuki_pod.membership import Membership
from tasuki_pod.metrics import Metrics
from tasuki_pod.policy import PolicyFile
from tasuki_pod.wire import Backend, PrefixEnded, Ready, Start

log = logs.get("tasuki.pod")

CARD_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "config.json",
)
_STOP_SECONDS = 5.0


class Pod:
    """One pod, as its role's routes see it."""

    def __init__(self, config: PodConfig, role: Role, url: str) -> None:
        self.config = config
        self.role = role
        self.url = url
        self.incarnation = secrets.token_hex(8)
        self._policy = PolicyFile(config.policy_file)
        self.metrics = Metrics(role)
        self.membership = Membership(config, self.member)
        self.client = EngineClient(
            on_cache_events=self.membership.on_cache_events, on_prefix_ended=self._on_prefix_ended
        )
        self.metrics.watch(self.client)
        self.on_prefix_ended: list[Callable[[PrefixEnded], None]] = []
        self._engine: Ready | None = None
        self._created = int(time.time())
        self._accepting = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def engine(self) -> Ready:
        """What the loaded engine said of itself.

        Raises:
            UnavailableError: it is still loading.
        """
        if self._engine is None:
            raise UnavailableError("The model is still being loaded.", retry_after=2.0)
        return self._engine

    @property
    def ready(self) -> bool:
        """Whether a request would be served now."""
        return self._accepting and self._engine is not None and self.client.alive

    def member(self) -> Member:
        """The pod as it announces itself."""
        config, engine, stats = self.config, self.engine, self.client.stats
        return Member(
            pod=config.pod_name,
            incarnation=self.incarnation,
            role=self.role,
            model=config.served_name,
            aliases=config.aliases,
            fingerprint=engine.fingerprint,
            url=self.url,
            transfer=engine.transfer_backends,
            max_model_len=engine.max_model_len,
            block_size=engine.block_size,
            hash_algorithm=engine.hash_algorithm,
            hash_revision=engine.hash_revision,
            needs_checkpoint=engine.needs_checkpoint,
            draining=not self.ready,
            policy=self._policy.current(),
            load=Load(
                running=stats.running,
                waiting=stats.waiting,
                waiting_tokens=stats.waiting_tokens,
                blocks_free=stats.blocks_total - stats.blocks_used,
                blocks_total=stats.blocks_total,
                leases=self.client.leases,
            ),
        )

    def card(self) -> ModelCard:
        """What a gateway needs to know of the model."""
        engine, folder = self.engine, Path(self.engine.folder)
        return ModelCard(
            model=self.config.served_name,
            fingerprint=engine.fingerprint,
            root=self.config.model,
            vocab_size=engine.vocab_size,
            created=self._created,
            files={
                name: (folder / name).read_bytes()
                for name in CARD_FILES
                if (folder / name).is_file()
            },
        )

    def prefix_hash(self, token_ids: list[int], cache_salt: str | None) -> bytes:
        """Name of the last block of `token_ids`, whose number is a multiple of the block size."""
        engine = self.engine
        root = root_hash(engine.hash_algorithm, engine.hash_revision, cache_salt)
        return block_hashes(engine.hash_algorithm, root, token_ids, engine.block_size)[-1]

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """Counts a request in while the block runs.

        Raises:
            UnavailableError: the pod is not ready, or on its way out.
        """
        if not self.ready:
            state = "still loading" if self._engine is None else "leaving"
            raise UnavailableError(f"Pod {self.config.pod_name} is {state}; ask another one.")
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def start(self) -> None:
        """Starts the engine process, which loads while the caller goes on."""
        config = self.config
        await self.client.start(
            Start(
                engine=config.engine_config(),
                role=self.role,
                pod=config.pod_name,
                deployment=config.deployment,
                incarnation=self.incarnation,
                transfer_key=config.transfer_key.encode(),
                transfer_backends=typing.cast(tuple[Backend, ...], config.transfer_backends),
                transfer_host=config.transfer_host,
                transfer_port=config.transfer_port,
                lease_seconds=config.lease_seconds,
                log_level=config.log_level,
            )
        )

    async def open(self) -> None:
        """Waits for the engine, then takes requests and announces the pod."""
        self._engine = await self.client.ready()
        self._accepting = True
        self.membership.start()
        log.info(
            "pod_ready",
            pod=self.config.pod_name,
            incarnation=self.incarnation,
            url=self.url,
            fingerprint=self.engine.fingerprint,
            max_model_len=self.engine.max_model_len,
            transfer=f"{self.engine.transfer_host}:{self.engine.transfer_port}",
            transfer_backends=self.engine.transfer_backends,
        )

    async def drain(self, forced: asyncio.Event) -> None:
        """Steps 1 to 5 of leaving."""
        log.info("drain_1_not_ready", pod=self.config.pod_name)
        self._accepting = False
        self.membership.announce_soon()
        log.info("drain_2_admission_closed", in_flight=self._in_flight, leases=self.client.leases)
        waiting = asyncio.ensure_future(self._wait_until_idle())
        force = asyncio.ensure_future(forced.wait())
        await asyncio.wait(
            (waiting, force),
            timeout=self.config.drain_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in (waiting, force):
            task.cancel()
        log.info("drain_3_waited", in_flight=self._in_flight, leases=self.client.leases)
        await self.membership.stop()
        log.info("drain_4_withdrawn")
        await self.client.stop(_STOP_SECONDS if self._engine is not None else 0.0)
        log.info("drain_5_engine_stopped")

    async def _wait_until_idle(self) -> None:
        await self._idle.wait()
        if self._engine is not None and self.client.alive:
            await self.client.drain(self.config.drain_seconds)

    def _on_prefix_ended(self, ended: PrefixEnded) -> None:
        self.metrics.prefix_ended(ended.outcome)
        for listener in self.on_prefix_ended:
            listener(ended)


def common_routes(pod: Pod) -> list[BaseRoute]:
    """What every pod answers, whatever its role."""

    async def health(_: Request) -> Response:
        return PlainTextResponse(
            "ok" if pod.client.alive else "engine lost", _status(pod.client.alive)
        )

    async def ready(_: Request) -> Response:
        """Who replaces pods waits for this: a pod that no gateway finds replaces nobody."""
        known = pod.membership.announced
        text = "ready" if pod.ready and known else "not ready" if known else "not in the index"
        return PlainTextResponse(text, _status(pod.ready and known))

    async def member(_: Request) -> Response:
        return msgpack_response(pod.member())

    async def card(_: Request) -> Response:
        return msgpack_response(await asyncio.to_thread(pod.card))

    async def metrics(_: Request) -> Response:
        pod.metrics.event_loop_tasks.set(len(asyncio.all_tasks()))
        return Response(pod.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    handlers = {
        "/health": health,
        "/ready": ready,
        "/member": member,
        "/card": card,
        "/metrics": metrics,
    }
    return [Route(path, handler, methods=["GET"]) for path, handler in handlers.items()]


def _status(good: bool) -> int:
    return 200 if good else 503
