"""The flat trie against a trie of dicts."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.tokenizers.trie import PrefixTrie, build_trie


@st.composite
def sids(draw: st.DrawFn) -> Tensor:
    """Distinct strings of 1 to 4 symbols over small alphabets, in any order."""
    steps = draw(st.integers(1, 4))
    one = st.tuples(*(st.integers(10 * step, 10 * step + draw(st.integers(0, 4))) for step in range(steps)))
    return torch.tensor(draw(st.lists(one, min_size=1, max_size=40, unique=True)))


def as_dicts(symbols: Tensor) -> dict[int, Any]:
    root: dict[int, Any] = {}
    for item, sid in enumerate(symbols.tolist()):
        node = root
        for symbol in sid[:-1]:
            node = node.setdefault(symbol, {})
        node[sid[-1]] = item
    return root


def read_back(trie: PrefixTrie, node: int) -> dict[int, Any] | int:
    count = int(trie.num_children[node])
    if count == 0:
        return int(trie.item[node])
    assert int(trie.item[node]) == -1
    first = int(trie.first_child[node])
    return {int(trie.symbol[child]): read_back(trie, child) for child in range(first, first + count)}


def count_leaves(node: dict[int, Any] | int) -> int:
    return 1 if isinstance(node, int) else sum(count_leaves(child) for child in node.values())


def by_depth(tree: dict[int, Any]) -> list[list[dict[int, Any]]]:
    levels = [[tree]]
    while isinstance(next(iter(levels[-1][0].values())), dict):
        levels.append([child for node in levels[-1] for child in node.values()])
    return levels


@given(sids())
@settings(max_examples=30, deadline=None)
def test_the_tree_holds_the_strings_and_nothing_else(symbols: Tensor) -> None:
    trie, expected = build_trie(symbols), as_dicts(symbols)
    assert read_back(trie, 0) == expected
    inner = by_depth(expected)
    assert len(trie.symbol) == 1 + sum(len(node) for level in inner for node in level)
    assert trie.fan_out == [max(len(node) for node in level) for level in inner]
    assert int(trie.symbol[0]) == -1


@given(sids())
@settings(max_examples=30, deadline=None)
def test_paths_and_leaf_counts(symbols: Tensor) -> None:
    trie = build_trie(symbols)
    assert trie.path.shape == (len(symbols), symbols.shape[1] + 1)
    assert torch.equal(trie.symbol[trie.path[:, 1:]], symbols)
    assert torch.equal(trie.item[trie.path[:, -1]], torch.arange(len(symbols)))
    assert bool((trie.path[:, 0] == 0).all())
    below = [count_leaves(read_back(trie, node)) for node in range(len(trie.symbol))]
    assert trie.leaves.tolist() == below


@given(sids(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_order_of_items_only_renames_leaves(symbols: Tensor, random: Any) -> None:
    order = list(range(len(symbols)))
    random.shuffle(order)
    trie, shuffled = build_trie(symbols), build_trie(symbols[order])
    for name in ("symbol", "first_child", "num_children", "leaves"):
        assert torch.equal(getattr(trie, name), getattr(shuffled, name))
    assert torch.equal(shuffled.path, trie.path[order])


@given(sids(), st.data())
@settings(max_examples=30, deadline=None)
def test_two_items_of_one_string_are_refused_by_name(symbols: Tensor, data: st.DataObject) -> None:
    twin = data.draw(st.integers(0, len(symbols) - 1))
    both = torch.cat([symbols, symbols[twin : twin + 1]])
    with pytest.raises(ValueError, match=rf"items {twin} and {len(symbols)} share the SID"):
        build_trie(both)
