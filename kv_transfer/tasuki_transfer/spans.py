"""The unit of a hand-over: one KV block or one state slot, as its holder names it."""

import msgspec


class Span(msgspec.Struct, frozen=True, array_like=True):
    """One block or slot of a prefix, as its holder offers it.

    `pool` names the region ("full", "window", "state"); `index` is the block or slot in the
    holder's region; `ordinal` is its place in the prefix (block number; 0 for the state).
    `generation` counts how often `index` was given out: content may only be trusted while it
    stands.
    """

    pool: str
    index: int
    ordinal: int
    generation: int
