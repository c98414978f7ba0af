"""The dashboard's tree of cached prefixes: folded nodes are still counted."""

import numpy as np
import pytest

from prefixstore.dashboard.prefix_tree import fold
from prefixstore.index import RadixIndex


@pytest.mark.parametrize("max_nodes", [0, 1, 7, 60, 10_000])
def test_folding_loses_no_block(max_nodes) -> None:
    rng = np.random.default_rng(max_nodes)
    index = RadixIndex(2)
    for i in range(150):
        tokens = rng.integers(0, 2, (rng.integers(1, 9), 1)).repeat(2, axis=1).ravel()
        index.insert(tokens, np.full((len(tokens) // 2, 1), i, np.int32), bytes([i % 3]))
    tree = fold(index.outline(), max_nodes)
    nodes = tree["nodes"]
    assert len(nodes) == min(max_nodes, index.stats().num_runs)
    folded = [*nodes, tree]
    assert len(nodes) + sum(one["folded_runs"] for one in folded) == index.stats().num_runs
    own = sum(node["own_blocks"] for node in nodes)
    assert own + sum(one["folded_blocks"] for one in folded) == index.num_blocks
    for place, node in enumerate(nodes):
        below = [one for one in nodes if one["parent"] == place]
        assert node["below_blocks"] == node["own_blocks"] + node["folded_blocks"] + sum(
            one["below_blocks"] for one in below
        )
        assert all(one["salt"] == node["salt"] for one in below)
        end = node["first_blocks"] + node["own_blocks"]
        assert all(one["first_blocks"] == end for one in below)


def test_folding_keeps_the_largest() -> None:
    index = RadixIndex(1)
    for first, length in ((1, 5), (2, 50), (3, 8)):
        index.insert(np.full(length, first), np.zeros((length, 1), np.int32))
    tree = fold(index.outline(), 2)
    assert sorted(node["own_blocks"] for node in tree["nodes"]) == [8, 50]
    assert (tree["folded_runs"], tree["folded_blocks"]) == (1, 5)
