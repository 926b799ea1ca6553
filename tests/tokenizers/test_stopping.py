"""Lengths: the bound that they are trained on, their distribution, and the rule of the price."""

import itertools
import math

import pytest
import torch

from components.tokenizers import stopping

V, T = 3, 3


def test_the_three_terms_are_the_bound_by_enumeration() -> None:
    """-ELBO = reconstruction + codes + length + log normaliser of the prior, over all codes and lengths."""
    g = torch.Generator().manual_seed(0)
    price = 0.7
    # A table for every prefix: the next code's distribution, the hazard after it, and log p(x | prefix).
    prefixes = [p for n in range(T + 1) for p in itertools.product(range(V), repeat=n)]
    log_q = {p: torch.randn(V, generator=g, dtype=torch.float64).log_softmax(0) for p in prefixes}
    hazard = {p: 2 * torch.randn(1, generator=g, dtype=torch.float64) for p in prefixes}
    log_x = {p: -20 * torch.rand(1, generator=g, dtype=torch.float64) - 1 for p in prefixes}
    log_prior = stopping.log_prior(price, T)

    definition, mass, evidence = 0.0, 0.0, 0.0
    recon = codes = length = 0.0
    for z in itertools.product(range(V), repeat=T):
        a = torch.cat([hazard[z[:n]] for n in range(1, T)])[None]
        log_l, survival = stopping.log_pmf(a)[0], stopping.survival(a)[0]
        q_z = math.exp(sum(float(log_q[z[:t]][z[t]]) for t in range(T)))
        # The extra codes of a short name are drawn on from q, so sums over all of z weigh each prefix rightly.
        for n in range(1, T + 1):
            q = q_z * math.exp(float(log_l[n - 1]))
            log_joint = float(log_prior[n - 1]) - n * math.log(V) + float(log_x[z[:n]])
            log_post = sum(float(log_q[z[:t]][z[t]]) for t in range(n)) + float(log_l[n - 1])
            definition += q * (log_joint - log_post)
            mass += q
            recon -= q * float(log_x[z[:n]])
        kl = [math.log(V) + float((log_q[z[:t]].exp() * log_q[z[:t]]).sum()) for t in range(T)]
        codes += q_z * float((survival * torch.tensor(kl, dtype=torch.float64)).sum())
        log_q_l = log_l[None]
        length += q_z * float(price * stopping.expected(log_q_l) - stopping.entropy(log_q_l))
    for p in prefixes[1:]:
        evidence += math.exp(float(log_prior[len(p) - 1]) - len(p) * math.log(V) + float(log_x[p]))
    normaliser = math.log(sum(math.exp(-price * n) for n in range(1, T + 1)))
    assert mass == pytest.approx(1, abs=1e-12)
    assert definition == pytest.approx(-(recon + codes + length + normaliser), abs=1e-9)
    assert definition <= math.log(evidence)


def test_the_prior_is_a_truncated_geometric() -> None:
    price, alpha = 0.3, 1 - math.exp(-0.3)
    geometric = [(1 - alpha) ** (n - 1) * alpha / (1 - (1 - alpha) ** 5) for n in range(1, 6)]
    torch.testing.assert_close(
        stopping.log_prior(price, 5).exp(), torch.tensor(geometric, dtype=torch.float64)
    )
    torch.testing.assert_close(stopping.log_prior(0, 4).exp(), torch.full((4,), 0.25, dtype=torch.float64))


def test_lengths_have_mass_one_and_survival_falls_also_at_extreme_hazards() -> None:
    g = torch.Generator().manual_seed(1)
    hazards = torch.cat([torch.randn(50, 4, generator=g), 100 * (torch.rand(200, 4, generator=g) - 0.5)])
    hazards = torch.cat([hazards, torch.full((1, 4), 50.0), torch.full((1, 4), -50.0)]).requires_grad_()
    log_q, survival = stopping.log_pmf(hazards), stopping.survival(hazards)
    torch.testing.assert_close(log_q.logsumexp(dim=1), torch.zeros(len(hazards)), atol=1e-6, rtol=0)
    assert (survival[:, 0] == 1).all() and (survival.diff(dim=1) <= 0).all()
    torch.testing.assert_close(survival.sum(dim=1), stopping.expected(log_q))
    (stopping.expected(log_q) - stopping.entropy(log_q)).sum().backward()
    assert hazards.grad is not None and hazards.grad.isfinite().all()


def test_fresh_hazards_halve_what_is_left() -> None:
    log_q = stopping.log_pmf(torch.zeros(1, 4))
    torch.testing.assert_close(log_q.exp()[0], torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]))
    assert float(stopping.expected(log_q)) == pytest.approx(1.9375)


def test_the_rules_of_extraction_differ_and_the_median_needs_half_of_the_mass() -> None:
    hazard = math.log(0.4 / 0.6)
    log_q = stopping.log_pmf(torch.full((1, 3), hazard))  # .4, .24, .144, .216
    assert stopping.argmax_length(log_q).tolist() == [1]
    assert stopping.median_length(log_q).tolist() == [2]
    halves = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]).log()
    assert stopping.median_length(halves).tolist() == [1, 3, 1]


def test_descent_on_free_lengths_finds_the_optimal_posterior() -> None:
    g = torch.Generator().manual_seed(2)
    errors = torch.rand(6, 4, generator=g, dtype=torch.float64).sort(dim=1, descending=True).values
    paid = torch.rand(6, 4, generator=g, dtype=torch.float64)
    price, beta, weight = 1.5, 0.2, 0.9
    hazards = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([hazards], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14)

    def loss() -> torch.Tensor:
        descent.zero_grad()
        log_q = stopping.log_pmf(hazards)
        smooth = weight * log_q.exp() + (1 - weight) / 4
        nats = (stopping.survival(hazards) * paid).sum(dim=1)
        nats = nats + price * stopping.expected(log_q) - stopping.entropy(log_q)
        total = ((smooth * errors).sum(dim=1) + beta * nats).sum()
        total.backward()
        return total

    for _ in range(5):
        descent.step(loss)  # type: ignore[no-untyped-call]
    wanted = stopping.optimal_log_pmf(errors, paid, price, beta, weight)
    torch.testing.assert_close(stopping.log_pmf(hazards).exp(), wanted.exp(), atol=1e-5, rtol=0)


def test_with_falling_gains_the_optimum_stops_where_the_next_token_is_not_worth_it() -> None:
    errors = torch.tensor([[0.8, 0.4, 0.2, 0.15, 0.14]])
    beta, weight, surprise = 0.01, 0.8, 2.0
    full = torch.full((1, 5), surprise)
    for price in (0.0, 1.0, 3.0, 10.0, 20.0, 60.0):
        best = stopping.argmax_length(stopping.optimal_log_pmf(errors, full, price, beta, weight))
        assert best.tolist() == [stopping.rule_length(errors[0], price, beta, weight, surprise)]


def test_the_price_for_a_gain_makes_just_that_gain_not_worth_its_cost() -> None:
    errors = torch.tensor([0.8, 0.4, 0.2, 0.15])
    beta, weight, surprise = 0.002, 0.9, 3.0
    price = stopping.price_for(0.2, beta, weight, surprise)
    assert stopping.rule_length(errors, price + 1e-3, beta, weight, surprise) == 2
    assert stopping.rule_length(errors, price - 1e-3, beta, weight, surprise) == 3


@pytest.mark.parametrize(
    ("errors", "price", "published"),
    [  # prefix errors by draw of published runs, and the mean length observed there
        ([0.1385, 0.0571, 0.0396, 0.0310, 0.0267], 1.0, 2.96),
        ([0.395, 0.246, 0.180, 0.147, 0.127], 9.0, 3.45),
        ([0.229, 0.110, 0.088, 0.077, 0.071], 1.5, 3.01),
    ],
)
def test_the_rule_predicts_published_mean_lengths_to_half_a_token(errors, price, published) -> None:
    predicted = stopping.rule_length(torch.tensor(errors), price, 0.002, 0.9, math.log(4096) - 2.0)
    assert abs(predicted - published) <= 0.5


def test_free_nats_of_the_published_vocabulary_are_the_published_two() -> None:
    assert stopping.free_nats(4096) == pytest.approx(2.0, abs=0.01)
