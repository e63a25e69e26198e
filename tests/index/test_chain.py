"""The book: whatever a cache stores and evicts, what is published is what could be resumed."""

from hypothesis import given, settings, strategies as st
from index_helpers import Event

from tasuki_index import Chain, Change, Kind

# A tree of 12 blocks in which block n hangs below a smaller one, or is the first of a prompt.
PARENTS = st.tuples(*(st.integers(-1, n - 1) for n in range(12)))
STEPS = st.lists(st.tuples(st.integers(0, 11), st.booleans(), st.booleans()), max_size=80)


def name(block: int) -> bytes:
    return b"" if block < 0 else bytes([block + 1]) * 16


def whole_chain(block: int, held: set[int], parents: tuple[int, ...]) -> bool:
    return block < 0 or (block in held and whole_chain(parents[block], held, parents))


@given(PARENTS, STEPS)
@settings(max_examples=300)
def test_published_is_exactly_what_has_no_hole_above_it_after_every_event(
    parents: tuple[int, ...], steps: list[tuple[int, bool, bool]]
) -> None:
    chain, held, marked = Chain(), set[int](), set[int]()
    published: set[tuple[Kind, bytes]] = set()
    for block, stored, is_checkpoint in steps:
        book = marked if is_checkpoint else held
        (book.add if stored else book.discard)(block)
        kind: Kind = "checkpoint" if is_checkpoint else "block"
        for change in chain.apply([Event(kind, stored, name(block), name(parents[block]))]):
            entry = (change.kind, change.hash)
            assert change.stored is (entry not in published), "a change must change something"
            (published.add if change.stored else published.remove)(entry)
            if change.kind == "block":
                assert closed(published, parents), "closed under prefixes after each change"
        whole = {("block", name(b)) for b in range(12) if whole_chain(b, held, parents)}
        assert published == whole | {("checkpoint", name(b)) for b in marked}
    assert sorted(chain.snapshot()) == sorted(Change(k, True, n) for k, n in published)
    assert len(chain) == len(published)


@given(PARENTS, STEPS)
def test_a_snapshot_is_closed_under_prefixes_at_every_cut(
    parents: tuple[int, ...], steps: list[tuple[int, bool, bool]]
) -> None:
    chain = Chain()
    for block, stored, _ in steps:
        chain.apply([Event("block", stored, name(block), name(parents[block]))])
    published: set[tuple[Kind, bytes]] = set()
    for change in chain.snapshot():
        published.add((change.kind, change.hash))
        assert closed(published, parents)


@given(PARENTS, STEPS)
def test_nothing_is_remembered_of_a_cache_that_is_empty_again(
    parents: tuple[int, ...], steps: list[tuple[int, bool, bool]]
) -> None:
    chain = Chain()
    for block, stored, _ in steps:
        chain.apply([Event("block", stored, name(block), name(parents[block]))])
    chain.apply([Event("block", False, name(block)) for block in range(12)])
    assert len(chain) == 0
    assert not any((chain._parents, chain._children, chain._published))


def closed(published: set[tuple[Kind, bytes]], parents: tuple[int, ...]) -> bool:
    return all(
        parents[block] < 0 or ("block", name(parents[block])) in published
        for block in range(12)
        if ("block", name(block)) in published
    )
