"""Laws of histories as rows of symbols: SIDs of unequal length, and SIDs of one length as their special case."""

import math
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from components.data.batches import Rows, cut_batches, pad, row_symbols, window_rows
from components.recommenders.causal import Causal, CausalConfig
from components.recommenders.item_encoders import latest
from components.recommenders.strings import lay_out
from components.seams import (
    BatchTokens,
    Catalogue,
    ItemTokens,
    Ranking,
    RecommenderLoss,
    SequenceBatch,
    SymbolSpace,
)
from components.tokenizers.sids import symbol_counts
from components.tokenizers.trie import build_trie

SIZE: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 2, "head_dim": 8, "hidden": 32, "max_history": 6}
APART = SymbolSpace((4, 3, 4), 3)
SHARED = SymbolSpace((4, 4, 4), 3, shared=True)
UNEQUAL = SymbolSpace((4, 4, 4), 3, shared=True, shortest=1)
every_fixed_space = pytest.mark.parametrize("space", [APART, SHARED], ids=["levels apart", "shared codes"])
HISTORIES = [[3], [5, 1, 5, 5, 2], [0, 1, 2, 8, 4, 9], [7, 7, 7], [10, 11, 6]]
TARGETS = [9, 2, 11, 0, 7]
ITEMS = 12
laws = settings(max_examples=40, deadline=None)


def table(space: SymbolSpace) -> Tensor:
    """Twelve SIDs, as many of each length that the space has."""
    suffix, levels = torch.arange(space.num_codes, space.num_symbols), space.num_levels
    codes = [torch.arange(size) + space.starts[level] for level, size in enumerate(space.codebook_sizes)]
    lengths, some = range(space.shortest or levels, levels + 1), []
    for length in lengths:
        sids = F.pad(torch.cartesian_prod(*codes[:length], suffix), (0, levels - length), value=-1)
        drawn = torch.randperm(len(sids), generator=torch.Generator().manual_seed(length))
        some.append(sids[drawn[: ITEMS // len(lengths)]])
    every = torch.cat(some)
    return every[torch.randperm(ITEMS, generator=torch.Generator().manual_seed(0))]


def model_of(space: SymbolSpace, **settings: Any) -> Causal:
    """Weights large enough for scores that differ clearly; no dropout."""
    torch.manual_seed(0)
    model = Causal(CausalConfig(**SIZE | settings), space).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.4)
    return model


def batch_of(histories: list[list[int]], targets: list[int], padding: int | None = None) -> SequenceBatch:
    """Pad by hand, with the oldest item or another one."""
    longest = max(len(history) for history in histories)
    filled = [h + [h[0] if padding is None else padding] * (longest - len(h)) for h in histories]
    mask = torch.arange(longest) < torch.tensor([len(history) for history in histories])[:, None]
    return SequenceBatch(torch.arange(ITEMS), torch.tensor(filled), mask, torch.tensor(targets))


def loss_of(model: Causal, batch: SequenceBatch) -> RecommenderLoss:
    hard = ItemTokens(table(model.space))
    return model.loss(batch, BatchTokens(hard, hard, hard))


def rank(model: Causal, histories: list[list[int]], *, exclude_seen: bool = False) -> Ranking:
    symbols = table(model.space)
    batch = batch_of(histories, [0] * len(histories))
    with torch.no_grad():
        return model.rank(batch, Catalogue(symbols, build_trie(symbols)), ITEMS, exclude_seen=exclude_seen)


def same(one: Ranking, other: Ranking) -> None:
    assert torch.equal(one.items, other.items)
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=2e-5)


# The layout


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=6))
@laws
def test_every_symbol_knows_its_item_and_its_step(counts: list[list[int]]) -> None:
    longest = max(len(row) for row in counts)
    # Where no item is, any number may stand.
    counts_BT = torch.tensor([row + [4] * (longest - len(row)) for row in counts])
    present_BT = torch.arange(longest) < torch.tensor([len(row) for row in counts])[:, None]
    found = lay_out(counts_BT, present_BT)
    expected = [[(place, step) for place, n in enumerate(row) for step in range(n)] for row in counts]
    assert found.length.tolist() == [len(row) for row in expected]
    assert found.present.sum(dim=1).tolist() == found.length.tolist()
    assert found.place.shape == found.step.shape == found.present.shape == (len(counts), max(found.length))
    for row, wanted in enumerate(expected):
        pairs = list(zip(found.place[row].tolist(), found.step[row].tolist(), strict=True))
        assert pairs == wanted + [(0, 0)] * (len(pairs) - len(wanted))
        assert bool(found.present[row, : len(wanted)].all())


# One length


def rectangle(model: Causal, histories: list[list[int]], targets: list[int]) -> tuple[Tensor, Tensor]:
    """Loss and its steps where every item is a row of S symbols: histories as a block (B, T, S, D)."""
    space, symbols = model.space, table(model.space)
    longest = max(len(history) for history in histories) + 1
    whole = [[*history, target] for history, target in zip(histories, targets, strict=True)]
    items_BT = torch.tensor([row + [row[0]] * (longest - len(row)) for row in whole])
    present_BT = torch.arange(longest) < torch.tensor([len(row) for row in whole])[:, None]
    x_BTSD = model.symbols.weight[symbols[items_BT]] + model.place[:longest, None] + model.step_place
    hidden, _ = model.stack(x_BTSD.flatten(1, 2)[:, :-1])
    steps = space.num_steps
    h_PSD = hidden[:, steps - 1 :].unflatten(1, (-1, steps))[present_BT[:, 1:]]
    symbols_PS = symbols[items_BT[:, 1:][present_BT[:, 1:]]]
    losses = []
    for step in range(steps):
        start, end = space.range(step)
        losses.append(
            F.cross_entropy(h_PSD[:, step] @ model.out.weight[start:end].T, symbols_PS[:, step] - start)
        )
    return torch.stack(losses).mean(), torch.stack(losses)


@every_fixed_space
def test_sids_of_one_length_cost_and_teach_what_they_do_in_a_rectangle(space: SymbolSpace) -> None:
    model = model_of(space)
    total, steps = rectangle(model, HISTORIES, TARGETS)
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = loss_of(model, batch_of(HISTORIES, TARGETS))
    found.total.backward()
    torch.testing.assert_close(found.total, total, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.steps, steps.detach(), rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


@every_fixed_space
def test_sids_of_one_length_are_ranked_as_in_a_rectangle(space: SymbolSpace) -> None:
    """Every item scored by the rectangle, each step normalised over the codes that lead to an item."""
    model, symbols = model_of(space), table(space)
    found = rank(model, HISTORIES)
    sids = [tuple(sid) for sid in symbols.tolist()]
    for row, history in enumerate(HISTORIES):
        costs = []
        for item in range(ITEMS):
            with torch.no_grad():
                steps = rectangle(model, [history], [item])[1].double() * len(history)
                if len(history) > 1:
                    earlier = rectangle(model, [history[:-1]], [history[-1]])[1].double()
                    steps = steps - earlier * (len(history) - 1)
            costs.append(steps.tolist())
        scores = []
        for sid, cost in zip(sids, costs, strict=True):
            score = 0.0
            for step in range(len(sid)):
                siblings = {other[step]: i for i, other in enumerate(sids) if other[:step] == sid[:step]}
                score -= cost[step] + math.log(sum(math.exp(-costs[i][step]) for i in siblings.values()))
            scores.append(score)
        best = sorted(range(ITEMS), key=lambda item: -scores[item])
        assert found.items[row].tolist() == best
        assert found.scores[row].tolist() == pytest.approx([scores[item] for item in best], abs=1e-4)


def test_full_sids_rank_the_same_where_shorter_ones_could_have_been() -> None:
    """The wider range of a step adds symbols that lead to no item, and the trie leaves those out."""
    fixed, open_ended = model_of(SHARED), model_of(UNEQUAL)
    open_ended.load_state_dict(fixed.state_dict())
    symbols = table(SHARED)
    batch, trie = batch_of(HISTORIES, TARGETS), build_trie(symbols)
    with torch.no_grad():
        for exclude_seen in (False, True):
            same(
                *(
                    m.rank(batch, Catalogue(symbols, trie), ITEMS, exclude_seen=exclude_seen)
                    for m in (fixed, open_ended)
                )
            )


# Unequal lengths


def by_hand(model: Causal, histories: list[list[int]], targets: list[int]) -> tuple[float, list[float]]:
    """Loss and its steps, user by user and symbol by symbol: each from the string before it, alone."""
    space, symbols = model.space, table(model.space)
    sums, counts = [0.0] * space.num_steps, [0] * space.num_steps
    for history, target in zip(histories, targets, strict=True):
        string: list[tuple[int, int, int]] = []
        for place, item in enumerate([*history, target]):
            for step, symbol in enumerate(s for s in symbols[item].tolist() if s >= 0):
                if place > 0:
                    read = torch.stack(
                        [model.symbols.weight[s] + model.place[p] + model.step_place[t] for s, p, t in string]
                    )
                    start, end = space.range(step)
                    logits = model.stack(read[None])[0][0, -1] @ model.out.weight[start:end].T
                    sums[step] -= float(logits.double().log_softmax(dim=0)[symbol - start])
                    counts[step] += 1
                string.append((symbol, place, step))
    return sum(sums) / sum(counts), [s / max(n, 1) for s, n in zip(sums, counts, strict=True)]


@pytest.mark.parametrize("space", [APART, UNEQUAL], ids=["one length", "unequal"])
@torch.no_grad()
def test_the_loss_is_the_mean_over_symbols_whoever_wrote_them(space: SymbolSpace) -> None:
    model = model_of(space)
    found = loss_of(model, batch_of(HISTORIES, TARGETS))
    total, steps = by_hand(model, HISTORIES, TARGETS)
    assert found.total.item() == pytest.approx(total, abs=1e-5)
    assert found.steps.tolist() == pytest.approx(steps, abs=1e-5)


@torch.no_grad()
def test_steps_that_no_predicted_item_has_cost_nothing() -> None:
    model, counts = model_of(UNEQUAL), symbol_counts(table(UNEQUAL)).tolist()
    short = counts.index(2)
    long = counts.index(4)
    found = loss_of(model, batch_of([[long, short], [short]], [short, short]))
    assert bool(found.steps[2:].isnan().all()) and bool((found.steps[:2] > 0).all())
    assert found.total.item() == pytest.approx(found.steps[:2].mean().item(), abs=1e-6)


def states(model: Causal, batch: SequenceBatch) -> list[Tensor]:
    """What the stack makes of the symbols of each row, in the loss; (n - 1, D) for a string of n symbols."""
    seen: list[Tensor] = []
    hook = model.stack.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with torch.no_grad():
        loss_of(model, batch)
    hook.remove()
    counts = symbol_counts(table(model.space))
    lengths = (counts[batch.items] * batch.mask).sum(dim=1) + counts[batch.target] - 1
    return [row[:length] for row, length in zip(seen[0], lengths.tolist(), strict=True)]


def predicted(space: SymbolSpace, history: list[int], target: int) -> int:
    """Symbols that a user's row predicts."""
    return int(symbol_counts(table(space))[[*history[1:], target]].sum())


def neighbourhoods() -> Iterator[tuple[list[list[int]], list[int], list[int]]]:
    """The same users in other company: histories, targets, and which of ``HISTORIES`` each row is (-1: another)."""
    yield HISTORIES[::-1], TARGETS[::-1], [4, 3, 2, 1, 0]
    for dropped in range(len(HISTORIES)):
        kept = [row for row in range(len(HISTORIES)) if row != dropped]
        yield [HISTORIES[row] for row in kept], [TARGETS[row] for row in kept], kept
    for changed in range(len(HISTORIES)):
        others = [[8, 9, 10, 4, 4, 2] if row == changed else h for row, h in enumerate(HISTORIES)]
        targets = [3 if row == changed else target for row, target in enumerate(TARGETS)]
        yield others, targets, [-1 if row == changed else row for row in range(len(HISTORIES))]
    yield from (([history], [TARGETS[row]], [row]) for row, history in enumerate(HISTORIES))


@pytest.mark.parametrize("space", [APART, UNEQUAL], ids=["one length", "unequal"])
def test_no_user_sees_another(space: SymbolSpace) -> None:
    """Alone, padded, in any order and beside anyone, a user has the same states, loss and ranking."""
    model = model_of(space)
    batch = batch_of(HISTORIES, TARGETS)
    alone = [states(model, batch_of([h], [t]))[0] for h, t in zip(HISTORIES, TARGETS, strict=True)]
    ranked = rank(model, HISTORIES, exclude_seen=True)
    for row, hidden in enumerate(states(model, batch)):
        torch.testing.assert_close(hidden, alone[row], rtol=0, atol=1e-5)
    for histories, targets, which in neighbourhoods():
        for padding in (None, 6):
            found = states(model, batch_of(histories, targets, padding))
            for hidden, row in zip(found, which, strict=True):
                if row >= 0:
                    torch.testing.assert_close(hidden, alone[row], rtol=0, atol=1e-5)
        beside = rank(model, histories, exclude_seen=True)
        here = [at for at, row in enumerate(which) if row >= 0]
        there = [row for row in which if row >= 0]
        same(
            Ranking(beside.items[here], beside.scores[here]),
            Ranking(ranked.items[there], ranked.scores[there]),
        )


@pytest.mark.parametrize("space", [APART, UNEQUAL], ids=["one length", "unequal"])
@torch.no_grad()
def test_the_loss_of_a_batch_is_the_sum_of_what_its_users_lose_alone(space: SymbolSpace) -> None:
    model = model_of(space)
    alone = {
        (tuple(h), t): predicted(space, h, t) * loss_of(model, batch_of([h], [t])).total.item()
        for histories, targets, _ in neighbourhoods()
        for h, t in zip(histories, targets, strict=True)
    }
    for histories, targets, _ in neighbourhoods():
        users = list(zip(histories, targets, strict=True))
        total = loss_of(model, batch_of(histories, targets)).total.item()
        count = sum(predicted(space, h, t) for h, t in users)
        assert total * count == pytest.approx(sum(alone[tuple(h), t] for h, t in users), abs=1e-3)


# The budget


@given(
    st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=8), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(4, 20),
)
@laws
def test_whole_items_are_kept_the_latest_first_and_never_over_the_budget(
    histories: list[list[int]], most: int, budget: int
) -> None:
    counts = symbol_counts(table(UNEQUAL))
    batch = batch_of(histories, [0] * len(histories))
    found = latest(batch.items, batch.mask, most, (counts[batch.items], budget))
    for row, history in enumerate(histories):
        kept: list[int] = []
        for item in reversed(history):
            if len(kept) == most or counts[[item, *kept]].sum() > budget:
                break
            kept.insert(0, item)
        assert found.items[row][found.mask[row]].tolist() == kept
        assert found.length[row] == len(kept)
        assert found.mask[row, : len(kept)].all()


@pytest.mark.parametrize("space", [APART, UNEQUAL], ids=["one length", "unequal"])
def test_a_ranking_reads_the_latest_items_that_the_budget_holds(space: SymbolSpace) -> None:
    budget, counts = 9, symbol_counts(table(space))
    bound, free = model_of(space, max_tokens=budget), model_of(space)
    histories = [h for h in HISTORIES if counts[h].sum() > budget]
    cut = []
    for history in histories:
        fits = [n for n in range(1, len(history) + 1) if counts[history[-n:]].sum() <= budget]
        cut.append(history[-max(fits) :])
    assert len(histories) >= 2 and all(a != b for a, b in zip(histories, cut, strict=True))
    same(rank(bound, histories), rank(free, cut))
    # What is not read has been seen all the same.
    hidden = set(histories[0]) - set(cut[0])
    assert hidden and not hidden & set(rank(bound, histories, exclude_seen=True).items[0].tolist())


@pytest.fixture(scope="module")
def retail() -> pl.DataFrame:
    """Training sequences of the shipped Online Retail sample, the last two events of a user held out."""
    path = files("components.data.samples") / "online-retail" / "interactions.parquet"
    with path.open("rb") as file:
        events = pl.read_parquet(file).sort("user_id", "position", maintain_order=True)
    items = pl.col("item_id")
    return events.group_by("user_id", maintain_order=True).agg(sequence=items.head(items.len() - 2))


@pytest.mark.parametrize("batch_tokens", [None, 2048], ids=["64 histories", "2048 symbols"])
@pytest.mark.parametrize("max_tokens", [None, 60])
def test_batches_of_real_histories_are_hardly_padded(
    retail: pl.DataFrame, batch_tokens: int | None, max_tokens: int | None
) -> None:
    """At least 95 % of the positions are symbols, for SIDs of 2 to 5 of them at random."""
    num_items = int(retail["sequence"].explode().to_numpy().max()) + 1
    counts = np.random.default_rng(0).integers(2, 6, size=num_items)
    generator = torch.Generator().manual_seed(0)
    rows = window_rows(retail, 20, generator, counts, max_tokens)
    cost = row_symbols(rows, counts)
    real = positions = 0
    for which in cut_batches(rows, 64, generator, cost, batch_tokens):
        strings = laid_out(rows, which, torch.from_numpy(counts))
        assert strings.sum() == cost[which].sum()
        real += int(strings.sum())
        positions += strings.numel()
    assert real >= 0.95 * positions


def laid_out(rows: Rows, which: np.ndarray, counts: Tensor) -> Tensor:
    """Return where the symbols of a batch stand, its targets included, as the recommender lays them out."""
    batch = pad(rows, which)
    target = batch.unique[batch.target][:, None]
    items = F.pad(batch.unique[batch.items], (0, 1)).scatter(1, batch.mask.sum(dim=1, keepdim=True), target)
    present = F.pad(batch.mask, (1, 0), value=True)
    return lay_out(counts[items], present).present
