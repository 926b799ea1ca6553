"""The flat trie against a trie of dicts, and against its fields worked out from the strings alone."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.tokenizers.trie import PrefixTrie, build_trie, choices


@st.composite
def sids(draw: st.DrawFn) -> Tensor:
    """Distinct strings of 1 to 4 symbols over small alphabets, in any order."""
    steps = draw(st.integers(1, 4))
    one = st.tuples(*(st.integers(10 * step, 10 * step + draw(st.integers(0, 4))) for step in range(steps)))
    return torch.tensor(draw(st.lists(one, min_size=1, max_size=40, unique=True)))


@st.composite
def unequal_sids(draw: st.DrawFn) -> Tensor:
    """1 to 3 codes that all places share, then a suffix from 10 on; -1 behind, up to one column of nothing else."""
    codes = st.lists(st.integers(0, draw(st.integers(0, 3))), min_size=1, max_size=3).map(tuple)
    bucket: Counter[tuple[int, ...]] = Counter()
    rows = []
    for one in draw(st.lists(codes, min_size=1, max_size=40)):
        rows.append([*one, 10 + bucket[one]])
        bucket[one] += 1
    width = max(len(row) for row in rows) + draw(st.integers(0, 1))
    rows = draw(st.permutations(rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


any_sids = st.one_of(sids(), unequal_sids())


def strings(symbols: Tensor) -> list[tuple[int, ...]]:
    return [tuple(symbol for symbol in row if symbol >= 0) for row in symbols.tolist()]


def as_dicts(symbols: Tensor) -> dict[int, Any]:
    root: dict[int, Any] = {}
    for item, sid in enumerate(strings(symbols)):
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
    while inner := [c for node in levels[-1] for c in node.values() if isinstance(c, dict)]:
        levels.append(inner)
    return levels


@given(any_sids)
@settings(max_examples=60, deadline=None)
def test_the_tree_holds_the_strings_and_nothing_else(symbols: Tensor) -> None:
    trie, expected = build_trie(symbols), as_dicts(symbols)
    assert read_back(trie, 0) == expected
    inner = by_depth(expected)
    assert len(trie.symbol) == 1 + sum(len(node) for level in inner for node in level)
    nothing = [0] * (symbols.shape[1] - len(inner))
    assert trie.fan_out == [max(len(node) for node in level) for level in inner] + nothing
    assert int(trie.symbol[0]) == -1


@given(any_sids)
@settings(max_examples=60, deadline=None)
def test_paths_and_leaf_counts(symbols: Tensor) -> None:
    trie = build_trie(symbols)
    assert trie.path.shape == (len(symbols), symbols.shape[1] + 1)
    written = symbols >= 0
    assert torch.equal(trie.symbol[trie.path[:, 1:]][written], symbols[written])
    assert torch.equal(
        trie.path[:, 1:][~written], trie.path[:, :-1][~written]
    )  # a short item stays on its leaf
    assert torch.equal(trie.item[trie.path[:, -1]], torch.arange(len(symbols)))
    assert bool((trie.path[:, 0] == 0).all())
    below = [count_leaves(read_back(trie, node)) for node in range(len(trie.symbol))]
    assert trie.leaves.tolist() == below


@given(any_sids)
@settings(max_examples=60, deadline=None)
def test_nodes_are_the_beginnings_of_strings_by_length_then_by_symbols(symbols: Tensor) -> None:
    """Every field follows from this numbering."""
    trie, items, steps = build_trie(symbols), strings(symbols), range(symbols.shape[1])
    nodes = sorted({sid[:depth] for sid in items for depth in range(len(sid) + 1)}, key=lambda p: (len(p), p))
    number = {prefix: node for node, prefix in enumerate(nodes)}
    children = [[number[p] for p in nodes if p[:-1] == prefix and p] for prefix in nodes]
    assert trie.symbol.tolist() == [-1] + [prefix[-1] for prefix in nodes[1:]]
    assert trie.first_child.tolist() == [min(below, default=len(nodes)) for below in children]
    assert trie.num_children.tolist() == [len(below) for below in children]
    assert trie.item.tolist() == [items.index(prefix) if prefix in items else -1 for prefix in nodes]
    assert trie.leaves.tolist() == [sum(sid[: len(p)] == p for sid in items) for p in nodes]
    assert trie.path.tolist() == [[number[sid[:depth]] for depth in (*steps, len(steps))] for sid in items]
    fans = [
        [len(below) for p, below in zip(nodes, children, strict=True) if len(p) == step] for step in steps
    ]
    assert trie.fan_out == [max(fan, default=0) for fan in fans]
    assert trie.ends == [any(len(sid) == step + 1 for sid in items) for step in steps]


@given(any_sids, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_order_of_items_only_renames_leaves(symbols: Tensor, random: Any) -> None:
    order = list(range(len(symbols)))
    random.shuffle(order)
    trie, shuffled = build_trie(symbols), build_trie(symbols[order])
    for name in ("symbol", "first_child", "num_children", "leaves"):
        assert torch.equal(getattr(trie, name), getattr(shuffled, name))
    assert torch.equal(shuffled.path, trie.path[order])


@given(any_sids, st.data())
@settings(max_examples=30, deadline=None)
def test_two_items_of_one_string_are_refused_by_name(symbols: Tensor, data: st.DataObject) -> None:
    twin = data.draw(st.integers(0, len(symbols) - 1))
    both = torch.cat([symbols, symbols[twin : twin + 1]])
    with pytest.raises(ValueError, match=rf"items {twin} and {len(symbols)} share the SID"):
        build_trie(both)


@given(unequal_sids(), st.data())
@settings(max_examples=30, deadline=None)
def test_a_string_that_begins_another_is_refused_by_name(symbols: Tensor, data: st.DataObject) -> None:
    longer = data.draw(st.integers(0, len(symbols) - 1))
    whole = strings(symbols)[longer]
    cut = data.draw(st.integers(1, len(whole) - 1))
    row = symbols[longer].clone()
    row[cut:] = -1
    with pytest.raises(ValueError) as error:
        build_trie(torch.cat([symbols, row[None]]))
    # There may be several that go on like it: the message names one of them.
    named = [i for i, sid in enumerate(strings(symbols)) if f"that of item {i}:" in str(error.value)]
    assert f"the SID {list(whole[:cut])} of item {len(symbols)} is the beginning of" in str(error.value)
    assert [strings(symbols)[i][:cut] for i in named] == [whole[:cut]]


@pytest.mark.parametrize("row", [[-1, -1, -1], [1, -1, 7]])
def test_a_row_that_is_no_string_is_refused_by_name(row: list[int]) -> None:
    with pytest.raises(ValueError, match=r"item 1 has the symbols"):
        build_trie(torch.tensor([[0, 2, 7], row]))


def test_choices_are_what_may_follow_the_same_beginning() -> None:
    symbols = torch.tensor([[0, 3, 6], [0, 4, 6], [0, 4, 7], [1, 3, 6], [2, 7, -1]])
    starts, asked = [0, 3, 6], torch.tensor([2, 4, 0])
    found = choices(build_trie(symbols), asked, starts)
    sids = strings(symbols)
    for step, (columns, real, own) in enumerate(found):
        for row, item in enumerate(asked.tolist()):
            if len(sids[item]) <= step:
                assert not real[row].any()
                continue
            following = sorted(
                {sid[step] for sid in sids if len(sid) > step and sid[:step] == sids[item][:step]}
            )
            assert [column + starts[step] for column in columns[row][real[row]].tolist()] == following
            assert int(columns[row, own[row]]) + starts[step] == sids[item][step]
