"""What the Secrets of a spec become: digests that tell nothing, sentences that name the field."""

import base64
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tasuki_common.messages import Member
from tasuki_common.policy import key_digest
from tasuki_operator import builders, credentials, names, rivals
from tasuki_operator.builders import Owner, Surroundings
from tasuki_operator.schema import Spec
from tasuki_operator.store import Key

KEY = b"the-key-that-pods-show-each-other"
OURS, THEIRS = "first-key-of-the-model", "second-key-of-the-model"


def spec(**fields: Any) -> Spec:
    return Spec.model_validate({"model": {"source": "hf://org/name"}, **fields})


ALL = spec(
    model={"source": "hf://org/name", "tokenSecret": {"name": "hub", "key": "token"}},
    transfer={"keySecret": {"name": "keys", "key": "transfer"}},
    prefixIndex={"urlSecret": {"name": "redis", "key": "url"}},
    gateway={"apiKeySecret": {"name": "keys", "key": "api"}},
)


def secret(**entries: str) -> dict[str, Any]:
    """A Secret as the API server answers it."""
    data = {name: base64.b64encode(value.encode()).decode() for name, value in entries.items()}
    return {"kind": "Secret", "data": data}


SECRETS = {
    "hub": secret(token="hf_x"),
    "keys": secret(transfer="between-pods", api=f"{OURS}\n{THEIRS}\n"),
    "redis": secret(url="redis://:pass@host:6379"),
}


def test_all_fields_that_name_secrets_are_read() -> None:
    named = credentials.held(ALL, SECRETS)
    assert named.trouble is None
    assert named.values[credentials.INDEX] == b"redis://:pass@host:6379"
    assert named.values[credentials.TRANSFER] == b"between-pods"
    text = str(ALL.model_dump(by_alias=True))
    assert text.count("'key': ") == len(credentials.fields(ALL)) == 4


@pytest.mark.parametrize("name", SECRETS)
def test_a_missing_secret_is_named_with_its_field(name: str) -> None:
    named = credentials.held(ALL, {**SECRETS, name: None})
    assert named.trouble is not None
    assert named.trouble.reason == "SecretMissing"
    assert f'Secret "{name}", which does not exist' in named.trouble.message
    assert named.trouble.message.startswith("spec.")


def test_a_missing_entry_is_named() -> None:
    named = credentials.held(ALL, {**SECRETS, "redis": secret(URL="x")})
    assert named.trouble is not None
    assert 'spec.prefixIndex.urlSecret names entry "url"' in named.trouble.message


@pytest.mark.parametrize("keys", ["short", f"{OURS} short", "   \n"])
def test_keys_that_could_be_guessed_or_are_none_are_refused(keys: str) -> None:
    kept = secret(transfer="between-pods", api=keys)
    named = credentials.held(ALL, {**SECRETS, "keys": kept})
    assert named.trouble is not None
    assert named.trouble.reason == "SecretUnfit"
    assert "short" not in named.trouble.message


def test_pods_are_replaced_for_what_they_read_at_their_start_alone() -> None:
    def digest(transfer_key: bytes = KEY, **changed: dict[str, Any]) -> str:
        named = credentials.held(ALL, {**SECRETS, **changed})
        return credentials.made("granite", named, transfer_key).digest

    assert digest() == digest()
    assert digest(redis=secret(url="redis://:new@host:6379")) != digest()
    assert digest(b"another-key") != digest()
    assert digest(hub=secret(token="hf_y")) == digest()
    assert digest(keys=secret(transfer="between-pods", api="another-key-of-the-model")) == digest()


def test_gateways_are_told_digests_of_the_models_keys() -> None:
    known = credentials.made("granite", credentials.held(ALL, SECRETS), KEY)
    assert set(known.key_digests) == {key_digest("granite", key.encode()) for key in (OURS, THEIRS)}
    assert credentials.made("granite", credentials.held(spec(), {}), KEY).key_digests == ()


@given(st.binary(min_size=1), st.binary(min_size=1))
def test_nothing_of_a_secret_shows_in_what_children_are_made_from(url: bytes, key: bytes) -> None:
    values = {credentials.INDEX: url, credentials.API_KEYS: b"k" * 16 + key.hex().encode()}
    known = credentials.made("granite", credentials.Named(values, None), KEY)
    assert len(known.digest) == 16
    assert all(len(digest) == 64 for digest in known.key_digests)
    int(known.digest, 16)


OWNER = Owner(namespace="models", name="granite", uid="u-1")
AROUND = Surroundings(
    image="tasuki/engine:1",
    redis_url="redis://redis:6379",
    system_namespace="tasuki-system",
    metrics_namespace="monitoring",
    pod_monitors=False,
)


def test_what_children_were_made_from_can_be_read_from_them() -> None:
    known = credentials.made("granite", credentials.held(ALL, SECRETS), KEY)
    made = builders.desired(OWNER, ALL, AROUND, known)
    deployments = [child for child in made if child["kind"] == "Deployment"]
    name = names.gateway_policy("granite")
    policy = next(child for child in made if child["metadata"]["name"] == name)
    assert credentials.kept(deployments, policy) == known
    assert credentials.kept(deployments, None) is None
    assert credentials.kept([], policy) is None
    for text in ("", "{", "[]"):
        assert credentials.kept(deployments, {**policy, "data": {"policy.json": text}}) is None
    for part in ({}, {"annotations": {}}):
        bare = {"spec": {"template": {"metadata": part}}}
        assert credentials.kept([bare], policy) is None


def test_the_index_is_the_specs_else_the_operators() -> None:
    none = credentials.Named({}, None)
    default = "redis://ours:6379"
    assert credentials.index_url(spec(), none, default) == default
    plain = spec(prefixIndex={"url": "redis://theirs:6379"})
    assert credentials.index_url(plain, none, default) == "redis://theirs:6379"
    assert credentials.index_url(ALL, none, default) is None
    held = credentials.held(ALL, SECRETS)
    assert credentials.index_url(ALL, held, default) == "redis://:pass@host:6379"
    line = credentials.Named({credentials.INDEX: b"redis://ours:6379\n"}, None)  # of a file
    assert credentials.is_same_redis(credentials.index_url(ALL, line, "") or "", default)


def test_one_redis_is_one_for_each_of_its_users() -> None:
    ours = "rediss://operator:secret@managed:6380"
    assert credentials.is_same_redis(ours, "rediss://granite:other@managed:6380/")
    assert credentials.is_same_redis(ours, "rediss://managed:6380")
    assert not credentials.is_same_redis(ours, "rediss://managed:6381")
    assert not credentials.is_same_redis(ours, "rediss://managed:6380/1")


def test_the_operators_password_never_goes_into_a_template() -> None:
    default = "redis://:pass@ours:6379"
    trouble = credentials.exposed_password(spec(), default)
    assert trouble is not None
    assert "spec.prefixIndex.urlSecret" in trouble.message
    assert "pass@" not in trouble.message
    assert credentials.exposed_password(ALL, default) is None
    assert credentials.exposed_password(spec(), "redis://ours:6379") is None


@pytest.mark.parametrize(
    "url", ["redis://:pass@host", "http://host", "redis://", "redis://a b", "unix:///x"]
)
def test_a_plain_url_holds_no_password_and_is_a_redis(url: str) -> None:
    with pytest.raises(ValueError, match="urlSecret"):
        spec(prefixIndex={"url": url})


def test_only_one_way_to_name_a_redis() -> None:
    both = {"url": "redis://h", "urlSecret": {"name": "a", "key": "b"}}
    with pytest.raises(ValueError, match="either"):
        spec(prefixIndex=both)


def member(pod: str, model: str, *aliases: str) -> Member:
    return Member(
        pod=pod,
        incarnation="i",
        role="decode",
        model=model,
        aliases=aliases,
        fingerprint="f",
        url="http://x",
        max_model_len=1,
        block_size=16,
        hash_algorithm="xxh3",
        hash_revision="r",
        needs_checkpoint=False,
    )


@pytest.mark.parametrize(
    ("members", "namespaces", "found"),
    [
        ([member("other/p", "granite")], ["mine"], True),
        ([member("other/p", "x", "granite")], ["mine"], True),
        ([member("other/p", "x")], ["mine"], False),
        ([member("mine/p", "granite")], ["mine"], False),
        ([member("second/p", "granite")], ["mine", "second"], False),
        ([member("other/p", "granite")], [], False),
    ],
)
def test_a_name_served_where_this_operator_does_not_look_is_found_in_the_index(
    members: list[Member], namespaces: list[str], found: bool
) -> None:
    body = {"metadata": {"name": "granite"}, "spec": {"model": {"source": "hf://a/b"}}}
    told = rivals.stranger(Key("mine", "granite"), body, members, namespaces)
    assert (told is not None) is found
    if told is not None:
        assert "other/p" in told.message
