"""Training of the discrete VAE: what popularity does to lengths, warm-ups, the price rule, going on after a stop."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from components.data.splits import count_events
from components.seeding import seed_everything
from components.tokenizers import stopping
from components.tokenizers.build import load_tokenizer
from components.tokenizers.dvae import Dvae, DvaeConfig
from components.training import dvae as training
from components.training.dvae import describe_names, total_loss, train_dvae, warm, weighted
from components.training.loop import LoopConfig
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage


class Toy(NamedTuple):
    """A tree of unit vectors whose popularity has nothing to do with where they lie."""

    x_ND: Tensor
    counts_N: Tensor
    rank_N: Tensor


def toy(seed: int, items: int) -> Toy:
    """Three levels of Gaussians, 40 x 12 leaves, and Zipf's law with exponent 1.1."""
    g = torch.Generator().manual_seed(seed)
    top, sub = torch.randn(40, 32, generator=g), 0.6 * torch.randn(40, 12, 32, generator=g)
    a, b = torch.randint(40, (items,), generator=g), torch.randint(12, (items,), generator=g)
    x = F.normalize(top[a] + sub[a, b] + 0.3 * torch.randn(items, 32, generator=g), dim=1)
    rank = torch.randperm(items, generator=g) + 1
    return Toy(x, (1e6 * rank.double() ** -1.1).round().float(), rank)


def nothing(*_: object) -> None:
    """Neither log nor save."""


def trained(data: Toy, seed: int, epochs: int, log=nothing, **settings) -> Dvae:
    """Train as the specification's toy does: 8 steps of 256 an epoch for 2,000 items."""
    sizes = {"vocabulary": 128, "positions": 4, "hidden": 48, "decoder_hidden": 96, "smoothing": 0.1}
    model = DvaeConfig(**sizes | {"price": 8.0} | settings)
    stage = TokenizerStage(model=model, loop=LoopConfig(epochs=epochs, validate_every=epochs), batch_size=256)
    g = seed_everything(seed)
    return train_dvae(model, data.x_ND, data.counts_N, stage, g, log, nothing, None)[0].eval()


def lengths(model: Dvae, data: Toy) -> Tensor:
    return model.lengths(model.names(data.x_ND), "argmax").float()


def gap(length: Tensor, data: Toy) -> float:
    """By how much names are shorter by interaction than by item."""
    return float(length.mean() - weighted(length, data.counts_N))


def chance(length: Tensor, data: Toy) -> float:
    """Two standard deviations of that gap if popularity has nothing to do with length: few items are most draws."""
    share = data.counts_N / data.counts_N.sum()
    return 2 * float(length.std() * share.square().sum().sqrt())


def hard_error(model: Dvae, data: Toy) -> float:
    names = model.names(data.x_ND)
    at = model.lengths(names, "argmax")[:, None] - 1
    return float(weighted(names.errors.gather(1, at)[:, 0], data.counts_N))


def test_popular_items_get_shorter_names_and_only_if_they_are_drawn_more_often() -> None:
    """A small toy, seconds long: the sign of the effect and its absence in the control."""
    data = toy(0, 400)
    small = {"vocabulary": 32, "positions": 3, "hidden": 24, "decoder_hidden": 32, "price": 30.0}
    small |= {"smoothing": 0.3, "dropout": 0.0}
    drawn, alike = (
        lengths(trained(data, 0, 200, sampling=sampling, **small), data)
        for sampling in ("interactions", "uniform")
    )
    assert gap(drawn, data) > 0.2
    assert alike.unique().numel() > 1 and abs(gap(alike, data)) < min(0.2, chance(alike, data))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_head_is_shorter_than_the_tail_and_codes_are_in_use(seed: int) -> None:
    data = toy(seed, 2000)
    model = trained(data, seed, 250)
    length = lengths(model, data)
    head, tail = length[data.rank_N <= 40].mean(), length[data.rank_N > 400].mean()
    assert float(weighted(length, data.counts_N)) <= float(length.mean()) - 0.3
    assert head < tail
    assert torch.bincount(length.long()).max() <= 0.95 * len(length)
    names = model.names(data.x_ND)
    for position in range(4):
        reached = length > position
        if int(reached.sum()) >= 4 * 128:
            share = torch.bincount(names.codes[reached, position], minlength=128) / reached.sum()
            assert float(torch.special.entr(share).sum().exp()) >= 0.4 * 128


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_at_a_mild_price_shorter_names_describe_items_as_well_as_full_ones(seed: int) -> None:
    data = toy(seed, 2000)
    mild, fixed = trained(data, seed, 250, price=1.0), trained(data, seed, 250, length="fixed")
    assert float(weighted(lengths(mild, data), data.counts_N)) < 2.5
    assert hard_error(mild, data) <= 1.1 * hard_error(fixed, data)


@pytest.mark.slow
def test_without_popularity_in_the_draws_lengths_do_not_follow_it() -> None:
    data = toy(0, 2000)
    length = lengths(trained(data, 0, 250, sampling="uniform"), data)
    assert abs(gap(length, data)) < chance(length, data)


@pytest.mark.slow
def test_the_price_rule_predicts_the_length_that_is_learned() -> None:
    data, logged = toy(0, 2000), {}
    model = trained(data, 0, 250, lambda _, values: logged.update(values), price="auto", typical_length=1)
    learned = float(weighted(lengths(model, data), data.counts_N))
    assert float(model.price) == pytest.approx(logged["price/auto"]) and logged["price/auto"] > 0
    assert abs(learned - logged["price/predicted_draw"]) < 0.5


def test_the_warm_up_rises_along_half_a_cosine_and_stays() -> None:
    assert [warm(p, 0.4) for p in (0.0, 0.2, 0.4, 0.9)] == pytest.approx([0, 0.5, 1, 1])


def test_beta_weighs_codes_and_price_together_and_nothing_else() -> None:
    terms = {
        "reconstruction": torch.tensor(3.0),
        "vocabulary": torch.tensor(5.0),
        "length": torch.tensor(7.0),
    }
    assert [float(total_loss(terms, beta)) for beta in (0, 1, 2)] == [3, 15, 27]


def test_beta_and_temperature_follow_the_warm_up_and_lengths_wait_for_its_end(tiny, monkeypatch) -> None:
    """10 steps, 5 of them warm-up; what the loss is asked for is recorded step by step."""
    calls: list[tuple[float, bool]] = []
    betas: list[float] = []
    plain, plain_total = Dvae.losses, training.total_loss

    def losses(self, x_BD, tau=0.6, *, all_prefixes=False):
        calls.append((tau, all_prefixes))
        return plain(self, x_BD, tau, all_prefixes=all_prefixes)

    def total(terms, beta):
        betas.append(beta)
        return plain_total(terms, beta)

    monkeypatch.setattr(Dvae, "losses", losses)
    monkeypatch.setattr(training, "total_loss", total)
    rows = len(tiny.embeddings.matrix)
    stage = small_stage(tau_start=1.0, tau_end=0.5, warmup=0.5, beta=0.004).model_copy(
        update={"batch_size": rows, "loop": LoopConfig(epochs=10)}
    )
    train_tokenizer(tiny.embeddings, stage, split=tiny.split)
    ready = [warm(step / 10, 0.5) for step in range(10)]
    assert [tau for tau, _ in calls] == pytest.approx([1 - 0.5 * r for r in ready])
    assert betas == pytest.approx([0.004 * r for r in ready])
    assert [waits for _, waits in calls] == [True] * 5 + [False] * 5


def small_stage(**settings) -> TokenizerStage:
    model = {"kind": "dvae", "vocabulary": 16, "positions": 3, "hidden": 16, "decoder_hidden": 16}
    model |= {"price": 5.0} | settings
    return TokenizerStage.model_validate(
        {"model": model, "loop": {"epochs": 6, "validate_every": 2}, "batch_size": 64}
    )


def test_equal_seeds_give_equal_bytes_and_other_seeds_others(tiny) -> None:
    stage = small_stage()
    one, two = (train_tokenizer(tiny.embeddings, stage, split=tiny.split) for _ in range(2))
    other = train_tokenizer(tiny.embeddings, stage.model_copy(update={"seed": 1}), split=tiny.split)
    assert one.fingerprint == two.fingerprint != other.fingerprint


@pytest.mark.parametrize("price", [5.0, "auto"])
def test_a_stopped_run_goes_on_to_the_same_bytes_also_from_within_the_probe(tiny, price) -> None:
    stage = small_stage(price=price, beta=1e-4, free_nats=0.5)
    states: list = []
    whole = train_tokenizer(tiny.embeddings, stage, save=states.append, split=tiny.split)
    assert len(states) == (6 if price == "auto" else 3)
    for state in (states[0], states[-2]):
        again = train_tokenizer(tiny.embeddings, stage, resume=state, split=tiny.split)
        assert again.fingerprint == whole.fingerprint


def test_auto_prices_the_gain_of_a_fixed_length_probe(tiny) -> None:
    stage = small_stage(price="auto", beta=1e-4, free_nats=0.5, typical_length=1)
    logged: dict[str, float] = {}
    checkpoint = train_tokenizer(tiny.embeddings, stage, lambda _, v: logged.update(v), split=tiny.split)
    model = stage.model
    wanted = stopping.price_for(logged["price/gain"], 1e-4, 1 - model.smoothing, model.surprise)
    assert logged["price/auto"] == pytest.approx(wanted)
    assert checkpoint.metrics["price"] == pytest.approx(wanted)
    assert 1 <= logged["price/predicted_draw"] <= 3 and "probe/loss" in logged
    probe = small_stage(price="auto", beta=1e-4, free_nats=0.5, length="fixed", reconstruct="every")
    errors = train_tokenizer(tiny.embeddings, probe, split=tiny.split).metrics
    assert logged["price/gain"] == pytest.approx(
        errors["prefix_error/1"] - errors["prefix_error/2"], rel=1e-3
    )


def test_a_gain_too_small_for_any_price_says_so(tiny) -> None:
    with pytest.raises(ValueError, match="price auto: code 3 gains .* set a price"):
        train_tokenizer(tiny.embeddings, small_stage(price="auto", beta=10.0), split=tiny.split)


def test_figures_are_those_of_the_names(tiny) -> None:
    stage = small_stage(price=0.5)
    metrics = train_tokenizer(tiny.embeddings, stage, split=tiny.split).metrics
    lengths_shares = [metrics[f"length_share/{n}"] for n in (1, 2, 3)]
    assert sum(lengths_shares) == pytest.approx(1)
    assert metrics["length/item"] == pytest.approx(
        sum(n * share for n, share in enumerate(lengths_shares, start=1))
    )
    fixed = train_tokenizer(tiny.embeddings, small_stage(length="fixed"), split=tiny.split).metrics
    assert fixed["reconstruction/draw"] == pytest.approx(fixed["prefix_error/3"])
    assert not any(name.startswith(("length", "price")) for name in fixed)


@pytest.mark.parametrize("price", [5.0, "auto"])
def test_metrics_are_those_of_the_kept_weights(tiny, price) -> None:
    stage = small_stage(price=price, beta=1e-4, free_nats=0.5)
    checkpoint = train_tokenizer(tiny.embeddings, stage, split=tiny.split)
    model, x = load_tokenizer(checkpoint), tiny.embeddings.matrix
    counts = torch.from_numpy(count_events(tiny.split.train["sequence"], len(x))).float()
    assert checkpoint.metrics == describe_names(model, model.names(x), counts)
    assert checkpoint.steps == 6 * -(-len(x) // 64)


def test_means_by_draw_weigh_items_by_their_interactions() -> None:
    model = Dvae(DvaeConfig(vocabulary=8, positions=2, typical_length=1, price=1.0), 4).eval()
    x, counts = torch.randn(3, 4), torch.tensor([8.0, 1.0, 1.0])
    names = model.names(x)._replace(
        errors=torch.tensor([[0.1, 0.0], [1.0, 0.5], [2.0, 0.6]]),
        log_q=torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]).log(),
        codes=torch.tensor([[1, 2], [3, 4], [3, 4]]),
    )
    figures = describe_names(model, names, counts)
    assert figures["length/item"] == pytest.approx(5 / 3)
    assert figures["length/draw"] == pytest.approx(1.2)
    assert figures["reconstruction/item"] == pytest.approx((0.1 + 0.5 + 0.6) / 3)
    assert figures["reconstruction/draw"] == pytest.approx(0.8 * 0.1 + 0.1 * 0.5 + 0.1 * 0.6)
    assert figures["collision_rate"] == pytest.approx(2 / 3)
    assert figures["largest_bucket"] == 2 and figures["distinct_share"] == pytest.approx(2 / 3)
    assert figures["perplexity/1"] == pytest.approx(3 / 2 ** (2 / 3))


@pytest.mark.gpu
def test_a_dvae_trains_and_names_items_on_a_gpu(tiny) -> None:
    stage = small_stage(price="auto", beta=1e-4, free_nats=0.5).model_copy(update={"device": "cuda"})
    checkpoint = train_tokenizer(tiny.embeddings, stage, split=tiny.split)
    assert not checkpoint.weights["codebook"].is_cuda and checkpoint.metrics["price"] > 0


def test_items_that_nobody_met_are_never_drawn_but_are_named(tiny) -> None:
    counts = torch.zeros(len(tiny.embeddings.matrix))
    counts[:20] = 1
    model = DvaeConfig(vocabulary=16, positions=3, price=5.0, hidden=16, decoder_hidden=16)
    stage = TokenizerStage(model=model, loop=LoopConfig(epochs=1), batch_size=32)
    x = tiny.embeddings.matrix
    one = train_dvae(model, x, counts, stage, seed_everything(0), nothing, nothing, None)[0]
    other_x = tiny.embeddings.matrix.clone()
    other_x[20:] = other_x[20:].flip(0) * 3 + 1
    two = train_dvae(model, other_x, counts, stage, seed_everything(0), nothing, nothing, None)[0]
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert len(one.names(tiny.embeddings.matrix).codes) == len(tiny.embeddings.matrix)
