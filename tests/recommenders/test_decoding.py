"""Beam search against scoring every item, with nothing but the training loss as the oracle.

``loss`` runs the whole string through the model in one pass, ``rank`` writes it symbol by symbol on caches:
where they agree, the caches, the trie and the bookkeeping of the beams are right.
"""

import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from components.recommenders.build import build_recommender
from components.recommenders.causal import Causal, CausalConfig
from components.recommenders.decoding import beam_search
from components.recommenders.tiger import Tiger, TigerConfig
from components.seams import BatchTokens, ItemTokens, Ranking, SequenceBatch, SymbolSpace
from components.tokenizers.trie import build_trie

SPACE = SymbolSpace((4, 3), 3)
NUM_SIDS = 4 * 3 * 3
SIZE = {"dim": 16, "layers": 2, "heads": 2, "head_dim": 8, "hidden": 32, "max_history": 6}
CONFIGS = [CausalConfig(**SIZE), TigerConfig(**SIZE)]
# Ragged; with repeats; the third has seen every item whose first code is 0.
HISTORIES = [[3], [5, 1, 5, 5, 2], [0, 1, 2, 3, 4, 5], [7, 7, 7]]


def all_sids() -> Tensor:
    """Every string of the space, in lexicographic order."""
    return torch.cartesian_prod(*(torch.arange(*SPACE.range(step)) for step in range(3)))


def table(num_items: int) -> Tensor:
    """Up to 33 items; the first six are all that start with code 0, so a history can exhaust a subtree."""
    sids = all_sids()
    others = torch.randperm(NUM_SIDS - 9, generator=torch.Generator().manual_seed(4)) + 9
    return torch.cat([sids[:6], sids[others]])[:num_items]


def model_of(config: CausalConfig | TigerConfig, seed: int = 0) -> Causal | Tiger:
    """Random weights, large enough for scores that differ clearly."""
    torch.manual_seed(seed)
    model = build_recommender(config, SPACE).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.5)
    return model


def batch_of(histories: list[list[int]], targets: list[int] | None = None) -> SequenceBatch:
    """Pad by hand, with all items up to the highest as the unique ones."""
    longest = max(len(h) for h in histories)
    items = torch.tensor([h + [h[0]] * (longest - len(h)) for h in histories])
    mask = torch.tensor([[True] * len(h) + [False] * (longest - len(h)) for h in histories])
    target = torch.zeros(len(histories), dtype=torch.long) if targets is None else torch.tensor(targets)
    return SequenceBatch(torch.arange(NUM_SIDS), items, mask, target)


@torch.no_grad()
def string_costs(model: Causal | Tiger, history: list[int], item: int, symbols: Tensor) -> list[float]:
    """Cross-entropy of each symbol of an item after a history, over all symbols of the step."""
    hard = ItemTokens(symbols)
    tokens = BatchTokens(hard, hard, hard)
    steps = model.loss(batch_of([history], [item]), tokens).steps.double()
    if model.positions == "all" and len(history) > 1:  # a mean over positions: take the earlier ones out
        before = model.loss(batch_of([history[:-1]], [history[-1]]), tokens).steps.double()
        steps = steps * len(history) - before * (len(history) - 1)
    return steps.tolist()


def brute_force(model: Causal | Tiger, history: list[int], symbols: Tensor) -> dict[int, float]:
    """Score every item: each step normalised over the symbols that lead to an item."""
    costs = {item: string_costs(model, history, item, symbols) for item in range(len(symbols))}
    sids = [tuple(sid) for sid in symbols.tolist()]
    children: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)
    for item, sid in enumerate(sids):
        for step in range(len(sid)):
            children[sid[:step]][sid[step]] = -costs[item][step]
    return {
        item: sum(
            children[sid[:step]][sid[step]]
            - math.log(sum(math.exp(score) for score in children[sid[:step]].values()))
            for step in range(len(sid))
        )
        for item, sid in enumerate(sids)
    }


@torch.no_grad()
def rank(
    model: Causal | Tiger,
    histories: list[list[int]],
    symbols: Tensor,
    beams: int,
    *,
    exclude_seen: bool = False,
) -> Ranking:
    return model.rank(batch_of(histories), symbols, build_trie(symbols), beams, exclude_seen=exclude_seen)


def check(found: Ranking, expected: list[dict[int, float]], width: int) -> None:
    """The list of each user is the best ``width`` of the expected scores, then -1 beside -inf."""
    assert found.items.shape == found.scores.shape == (len(expected), width)
    for items, scores, wanted in zip(found.items.tolist(), found.scores.tolist(), expected, strict=True):
        best = sorted(wanted, key=lambda item: -wanted[item])[:width]
        assert items[: len(best)] == best
        assert scores[: len(best)] == pytest.approx([wanted[item] for item in best], abs=1e-4)
        assert items[len(best) :] == [-1] * (width - len(best))
        assert scores[len(best) :] == [-math.inf] * (width - len(best))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_wide_beam_equals_scoring_every_item(config: CausalConfig | TigerConfig) -> None:
    model, symbols = model_of(config), table(20)
    every = [brute_force(model, history, symbols) for history in HISTORIES]
    for scores in every:
        assert sum(math.exp(s) for s in scores.values()) == pytest.approx(1, abs=1e-4)
    check(rank(model, HISTORIES, symbols, 20), every, 20)
    check(rank(model, HISTORIES, symbols, 33), every, 33)

    unseen = [
        {item: score for item, score in scores.items() if item not in history}
        for history, scores in zip(HISTORIES, every, strict=True)
    ]
    # 20 beams, fewer items left: the list ends early and no beam was spent on a seen item.
    check(rank(model, HISTORIES, symbols, 20, exclude_seen=True), unseen, 20)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_where_every_string_is_an_item_the_score_is_minus_the_loss(
    config: CausalConfig | TigerConfig,
) -> None:
    model, symbols = model_of(config, seed=1), all_sids()
    expected = [
        {item: -sum(string_costs(model, history, item, symbols)) for item in range(NUM_SIDS)}
        for history in HISTORIES
    ]
    check(rank(model, HISTORIES, symbols, NUM_SIDS), expected, NUM_SIDS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
@pytest.mark.parametrize("beams", [1, 3, 7])
def test_narrow_beam_returns_distinct_items_with_their_scores(
    config: CausalConfig | TigerConfig, beams: int
) -> None:
    """A narrow beam may miss items; what it returns is valid, unseen, ordered and rightly scored."""
    model, symbols = model_of(config), table(20)
    found = rank(model, HISTORIES, symbols, beams, exclude_seen=True)
    for history, items, scores in zip(HISTORIES, found.items.tolist(), found.scores.tolist(), strict=True):
        exact = brute_force(model, history, symbols)
        assert len(set(items)) == beams and not set(items) & {*history, -1}
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([exact[item] for item in items], abs=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_excluding_subtrees_costs_no_beams(config: CausalConfig | TigerConfig) -> None:
    """Where the best beams would all lead to seen items, one beam still finds an unseen one."""
    model, symbols = model_of(config), table(20)
    for history in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]):
        found = rank(model, [history], symbols, 1, exclude_seen=True)
        assert found.items[0, 0].item() not in {-1, *history}
        assert math.isfinite(found.scores[0, 0])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_nobody_else_in_the_batch_changes_a_ranking(config: CausalConfig | TigerConfig) -> None:
    """Neither padding nor the other users."""
    model, symbols = model_of(config), table(20)
    together = rank(model, HISTORIES, symbols, 9, exclude_seen=True)
    for row, history in enumerate(HISTORIES):
        alone = rank(model, [history], symbols, 9, exclude_seen=True)
        assert torch.equal(alone.items[0], together.items[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_only_the_latest_items_are_read(config: CausalConfig | TigerConfig) -> None:
    model, symbols = model_of(config), table(20)
    recent = [1, 4, 9, 9, 12, 3]
    full, cut = (rank(model, [h, [2]], symbols, 20) for h in ([17, 11, *recent], recent))
    assert torch.equal(full.items, cut.items)
    torch.testing.assert_close(full.scores, cut.scores, rtol=0, atol=1e-5)
    # ... but what was seen long ago is not recommended either.
    assert not {17, 11} & set(
        rank(model, [[17, 11, *recent]], symbols, 20, exclude_seen=True).items[0].tolist()
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_a_catalogue_of_one_item(config: CausalConfig | TigerConfig) -> None:
    model, symbols = model_of(config), table(1)
    found = rank(model, [[0], [0, 0]], symbols, 3)
    assert found.items.tolist() == [[0, -1, -1]] * 2
    assert found.scores[:, 0].tolist() == pytest.approx([0, 0], abs=1e-6)  # the only item is certain
    nothing = rank(model, [[0], [0, 0]], symbols, 3, exclude_seen=True)
    assert nothing.items.tolist() == [[-1] * 3] * 2
    assert bool(torch.isneginf(nothing.scores).all())


class Coin:
    """A head without memory: the logits of a step are fixed, and differ by user."""

    def __init__(self, logits: list[Tensor]) -> None:
        self.logits = logits

    def step(self, state: None, step: int, symbols: Tensor | None) -> tuple[Tensor, None]:
        width = 1 if symbols is None else symbols.shape[1]
        return self.logits[step][:, None].expand(-1, width, -1), None

    def reorder(self, state: None, index: Tensor) -> None:
        return None


def test_nothing_excluded_equals_no_exclusion() -> None:
    """Also for one user of a batch, beside users who exclude."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(3, SPACE.range(s)[1] - SPACE.range(s)[0], generator=generator) for s in range(3)]
    symbols, starts = table(20), [SPACE.range(step)[0] for step in range(3)]
    trie, head = build_trie(symbols), Coin(logits)
    free = beam_search(head, None, trie, starts, 20)
    none = beam_search(head, None, trie, starts, 20, torch.full((3, 4), -1))
    assert torch.equal(free.items, none.items) and torch.equal(free.scores, none.scores)

    everything = torch.arange(20)
    excluded = torch.stack([torch.full((20,), -1), everything, everything.masked_fill(everything == 13, -1)])
    mixed = beam_search(head, None, trie, starts, 20, excluded)
    assert torch.equal(mixed.items[0], free.items[0])
    assert mixed.items[1].tolist() == [-1] * 20
    assert mixed.items[2].tolist() == [13] + [-1] * 19
    assert mixed.scores[2, 0] == free.scores[2][free.items[2] == 13]


def test_exclusion_of_any_items_equals_filtering() -> None:
    """One law over many random histories; no model needed."""
    generator = torch.Generator().manual_seed(5)
    users = 200
    logits = [
        torch.randn(users, SPACE.range(s)[1] - SPACE.range(s)[0], generator=generator) for s in range(3)
    ]
    symbols, starts = table(24), [SPACE.range(step)[0] for step in range(3)]
    trie, head = build_trie(symbols), Coin(logits)
    free = beam_search(head, None, trie, starts, 24)
    excluded = torch.randint(-1, 24, (users, 40), generator=generator)
    excluded[:, 1:] = excluded[:, 1:].masked_fill(
        torch.rand(users, 39, generator=generator) < torch.rand(users, 1, generator=generator), -1
    )
    found = beam_search(head, None, trie, starts, 24, excluded)
    for row in range(users):
        gone = set(excluded[row].tolist())
        left = [item for item in free.items[row].tolist() if item not in gone]
        assert found.items[row].tolist() == left + [-1] * (24 - len(left))
