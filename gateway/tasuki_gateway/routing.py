"""Which pods serve a request: pure functions of what is known about pods and prompt.

Work is counted in prompt tokens: what a pod has to compute before this request's first token, and
what the request costs by making a batch larger. All constants are in that unit.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from tasuki_common.messages import Member

PULL = 0.02
"""Moving a token's cache from pod to pod, against computing it."""
COMPANY = 64.0
"""Each request in the batch of a decode pod."""
NO_ROOM = 16384.0
"""A pod without free blocks for the prompt: it would preempt, or make the request wait."""

Kind = Literal["prefill", "local"]


class PodLoad(Protocol):
    """A pod as routing sees it: its heartbeat, and what this gateway has sent since."""

    @property
    def member(self) -> Member: ...
    @property
    def busy(self) -> int:
        """Requests running or waiting."""

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens still to compute."""


PodT = TypeVar("PodT", bound=PodLoad)


class Choice(NamedTuple, Generic[PodT]):
    """Pods in the order in which to try them; without a prefill pod the decode pod prefills."""

    decode: list[PodT]
    prefill: list[PodT]
    depth: int
    """Tokens of the prompt that the first decode pod holds already."""

    @property
    def kind(self) -> Kind:
        return "prefill" if self.prefill else "local"


def handed_over(tokens: int, block_size: int) -> int:
    """Prompt tokens that another pod can compute: full blocks, one token left to sample from."""
    return (tokens - 1) // block_size * block_size


def choose(
    decode: Sequence[PodT],
    prefill: Sequence[PodT],
    *,
    tokens: int,
    depths: Mapping[str, int],
    threshold: int,
    tie: Callable[[], float] = random.random,
) -> Choice[PodT]:
    """The pods for a prompt of `tokens` tokens, of which pod `name` holds `depths[name]`.

    The decode pod prefills itself where no more than `threshold` tokens (or one block) are missing
    on the one that would be done first, or where there is no prefill pod.
    """

    def missing(pod: PodT) -> int:
        return tokens - depths.get(pod.member.pod, 0)

    def decode_work(pod: PodT) -> float:
        full = pod.member.load.blocks_free * pod.member.block_size < tokens
        return pod.waiting_tokens + COMPANY * pod.busy + (NO_ROOM if full else 0.0)

    local = _ordered(decode, lambda pod: missing(pod) + decode_work(pod), tie)
    if not prefill or not local or missing(local[0]) <= max(threshold, _block(local)):
        return Choice(local, [], depths.get(local[0].member.pod, 0) if local else 0)
    pulling = _ordered(decode, lambda pod: PULL * missing(pod) + decode_work(pod), tie)
    givers = _ordered(prefill, lambda pod: missing(pod) + pod.waiting_tokens, tie)
    return Choice(pulling, givers, depths.get(pulling[0].member.pod, 0))


def _block(pods: Sequence[PodT]) -> int:
    return pods[0].member.block_size


def _ordered(
    pods: Sequence[PodT], work: Callable[[PodT], float], tie: Callable[[], float]
) -> list[PodT]:
    if len(pods) == 1:
        return list(pods)
    return sorted(pods, key=lambda pod: (work(pod), tie()))


def pick_fingerprint(decode_pods: Mapping[str, int], current: str | None) -> str:
    """The one fingerprint that serves a name while a rollout has several: never are two paired.

    `decode_pods`: ready decode pods by fingerprint, at least one. The most win; at a tie the one
    that serves now.
    """
    return max(decode_pods, key=lambda name: (decode_pods[name], name == current, name))
