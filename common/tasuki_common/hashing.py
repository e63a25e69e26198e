"""Names of KV blocks: a chained hash over a prompt's full blocks.

A block's name is `H(parent name, its tokens)`; the first block's parent is a root made of all
else that changes the numbers in a block: model revision and cache salt. Two blocks with one name
hold the same numbers, wherever they lie. A *checkpoint* (recurrent state at a block boundary) bears
the name of the block that ends there. Unchained hashes give false hits, so none are offered.
"""

import hashlib
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Literal

import xxhash

HashAlgorithm = Literal["sha256", "xxh3"]
HASH_BYTES = 16

_DIGESTS: dict[HashAlgorithm, Callable[[bytes], bytes]] = {
    "sha256": lambda data: hashlib.sha256(data).digest()[:HASH_BYTES],
    "xxh3": lambda data: xxhash.xxh3_128_digest(data),
}


def root_hash(algorithm: HashAlgorithm, revision: str, salt: str | None = None) -> bytes:
    """The parent of a prompt's first block, 16 bytes.

    `revision` identifies the weights; `salt` separates tenants that must not share a cache.
    """
    revision_bytes, salt_bytes = revision.encode(), (salt or "").encode()
    header = struct.pack("<II", len(revision_bytes), len(salt_bytes))
    return _DIGESTS[algorithm](header + revision_bytes + salt_bytes)


def block_hashes(
    algorithm: HashAlgorithm, parent: bytes, tokens: Sequence[int], block_size: int
) -> list[bytes]:
    """Names of the full blocks of `tokens`, 16 bytes each, in order.

    `parent` is `root_hash(...)` for tokens from position 0, or the name of the block before them
    when a known prefix is extended. A last block that is not full has no name. Tokens in an array
    need not be packed: its bytes, on a little-endian host, are what is hashed.
    """
    digest = _DIGESTS[algorithm]
    full = len(tokens) - len(tokens) % block_size
    if isinstance(tokens, array) and tokens.typecode == "i":
        packed = tokens[:full].tobytes()
    else:
        packed = struct.pack(f"<{full}I", *tokens[:full])
    step = 4 * block_size
    names: list[bytes] = []
    for start in range(0, len(packed), step):
        parent = digest(parent + packed[start : start + step])
        names.append(parent)
    return names
