"""Which requests are taken: from what was asked to a sequence, or to an error that says why not."""

import random
import struct
import time
from array import array
from collections.abc import Container, Sequence as Seq

import numpy as np

from tasuki_common.errors import OverloadedError, RequestError
from tasuki_common.hashing import block_hashes, root_hash
from tasuki_common.sampling import SamplingParams
from tasuki_engine import identity
from tasuki_engine.config import EngineConfig
from tasuki_engine.models import Model
from tasuki_engine.request import EngineRequest
from tasuki_engine.sampler import SamplerRow
from tasuki_engine.scheduler import Scheduler
from tasuki_engine.sequence import Sequence

_PROOF = SamplingParams(temperature=0.0)
"""How a hand-over's token is drawn. Nobody gets it; where numbers are wrong there is none."""


class Admission:
    """The limits of one engine, and how its prefixes are named."""

    def __init__(self, config: EngineConfig, model: Model, max_model_len: int) -> None:
        self._config = config
        self._model = model
        self._max_model_len = max_model_len
        self._hash_revision = identity.hash_revision(model)
        self._arrivals = 0

    def admit(
        self, request: EngineRequest, known_ids: Container[str], scheduler: Scheduler
    ) -> Sequence:
        """The sequence of a request; `known_ids` are taken, `scheduler` says how many wait.

        Raises:
            RequestError: when it cannot be served as it stands; `param` names the field.
            OverloadedError: when too many wait already.
        """
        if request.request_id in known_ids:
            raise RequestError(
                f"Request {request.request_id!r} is here already.", param="request_id"
            )
        tokens = self._tokens(request)
        self._check_params(request)
        self._check_room(len(request.prompt_token_ids), scheduler)
        return self._sequence(request, tokens)

    def prefix_names(self, token_ids: Seq[int], num_tokens: int, salt: str | None) -> list[bytes]:
        """Names of the blocks of the first `num_tokens` of `token_ids`.

        Raises:
            RequestError: when `num_tokens` is no block boundary within `token_ids`.
        """
        block_size = self._config.block_size
        if num_tokens % block_size or not 0 <= num_tokens <= len(token_ids):
            raise RequestError(
                f"num_tokens is {num_tokens}; it must be a multiple of {block_size} and at most "
                f"the {len(token_ids)} tokens given.",
                param="num_tokens",
            )
        root, prefix = self._root(salt), token_ids[:num_tokens]
        return block_hashes(self._config.hash_algorithm, root, prefix, block_size)

    def _sequence(self, request: EngineRequest, tokens: "array[int]") -> Sequence:
        config, params = self._config, request.sampling
        drawn = _PROOF if request.hand_over else params
        prompt, output = request.prompt_token_ids, list(request.output_token_ids)
        room = self._max_model_len - len(prompt)
        eos = () if params.ignore_eos else self._model.eos_token_ids
        stop_ids = tuple(dict.fromkeys((*eos, *(params.stop_token_ids or ()))))
        seed = random.getrandbits(63) if params.seed is None else params.seed
        named = config.enable_prefix_caching or request.prefix_id is not None
        self._arrivals += 1
        return Sequence(
            request,
            tokens,
            arrival=self._arrivals,
            deadline=None if request.timeout is None else time.monotonic() + request.timeout,
            block_size=config.block_size,
            hash_algorithm=config.hash_algorithm,
            parent=self._root(request.cache_salt) if named else None,
            writes_cache=config.enable_prefix_caching,
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            sampler_row=SamplerRow(drawn, prompt, output, seed, request.sample_index, stop_ids),
        )

    def _root(self, salt: str | None) -> bytes:
        return root_hash(self._config.hash_algorithm, self._hash_revision, salt)

    def _tokens(self, request: EngineRequest) -> "array[int]":
        """Prompt and output, of known tokens and not too many."""
        if not request.prompt_token_ids:
            raise RequestError("The prompt has no token; give at least one.", param="prompt")
        vocab_size = self._model.vocab_size
        ids = request.prompt_token_ids + request.output_token_ids
        tokens = _in_array(ids, vocab_size)
        if tokens is None:
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise RequestError(
                f"Token id {wrong} is outside the vocabulary of {vocab_size} tokens.",
                param="prompt",
            )
        room = 0 if request.hand_over or request.sampling.max_tokens == 0 else 1
        if len(tokens) + room > self._max_model_len:
            raise RequestError(
                f"The prompt has {len(tokens)} tokens; with at least {room} to generate it exceeds "
                f"the context length of {self._max_model_len} tokens.",
                param="prompt",
            )
        return tokens

    def _check_params(self, request: EngineRequest) -> None:
        params, vocab_size = request.sampling, self._model.vocab_size
        for field, ids in (
            ("logit_bias", params.logit_bias or {}),
            ("stop_token_ids", params.stop_token_ids or ()),
        ):
            outside = sorted(i for i in ids if not 0 <= i < vocab_size)
            if outside:
                raise RequestError(
                    f"{field} names token ids {outside}, which are outside the vocabulary of "
                    f"{vocab_size} tokens.",
                    param=field,
                )

    def _check_room(self, num_tokens: int, scheduler: Scheduler) -> None:
        config = self._config
        if scheduler.num_waiting >= config.max_queued_requests:
            raise OverloadedError(f"{scheduler.num_waiting} requests are waiting already.")
        if config.max_queued_tokens is not None:
            queued = sum(len(seq.tokens) for seq in scheduler.waiting)
            if queued and queued + num_tokens > config.max_queued_tokens:
                raise OverloadedError(f"{queued} prompt tokens are waiting already.")


def _in_array(ids: list[int], below: int) -> "array[int] | None":
    """The ids as int32; None where one is negative or not below `below`.

    A long prompt's first token waits for this: packed at once and compared by numpy, they take a
    third of the time that `array` and `min` take for them one by one.
    """
    tokens = array("i")
    try:
        tokens.frombytes(struct.pack(f"{len(ids)}i", *ids))
    except struct.error:  # beyond 32 bits
        return None
    values = np.frombuffer(tokens, np.int32)
    return tokens if values.min() >= 0 and values.max() < below else None
