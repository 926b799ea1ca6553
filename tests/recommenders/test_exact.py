"""Exact scores against a loop over all items, and against the beam search that they are the oracle of."""

import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from components.recommenders.decoding import beam_search
from components.recommenders.exact import exact_scores, index_of, rank_exact
from components.seams import SymbolSpace
from components.tokenizers.trie import build_trie

USERS, WIDTH = 3, 4
SPACES = {
    "a codebook a level": SymbolSpace((4, 3, 5), 3),
    "a shared codebook": SymbolSpace((5, 5, 5), 3, shared=True),
    "unequal lengths": SymbolSpace((5, 5, 5, 5), 8, shared=True, shortest=1),
}


class Chain:
    """Random transitions that follow the user, as a first-order head and as one that a beam search drives."""

    def __init__(self, space: SymbolSpace, shift: float = 0.0) -> None:
        self.space, generator = space, torch.Generator().manual_seed(1)
        self.weights = []
        for step in range(space.num_steps):
            rows = 1 if step == 0 else space.codebook_sizes[step - 1]
            start, stop = space.range(step)
            self.weights.append(2 * torch.randn(WIDTH, rows, stop - start, generator=generator))
        self.shift = shift

    def transitions(self, user_BD: Tensor, step: int) -> Tensor:
        logits = torch.einsum("bd,dck->bck", user_BD, self.weights[step])
        return logits + self.shift * torch.arange(1, logits.shape[1] + 1)[:, None]

    def step(self, user_BD: Tensor, step: int, symbols: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self.transitions(user_BD, step)
        if symbols is None:
            return logits, user_BD
        rows = (symbols - self.space.codes(step - 1)[0]).clamp(
            max=logits.shape[1] - 1
        )  # dead beams write no code
        return logits.gather(1, rows[:, :, None].expand(-1, -1, logits.shape[2])), user_BD

    def reorder(self, user_BD: Tensor, index: Tensor) -> Tensor:
        return user_BD


def table_of(space: SymbolSpace, num_items: int = 40, longest: int | None = None) -> Tensor:
    """Random SIDs with suffixes counted from 0 and few enough codes for siblings; -1 behind short ones."""
    generator, levels = torch.Generator().manual_seed(2), space.num_levels
    rows: list[list[int]] = []
    met: dict[tuple[int, ...], int] = defaultdict(int)
    while len(rows) < num_items:
        length = levels
        if space.shortest is not None:
            length = int(torch.randint(space.shortest, (longest or levels) + 1, (), generator=generator))
        drawn = [torch.randint(*space.codes(level), (), generator=generator) for level in range(length)]
        codes = tuple(int(code) for code in drawn)
        if met[codes] < space.suffix_size:
            rows.append([*codes, space.num_codes + met[codes]] + [-1] * (levels - length))
            met[codes] += 1
    return torch.tensor(rows)


def users() -> Tensor:
    return torch.randn(USERS, WIDTH, generator=torch.Generator().manual_seed(3))


def scores_of(space: SymbolSpace, table: Tensor, shift: float = 0.0) -> Tensor:
    return exact_scores(Chain(space, shift), users(), index_of(build_trie(table), space))


def one_by_one(space: SymbolSpace, table: Tensor) -> Tensor:
    """Score item after item and symbol after symbol, from the transitions alone."""
    sids = [[symbol for symbol in sid if symbol >= 0] for sid in table.tolist()]
    siblings: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for sid in sids:
        for step, symbol in enumerate(sid):
            siblings[tuple(sid[:step])].add(symbol)
    scores = torch.zeros(USERS, len(sids), dtype=torch.double)
    for step in range(max(map(len, sids))):
        logits, start = Chain(space).transitions(users(), step).double(), space.range(step)[0]
        for item, sid in enumerate(sids):
            if step < len(sid):
                row = logits[:, sid[step - 1] - space.codes(step - 1)[0] if step else 0]
                shared = [symbol - start for symbol in siblings[tuple(sid[:step])]]
                scores[:, item] += row[:, sid[step] - start] - row[:, shared].logsumexp(dim=1)
    return scores


each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


@each_space
def test_scores_are_those_of_a_loop_over_all_items(space: SymbolSpace) -> None:
    table = table_of(space)
    expected = one_by_one(space, table).float()
    torch.testing.assert_close(scores_of(space, table), expected, atol=1e-5, rtol=1e-5)


def test_levels_that_no_sid_reaches_are_not_asked_for() -> None:
    space = SPACES["unequal lengths"]
    table = table_of(space, num_items=20, longest=2)
    assert len(index_of(build_trie(table), space).edges) == 3
    expected = one_by_one(space, table).float()
    torch.testing.assert_close(scores_of(space, table), expected, atol=1e-5, rtol=1e-5)


@each_space
def test_scores_are_a_distribution_over_items(space: SymbolSpace) -> None:
    mass = scores_of(space, table_of(space)).exp().sum(dim=1)
    torch.testing.assert_close(mass, torch.ones(USERS), atol=1e-5, rtol=0)


@each_space
def test_what_is_added_to_all_logits_of_a_row_changes_nothing_however_large(space: SymbolSpace) -> None:
    """Exponentials of such logits overflow, or vanish, unless the largest sibling is taken off before."""
    table = table_of(space)
    for shift in (200.0, -200.0):
        torch.testing.assert_close(
            scores_of(space, table, shift=shift), scores_of(space, table), atol=2e-3, rtol=0
        )


@pytest.mark.parametrize("excluding", [False, True], ids=["all items", "seen items excluded"])
@each_space
def test_the_list_is_that_of_an_unlimited_beam(space: SymbolSpace, excluding: bool) -> None:
    table = table_of(space)
    excluded = torch.tensor([[0, 5, -1, 5], [1, 2, 3, 4], [-1, -1, -1, -1]]) if excluding else None
    trie, head = build_trie(table), Chain(space)
    beam = beam_search(head, users(), trie, space.starts, len(table), excluded)
    exact = rank_exact(scores_of(space, table), len(table), excluded)
    assert torch.equal(exact.items, beam.items)
    torch.testing.assert_close(exact.scores, beam.scores, atol=1e-5, rtol=1e-5)


@each_space
def test_whatever_a_narrow_beam_finds_has_its_exact_score(space: SymbolSpace) -> None:
    table = table_of(space)
    scores = scores_of(space, table)
    for width in (1, 2, 5):
        beam = beam_search(Chain(space), users(), build_trie(table), space.starts, width)
        found = beam.items >= 0
        assert bool(found.any(dim=1).all())
        exact = scores.gather(1, beam.items.clamp(min=0))
        torch.testing.assert_close(beam.scores[found], exact[found], atol=1e-5, rtol=1e-5)
        assert bool((rank_exact(scores, width).scores >= beam.scores - 1e-5).all())


@each_space
def test_other_item_ids_permute_the_result_and_nothing_else(space: SymbolSpace) -> None:
    table = table_of(space)
    old_of_new = torch.randperm(len(table), generator=torch.Generator().manual_seed(5))
    scores, renamed = scores_of(space, table), scores_of(space, table[old_of_new])
    assert torch.equal(renamed, scores[:, old_of_new])
    ranked, again = rank_exact(scores, 10), rank_exact(renamed, 10)
    assert torch.equal(old_of_new[again.items], ranked.items)
    assert torch.equal(again.scores, ranked.scores)


@pytest.mark.parametrize("beams", [1, 4, 12, 15])
def test_of_equal_scores_the_lower_id_comes_first_and_what_is_missing_is_marked(beams: int) -> None:
    """Scores of few values, so that ties stand across the end of every list; the last user has two items left."""
    scores = -torch.randint(3, (4, 12), generator=torch.Generator().manual_seed(6)).float()
    excluded = torch.full((4, 10), -1)
    excluded[1, :3] = torch.tensor([7, 0, 7])
    excluded[3] = torch.arange(10)
    found = rank_exact(scores, beams, excluded)
    assert found.items.shape == found.scores.shape == (4, beams)
    for user in range(4):
        left = [item for item in range(12) if item not in excluded[user].tolist()]
        best = sorted(left, key=lambda item: (-float(scores[user, item]), item))[:beams]
        missing = beams - len(best)
        assert found.items[user].tolist() == best + [-1] * missing
        assert found.scores[user].tolist() == scores[user, best].tolist() + [-math.inf] * missing
