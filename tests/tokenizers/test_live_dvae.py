"""A dvae as a source of tokens: hard in value, soft in the context of the table's names, silent behind their end."""

import math
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from components.artifacts import SidTable, TokenizerCheckpoint
from components.data.batches import held_out_rows, pad
from components.exploration import (
    FrqudConfig,
    GumbelConfig,
    NoNoiseConfig,
    SdudConfig,
    SdudFrqudConfig,
    SteConfig,
)
from components.recommenders.build import build_recommender
from components.recommenders.causal import CausalConfig
from components.recommenders.tiger import TigerConfig
from components.seams import Catalogue, ItemTokens
from components.tokenizers.build import checkpoint_of, load_tokenizer
from components.tokenizers.dvae import Dvae, DvaeConfig
from components.tokenizers.live_dvae import LiveDvae
from components.tokenizers.sids import SidConfig, assign, space_of, symbol_counts, table_symbols
from components.tokenizers.sources import Paths
from components.tokenizers.suffix_cost import occupancy, suffix_cost
from components.tokenizers.trie import build_trie

SIZE: dict[str, Any] = dict(dim=16, layers=1, heads=2, head_dim=8, hidden=32, dropout=0.0)
CAUSAL, TIGER = CausalConfig(**SIZE), TigerConfig(**SIZE)
NONE = Paths(history=False, teacher_forcing=False, target=False)
KINDS = [
    NoNoiseConfig(),
    GumbelConfig(),
    GumbelConfig(noise=2.0, tau=2.0),
    SdudConfig(),
    FrqudConfig(momentum=0.0),
    FrqudConfig(momentum=0.0, scope="item"),
    SdudFrqudConfig(momentum=0.0),
]
MOVED = {"codebook", "log_logit_scale", "log_residual_scale", "norm.weight"}
"""What the recommendation loss may reach."""


class Named(NamedTuple):
    """A dvae with random weights, and the names that it gives the planted items."""

    checkpoint: TokenizerCheckpoint
    sids: SidTable


def _named(tiny, length: str) -> Named:
    torch.manual_seed(1)
    config = DvaeConfig(
        vocabulary=8, positions=3, hidden=16, decoder_hidden=16, length=length, price=1.0, logit_scale=8.0
    )
    model = Dvae(config, tiny.embeddings.matrix.shape[1])
    for scale in (model.log_logit_scale, model.log_residual_scale, model.norm.weight):
        scale.data.add_(0.2 * torch.randn(scale.shape))  # no position is like another
    if length == "variable":  # a fresh stop head says the same of every item
        torch.nn.init.normal_(model.stop.out.weight, std=8.0)
    checkpoint = checkpoint_of(model, embeddings=tiny.embeddings.fingerprint, steps=0, metrics={})
    return Named(checkpoint, assign(checkpoint, tiny.embeddings, SidConfig(suffix_size=120)))


@pytest.fixture(scope="module")
def variable(tiny) -> Named:
    named = _named(tiny, "variable")
    counts = named.sids.codes["codes"].list.len().value_counts()["count"].to_list()
    assert len(counts) == 3 and min(counts) >= 10  # all lengths are met, or the tests below say little
    return named


@pytest.fixture(scope="module")
def fixed(tiny) -> Named:
    return _named(tiny, "fixed")


def source(
    tiny, named: Named, exploration=None, paths=None, *, seed: int = 0, encoder: bool = False
) -> LiveDvae:
    """Make a live source; by default a plain Gumbel run with all paths open."""
    return LiveDvae(
        load_tokenizer(named.checkpoint),
        tiny.embeddings.matrix,
        named.sids,
        exploration or GumbelConfig(),
        paths or Paths(),
        SidConfig(),
        train_encoder=encoder,
        generator=torch.Generator().manual_seed(seed),
    ).train()


def loss_of(tiny, live: LiveDvae, model=CAUSAL) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Return the recommendation loss of a batch, the soft assignment of its items, and their codes in the table."""
    torch.manual_seed(0)
    recommender = build_recommender(model, live.space)
    # Fresh tied tables are too small for their logits to tell codes apart; trained ones are not.
    recommender.symbols.weight.data.normal_(std=0.3)
    batch = pad(held_out_rows(tiny.split.valid), torch.arange(32).numpy())
    tokens, quantized = live.assign(batch.unique)
    return recommender.loss(batch, tokens).total, quantized.probabilities, live.codes[batch.unique]


def reached(live: LiveDvae) -> set[str]:
    """Return the parameters of the dvae that have a gradient other than 0."""
    found = {name: p.grad for name, p in live.tokenizer.named_parameters() if p.grad is not None}
    assert all(bool(g.isfinite().all()) for g in found.values())
    return {name for name, g in found.items() if bool(g.any())}


@pytest.mark.parametrize("exploration", KINDS, ids=str)
@pytest.mark.parametrize(("which", "model"), [("variable", CAUSAL), ("fixed", CAUSAL), ("fixed", TIGER)])
def test_the_recommendation_loss_alone_reaches_codebook_and_scales_and_nothing_else(
    tiny, request, which: str, model, exploration
) -> None:
    """No hazard, no decoder, no reader of content: where to stop is not the recommender's to say."""
    live = source(tiny, request.getfixturevalue(which), exploration)
    loss, probabilities, codes = loss_of(tiny, live, model)
    for soft in probabilities:
        soft.retain_grad()
    loss.backward()
    assert reached(live) == MOVED
    for name in ("log_logit_scale", "log_residual_scale"):
        assert bool((live.tokenizer.get_parameter(name).grad.abs() > 1e-10).all()), name
    for level, soft in enumerate(probabilities):
        pulled = soft.grad.abs().sum(dim=1)
        ended = codes[:, level] < 0
        assert not bool(pulled[ended].any()) and bool((pulled[~ended] > 1e-10).any())


@pytest.mark.parametrize("exploration", KINDS, ids=str)
def test_all_paths_detached_send_nothing(tiny, variable, exploration) -> None:
    live = source(tiny, variable, exploration, NONE)
    loss_of(tiny, live)[0].backward()
    assert all(p.grad is None for p in live.parameters())


@pytest.mark.parametrize(
    ("which", "model", "paths"),
    [
        ("variable", CAUSAL, Paths(True, True, False)),
        ("variable", CAUSAL, Paths(False, False, True)),
        ("fixed", TIGER, Paths(True, False, False)),
        ("fixed", TIGER, Paths(False, True, False)),
        ("fixed", TIGER, Paths(False, False, True)),
    ],
    ids=["causal-input", "causal-target", "tiger-history", "tiger-forcing", "tiger-target"],
)
def test_each_path_alone_reaches_the_message(tiny, request, which: str, model, paths: Paths) -> None:
    live = source(tiny, request.getfixturevalue(which), paths=paths)
    loss_of(tiny, live, model)[0].backward()
    assert reached(live) == MOVED


@pytest.mark.parametrize("encoder", [False, True])
def test_the_readers_of_content_learn_only_when_asked_and_the_stop_from_its_own_loss_alone(
    tiny, variable, encoder: bool
) -> None:
    live = source(tiny, variable, encoder=encoder)
    loss_of(tiny, live)[0].backward()
    read = {"read.0.weight", "read.0.bias", "read.1.weight", "read.1.bias"}
    assert reached(live) == MOVED | (read if encoder else set())
    live.zero_grad()
    _, quantized = live.assign(torch.arange(40))
    sum(quantized.losses.values()).backward()
    parts = {name.split(".")[0] for name in reached(live)}
    assert {"stop", "decoder", "table", "codebook"} <= parts
    assert ({"read", "read_for_stop"} <= parts) == encoder and ("read" in parts) == encoder
    trained = {id(p) for p in live.trained_parameters()}
    assert {n for n, p in live.tokenizer.named_parameters() if p.grad is not None} == {
        n for n, p in live.tokenizer.named_parameters() if id(p) in trained
    }


@pytest.mark.parametrize(("which", "model"), [("variable", CAUSAL), ("fixed", CAUSAL), ("fixed", TIGER)])
@pytest.mark.parametrize("exploration", KINDS, ids=str)
def test_soft_tokens_cost_what_their_hard_codes_cost(tiny, request, which: str, model, exploration) -> None:
    named = request.getfixturevalue(which)
    soft, hard = (loss_of(tiny, source(tiny, named, exploration, p), model)[0] for p in (Paths(), NONE))
    assert soft.item() == pytest.approx(hard.item(), rel=1e-5)


def test_what_stands_behind_the_end_of_a_name_is_not_read(tiny, variable) -> None:
    live, garbage = source(tiny, variable), torch.Generator().manual_seed(2)
    batch = pad(held_out_rows(tiny.split.valid), torch.arange(32).numpy())
    tokens, _ = live.assign(batch.unique)
    recommender = build_recommender(CAUSAL, live.space)
    ended = live.codes[batch.unique] < 0
    weights = tuple(
        torch.where(ended[:, level, None], torch.randn(w.shape, generator=garbage), w)
        for level, w in enumerate(tokens.history.weights)
    )
    other = ItemTokens(tokens.history.symbols, weights)
    assert torch.equal(
        recommender.loss(batch, tokens).total,
        recommender.loss(batch, type(tokens)(other, other, other)).total,
    )


@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0])
def test_the_message_of_a_position_is_that_of_the_encoder_after_the_codes_of_the_table(
    tiny, variable, tau: float
) -> None:
    """The codebook has moved on: today's codes are others than the table's, which stay the context."""
    live = source(tiny, variable, NoNoiseConfig(tau=tau))
    dvae = live.tokenizer
    with torch.no_grad():
        dvae.codebook.add_(0.5 * torch.randn(dvae.codebook.shape, generator=torch.Generator().manual_seed(3)))
    items = torch.arange(tiny.sids.num_items)
    _, quantized = live.assign(items)
    assert not torch.equal(quantized.codes, live.codes)
    for item in range(0, len(items), 7):
        u = dvae.read(F.normalize(tiny.embeddings.matrix[item], dim=0))
        for t, code in enumerate(live.codes[item].tolist()):
            if code < 0:
                assert quantized.codes[item, t] == quantized.greedy[item, t] == -1
                continue
            scale = dvae.log_logit_scale[t].exp()
            logits = scale * F.cosine_similarity(u[None], dvae.codebook, dim=1)
            torch.testing.assert_close(quantized.probabilities[t][item], (logits / tau).softmax(0))
            assert quantized.codes[item, t] == quantized.greedy[item, t] == logits.argmax()
            if t < 2:
                u = dvae.norm(u - dvae.log_residual_scale[t].exp() * dvae.codebook[code])


def test_without_noise_the_drawn_codes_are_those_of_a_table_just_made(tiny, variable) -> None:
    live = source(tiny, variable, NoNoiseConfig())
    _, quantized = live.assign(torch.arange(tiny.sids.num_items))
    assert torch.equal(quantized.codes, live.codes) and torch.equal(quantized.greedy, live.codes)


def test_the_table_of_the_source_is_the_table_it_was_made_from(tiny, variable, fixed) -> None:
    for named in (variable, fixed):
        live = source(tiny, named)
        assert torch.equal(live.symbols, table_symbols(named.sids))
        assert live.table(named.checkpoint.fingerprint).fingerprint == named.sids.fingerprint
        assert not bool(live.refresh().any())


def test_refresh_names_as_the_tokenizer_does_and_keeps_the_suffix_of_what_stays(tiny, variable) -> None:
    live = source(tiny, variable)
    before, lengths = live.symbols.clone(), symbol_counts(live.symbols)
    with torch.no_grad():
        live.tokenizer.codebook.add_(
            0.2 * torch.randn(live.tokenizer.codebook.shape, generator=torch.Generator().manual_seed(4))
        )
    moved = live.refresh()
    assert 0 < int(moved.sum()) < len(moved)
    assert bool((symbol_counts(live.symbols) != lengths).any())
    assert torch.equal(live.symbols[~moved], before[~moved])
    checkpoint = checkpoint_of(live.tokenizer, embeddings=tiny.embeddings.fingerprint, steps=1, metrics={})
    wanted = assign(checkpoint, tiny.embeddings, SidConfig(suffix_size=120), previous=variable.sids)
    assert live.table(checkpoint.fingerprint).fingerprint == wanted.fingerprint
    assert torch.equal(table_symbols(wanted), live.symbols)
    build_trie(live.symbols)  # refuses strings that are not unique, or begin one another


def test_state_is_table_tokenizer_and_noise_of_one_moment(tiny, variable) -> None:
    live, items = source(tiny, variable, FrqudConfig(momentum=0.5)), torch.arange(60)
    with torch.no_grad():
        live.tokenizer.codebook.mul_(-1)
    live.refresh()
    live.assign(items)
    state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in live.state_dict().items()}
    other = source(tiny, variable, FrqudConfig(momentum=0.5), seed=9)
    other.load_state_dict(state)
    assert torch.equal(other.symbols, live.symbols)
    one, two = live.assign(items)[1], other.assign(items)[1]
    assert torch.equal(one.codes, two.codes)
    assert all(torch.equal(one.losses[name], two.losses[name]) for name in one.losses)


def test_noise_is_a_function_of_the_seed_and_leaves_the_global_stream_alone(tiny, variable) -> None:
    items = torch.arange(tiny.sids.num_items)
    sources = [source(tiny, variable, seed=seed) for seed in (0, 0, 1)]
    before = torch.get_rng_state()
    first, same, other = (live.assign(items)[1] for live in sources)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.codes, same.codes) and not torch.equal(first.codes, other.codes)
    assert first.losses["reconstruction"] == same.losses["reconstruction"] != other.losses["reconstruction"]
    assert torch.equal(
        source(tiny, variable, GumbelConfig(noise=3.0)).eval().assign(items)[1].codes,
        source(tiny, variable).codes,
    )


@pytest.mark.parametrize("scope", ["level", "item"])
def test_codes_are_counted_only_where_a_name_has_one(tiny, variable, scope: str) -> None:
    live = source(tiny, variable, FrqudConfig(momentum=0.0, scope=scope))
    items = torch.arange(tiny.sids.num_items)
    _, quantized = live.assign(items)
    for level in range(3 if scope == "level" else 1):
        used = quantized.greedy[:, level][live.codes[:, level] >= 0]
        share = torch.bincount(used, minlength=8) / len(used)
        torch.testing.assert_close(live.exploration.share(level), share)
    short = items[symbol_counts(live.symbols) == 2]
    shares = live.exploration.share(2).clone()
    live.assign(short)  # nobody reaches the last level
    assert torch.equal(live.exploration.share(2), shares)


@pytest.mark.parametrize("exploration", [SteConfig(), GumbelConfig(forward="sample")], ids=str)
def test_codes_that_are_drawn_cannot_be_read(tiny, variable, exploration) -> None:
    with pytest.raises(ValueError, match=r"reads the codes drawn now, whose length and suffix"):
        source(tiny, variable, exploration)


def test_ranking_does_not_depend_on_where_a_name_might_have_ended(tiny, variable) -> None:
    """Training allows any length; the table that is handed on says less. Only children of the tree are scored."""
    live = source(tiny, variable)
    long = live.codes.clone()
    short = (long >= 0).sum(dim=1) == 1
    long[short, 1] = 0  # no name of one code is left
    live.follow(long)
    table = live.table()
    spaces = live.space, space_of(table)
    assert [space.shortest for space in spaces] == [1, 2]
    batch = pad(held_out_rows(tiny.split.valid), torch.arange(24).numpy())
    catalogue = Catalogue(live.symbols, build_trie(live.symbols))
    rankings = []
    for space in spaces:
        torch.manual_seed(0)
        recommender = build_recommender(CAUSAL, space).eval()
        torch.nn.init.normal_(recommender.out.weight)
        rankings.append(recommender.rank(batch, catalogue, 10, exclude_seen=False))
    assert torch.equal(rankings[0].items, rankings[1].items)
    torch.testing.assert_close(rankings[0].scores, rankings[1].scores)


def _cost_by_all_codes(codes: Tensor, mass: Tensor, soft: list[Tensor], item: int) -> float:
    """The expectation as written, over every string of codes that is as long as the item's."""
    length, own = int((codes[item] >= 0).sum()), float(mass[item])
    masses: dict[tuple[int, ...], float] = {}
    for other, row in enumerate(codes.tolist()):
        if other != item:
            name = tuple(code for code in row if code >= 0)
            masses[name] = masses.get(name, 0.0) + float(mass[other])
    return math.fsum(
        math.prod(float(soft[level][item, code]) for level, code in enumerate(string))
        * math.log((own + masses.get(string, 0.0)) / own)
        for string in product(range(3), repeat=length)
    )


def test_the_suffix_costs_an_item_only_among_names_of_its_own_length() -> None:
    g = torch.Generator().manual_seed(5)
    codes = torch.randint(3, (14, 3), generator=g)
    lengths = torch.randint(1, 4, (14, 1), generator=g)
    codes = codes.masked_fill(torch.arange(3) >= lengths, -1)
    mass = torch.rand(14, generator=g, dtype=torch.float64) + 0.5
    soft = [
        torch.randn(14, 3, generator=g, dtype=torch.float64).softmax(-1).requires_grad_() for _ in range(3)
    ]
    table, ids = occupancy(codes, mass, (3, 3, 3)), torch.randperm(14, generator=g)
    cost = suffix_cost([p[ids] for p in soft], ids, table)
    hard = [p.detach() for p in soft]
    wanted = [_cost_by_all_codes(codes, mass, hard, item) for item in ids.tolist()]
    assert cost.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    cost.sum().backward()
    assert not any(bool(p.grad[codes[:, level] < 0].any()) for level, p in enumerate(soft))


@pytest.mark.parametrize("codes", [[[0, -1, 1]], [[-1, -1, -1]], [[0, -2, -2]]])
def test_an_end_that_is_none_is_refused(codes: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="-1 stands behind the last code, and nothing else does"):
        occupancy(torch.tensor(codes), torch.ones(1), (3, 3, 3))
