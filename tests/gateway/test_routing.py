"""Which pods are chosen: a table of situations."""

import dataclasses

import pytest

from tasuki_common.messages import Load, Member, Role
from tasuki_gateway import routing

BLOCK = 16


@dataclasses.dataclass
class Pod:
    member: Member
    busy: int = 0
    waiting_tokens: int = 0


def pod(name: str, role: Role = "decode", busy: int = 0, waiting: int = 0, free: int = 9999) -> Pod:
    member = Member(
        pod=name,
        incarnation="i",
        role=role,
        model="m",
        fingerprint="f",
        url="http://x",
        max_model_len=9999,
        block_size=BLOCK,
        hash_algorithm="xxh3",
        hash_revision="r",
        needs_checkpoint=True,
        load=Load(blocks_free=free),
    )
    return Pod(member, busy, waiting)


P0, P1 = pod("p0", "prefill"), pod("p1", "prefill")
BUSY_P0 = pod("p0", "prefill", waiting=8000)

CASES = {
    # name: (decode, prefill, tokens, depths, expected decode order, expected prefill order, depth)
    "a long new prompt is handed over": ([pod("d0")], [P0], 1000, {}, ["d0"], ["p0"], 0),
    "a short prompt is prefilled where it decodes": ([pod("d0")], [P0], 200, {}, ["d0"], [], 0),
    "a short rest of a long prompt too": ([pod("d0")], [P0], 1000, {"d0": 800}, ["d0"], [], 800),
    "a prefix on an idle pod draws the request": (
        [pod("d0"), pod("d1")],
        [],
        1000,
        {"d1": 512},
        ["d1", "d0"],
        [],
        512,
    ),
    "a prefix on an overloaded pod does not": (
        [pod("d0"), pod("d1", busy=20)],
        [P0],
        1000,
        {"d1": 900},
        ["d0", "d1"],
        ["p0"],
        0,
    ),
    "the less busy pod decodes": (
        [pod("d0", busy=3), pod("d1", busy=1)],
        [],
        100,
        {},
        ["d1", "d0"],
        [],
        0,
    ),
    "a pod without room comes last": (
        [pod("d0", free=2), pod("d1", busy=50)],
        [P0],
        1000,
        {},
        ["d1", "d0"],
        ["p0"],
        0,
    ),
    "the prefill pod with the longest prefix computes": (
        [pod("d0")],
        [P0, P1],
        4000,
        {"p1": 2048},
        ["d0"],
        ["p1", "p0"],
        0,
    ),
    "unless its queue is longer than what it saves": (
        [pod("d0")],
        [BUSY_P0, P1],
        4000,
        {"p0": 2048},
        ["d0"],
        ["p1", "p0"],
        0,
    ),
    "without a prefill pod the decode pod computes": ([pod("d0")], [], 9000, {}, ["d0"], [], 0),
    "without a decode pod there is no choice": ([], [P0], 1000, {}, [], [], 0),
}


@pytest.mark.parametrize("name", CASES)
def test_pods_are_chosen_by_what_they_hold_and_how_busy_they_are(name: str) -> None:
    decode, prefill, tokens, depths, want_decode, want_prefill, depth = CASES[name]
    chosen = routing.choose(
        decode, prefill, tokens=tokens, depths=depths, threshold=256, tie=lambda: 0.0
    )
    assert [pod.member.pod for pod in chosen.decode] == want_decode
    assert [pod.member.pod for pod in chosen.prefill] == want_prefill
    assert chosen.depth == depth
    assert chosen.kind == ("prefill" if want_prefill else "local")


def test_a_prompt_without_a_full_block_is_never_handed_over() -> None:
    for tokens in range(1, BLOCK + 1):
        assert routing.handed_over(tokens, BLOCK) == 0
        assert not routing.choose([pod("d0")], [P0], tokens=tokens, depths={}, threshold=0).prefill
    assert routing.handed_over(BLOCK + 1, BLOCK) == BLOCK
    assert routing.choose([pod("d0")], [P0], tokens=BLOCK + 1, depths={}, threshold=0).prefill


def test_equal_pods_share_the_requests() -> None:
    pods = [pod("d0"), pod("d1"), pod("d2")]
    first = {
        routing.choose(pods, [], tokens=50, depths={}, threshold=0).decode[0].member.pod
        for _ in range(200)
    }
    assert first == {"d0", "d1", "d2"}


@pytest.mark.parametrize(
    ("ready", "current", "expected"),
    [
        ({"a": 2, "b": 1}, "a", "a"),
        ({"a": 1, "b": 2}, "a", "b"),
        ({"a": 1, "b": 1}, "a", "a"),
        ({"a": 1, "b": 1}, "b", "b"),
        ({"b": 1}, "a", "b"),
    ],
)
def test_a_rollout_moves_to_the_new_fingerprint_once_most_pods_have_it(
    ready: dict[str, int], current: str | None, expected: str
) -> None:
    assert routing.pick_fingerprint(ready, current) == expected
