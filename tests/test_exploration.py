"""How noise fades: the equilibrium of a learned scale, who is hot, and what evaluation leaves alone."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from components.exploration import (
    ExplorationConfig,
    FrqudConfig,
    GumbelConfig,
    NoNoiseConfig,
    SdudConfig,
    SdudFrqudConfig,
    SteConfig,
    build_exploration,
)

SIZES = [4, 4, 4]


def _with_shares(exploration, level: int, shares: list[float]):
    decay = getattr(exploration, "frequency", exploration)
    decay.share(level).copy_(torch.tensor(shares))
    return exploration


@pytest.mark.parametrize(("loss", "rest"), [(5.545, 0.655), (2.89, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("scaling", ["scaled", "detached"])
def test_sigma_comes_to_rest_where_the_paper_says(loss: float, rest: float, scaling: str) -> None:
    """At a constant loss L the learned scale goes to max(0, sqrt(L) - lambda)."""
    exploration = build_exploration(SdudConfig(sigma=2.0, lam=1.7, scaling=scaling), SIZES)
    optimizer = torch.optim.Adam(exploration.parameters(), lr=0.01)
    for _ in range(3000):
        optimizer.zero_grad()
        exploration.weigh(torch.tensor(loss)).backward()
        optimizer.step()
    assert exploration.scales().mean().item() == pytest.approx(rest, abs=0.02)


def test_raw_scaling_leaves_the_loss_as_it_is_and_sigma_learns_through_the_assignment(
    tiny, live_sids
) -> None:
    live = live_sids(SdudConfig())
    loss = torch.tensor(3.3)
    assert live.exploration.weigh(loss) is loss
    weights = live.assign(torch.arange(60))[0].history.weights
    sum(
        (w * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))).sum() for w in weights
    ).backward()
    assert (live.exploration.sigma.grad.abs() > 1e-10).all()


def test_scaled_loss_shrinks_the_gradient_of_the_recommender_and_detached_does_not() -> None:
    gradients = {}
    for scaling in ("raw", "scaled", "detached"):
        loss = torch.tensor(4.0, requires_grad=True)
        build_exploration(SdudConfig(sigma=1.0, lam=1.0, scaling=scaling), SIZES).weigh(loss).backward()
        gradients[scaling] = loss.grad.item()
    assert gradients == {"raw": 1.0, "scaled": pytest.approx(1 / 8), "detached": 1.0}


def test_items_in_hot_codes_explore_and_others_do_not() -> None:
    """K = 4 and rho = 1.5: hot above a share of .375."""
    shares, codes = [0.7, 0.1, 0.1, 0.1], torch.tensor([0, 1])
    frqud = _with_shares(build_exploration(FrqudConfig(noise=0.8, momentum=1.0), SIZES), 1, shares)
    assert frqud.hot(codes, 1).tolist() == [True, False]
    assert frqud.noise(codes, 1)[:, 0].tolist() == pytest.approx([0.8, 0.0])
    both = _with_shares(build_exploration(SdudFrqudConfig(sigma=0.6, momentum=1.0), SIZES), 1, shares)
    assert both.noise(codes, 1)[:, 0].tolist() == pytest.approx([0.6, 0.0])


def test_a_code_at_the_threshold_is_not_hot() -> None:
    frqud = _with_shares(build_exploration(FrqudConfig(ratio=1.0, momentum=1.0), SIZES), 0, [0.25] * 4)
    assert frqud.hot(torch.arange(4), 0).tolist() == [False] * 4


def test_scope_item_decides_on_the_first_level_from_the_shares_before_the_batch() -> None:
    codes = [torch.tensor([0, 1, 1]), torch.tensor([2, 2, 2])]
    by_item = _with_shares(
        build_exploration(FrqudConfig(scope="item", momentum=0.0), SIZES), 0, [0.7, 0.1, 0.1, 0.1]
    )
    # The batch alone would make code 1 hot; the shares before it say code 0.
    assert [by_item.hot(codes[level], level).tolist() for level in range(2)] == [[True, False, False]] * 2
    by_level = _with_shares(build_exploration(FrqudConfig(momentum=0.0), SIZES), 0, [0.7, 0.1, 0.1, 0.1])
    assert by_level.hot(codes[0], 0).tolist() == [False, True, True]
    assert by_level.hot(codes[1], 1).tolist() == [True, True, True]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 1.0])
def test_shares_stay_shares_whatever_comes(momentum: float) -> None:
    frqud = build_exploration(FrqudConfig(momentum=momentum), SIZES)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        frqud.noise(torch.randint(0, 4, (7,), generator=generator), 2)
    assert frqud.share(2).sum().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(frqud.share(2), torch.full((4,), 0.25)) == (momentum == 1.0)
    assert torch.equal(frqud.share(0), torch.full((4,), 0.25))


def test_evaluation_counts_nothing_and_draws_nothing(live_sids) -> None:
    live = live_sids(SdudFrqudConfig(momentum=0.5)).eval()
    before = {name: value.clone() for name, value in live.exploration.state_dict().items()}
    _, quantized = live.assign(torch.arange(60))
    assert torch.equal(quantized.codes, quantized.greedy)
    assert float(quantized.noise.abs().max()) == 0
    for name, value in live.exploration.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_state_of_the_noise_is_saved_with_the_tokenizer(live_sids) -> None:
    live, other = live_sids(SdudFrqudConfig(momentum=0.5)), live_sids(SdudFrqudConfig(momentum=0.5))
    live.assign(torch.arange(60))
    with torch.no_grad():
        live.exploration.deviation.sigma.mul_(0.5)
    other.load_state_dict(live.state_dict())
    assert torch.equal(live.assign(torch.arange(50))[1].codes, other.assign(torch.arange(50))[1].codes)


def test_noise_grows_with_its_scale_in_what_it_changes(live_sids) -> None:
    items = torch.arange(120)
    agree = []
    for noise in (0.0, 0.5, 1.0, 3.0, 30.0):
        quantized = live_sids(GumbelConfig(noise=noise)).assign(items)[1]
        agree.append((quantized.codes[:, 0] == quantized.greedy[:, 0]).float().mean().item())
    assert agree[0] == 1.0
    assert agree == sorted(agree, reverse=True)
    assert agree[-1] < 0.4


def test_sample_forward_reads_the_drawn_code_and_table_forward_never_does(live_sids) -> None:
    items = torch.arange(120)
    for forward in ("table", "sample"):
        live = live_sids(GumbelConfig(noise=3.0, forward=forward))
        tokens, quantized = live.assign(items)
        codes = (tokens.history.symbols - live.starts)[:, :-1]
        assert torch.equal(codes, quantized.codes if forward == "sample" else live.codes[items])
        assert torch.equal((tokens.history.symbols - live.starts)[:, -1], live.suffix[items])
        for level, weights in enumerate(tokens.target.weights):
            assert torch.equal(weights.argmax(-1), codes[:, level])
        evaluated, _ = live.eval().assign(items)
        assert torch.equal((evaluated.history.symbols - live.starts)[:, :-1], live.codes[items])


def test_naive_straight_through_follows_the_live_codebooks(live_sids) -> None:
    live = live_sids(SteConfig())
    with torch.no_grad():
        for book in live.tokenizer.codebooks:
            book.add_(0.3 * torch.randn(book.shape, generator=torch.Generator().manual_seed(0)))
    tokens, quantized = live.assign(torch.arange(120))
    read = (tokens.history.symbols - live.starts)[:, :-1]
    assert torch.equal(read, quantized.greedy)
    assert not torch.equal(read, live.codes)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kind": "gumbel", "noise": -1}, "noise"),
        ({"kind": "gumbel", "tau": 0}, "tau"),
        ({"kind": "sdud", "sigma": 0}, "sigma"),
        ({"kind": "frqud", "momentum": 1.5}, "momentum"),
        ({"kind": "frqud", "ratio": 0}, "ratio"),
        ({"kind": "ste", "forward": "table"}, "forward"),
        ({"kind": "none", "noise": 1.0}, "noise"),
        ({"kind": "sdud_frqud", "scope": "user"}, "scope"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings, key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        TypeAdapter(ExplorationConfig).validate_python(settings)


def test_kinds_without_noise_have_nothing_to_learn() -> None:
    for config in (NoNoiseConfig(), SteConfig(), GumbelConfig(), FrqudConfig()):
        assert not list(build_exploration(config, SIZES).parameters())
