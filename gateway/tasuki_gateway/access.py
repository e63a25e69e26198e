"""Who may use which model, and how many requests at a time.

A model with API keys of its own opens to these alone; any other opens to the gateway's key, or to
everybody where the gateway has none.
"""

import contextlib
import hmac
from collections import Counter
from collections.abc import Iterator

from tasuki_common.policy import key_digest
from tasuki_gateway.failures import AuthenticationError, TooManyRequestsError
from tasuki_gateway.fleet import Fleet, Served

_LOOK_SECONDS = 3.0
_HOW = "send it as Authorization: Bearer KEY."


class Access:
    """Holds requests against the gateway's key and against the policies of the fleet's models."""

    def __init__(self, api_key: str | None, fleet: Fleet) -> None:
        self._api_key = None if api_key is None else api_key.encode()
        self._fleet = fleet
        self._running: Counter[str] = Counter()

    async def enter(self, key: bytes) -> None:
        """Before a request's body is read; `key`: the one it shows, empty if none.

        Raises:
            AuthenticationError: it opens neither the gateway nor any model.
        """
        if not self._opens_any(key):
            await self._fleet.look(_LOOK_SECONDS)  # it may be that of a model which is new
            if not self._opens_any(key):
                raise AuthenticationError(f"No valid API key: {_HOW}")

    def opens(self, key: bytes, served: Served) -> bool:
        """Whether `key` opens the model."""
        digests = served.policy.key_digests
        if not digests:
            return self._opens_gateway(key)
        return key_digest(served.model, key) in digests

    def check(self, key: bytes, served: Served) -> None:
        """Once the model is known.

        Raises:
            AuthenticationError: `key` does not open it.
        """
        if not self.opens(key, served):
            raise AuthenticationError(f"No valid API key for {served.model}: {_HOW}")

    @contextlib.contextmanager
    def room(self, served: Served) -> Iterator[None]:
        """Counts a request of the model in while the block runs.

        Raises:
            TooManyRequestsError: it has as many as its policy allows.
        """
        model, most = served.model, served.policy.max_requests
        if most is not None and self._running[model] >= most:
            raise TooManyRequestsError(
                f"The gateway serves {most} requests for {model} at a time; try again."
            )
        self._running[model] += 1
        try:
            yield
        finally:
            self._running[model] -= 1

    def _opens_any(self, key: bytes) -> bool:
        return self._opens_gateway(key) or any(
            served.policy.key_digests and self.opens(key, served)
            for served in self._fleet.names.values()
        )

    def _opens_gateway(self, key: bytes) -> bool:
        return self._api_key is None or hmac.compare_digest(key, self._api_key)
