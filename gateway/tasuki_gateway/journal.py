"""What the client of one prompt has received so far, so that another pod can go on from there.

A choice of which no token has come is not begun: its frames without tokens (a role, an echo) are
held back until its first token, so that a pod which continues sends them exactly when `resume`
names no tokens for it.
"""

import struct

from tasuki_common.frames import Frame, Kind
from tasuki_common.messages import ResumedChoice


class Journal:
    """Tokens and finish of each of `choices` choices."""

    def __init__(self, choices: int) -> None:
        self._tokens = [bytearray() for _ in range(choices)]
        self._finished = [False] * choices
        self._held: dict[int, bytes] = {}

    def take(self, frame: Frame) -> bytes:
        """Notes a CHUNK or FINISH; returns the payload that the client is to get now.

        Raises:
            IndexError: the frame is of a choice that was not asked for.
        """
        kind, choice, tokens, payload = frame
        if tokens:
            self._tokens[choice] += tokens
        if kind is Kind.FINISH:
            self._finished[choice] = True
        elif not self._tokens[choice]:
            self._held[choice] = self._held.get(choice, b"") + payload
            return b""
        return self._held.pop(choice) + payload if choice in self._held else payload

    def resume(self) -> tuple[ResumedChoice, ...]:
        """For another pod to go on from; forgets what was held back. Empty: nothing was sent."""
        self._held.clear()
        if not self.begun:
            return ()
        return tuple(
            ResumedChoice(token_ids=_ids(tokens), finished=finished)
            for tokens, finished in zip(self._tokens, self._finished, strict=True)
        )

    @property
    def begun(self) -> bool:
        """Whether the client has received anything."""
        return any(self._tokens) or any(self._finished)

    @property
    def finished(self) -> bool:
        """Whether all choices are."""
        return all(self._finished)

    @property
    def num_tokens(self) -> int:
        """Tokens received, over all choices."""
        return sum(map(len, self._tokens)) // 4

    @property
    def only(self) -> list[int]:
        """The tokens of a single choice; empty when there are several."""
        return _ids(self._tokens[0]) if len(self._tokens) == 1 else []


def _ids(tokens: bytearray) -> list[int]:
    return list(struct.unpack(f"<{len(tokens) // 4}I", tokens))
