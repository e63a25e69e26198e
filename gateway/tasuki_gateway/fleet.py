"""The pods this gateway knows, and how loaded they are.

The index lists the pods that live. A pod that it does not list (it was away, or lost its memory),
or that failed us, is asked itself, and leaves the fleet when it refuses, or is silent for
`SILENCE_SECONDS`. So the fleet outlives the index, and a pod's death is known before its heartbeat
runs out. What a silent pod still had to answer is failed when it leaves, and goes on elsewhere.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from tasuki_common import logs, policy
from tasuki_common.errors import ConfigError
from tasuki_common.messages import Member
from tasuki_common.policy import Policy
from tasuki_gateway import metrics, models, routing
from tasuki_gateway.http_client import HttpClient, SilentError, UpstreamError
from tasuki_gateway.models import ModelText
from tasuki_index import Index, IndexUnavailable

log = logs.get("tasuki.gateway")

REFRESH_SECONDS = 1.0
SUSPECT_SECONDS = 0.2
"""Between refreshes while a pod is suspect: its return is awaited."""
LEAST_SECONDS = 0.1
"""Between refreshes, whoever asks for one."""
SILENCE_SECONDS = 6.0
"""A pod on a busy machine may miss a question; this is no longer busy."""
FORGET_SECONDS = 600.0
"""A name without a ready decode pod answers 503 for so long, and then 404."""
_ASK_SECONDS = 2.0
_member_decoder = msgspec.msgpack.Decoder(Member)


class Pod:
    """One pod: its last heartbeat, and what this gateway has running on it."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.suspect = False
        """It failed us and has not answered since."""
        self.heard_at = time.monotonic()
        self._requests = self._tokens = 0
        self._requests_then = self._tokens_then = 0

    def heard(self, member: Member) -> None:
        """Takes a new heartbeat; what it counts is no longer counted here."""
        if member.load != self.member.load or member.incarnation != self.member.incarnation:
            self._requests_then, self._tokens_then = self._requests, self._tokens
        self.member = member
        self.heard_at = time.monotonic()

    @property
    def names(self) -> tuple[str, ...]:
        """Under which its model is served."""
        return (self.member.model, *self.member.aliases)

    @property
    def busy(self) -> int:
        """Requests running or waiting: the heartbeat's, and the change in ours since it."""
        load = self.member.load
        return max(
            self._requests, load.running + load.waiting + self._requests - self._requests_then
        )

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens still to compute."""
        return max(0, self.member.load.waiting_tokens + self._tokens - self._tokens_then)

    def carry(self, tokens: int) -> "Burden":
        """Counts a request sent to it, with `tokens` prompt tokens to compute, until it ends."""
        self._requests += 1
        self._tokens += tokens
        return Burden(self, tokens)


class Burden:
    """One request of this gateway's on a pod."""

    def __init__(self, pod: Pod, tokens: int) -> None:
        self._pod = pod
        self._tokens = tokens
        self._ended = False

    def computed(self) -> None:
        """The prompt tokens are computed, or no longer wanted."""
        self._pod._tokens -= self._tokens
        self._tokens = 0

    def end(self) -> None:
        """The request is over; more calls do nothing."""
        self.computed()
        if not self._ended:
            self._ended = True
            self._pod._requests -= 1


class Served(NamedTuple):
    """What is known of a name, whether a pod is ready for it now or not."""

    model: str
    """The served name; the name itself may be an alias of it."""
    text: ModelText
    """Of the fingerprint, which other served names may have as well."""
    policy: Policy
    max_model_len: int
    """Tokens of prompt and output that all of the pods take."""


class Group:
    """The pods that serve one name: of one fingerprint, ready, not draining."""

    def __init__(self, text: ModelText, pods: Iterable[Pod]) -> None:
        pods = list(pods)
        self.decode = [pod for pod in pods if pod.member.role == "decode"]
        self.prefill = [pod for pod in pods if pod.member.role == "prefill"]
        members = [pod.member for pod in pods]
        self.served = Served(
            model=members[0].model,
            text=text,
            policy=policy.together([member.policy for member in members]),
            max_model_len=min(member.max_model_len for member in members),
        )

    @property
    def member(self) -> Member:
        """One of the decode pods: for what all of a fingerprint share."""
        return self.decode[0].member


class Fleet:
    """Keeps groups by served name up to date; `run` is the task that does it."""

    def __init__(
        self, client: HttpClient, index: Index | None, seeds: Iterable[str], inline_characters: int
    ) -> None:
        self.groups: dict[str, Group] = {}
        """Where new requests go, by served name and alias; only names with a ready decode pod."""
        self.names: dict[str, Served] = {}
        """All names served of late, ready now or not."""
        self.informed = index is None
        """Whether the index, where there is one, has told once who is there."""
        self._told = index is None
        """Whether it told at the last refresh."""
        self._client = client
        self._index = index
        self._seeds = tuple(seed.rstrip("/") for seed in seeds)
        self._inline_characters = inline_characters
        self._pods: dict[str, Pod] = {}
        self._all_groups: dict[tuple[str, str], Group] = {}
        self._texts: dict[str, ModelText] = {}
        self._unusable: set[str] = set()
        """Incarnations whose card cannot be used; they are not asked for it again."""
        self._serving: dict[str, str] = {}
        self._served_at: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._looked = asyncio.Event()
        """Set at the end of the next refresh that begins."""

    async def run(self) -> None:
        """Refreshes for ever."""
        while True:
            begun = time.monotonic()
            looked, self._looked = self._looked, asyncio.Event()
            try:
                await self.refresh()
            except Exception:
                log.exception("refresh_failed")
            looked.set()
            suspects = any(pod.suspect for pod in self._pods.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SUSPECT_SECONDS if suspects else REFRESH_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(begun + LEAST_SECONDS - time.monotonic())

    async def refresh(self) -> None:
        """One look at the index and, where it does not suffice, at the pods."""
        listed = {member.pod: member for member in await self._listed()}
        to_ask = {pod.member.url for name, pod in self._pods.items() if name not in listed}
        to_ask |= {pod.member.url for pod in self._pods.values() if pod.suspect}
        to_ask |= set(self._seeds) - {member.url for member in listed.values()}
        answers = await asyncio.gather(*(self._ask(url) for url in to_ask))
        silent = {url for url, answer in zip(to_ask, answers, strict=True) if answer == "silent"}
        answered = {answer.pod: answer for answer in answers if isinstance(answer, Member)}
        for name in self._pods.keys() - listed.keys() - answered.keys():
            self._miss(self._pods[name], silent=self._pods[name].member.url in silent)
        for name, member in (listed | answered).items():
            self._hear(member, answered=name in answered)
        await self._load_texts()
        self._regroup()

    def suspect(self, pod: Pod) -> None:
        """Takes a pod that failed us out of routing until it answers again."""
        if not pod.suspect:
            pod.suspect = True
            log.warning("pod_suspect", pod=pod.member.pod)
            self._regroup()
            self._wake.set()

    def group(self, name: str, fingerprint: str) -> Group | None:
        """The ready pods for a request that began under `fingerprint`, during a rollout too."""
        return self._all_groups.get((name, fingerprint))

    def awaits(self, name: str, fingerprint: str) -> bool:
        """Whether such a decode pod was here a moment ago and may return."""
        return any(
            pod.suspect
            and pod.member.role == "decode"
            and pod.member.fingerprint == fingerprint
            and name in pod.names
            for pod in self._pods.values()
        )

    def served(self, name: str, *, within: float) -> bool:
        """Whether a decode pod was ready for the name in the last `within` seconds."""
        return name in self._served_at and time.monotonic() - self._served_at[name] < within

    async def look(self, seconds: float) -> None:
        """Until a refresh that begins from now on has heard of the index, or `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    self._wake.set()
                    await self._looked.wait()
                    if self._told:
                        return
                    await asyncio.sleep(SUSPECT_SECONDS)

    async def changed(self, seconds: float) -> None:
        """Until the groups change, or `seconds`."""
        await _within(seconds, self._changed)

    async def _listed(self) -> list[Member]:
        if self._index is None:
            return []
        try:
            members = await self._index.members()
        except IndexUnavailable:
            self._told = False
            return []
        self.informed = self._told = True
        return members

    async def _ask(self, url: str) -> Member | Literal["silent", "refused"]:
        """What the pod at `url` says of itself."""
        try:
            status, packed = await self._get(url + "/member")
            return _member_decoder.decode(packed) if status == 200 else "refused"
        except SilentError:
            return "silent"
        except UpstreamError:
            return "refused"
        except msgspec.MsgspecError as error:
            log.warning("member_unreadable", url=url, error=str(error))
            return "refused"

    async def _get(self, url: str) -> tuple[int, bytes]:
        response = await self._client.request("GET", url, silence=_ASK_SECONDS)
        try:
            return response.status, await response.body()
        finally:
            response.close()

    def _miss(self, pod: Pod, *, silent: bool) -> None:
        """A pod neither stands in the index nor answers."""
        if silent and time.monotonic() - pod.heard_at < SILENCE_SECONDS:
            return
        name = pod.member.pod
        log.info("pod_left", pod=name, silent=silent)
        del self._pods[name]
        if silent:
            self._client.abandon(pod.member.url, "is silent and no longer listed")

    def _hear(self, member: Member, *, answered: bool) -> None:
        pod = self._pods.get(member.pod)
        if pod is None:
            self._pods[member.pod] = Pod(member)
            log.info("pod_joined", pod=member.pod, role=member.role, url=member.url)
            return
        if answered or member.incarnation != pod.member.incarnation:
            pod.suspect = False
        pod.heard(member)

    async def _load_texts(self) -> None:
        """Fetches the card of each fingerprint not seen before, from one of its pods."""
        alive = {pod.member.fingerprint for pod in self._pods.values()}
        alive |= set(self._serving.values())
        self._texts = {name: text for name, text in self._texts.items() if name in alive}
        self._unusable &= {pod.member.incarnation for pod in self._pods.values()}
        for pod in list(self._pods.values()):
            member = pod.member
            if member.fingerprint in self._texts or pod.suspect:
                continue
            if member.incarnation in self._unusable:
                continue
            try:
                status, packed = await self._get(member.url + "/card")
                if status != 200:
                    continue
                text = await models.load(packed, inline_characters=self._inline_characters)
            except UpstreamError:
                continue
            except (msgspec.MsgspecError, ConfigError) as error:
                self._unusable.add(member.incarnation)
                log.error("card_unusable", pod=member.pod, error=str(error))
                continue
            self._texts[member.fingerprint] = text

    def _regroup(self) -> None:
        usable = [
            pod
            for pod in self._pods.values()
            if not (pod.suspect or pod.member.draining)
            and pod.member.policy.exposed
            and pod.member.fingerprint in self._texts
        ]
        pods: dict[tuple[str, str], list[Pod]] = {}
        for pod in usable:
            for name in pod.names:
                pods.setdefault((name, pod.member.fingerprint), []).append(pod)
        every = {key: Group(self._texts[key[1]], members) for key, members in pods.items()}
        self._all_groups = {key: group for key, group in every.items() if group.decode}
        groups: dict[str, Group] = {}
        for name in {name for name, _ in self._all_groups}:
            sizes = {f: len(g.decode) for (n, f), g in self._all_groups.items() if n == name}
            chosen = routing.pick_fingerprint(sizes, self._serving.get(name))
            self._serving[name] = chosen
            groups[name] = self._all_groups[name, chosen]
            self.names[name] = groups[name].served
        self.groups = groups
        self._forget_names()
        _count(groups)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _forget_names(self) -> None:
        """Of models that have gone for good (their tokenizers are large), or are not exposed."""
        now = time.monotonic()
        pods = self._pods.values()
        hidden = {name for pod in pods if not pod.member.policy.exposed for name in pod.names}
        self._served_at |= dict.fromkeys(self.groups, now)
        for name, at in list(self._served_at.items()):
            if now - at > FORGET_SECONDS or name in hidden - self.groups.keys():
                del self._served_at[name], self._serving[name], self.names[name]


async def _within(seconds: float, event: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _count(groups: dict[str, Group]) -> None:
    """Brings the gauge of pods up to date."""
    metrics.pods.clear()
    for name, group in groups.items():
        metrics.pods.labels(name, "decode").set(len(group.decode))
        metrics.pods.labels(name, "prefill").set(len(group.prefill))
