"""What the Secrets that a spec names hold, and what pods and gateways may know of it.

Each Secret is read by its name at each look at the deployment: the operator has no right to list or
to watch them. What pods read only when they start goes into a digest in their template, so that
they are replaced when it changes.
"""

import asyncio
import base64
import hashlib
import hmac
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from tasuki_common.policy import LEAST_KEY, Policy, key_digest
from tasuki_operator import names
from tasuki_operator.api import Api
from tasuki_operator.kinds import SECRET
from tasuki_operator.schema import Spec
from tasuki_operator.schema_base import SecretKey
from tasuki_operator.troubles import Trouble

Manifest = dict[str, Any]

TRANSFER, INDEX = "spec.transfer.keySecret", "spec.prefixIndex.urlSecret"
API_KEYS, TOKEN = "spec.gateway.apiKeySecret", "spec.model.tokenSecret"
_DIGEST = 16


class Credentials(NamedTuple):
    """What children are made from; no secret itself."""

    digest: str
    """Changes with what pods read when they start."""
    key_digests: tuple[str, ...] = ()
    """Of the model's API keys."""


class Named(NamedTuple):
    """What the Secrets hold that a spec names."""

    values: Mapping[str, bytes]
    """By the field of the spec; those that are there."""
    trouble: Trouble | None
    """Of the first that is missing or cannot be used."""


def fields(spec: Spec) -> dict[str, SecretKey]:
    """The entries of Secrets that the spec names, by its fields."""
    named = {
        TRANSFER: spec.transfer.key_secret,
        INDEX: spec.prefix_index.url_secret,
        API_KEYS: spec.gateway.api_key_secret,
        TOKEN: spec.model.token_secret,
    }
    return {field: entry for field, entry in named.items() if entry is not None}


async def read(api: Api, namespace: str, spec: Spec) -> Named:
    """What the spec's Secrets hold now; raises as `Api.get` does."""
    entries = fields(spec)
    secrets = sorted({entry.name for entry in entries.values()})
    found = await asyncio.gather(*(api.get(SECRET, namespace, name) for name in secrets))
    return held(spec, dict(zip(secrets, found, strict=True)))


def held(spec: Spec, secrets: Mapping[str, Manifest | None]) -> Named:
    """The same from the Secrets themselves, by name; None: there is none."""
    values: dict[str, bytes] = {}
    troubles: list[Trouble] = []
    for field, entry in fields(spec).items():
        secret = secrets[entry.name]
        value = ((secret or {}).get("data") or {}).get(entry.key)
        if value:
            values[field] = base64.b64decode(value)
        else:
            troubles.append(_missing(field, entry, is_there=secret is not None))
    if API_KEYS in values and min(map(len, values[API_KEYS].split()), default=0) < LEAST_KEY:
        text = (
            f"{API_KEYS} holds no key, or one of fewer than {LEAST_KEY} characters; take random "
            "ones, whose digest nobody can try out."
        )
        troubles.append(Trouble("SecretUnfit", text))
    return Named(values, troubles[0] if troubles else None)


def _missing(field: str, entry: SecretKey, *, is_there: bool) -> Trouble:
    if is_there:
        what = f'entry "{entry.key}" of Secret "{entry.name}", which has none of that name; add it.'
    else:
        what = f'Secret "{entry.name}", which does not exist; make it, with entry "{entry.key}".'
    return Trouble("SecretMissing", f"{field} names {what}")


def index_url(spec: Spec, named: Named, default: str) -> str | None:
    """Of the deployment's Redis; None: the Secret that names it is missing."""
    if spec.prefix_index.url_secret is None:
        return spec.prefix_index.url or default
    value = named.values.get(INDEX)
    return None if value is None else value.decode("utf-8", "replace").strip()


def is_same_redis(one: str, other: str) -> bool:
    """Whether two URLs lead to one Redis, as whoever."""
    places = {url.partition("://")[2].rpartition("@")[2].rstrip("/") for url in (one, other)}
    return len(places) == 1


def exposed_password(spec: Spec, default: str) -> Trouble | None:
    """Whether pods would carry the password of the operator's own Redis in their templates."""
    index = spec.prefix_index
    if index.url is None and index.url_secret is None and urllib.parse.urlsplit(default).password:
        text = (
            "The installation's Redis has a password, which would stand in the pods' templates; "
            f"put its URL into a Secret here and name that in {INDEX}."
        )
        return Trouble("IndexSecretNeeded", text)
    return None


def made(model: str, named: Named, transfer_key: bytes) -> Credentials:
    """For the served name `model`. Digests are keyed with `transfer_key`, so that nobody who reads
    a pod's annotations can try passwords out on them."""
    digest = hmac.new(transfer_key, named.values.get(INDEX, b""), hashlib.sha256).hexdigest()
    keys = {key_digest(model, key) for key in named.values.get(API_KEYS, b"").split()}
    return Credentials(digest[:_DIGEST], tuple(sorted(keys)))


def kept(deployments: Sequence[Manifest], policy: Manifest | None) -> Credentials | None:
    """What these children were made from, so that what serves is kept up while a Secret is missing.

    None: the Deployments or the ConfigMap `policy` are not there, or say nothing.
    """
    templates = [deployment["spec"]["template"]["metadata"] for deployment in deployments]
    digests = [(metadata.get("annotations") or {}).get(names.SECRETS) for metadata in templates]
    text = ((policy or {}).get("data") or {}).get(names.POLICY_ENTRY)
    if not digests or not digests[0] or text is None:
        return None
    try:
        return Credentials(digests[0], msgspec.json.decode(text, type=Policy).key_digests)
    except msgspec.MsgspecError:  # somebody has edited it
        return None
