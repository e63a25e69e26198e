"""Autoscalers are known by their targets, whatever a watch has missed."""

from typing import Any

from hypothesis import given, strategies as st

from tasuki_operator.autoscaling import Autoscalers, keep_replicas
from tasuki_operator.store import Key

TARGETS = ("a-prefill", "a-decode", "b-decode", "-decode-", "web", "decode")


def autoscaler(name: str, target: str, kind: str = "Deployment") -> dict[str, Any]:
    reference = {"kind": kind, "name": target, "apiVersion": "apps/v1"}
    metadata = {"namespace": "models", "name": name}
    return {"metadata": metadata, "spec": {"scaleTargetRef": reference}}


A, B = Key("models", "a"), Key("models", "b")


def test_an_autoscaler_with_a_new_target_concerns_the_old_one_too() -> None:
    known = Autoscalers()
    assert known.put(autoscaler("one", "a-prefill")) == {A}
    assert known.roles(A) == {"prefill"}
    assert known.put(autoscaler("one", "b-decode")) == {A, B}
    assert (known.roles(A), known.roles(B)) == (frozenset(), {"decode"})
    assert known.put(autoscaler("one", "web")) == {B}
    assert known.roles(B) == frozenset()


def test_what_is_not_a_child_of_ours_concerns_nobody() -> None:
    known = Autoscalers()
    for body in (
        autoscaler("one", "web"),
        autoscaler("two", "a-decode", kind="StatefulSet"),
        autoscaler("three", "a", kind="InferenceDeployment"),
    ):
        assert known.put(body) == set()
        assert known.drop(body) == set()
    assert known.known() == set()


def test_a_list_finds_what_a_watch_has_missed_and_keeps_what_came_after_it() -> None:
    known = Autoscalers()
    known.put(autoscaler("gone", "a-prefill"))
    before = known.known()
    known.put(autoscaler("newer", "a-decode"))
    assert known.replace(before, [autoscaler("unseen", "b-decode")]) == {A, B}
    assert known.roles(A) == {"decode"}
    assert known.roles(B) == {"decode"}


EVENTS = st.lists(
    st.tuples(st.sampled_from(["one", "two"]), st.sampled_from([None, *TARGETS])), max_size=20
)


@given(EVENTS)
def test_watches_and_a_list_of_the_same_end_tell_the_same(
    events: list[tuple[str, str | None]],
) -> None:
    watched, listed, there = Autoscalers(), Autoscalers(), {}
    for name, target in events:
        if target is None:
            watched.drop(autoscaler(name, "web"))
            there.pop(name, None)
        else:
            watched.put(autoscaler(name, target))
            there[name] = autoscaler(name, target)
    listed.replace(set(), there.values())
    for key in (A, B, Key("models", "")):
        assert watched.roles(key) == listed.roles(key)
    assert watched.replace(watched.known(), there.values()) == set()


def test_replicas_are_those_of_the_live_object_and_of_no_later_one() -> None:
    ours = {"metadata": {"name": "a-decode"}, "spec": {"replicas": 1, "template": {}}}
    live = {"metadata": {"resourceVersion": "7"}, "spec": {"replicas": 5, "template": {"x": 1}}}
    assert keep_replicas(ours, live) == {
        "metadata": {"name": "a-decode", "resourceVersion": "7"},
        "spec": {"replicas": 5, "template": {}},
    }
    assert ours["spec"]["replicas"] == 1
