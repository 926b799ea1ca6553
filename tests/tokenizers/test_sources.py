"""Soft and hard tokens agree in value, differ in gradient, and the table keeps its promises."""

import pytest
import torch
from torch.nn import functional as F

from components.exploration import GumbelConfig, NoNoiseConfig, build_exploration, gumbel, pick
from components.recommenders.item_encoders import SymbolEmbedding
from components.seams import ItemTokens
from components.tokenizers.build import load_tokenizer
from components.tokenizers.quantize import straight_through
from components.tokenizers.sids import table_symbols
from components.tokenizers.sources import FrozenSids, explore, logit_scales


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_live_tokens_equal_frozen_tokens_in_value(tiny, live_sids) -> None:
    items = torch.arange(0, tiny.sids.num_items, 3)
    live, frozen = live_sids(), FrozenSids(tiny.sids)
    embed = SymbolEmbedding(live.space, 12, std=1.0)
    soft, hard = live.tokens(items).history, frozen.tokens(items).history
    assert torch.equal(soft.symbols, hard.symbols)
    for level, weights in enumerate(soft.weights):
        start, _ = live.space.range(level)
        assert torch.equal(weights, F.one_hot(hard.symbols[:, level] - start, weights.shape[1]).float())
    torch.testing.assert_close(embed(soft), embed(hard), rtol=0, atol=1e-6)


def test_gradient_of_the_assignment_has_its_closed_form() -> None:
    """dLoss/dlogit_k = P_k (G_k - sum_j P_j G_j) / tau (DIGER, straight-through estimator)."""
    tau, logits = 1.7, torch.randn(5, 6, generator=_generator(), requires_grad=True)
    weight = torch.randn(5, 6, generator=_generator(1))
    codes, soft = pick(logits, torch.zeros(5, 1), tau, _generator())
    onehot = straight_through(codes, soft)
    (onehot * weight).sum().backward()
    closed = soft * (weight - (soft * weight).sum(-1, keepdim=True)) / tau
    torch.testing.assert_close(logits.grad, closed.detach())


def test_without_noise_the_drawn_code_is_the_nearest(tiny, live_sids) -> None:
    live = live_sids(NoNoiseConfig())
    _, quantized = live.assign(torch.arange(tiny.sids.num_items))
    assert torch.equal(quantized.codes, quantized.greedy)
    assert torch.equal(quantized.codes, live.codes)


def test_noise_is_a_function_of_the_seed(tiny, live_sids) -> None:
    items = torch.arange(tiny.sids.num_items)
    first, same, other = (live_sids(seed=seed).assign(items)[1].codes for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_agreement_of_drawn_and_nearest_codes_is_the_top_probability(tiny, live_sids) -> None:
    """With noise 1 and tau 1 a Gumbel draw follows the soft assignment: that is what the scale is set by."""
    live = live_sids()
    items = torch.arange(tiny.sids.num_items)
    draws = [live.assign(items)[1] for _ in range(60)]
    agree = torch.stack([(q.codes[:, 0] == q.greedy[:, 0]).float().mean() for q in draws]).mean()
    assert abs(float(agree) - 0.5) < 0.03


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.9])
def test_logit_scales_give_the_wanted_top_probability(tiny, wanted: float) -> None:
    tokenizer = load_tokenizer(tiny.tokenizer)
    z = tokenizer.latents(tiny.embeddings.matrix)
    scales = logit_scales(z, list(tokenizer.codebooks), wanted)
    quantized = explore(
        z, list(tokenizer.codebooks), scales, build_exploration(NoNoiseConfig(), [8, 8, 8]), 1.0, _generator()
    )
    for soft in quantized.probabilities:
        assert abs(soft.amax(-1).mean().item() - wanted) < 1e-3


def test_impossible_top_probability_is_refused(tiny) -> None:
    tokenizer = load_tokenizer(tiny.tokenizer)
    with pytest.raises(ValueError, match=r"between 1/8 \(level 1\) and 1, got 0.1"):
        logit_scales(tokenizer.latents(tiny.embeddings.matrix), list(tokenizer.codebooks), 0.1)


def test_codewords_that_coincide_are_refused_where_no_scale_can_help(tiny) -> None:
    tokenizer = load_tokenizer(tiny.tokenizer)
    with torch.no_grad():
        tokenizer.codebooks[1][:] = tokenizer.codebooks[1][0]
    with pytest.raises(ValueError, match=r"level 2: no logit scale gives top_probability 0.5, .* 0\.125"):
        logit_scales(tokenizer.latents(tiny.embeddings.matrix), list(tokenizer.codebooks), 0.5)


def test_tau_flattens_the_soft_assignment_and_leaves_the_draw_alone(tiny, live_sids) -> None:
    items = torch.arange(tiny.sids.num_items)
    sharp, flat = (live_sids(GumbelConfig(tau=tau)).assign(items)[1] for tau in (1.0, 4.0))
    assert torch.equal(sharp.codes[:, 0], flat.codes[:, 0])
    assert flat.probabilities[0].amax(-1).mean() < 0.8 * sharp.probabilities[0].amax(-1).mean()


def test_evaluation_draws_no_noise(tiny, live_sids) -> None:
    live = live_sids(GumbelConfig(noise=3.0)).eval()
    state = live.generator.get_state()
    _, quantized = live.assign(torch.arange(tiny.sids.num_items))
    assert torch.equal(quantized.codes, live.codes)
    assert torch.equal(live.generator.get_state(), state)


@pytest.mark.parametrize(
    ("noise", "tau", "message"),
    [(-1.0, 1.0, "noise must be >= 0, got -1"), (1.0, 0.0, "tau must be > 0, got 0")],
)
def test_pick_refuses_nonsense(noise: float, tau: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pick(torch.zeros(2, 3), torch.full((2, 1), noise), tau, _generator())


def test_gumbel_noise_is_finite_and_standard() -> None:
    draws = gumbel(torch.Size([200_000]), _generator(), torch.device("cpu"))
    assert bool(torch.isfinite(draws).all())
    assert abs(float(draws.mean()) - 0.5772) < 0.01
    assert abs(float(draws.var()) - 1.6449) < 0.03


def test_refresh_follows_the_codebooks_and_keeps_suffixes(tiny, live_sids) -> None:
    live = live_sids()
    before = live.symbols.clone()
    assert not bool(live.refresh().any())
    assert torch.equal(live.symbols, before)
    with torch.no_grad():
        for book in live.tokenizer.codebooks:
            book.add_(0.3 * torch.randn(book.shape, generator=_generator()))
    moved = live.refresh()
    assert 0 < int(moved.sum()) < len(moved)
    assert torch.equal(live.codes, live.tokenizer.encode(tiny.embeddings.matrix))
    assert torch.equal(live.symbols[~moved], before[~moved])
    assert len(torch.unique(live.symbols, dim=0)) == len(live.symbols)


def test_table_of_the_live_source_is_the_table_it_reads(tiny, live_sids) -> None:
    live = live_sids()
    assert torch.equal(table_symbols(live.table("x")), live.symbols)
    assert live.table(tiny.sids.tokenizer).fingerprint == tiny.sids.fingerprint


def test_soft_tokens_send_gradient_through_the_look_up(tiny, live_sids) -> None:
    weights = torch.full((1, 8), 1 / 8, requires_grad=True)
    live = live_sids()
    embed = SymbolEmbedding(live.space, 4, std=1.0)
    tokens = ItemTokens(live.symbols[:1], (weights, torch.eye(8)[:1], torch.eye(8)[:1]))
    embed(tokens)[0, 0].sum().backward()
    torch.testing.assert_close(weights.grad[0], embed.weight[:8].sum(dim=1).detach())
