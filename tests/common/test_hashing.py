"""Names of blocks: the chain is what it is said to be, whatever the tokens come in."""

import hashlib
import struct
from array import array

from hypothesis import given, strategies as st

from tasuki_common.hashing import HASH_BYTES, HashAlgorithm, block_hashes, root_hash

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
ALGORITHMS = st.sampled_from(["sha256", "xxh3"])


@given(TOKENS, st.integers(1, 9))
def test_each_name_is_the_digest_of_its_parent_and_its_tokens(
    tokens: list[int], block_size: int
) -> None:
    parent = root_hash("sha256", "weights", "salt")
    names = block_hashes("sha256", parent, tokens, block_size)
    assert len(names) == len(tokens) // block_size
    for number, name in enumerate(names):
        block = tokens[number * block_size : (number + 1) * block_size]
        parent = hashlib.sha256(parent + struct.pack(f"<{block_size}I", *block)).digest()
        parent = parent[:HASH_BYTES]
        assert name == parent


@given(ALGORITHMS, TOKENS, st.integers(1, 9), st.data())
def test_names_do_not_depend_on_how_the_tokens_are_held_or_when_they_came(
    algorithm: HashAlgorithm, tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    root = root_hash(algorithm, "weights")
    names = block_hashes(algorithm, root, tokens, block_size)
    assert block_hashes(algorithm, root, array("i", tokens), block_size) == names
    known = data.draw(st.integers(0, len(names)))
    parent = names[known - 1] if known else root
    rest = array("i", tokens)[known * block_size :]
    assert names[:known] + block_hashes(algorithm, parent, rest, block_size) == names
