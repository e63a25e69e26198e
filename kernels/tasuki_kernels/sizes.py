"""Arithmetic of launches; Triton's own functions cost microseconds a call."""

_PROGRAMS = 1056
"""Eight per SM of an H200: each has one load in flight."""
_FEW, _MOST = 16, 512
"""What `room_for` has room for."""


def blocks(count: int, block: int) -> int:
    """How many blocks hold `count` things."""
    return -(-count // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


def shares(count: int, size: int, block: int) -> tuple[int, int]:
    """Into how many parts each of `count` rows of `size` is cut so that all SMs work, and the size
    of a part, in whole blocks."""
    parts = max(1, min(_PROGRAMS // max(count, 1), blocks(size, block), _MOST))
    share = blocks(blocks(size, parts), block) * block
    return blocks(size, share), share


def room_for(parts: int) -> int:
    """A power of two for `parts` of `shares`, of which there are two: each is a kernel compiled."""
    return _FEW if parts <= _FEW else _MOST
