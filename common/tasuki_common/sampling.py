"""Sampling parameters: one type from the HTTP body to the sampler."""

from collections.abc import Sequence

import msgspec

from tasuki_common.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOPS = 64
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How tokens are chosen and when they end; names and semantics are vLLM's.

    Log-probabilities are those of the raw logits (before temperature, penalties and masks).
    The repetition penalty counts prompt and output; presence and frequency count output only.

    Raises:
        RequestError: on construction, when a value is out of its range; `param` names the field.
    """

    n: int = 1
    """Number of independent samples of one prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """int64. With a seed, token i of sample j depends on (seed, j, i) and the logits alone."""
    stop: Sequence[str] | str | None = None
    """Strings that end the text, found across token borders; normalised to a tuple."""
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: to the end of the context."""
    min_tokens: int = 0
    """Until so many tokens are out, eos and stop tokens are masked."""
    logprobs: int | None = None
    """Top log-probabilities per output token, beside the sampled one's; 0: only that one."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    logit_bias: dict[int, float] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        set_field = msgspec.structs.force_setattr
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        set_field(self, "stop", stop)
        set_field(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.top_k == -1:
            set_field(self, "top_k", 0)
        self._check("n", 1 <= self.n <= 128, "must be from 1 to 128")
        self._check("temperature", 0.0 <= self.temperature < float("inf"), "must be 0 or more")
        self._check("top_p", 0.0 < self.top_p <= 1.0, "must be in (0, 1]")
        self._check("top_k", self.top_k >= 0, "must be -1, 0 (all) or more")
        self._check("min_p", 0.0 <= self.min_p <= 1.0, "must be in [0, 1]")
        self._check(
            "repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "must be above 0"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, -2.0 <= getattr(self, name) <= 2.0, "must be in [-2, 2]")
        if self.seed is not None:
            self._check(
                "seed",
                _INT64_MIN <= self.seed <= _INT64_MAX,
                f"must be an int64, from {_INT64_MIN} to {_INT64_MAX}",
            )
        self._check("stop", "" not in stop, "must not hold an empty string")
        if len(stop) > MAX_STOPS:
            raise RequestError(
                f"stop holds {len(stop)} strings; at most {MAX_STOPS} are watched for.",
                param="stop",
            )
        if self.max_tokens is not None:
            self._check("max_tokens", self.max_tokens >= 0, "must be 0 or more")
            self._check(
                "min_tokens", self.min_tokens <= self.max_tokens, "must not exceed max_tokens"
            )
        self._check("min_tokens", self.min_tokens >= 0, "must be 0 or more")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                self._check(name, 0 <= value <= MAX_LOGPROBS, f"must be from 0 to {MAX_LOGPROBS}")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise RequestError(f"{name} is {getattr(self, name)!r}; it {rule}.", param=name)
