"""Which steps run in graphs; that they give the same tokens is proved on a GPU (tests/gpu)."""

import itertools

from hypothesis import given, strategies as st

from tasuki_engine import decode_graphs, prompt_graphs
from tasuki_engine.layers import moe


def test_no_step_in_a_graph_has_so_many_tokens_that_experts_are_chosen_on_the_host() -> None:
    assert decode_graphs.MAX_SEQUENCES <= moe.MAX_DENSE_TOKENS
    assert prompt_graphs.MAX_TOKENS <= moe.MAX_DENSE_TOKENS


@given(largest=st.integers(1, 600))
def test_sizes_rise_from_one_to_the_largest_by_no_more_than_32(largest: int) -> None:
    found = decode_graphs.sizes(largest)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (1, largest)
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert max(steps, default=0) <= 32
