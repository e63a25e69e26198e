"""What a pod's prefix cache tells the index."""

from typing import Literal, NamedTuple, Protocol

Kind = Literal["block", "checkpoint"]


class CacheEvent(Protocol):
    """A cached block or checkpoint came or went; the engine's own events have this shape."""

    @property
    def kind(self) -> Kind: ...
    @property
    def stored(self) -> bool: ...
    @property
    def hash(self) -> bytes:
        """Name of the block; of a checkpoint, name of the block that ends there. 16 bytes."""

    @property
    def parent(self) -> bytes:
        """Of a stored block: name of the block before it, empty for a prompt's first."""


class Change(NamedTuple):
    """What the index is to change: one entry of one pod appears or disappears."""

    kind: Kind
    stored: bool
    hash: bytes
