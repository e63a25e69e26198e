"""What gateways allow clients to do with a model.

Each pod announces its model's policy along with itself, so that a gateway never knows a model
without it. API keys are announced as digests: what is in the index, others may read.
"""

import hashlib
from collections.abc import Iterable, Sequence

import msgspec

LEAST_KEY = 16
"""Characters of an API key of a model; the digest of a shorter one could be guessed."""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """None: no limit. A reader that does not know a field refuses all: it might be a barrier."""

    exposed: bool = True
    """False: gateways neither list nor serve the model."""
    key_digests: tuple[str, ...] = ()
    """`key_digest` of each key that opens the model; none: the gateway's own rule holds."""
    max_requests: int | None = None
    """Requests for the model that one gateway serves at a time."""
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    """Of each choice."""
    prefill_threshold: int | None = None
    """Missing prompt tokens up to which a decode pod prefills itself; None: the gateway's."""


def key_digest(model: str, key: bytes) -> str:
    """What is told of an API key of the served name `model`, which is the salt."""
    return hashlib.sha256(b"tasuki api key\0" + model.encode() + b"\0" + key).hexdigest()


def together(policies: Sequence[Policy]) -> Policy:
    """One policy of a model whose pods do not all know the newest: the strictest limit of each
    kind, and a key where any has one; all keys open it until the old ones are known no more."""
    return Policy(
        exposed=all(policy.exposed for policy in policies),
        key_digests=tuple(sorted({key for policy in policies for key in policy.key_digests})),
        max_requests=_least(policy.max_requests for policy in policies),
        max_prompt_tokens=_least(policy.max_prompt_tokens for policy in policies),
        max_output_tokens=_least(policy.max_output_tokens for policy in policies),
        prefill_threshold=_least(policy.prefill_threshold for policy in policies),
    )


def _least(limits: Iterable[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
