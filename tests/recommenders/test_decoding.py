"""Beam search against scoring every item, with nothing but the training loss as the oracle.

``loss`` runs the whole string through the model in one pass, ``rank`` writes it symbol by symbol on caches:
where they agree, the caches, the trie and the bookkeeping of the beams are right. SIDs of unequal length are
searched with a toy head, and scored string by string without a trie.
"""

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from components.recommenders.build import build_recommender
from components.recommenders.causal import Causal, CausalConfig
from components.recommenders.decoding import beam_search
from components.recommenders.intrr import Intrr, IntrrConfig
from components.recommenders.tiger import Tiger, TigerConfig
from components.seams import BatchTokens, ItemFacts, ItemTokens, Ranking, SequenceBatch, SymbolSpace
from components.tokenizers.trie import build_trie, choices

SPACE = SymbolSpace((4, 3), 3)
NUM_SIDS = 4 * 3 * 3
UNEQUAL = SymbolSpace((5, 5, 5, 5), 64, shared=True, shortest=1)
SIZE = {"dim": 16, "layers": 2, "heads": 2, "head_dim": 8, "hidden": 32, "max_history": 6}
SMALL = {"uid_dim": 6, "ran_hidden": 12}
CHOICES: list[dict[str, Any]] = [
    {},
    {"context": "prefix_sum", "assignment": "ste"},
    {"reads": "uid_codewords", "writes": "autoregressive", "text": True},
    {"reads": "flat", "backbone": "hstu"},
]
CONFIGS = [
    CausalConfig(**SIZE),
    TigerConfig(**SIZE),
    *(IntrrConfig(**SIZE, **SMALL, **choices) for choices in CHOICES),
]
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


def model_of(config: CausalConfig | TigerConfig | IntrrConfig, seed: int = 0) -> Causal | Tiger | Intrr:
    """Random weights, large enough for scores that differ clearly."""
    torch.manual_seed(seed)
    facts = ItemFacts(torch.ones(NUM_SIDS, dtype=torch.bool), torch.randn(NUM_SIDS, 5))
    model = build_recommender(config, SPACE, facts).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.5)
    return model


def batch_of(
    histories: list[list[int]], targets: list[int] | None = None, num_items: int = NUM_SIDS
) -> SequenceBatch:
    """Pad by hand, with all items up to the highest as the unique ones."""
    longest = max(len(h) for h in histories)
    items = torch.tensor([h + [h[0]] * (longest - len(h)) for h in histories])
    mask = torch.tensor([[True] * len(h) + [False] * (longest - len(h)) for h in histories])
    target = torch.zeros(len(histories), dtype=torch.long) if targets is None else torch.tensor(targets)
    return SequenceBatch(torch.arange(num_items), items, mask, target)


@torch.no_grad()
def string_costs(
    model: Causal | Tiger | Intrr, history: list[int], item: int, symbols: Tensor, *, children: bool = False
) -> list[float]:
    """Cross-entropy of each symbol of an item after a history, over all symbols of the step or those that lead on."""
    hard = ItemTokens(symbols)
    among = choices(build_trie(symbols), torch.arange(len(symbols)), SPACE.starts) if children else None
    tokens = BatchTokens(hard, hard, hard._replace(choices=among))
    steps = model.loss(batch_of([history], [item], len(symbols)), tokens).steps.double()
    if model.positions == "all" and len(history) > 1:  # a mean over positions: take the earlier ones out
        before = model.loss(batch_of([history[:-1]], [history[-1]], len(symbols)), tokens).steps.double()
        steps = steps * len(history) - before * (len(history) - 1)
    return steps.tolist()


def brute_force(model: Causal | Tiger | Intrr, history: list[int], symbols: Tensor) -> dict[int, float]:
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
    model: Causal | Tiger | Intrr,
    histories: list[list[int]],
    symbols: Tensor,
    beams: int,
    *,
    exclude_seen: bool = False,
) -> Ranking:
    return model.rank(
        batch_of(histories, None, len(symbols)),
        model.catalogue(symbols, build_trie(symbols)),
        beams,
        exclude_seen=exclude_seen,
    )


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
def test_over_the_children_the_loss_is_minus_the_score(
    config: CausalConfig | TigerConfig | IntrrConfig,
) -> None:
    """Trained as it decodes: the costs of an item's symbols add up to minus its log-probability among all items."""
    model, symbols = model_of(config), table(20)
    ranking = rank(model, HISTORIES, symbols, 20)
    for history, items, scores in zip(
        HISTORIES, ranking.items.tolist(), ranking.scores.tolist(), strict=True
    ):
        found = [-sum(string_costs(model, history, item, symbols, children=True)) for item in items]
        assert found == pytest.approx(scores, abs=1e-4)


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


class Remembers:
    """A head whose logits depend on the user and on every symbol written so far, in their order."""

    def __init__(self, users: int, space: SymbolSpace, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.space, self.user = space, normal(users, 1, 8)
        self.mix, self.read, self.out = (
            normal(8, 8),
            normal(space.num_symbols, 8),
            normal(space.num_symbols, 8),
        )

    def step(self, state: Tensor, step: int, symbols: Tensor | None) -> tuple[Tensor, Tensor]:
        if symbols is not None:
            state = torch.tanh(state @ self.mix + self.read[symbols])
        return state @ self.out[slice(*self.space.range(step))].T, state

    def reorder(self, state: Tensor, index: Tensor) -> Tensor:
        return state.gather(1, index.unsqueeze(-1).expand(-1, -1, state.shape[-1]))


def unequal_table(num_items: int, seed: int) -> Tensor:
    """Random codes of random number, suffixes counted within equal codes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(5, (num_items, 4), generator=generator).tolist()
    lengths = torch.randint(1, 5, (num_items,), generator=generator).tolist()
    met: dict[tuple[int, ...], int] = defaultdict(int)
    rows = []
    for all_codes, length in zip(codes, lengths, strict=True):
        one = tuple(all_codes[:length])
        rows.append([*one, 5 + met[one]] + [-1] * (4 - length))
        met[one] += 1
    return torch.tensor(rows)


def score_every_item(head: Remembers, symbols: Tensor) -> list[dict[int, float]]:
    """Write every string of the table for every user; each step is normalised over what some string has there."""
    sids = [[symbol for symbol in row if symbol >= 0] for row in symbols.tolist()]
    children: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for sid in sids:
        for step, symbol in enumerate(sid):
            children[tuple(sid[:step])].add(symbol)
    found: list[dict[int, float]] = [{} for _ in head.user]
    for user, scores in enumerate(found):
        for item, sid in enumerate(sids):
            scores[item], state = 0.0, head.user[user : user + 1]
            for step, symbol in enumerate(sid):
                logits, state = head.step(state, step, torch.tensor([[sid[step - 1]]]) if step else None)
                log_p = logits[0, 0] - logits[
                    0, 0, [s - head.space.range(step)[0] for s in children[tuple(sid[:step])]]
                ].logsumexp(0)
                scores[item] += float(log_p[symbol - head.space.range(step)[0]])
    return found


def penalised(every: list[dict[int, float]], symbols: Tensor, a: float) -> list[dict[int, float]]:
    count = (symbols >= 0).sum(dim=1).tolist()
    return [{item: score / count[item] ** a for item, score in scores.items()} for scores in every]


@pytest.mark.parametrize("seed", range(3))
def test_unequal_length_wide_beam_equals_scoring_every_item(seed: int) -> None:
    symbols, head = unequal_table(250, seed), Remembers(2, UNEQUAL, seed)
    trie, starts, every = build_trie(symbols), UNEQUAL.starts, score_every_item(head, symbols)
    assert all(sum(math.exp(s) for s in scores.values()) == pytest.approx(1, abs=1e-9) for scores in every)
    check(beam_search(head, head.user, trie, starts, 250), every, 250)
    check(beam_search(head, head.user, trie, starts, 300), every, 300)
    for a in (0.5, 1.0, 3.0):
        found = beam_search(head, head.user, trie, starts, 250, length_penalty=a)
        check(found, penalised(every, symbols, a), 250)


@pytest.mark.parametrize("a", [0.0, 1.0])
def test_unequal_length_exclusion_equals_filtering(a: float) -> None:
    """Of scattered items, of all below one node, of all that are short, of all but one and of all."""
    symbols, everything = unequal_table(200, 3), torch.arange(200)
    trie, short = build_trie(symbols), symbols[:, 2] < 0
    kept = [torch.rand(200, generator=torch.Generator().manual_seed(0)) < share for share in (0.7, 0.1)]
    kept += [symbols[:, 0] != 2, ~short, short, everything == 13, everything < 0]
    excluded = torch.stack([everything.masked_fill(keep, -1) for keep in kept])
    excluded = torch.cat([excluded, excluded[:, :50]], dim=1)  # some are met twice
    head = Remembers(len(kept), UNEQUAL, 3)
    every = penalised(score_every_item(head, symbols), symbols, a)
    left = [{i: s for i, s in scores.items() if keep[i]} for scores, keep in zip(every, kept, strict=True)]
    check(beam_search(head, head.user, trie, UNEQUAL.starts, 200, excluded, a), left, 200)
    # A narrow beam spends nothing on what is excluded: it is full, or holds all that is left.
    narrow = beam_search(head, head.user, trie, UNEQUAL.starts, 4, excluded, a)
    for items, wanted in zip(narrow.items.tolist(), left, strict=True):
        assert len({item for item in items if item in wanted}) == min(4, len(wanted))


@pytest.mark.parametrize("a", [0.0, 0.8])
@pytest.mark.parametrize("beams", [1, 3, 10])
def test_unequal_length_narrow_beam_returns_distinct_items_with_their_scores(beams: int, a: float) -> None:
    symbols, head = unequal_table(150, 4), Remembers(6, UNEQUAL, 4)
    found = beam_search(head, head.user, build_trie(symbols), UNEQUAL.starts, beams, length_penalty=a)
    every = penalised(score_every_item(head, symbols), symbols, a)
    for items, scores, exact in zip(found.items.tolist(), found.scores.tolist(), every, strict=True):
        assert len(set(items)) == beams and -1 not in items
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([exact[item] for item in items], abs=1e-9)


@pytest.mark.parametrize("longest", [3, 5])
def test_a_short_and_a_long_item_part_where_the_short_one_ends(longest: int) -> None:
    """Also where no item has all the steps of the space."""
    symbols = torch.full((2, 5), -1)
    symbols[0, :2], symbols[1, :longest] = torch.tensor([1, 5]), torch.tensor([1, 0, 3, 3, 5])[:longest]
    symbols[1, longest - 1] = 5
    head = Remembers(4, UNEQUAL, 0)
    logits = head.step(torch.tanh(head.user @ head.mix + head.read[1]), 1, None)[0][:, 0]
    p_short = logits[:, [0, 5]].softmax(dim=1)[:, 1].tolist()  # all other steps have one child
    expected = [{0: math.log(p), 1: math.log(1 - p)} for p in p_short]
    for beams in (1, 2, 3):
        check(beam_search(head, head.user, build_trie(symbols), UNEQUAL.starts, beams), expected, beams)


def test_nothing_is_asked_of_the_head_behind_the_longest_string() -> None:
    """The space has three steps, the table strings of two."""
    symbols = torch.tensor([[0, 5, -1], [0, 6, -1], [1, 5, -1]])
    head = Coin([torch.zeros(1, 7), torch.zeros(1, 7)])
    found = beam_search(head, None, build_trie(symbols), [0, 0, 5], 3)
    assert found.scores[0].exp().tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert found.items[0, 0] == 2


def log_probabilities(space: SymbolSpace, step: int, **of: float) -> Tensor:
    """Logits (1, K) of one user; symbols are named c0, c1 (codes) and s0, s1 (suffixes), all others have 0."""
    logits = torch.full((space.num_symbols,), -math.inf, dtype=torch.float64)
    for name, p in of.items():
        logits[int(name[1:]) + (space.num_codes if name[0] == "s" else 0)] = math.log(p)
    return logits[None, slice(*space.range(step))]


def test_neither_finished_nor_unfinished_strings_push_the_other_out() -> None:
    """A user with two beams, where three strings end or go on at the same step."""
    space = SymbolSpace((4, 4), 20, shared=True, shortest=1)
    short, wide, last = [0, 4, -1], [[0, 1, 4 + i] for i in range(10)], [0, 2, 4]
    items = {"short": 0, "last": 11}
    trie = build_trie(torch.tensor([short, *wide, last]))
    only, even = (
        log_probabilities(space, 0, c0=1.0),
        log_probabilities(space, 2, **{f"s{i}": 0.1 for i in range(10)}),
    )

    # Both longer beginnings are more probable than the item that ends, but nine of ten parts of one are spread.
    overtaken = Coin([only, log_probabilities(space, 1, s0=0.2, c1=0.42, c2=0.38), even])
    found = beam_search(overtaken, None, trie, space.starts, 2)
    assert found.items.tolist() == [[items["last"], items["short"]]]
    assert found.scores[0].tolist() == pytest.approx([math.log(0.38), math.log(0.2)])

    # The item that ends is the most probable, and yet both longer beginnings go on.
    ahead = Coin([only, log_probabilities(space, 1, s0=0.5, c1=0.3, c2=0.2), even])
    found = beam_search(ahead, None, trie, space.starts, 2)
    assert found.items.tolist() == [[items["short"], items["last"]]]
    assert found.scores[0].tolist() == pytest.approx([math.log(0.5), math.log(0.2)])


def test_length_penalty_lets_a_longer_string_overtake_a_finished_one() -> None:
    space = SymbolSpace((2, 2), 1, shared=True, shortest=1)
    trie = build_trie(torch.tensor([[0, 2, -1], [0, 1, 2]]))
    head = Coin(
        [
            log_probabilities(space, 0, c0=1.0),
            log_probabilities(space, 1, s0=0.6, c1=0.4),
            log_probabilities(space, 2, s0=1.0),
        ]
    )
    for a, best, score in [(0.0, 0, math.log(0.6)), (3.0, 1, math.log(0.4) / 27)]:
        found = beam_search(head, None, trie, space.starts, 1, length_penalty=a)
        assert found.items.tolist() == [[best]]
        assert found.scores.tolist() == [[pytest.approx(score)]]
