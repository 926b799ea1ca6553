"""The suffix cost against entropies and sums over all codes, both written from their definitions."""

import math
from collections import defaultdict
from itertools import product

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from components.tokenizers.quantize import straight_through
from components.tokenizers.sids import space_of, table_symbols
from components.tokenizers.suffix_cost import occupancy, suffix_cost

SIZES = (3, 2, 4)


def _case(seed: int, items: int = 9, sizes: tuple[int, ...] = SIZES) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Random codes and masses in float64 and soft probabilities of all items; buckets are shared."""
    g = torch.Generator().manual_seed(seed)
    codes_NL = torch.stack([torch.randint(size, (items,), generator=g) for size in sizes], dim=1)
    codes_NL[items // 2 :] = codes_NL[: items - items // 2].clone()
    mass_N = torch.rand(items, generator=g, dtype=torch.float64) * 10 + 0.5
    soft = [torch.randn(items, size, generator=g, dtype=torch.float64).softmax(dim=-1) for size in sizes]
    return codes_NL, mass_N, soft


def _one_hot(codes_NL: Tensor, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    return [F.one_hot(code_N, size).double() for code_N, size in zip(codes_NL.T, sizes, strict=True)]


def _entropy(masses: list[float]) -> float:
    total = math.fsum(masses)
    return -math.fsum(m / total * math.log(m / total) for m in masses)


def _bucket_masses(codes_NL: Tensor, mass_N: Tensor) -> dict[tuple[int, ...], float]:
    masses: dict[tuple[int, ...], float] = defaultdict(float)
    for row, mass in zip(codes_NL.tolist(), mass_N.tolist(), strict=True):
        masses[tuple(row)] += mass
    return masses


def _by_all_codes(codes_NL: Tensor, mass_N: Tensor, probabilities: list[Tensor], item: int) -> float:
    """The expectation as written: over every string of codes, log of the mass there with the item in it."""
    others = [row for row in range(len(codes_NL)) if row != item]
    masses, own, cost = _bucket_masses(codes_NL[others], mass_N[others]), float(mass_N[item]), 0.0
    for string in product(*(range(p.shape[1]) for p in probabilities)):
        chance = math.prod(float(p[item, code]) for p, code in zip(probabilities, string, strict=True))
        cost += chance * math.log((own + masses.get(string, 0.0)) / own)
    return cost


@given(st.integers(0, 10_000), st.integers(1, 14), st.sampled_from([(3, 3, 3), (2, 4), (5,), SIZES]))
@settings(max_examples=30, deadline=None)
def test_the_cost_is_the_expectation_over_all_codes(seed: int, items: int, sizes: tuple[int, ...]) -> None:
    codes_NL, mass_N, soft = _case(seed, items, sizes)
    ids = torch.randperm(items, generator=torch.Generator().manual_seed(seed))[: max(1, items - 2)]
    cost_U = suffix_cost([p[ids] for p in soft], ids, occupancy(codes_NL, mass_N, sizes))
    expected = [_by_all_codes(codes_NL, mass_N, soft, item) for item in ids.tolist()]
    assert cost_U.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert bool((cost_U >= 0).all())


def test_the_gradient_is_that_of_finite_differences_at_every_level() -> None:
    codes_NL, mass_N, soft = _case(1)
    ids, table = torch.tensor([7, 2, 5]), occupancy(codes_NL, mass_N, SIZES)
    inputs = [p[ids].clone().requires_grad_() for p in soft]
    assert torch.autograd.gradcheck(lambda *p: suffix_cost(p, ids, table), inputs)
    gradients = torch.autograd.grad(suffix_cost(inputs, ids, table).sum(), inputs)
    assert all(bool((g.abs().amax(dim=1) > 0).all()) for g in gradients)


def test_at_the_codes_of_the_table_the_cost_is_the_log_of_the_share_of_the_bucket() -> None:
    codes_NL, mass_N, _ = _case(2)
    masses = _bucket_masses(codes_NL, mass_N)
    cost_N = suffix_cost(_one_hot(codes_NL), torch.arange(9), occupancy(codes_NL, mass_N, SIZES))
    rows = zip(codes_NL.tolist(), mass_N.tolist(), strict=True)
    assert cost_N.tolist() == pytest.approx([math.log(masses[tuple(row)] / mass) for row, mass in rows])
    assert float(cost_N.max()) > 0.1


def test_the_mean_over_events_is_the_entropy_of_the_items_given_their_codes(tiny) -> None:
    """On the planted log, by two of its levels: with the entropy of the codes it is that of the items."""
    events = tiny.split.train.select(pl.col("sequence").explode()).to_series().to_torch().long()
    mass_N = torch.bincount(events, minlength=tiny.sids.num_items).double() + 1
    space = space_of(tiny.sids)
    sizes = space.codebook_sizes[:2]
    codes_NL = (table_symbols(tiny.sids) - torch.tensor(space.starts))[:, :2]
    table = occupancy(codes_NL, mass_N, sizes)
    cost_N = suffix_cost(_one_hot(codes_NL, sizes), torch.arange(len(mass_N)), table)
    mean = float((cost_N * mass_N).sum() / mass_N.sum())

    buckets: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for row, mass in zip(codes_NL.tolist(), mass_N.tolist(), strict=True):
        buckets[tuple(row)].append(mass)
    total = float(mass_N.sum())
    given_codes = math.fsum(math.fsum(inside) / total * _entropy(inside) for inside in buckets.values())
    assert given_codes > 0.1
    assert mean == pytest.approx(given_codes, rel=1e-12)
    codes = _entropy([math.fsum(inside) for inside in buckets.values()])
    assert codes + mean == pytest.approx(_entropy(mass_N.tolist()), rel=1e-12)


def test_what_an_item_saves_on_its_codes_it_pays_for_its_suffix() -> None:
    """Wherever an item moves, the log of the bucket's share that is then its own takes back the cost."""
    codes_NL, mass_N, _ = _case(3)
    table, share_N = occupancy(codes_NL, mass_N, SIZES), mass_N / mass_N.sum()
    for item, place in product(range(9), range(9)):
        moved_NL = codes_NL.clone()
        moved_NL[item] = codes_NL[place]
        codes_cost = -math.log(_bucket_masses(moved_NL, share_N)[tuple(codes_NL[place].tolist())])
        cost = suffix_cost(_one_hot(codes_NL[place, None]), torch.tensor([item]), table)
        assert codes_cost + float(cost) == pytest.approx(-math.log(float(share_N[item])))


def test_an_item_alone_in_its_bucket_pays_nothing() -> None:
    """Exactly nothing, in both precisions, for masses that binary fractions do not hold."""
    codes_NL = torch.tensor([[0, 0], [0, 1], [1, 1]])
    table = occupancy(codes_NL, torch.tensor([0.1, 0.7, 1.3]), (2, 2))
    for dtype in (torch.float32, torch.float64):
        hard = [p.to(dtype) for p in _one_hot(codes_NL, (2, 2))]
        cost_N = suffix_cost(hard, torch.arange(3), table)
        assert cost_N.dtype == dtype
        assert cost_N.tolist() == [0, 0, 0]


def test_leaving_a_heavy_bucket_for_an_empty_one_lowers_the_cost_and_the_gradient_says_so() -> None:
    """Codes of level 2, item 0: 0 is its own bucket, 1 heavier, 2 empty, 3 lighter than its own."""
    codes_NL = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 3]])
    table = occupancy(codes_NL, torch.tensor([1.0, 5.0, 50.0, 2.0]), (1, 4))
    first, ids = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0])
    second = torch.full((1, 4), 0.25, dtype=torch.float64, requires_grad=True)
    before = suffix_cost([first, second], ids, table)
    (slope,) = torch.autograd.grad(before.sum(), second)
    assert slope[0].tolist() == pytest.approx([math.log(6), math.log(51), 0, math.log(3)])
    after = suffix_cost([first, second.detach() + torch.tensor([0, -0.1, 0.1, 0])], ids, table)
    assert float(before.detach() - after) == pytest.approx(0.1 * math.log(51), rel=1e-6)


def test_straight_through_weights_give_the_cost_of_the_table_and_of_one_changed_code() -> None:
    codes_NL, mass_N, soft = _case(4)
    ids, table = torch.arange(9), occupancy(codes_NL, mass_N, SIZES)
    inputs = [p.requires_grad_() for p in soft]
    weights = [straight_through(code_N, p) for code_N, p in zip(codes_NL.T, inputs, strict=True)]
    cost_N = suffix_cost(weights, ids, table)
    assert torch.equal(cost_N, suffix_cost(_one_hot(codes_NL), ids, table))
    for level, slope_NK in enumerate(torch.autograd.grad(cost_N.sum(), inputs)):
        for code in range(SIZES[level]):
            changed_NL = codes_NL.clone()
            changed_NL[:, level] = code
            torch.testing.assert_close(slope_NK[:, code], suffix_cost(_one_hot(changed_NL), ids, table))


def test_neither_the_order_of_items_nor_the_unit_of_mass_matters() -> None:
    codes_NL, mass_N, soft = _case(5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    cost_N = suffix_cost(soft, torch.arange(9), occupancy(codes_NL, mass_N, SIZES))
    shuffled = occupancy(codes_NL[order], 7 * mass_N[order], SIZES)
    torch.testing.assert_close(
        suffix_cost([p[order] for p in soft], torch.arange(9), shuffled), cost_N[order]
    )


def test_descent_on_the_cost_alone_spreads_a_crowd() -> None:
    """Eight items in one bucket of nine, the table refreshed after each step: all end up alone."""
    g = torch.Generator().manual_seed(0)
    logits = [(0.1 * torch.randn(8, 3, generator=g)).requires_grad_() for _ in range(2)]
    mass_N = 1 + torch.rand(8, generator=g)
    optimizer = torch.optim.SGD(logits, lr=0.3)
    codes_NL, ids = torch.zeros(8, 2, dtype=torch.long), torch.arange(8)
    for _ in range(200):
        cost = suffix_cost([x.softmax(dim=-1) for x in logits], ids, occupancy(codes_NL, mass_N, (3, 3)))
        optimizer.zero_grad()
        cost.mean().backward()
        optimizer.step()
        codes_NL = torch.stack([x.detach().argmax(dim=-1) for x in logits], dim=1)
    assert len(torch.unique(codes_NL, dim=0)) == 8


@pytest.mark.parametrize(
    ("codes", "mass", "sizes", "message"),
    [
        ([[0, 0]], [0.0], (2, 2), "item 0 has mass 0.*smoothing count"),
        ([[0, 0], [1, 1]], [1.0, -2.0], (2, 2), "item 1 has mass -2"),
        ([[0, 0], [1, 1]], [1.0, math.nan], (2, 2), "item 1 has mass nan"),
        ([[0, 0], [1, 1]], [math.inf, 1.0], (2, 2), "item 0 has mass inf"),
        ([[0, 0], [1, 1]], [1.0], (2, 2), "2 items need a mass each"),
        ([[0, 0]], [1.0], (2, 2, 2), "2 levels need as many codebook sizes"),
        ([[0, 0], [0, 2]], [1.0, 1.0], (2, 2), "item 1 has code 2 on level 2, whose codebook has 2 codes"),
        ([[-1, 0]], [1.0], (2, 2), "item 0 has code -1 on level 1"),
        ([[0.5, 0.0]], [1.0], (2, 2), "codes must be integers"),
        ([0, 1], [1.0, 1.0], (2,), r"shape \(items, levels\)"),
    ],
)
def test_a_table_that_cannot_be_is_refused(codes: list, mass: list, sizes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        occupancy(torch.tensor(codes), torch.tensor(mass), sizes)


@pytest.mark.parametrize(
    ("shapes", "ids"),
    [
        ([(2, 3), (2, 2)], [0, 1]),
        ([(2, 3), (2, 2), (2, 3)], [0, 1]),
        ([(3, 3), (3, 2), (3, 4)], [0, 1]),
        ([(1, 3), (1, 2), (1, 4)], [0, 1]),
    ],
)
def test_probabilities_of_another_shape_are_refused(shapes: list[tuple[int, int]], ids: list[int]) -> None:
    codes_NL, mass_N, _ = _case(6)
    table = occupancy(codes_NL, mass_N, SIZES)
    with pytest.raises(ValueError, match=r"2 items .* need probabilities of shapes \[\(2, 3\), .*, got"):
        suffix_cost([torch.ones(shape) for shape in shapes], torch.tensor(ids), table)


def test_item_ids_that_are_not_ids_are_refused() -> None:
    codes_NL, mass_N, soft = _case(7)
    with pytest.raises(ValueError, match="item ids must be integers"):
        suffix_cost(soft, torch.arange(9.0), occupancy(codes_NL, mass_N, SIZES))
