"""The discrete VAE as a network: what sees what, the pieces of its loss, and names that do not depend on the batch."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from components.artifacts import SidTable
from components.tokenizers import dvae, stopping
from components.tokenizers.build import checkpoint_of, load_tokenizer
from components.tokenizers.dvae import Dvae, DvaeConfig
from components.tokenizers.prefixes import prefix_errors
from components.tokenizers.sids import SidConfig, assign, codes_to_table, table_symbols
from components.tokenizers.trie import build_trie
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage

SMALL = {"vocabulary": 16, "positions": 4, "hidden": 16, "decoder_hidden": 16, "price": 3.0}
NETWORKS = ("transformer", "sum")


def network(name: str, **settings) -> Dvae:
    """A dvae whose zero-initialised projections are filled, so that nothing is independent by chance."""
    torch.manual_seed(3)
    model = Dvae(DvaeConfig(**SMALL | {"network": name} | settings), 12)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return model.eval()


def vectors(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_prefix_is_decoded_from_its_own_tokens_alone(name: str) -> None:
    model, g = network(name), torch.Generator().manual_seed(5)
    codes = torch.randint(16, (30, 4), generator=g)
    together = model.decode(model.table[codes])
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(30, 4))
    for length in range(1, 5):
        alone = model.decode(model.table[codes[:, :length]])
        torch.testing.assert_close(together[:, length - 1], alone[:, -1])
    changed = codes.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 16
    moved = (model.decode(model.table[changed]) - together).abs().amax(dim=-1) > 1e-6
    assert not moved[:, :2].any() and moved[:, 2:].all()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_hazard_sees_tokens_up_to_its_own(name: str) -> None:
    model = network(name)
    states = torch.randn(30, 4, 16, generator=torch.Generator().manual_seed(6))
    before = model.stop(states)
    assert before.shape == (30, 3)
    for token in range(1, 4):  # states 1, 2, 3 follow tokens 1, 2, 3
        changed = states.clone()
        changed[:, token] += 1
        moved = (model.stop(changed) - before).abs() > 1e-6
        assert not moved[:, : token - 1].any() and moved[:, token - 1].all()
    item = states.clone()
    item[:, 0] += 1
    assert ((model.stop(item) - before).abs() > 1e-6).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_model_halves_what_is_left_at_every_token(name: str) -> None:
    model = Dvae(DvaeConfig(**SMALL | {"network": name}), 12)
    lengths = model.names(vectors()).log_q.exp()
    torch.testing.assert_close(lengths, torch.tensor([[0.5, 0.25, 0.125, 0.125]]).expand_as(lengths))


def message_terms(model: Dvae, x, tau: float):
    torch.manual_seed(7)
    message = model.message(F.normalize(x, dim=1), tau)
    error = (F.normalize(x, dim=1)[:, None] - model.decode(message.embedded)).square().sum(-1)
    return message, message.divergences, error


def test_a_divergence_is_that_of_the_scaled_cosines_without_noise_or_temperature() -> None:
    model, x = network("sum", logit_scale=7.0), F.normalize(vectors(), dim=1)
    for tau in (0.3, 2.0):
        first = model.message(x, tau).divergences[:, 0]
        u = model.read(x)
        p = (7.0 * F.cosine_similarity(u[:, None], model.codebook[None], dim=-1)).softmax(dim=1)
        torch.testing.assert_close(first, math.log(16) + (p * p.log()).sum(1))


def test_soft_samples_sharpen_as_the_temperature_falls() -> None:
    model, x = network("sum").requires_grad_(False), F.normalize(vectors(), dim=1)
    torch.manual_seed(0)
    cold = model.message(x, 1e-3).embedded[:, 0]
    assert float(torch.cdist(cold, model.table).amin(dim=1).max()) < 1e-3
    warm = model.message(x, 5.0).embedded[:, 0]
    assert float(torch.cdist(warm, model.table).amin(dim=1).mean()) > 0.1


def test_the_loss_has_smoothed_lengths_free_nats_by_item_and_position_and_unsmoothed_survival() -> None:
    model, x = network("sum", smoothing=0.1, free_nats=1.5, logit_scale=12.0), vectors()
    message, divergence, error = message_terms(model, x, 0.7)
    q = stopping.log_pmf(message.hazards).exp()
    paid = (divergence - 1.5).clamp(min=0)
    assert ((divergence < 1.5).any()) and (divergence > 1.5).any()
    survival = q.flip(1).cumsum(1).flip(1)
    wanted = {
        "reconstruction": ((0.9 * q + 0.1 / 4) * error).sum(1).mean(),
        "vocabulary": (survival * paid).sum(1).mean(),
        "length": (3.0 * (q * torch.arange(1, 5)).sum(1) + (q * q.log()).sum(1)).mean(),
    }
    torch.manual_seed(7)
    torch.testing.assert_close(model.losses(x, 0.7), wanted)


@pytest.mark.parametrize(("reconstruct", "columns"), [("last", slice(3, 4)), ("every", slice(0, 4))])
def test_a_fixed_length_model_reconstructs_the_last_or_every_prefix(reconstruct: str, columns: slice) -> None:
    model, x = network("sum", length="fixed", reconstruct=reconstruct, free_nats=0.5), vectors()
    _, divergence, error = message_terms(model, x, 0.7)
    torch.manual_seed(7)
    terms = model.losses(x, 0.7)
    torch.testing.assert_close(terms["reconstruction"], error[:, columns].mean())
    torch.testing.assert_close(terms["vocabulary"], (divergence - 0.5).clamp(min=0).sum(1).mean())
    assert float(terms["length"]) == 0
    assert (model.lengths(model.names(x), "argmax") == 4).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_part_of_the_network_gets_gradient_from_one_loss(name: str) -> None:
    model = network(name).train()
    terms = model.losses(vectors(), 0.8)
    (terms["reconstruction"] + 0.1 * (terms["vocabulary"] + terms["length"])).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.any(), parameter


def test_the_price_acts_on_the_length_alone_and_shortens_it() -> None:
    cheap, dear, x = network("sum", price=1.0), network("sum", price=2.0), vectors()
    torch.manual_seed(7)
    one = cheap.losses(x, 0.7)
    torch.manual_seed(7)
    two = dear.losses(x, 0.7)
    expected = stopping.expected(stopping.log_pmf(message_terms(cheap, x, 0.7)[0].hazards)).mean()
    torch.testing.assert_close(two["length"] - one["length"], expected)
    torch.testing.assert_close(two["reconstruction"], one["reconstruction"])
    torch.testing.assert_close(two["vocabulary"], one["vocabulary"])
    two["length"].backward()
    assert float(dear.stop.bias.grad.sum()) < 0  # descent raises the hazards


def test_names_do_not_depend_on_noise_mode_or_batch(monkeypatch) -> None:
    model, x = network("sum", dropout=0.5).train(), vectors(100)
    names = model.names(x)
    assert model.training
    again = model.names(x)
    for field, value in zip(names._fields, names, strict=True):
        torch.testing.assert_close(getattr(again, field), value, rtol=0, atol=0)
    monkeypatch.setattr(dvae, "ROWS", 7)
    for field, value in zip(names._fields, names, strict=True):
        torch.testing.assert_close(getattr(model.names(x), field), value)
    alone = [model.names(row[None]) for row in x[:10]]
    assert torch.equal(torch.cat([n.codes for n in alone]), names.codes[:10])
    torch.testing.assert_close(torch.cat([n.log_q for n in alone]), names.log_q[:10])


def test_the_first_code_is_the_codeword_of_largest_cosine_and_is_taken_off() -> None:
    model, x = network("sum"), vectors()
    u = model.read(F.normalize(x, dim=1))
    first = F.cosine_similarity(u[:, None], model.codebook[None], dim=-1).argmax(dim=1)
    names = model.names(x)
    assert torch.equal(names.codes[:, 0], first)
    u = model.norm(u - model.log_residual_scale[0].exp() * model.codebook[first])
    second = F.cosine_similarity(u[:, None], model.codebook[None], dim=-1).argmax(dim=1)
    assert torch.equal(names.codes[:, 1], second)


def test_a_checkpoint_gives_the_same_names_and_keeps_the_price(tmp_path) -> None:
    model, x = network("transformer"), vectors()
    model.price.fill_(5.5)
    checkpoint = checkpoint_of(model, embeddings="e", steps=3, metrics={})
    checkpoint.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(type(checkpoint).load(tmp_path / "tokenizer"))
    assert isinstance(loaded, Dvae) and float(loaded.price) == 5.5
    assert torch.equal(loaded.names(x).codes, model.names(x).codes)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValidationError, match="typical_length 4 must be below positions 4"):
        DvaeConfig(positions=4, typical_length=4)
    with pytest.raises(ValidationError, match="free_nats 9 must be below ln"):
        DvaeConfig(free_nats=9)
    with pytest.raises(ValidationError, match="decoder_hidden 70 does not split into heads"):
        DvaeConfig(network="transformer", decoder_hidden=70)
    for price in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValidationError, match="price"):
            DvaeConfig(price=price)
    with pytest.raises(ValidationError, match="warmup"):
        DvaeConfig(warmup=1.0)
    assert DvaeConfig(positions=2, length="fixed").codebook_sizes == [128, 128]


def test_a_shared_codebook_has_one_size() -> None:
    table = codes_to_table(torch.tensor([[1, 2]]), [4, 4], 8, "", shared=True)
    with pytest.raises(ValueError, match="one size, got"):
        replace(table, codebook_sizes=[4, 8])


@pytest.mark.parametrize("rule", ["argmax", "median", "optimum"])
def test_the_rule_of_the_length_reaches_the_table(tiny, rule) -> None:
    stage = TokenizerStage.model_validate(
        {"model": {"kind": "dvae", **SMALL, "price": 9.0}, "loop": {"epochs": 10}, "batch_size": 64}
    )
    checkpoint = train_tokenizer(tiny.embeddings, stage, split=tiny.split)
    table = assign(checkpoint, tiny.embeddings, SidConfig(suffix_size=120, length=rule))
    names = load_tokenizer(checkpoint).names(tiny.embeddings.matrix)
    wanted = {
        "argmax": names.log_q.argmax(dim=1) + 1,
        "median": 1 + (names.log_q.exp().cumsum(dim=1) < 0.5).sum(dim=1),
        "optimum": 1
        + (-9.0 * torch.arange(1, 5) - names.divergences.cumsum(dim=1) - 0.9 * names.errors / 0.002).argmax(
            dim=1
        ),
    }
    assert table.codes["codes"].list.len().to_list() == wanted[rule].tolist()
    assert len({tuple(lengths.tolist()) for lengths in wanted.values()}) > 1


@pytest.mark.parametrize("kind", ["rkmeans", "rqvae", "dvae"])
def test_prefix_errors_are_those_of_each_prefix_decoded_on_its_own(tiny, kind: str) -> None:
    model = {
        "rkmeans": {"kind": "rkmeans", "codebook_sizes": [8, 8, 8]},
        "rqvae": {"kind": "rqvae", "codebook_sizes": [8, 8, 8], "hidden": [16], "latent_dim": 8},
        "dvae": {"kind": "dvae", **SMALL},
    }[kind]
    stage = TokenizerStage.model_validate({"model": model, "loop": {"epochs": 2}, "batch_size": 64})
    tokenizer = load_tokenizer(train_tokenizer(tiny.embeddings, stage, split=tiny.split)).requires_grad_(
        False
    )
    x = tiny.embeddings.matrix
    codes = tokenizer.encode(x)
    short = codes.clone()
    short[::2, 1:] = -1
    errors = prefix_errors(tokenizer, x, short)
    assert errors[::2, 1:].isnan().all() and not errors[1::2].isnan().any()
    for item in (0, 1, 5):
        for length in range(1, int((short[item] >= 0).sum()) + 1):
            code = codes[item, :length]
            if isinstance(tokenizer, Dvae):
                rebuilt = tokenizer.decode(tokenizer.table[code][None])[0, -1]
            else:
                words = sum(book[c] for book, c in zip(tokenizer.codebooks, code, strict=False))
                rebuilt = tokenizer.decoder(words) if kind == "rqvae" else words
            cosine = F.cosine_similarity(rebuilt, x[item], dim=0)
            assert float(errors[item, length - 1]) == pytest.approx(float(2 - 2 * cosine), abs=1e-5)
    with pytest.raises(ValueError, match="different catalogues"):
        prefix_errors(tokenizer, x, codes[:-1])


@pytest.fixture(scope="module")
def named(tiny) -> SidTable:
    """Names of unequal length for the planted items, the most popular of equal codes first."""
    stage = TokenizerStage.model_validate(
        {"model": {"kind": "dvae", **SMALL, "price": 20.0}, "loop": {"epochs": 40}, "batch_size": 64}
    )
    tokenizer = train_tokenizer(tiny.embeddings, stage, split=tiny.split)
    config = SidConfig(suffix_size=64, suffix_order="popularity")
    return assign(tokenizer, tiny.embeddings, config, split=tiny.split)


def test_strings_are_unique_prefix_free_and_go_through_the_trie(named: SidTable) -> None:
    lengths = named.codes["codes"].list.len()
    assert lengths.n_unique() > 1 and named.shared
    symbols = table_symbols(named)
    strings = [tuple(s for s in row if s >= 0) for row in symbols.tolist()]
    assert [len(s) - 1 for s in strings] == lengths.to_list()
    assert len(set(strings)) == named.num_items
    prefixes = {s[:n] for s in strings for n in range(1, len(s))}
    assert not prefixes & set(strings)
    trie = build_trie(symbols)
    for item, string in enumerate(strings):
        node = 0
        for symbol in string:
            first, count = int(trie.first_child[node]), int(trie.num_children[node])
            node = next(n for n in range(first, first + count) if int(trie.symbol[n]) == symbol)
        assert int(trie.item[node]) == item


def test_suffixes_are_dense_and_the_most_popular_item_is_first(tiny, named: SidTable) -> None:
    from components.data.splits import count_events

    counts = count_events(tiny.split.train["sequence"], tiny.split.num_items)
    groups = named.codes.group_by("codes").agg("item_id", "suffix").rows()
    assert max(len(items) for _, items, _ in groups) > 2
    for _, items, suffixes in groups:
        by_suffix = [item for _, item in sorted(zip(suffixes, items, strict=True))]
        assert sorted(suffixes) == list(range(len(items)))
        assert by_suffix == sorted(items, key=lambda item: (-counts[item], item))


def test_what_goes_by_popularity_says_so_when_it_has_no_split(tiny) -> None:
    with pytest.raises(ValueError, match="counts items by interactions.*give the stage the SequenceSplit"):
        train_tokenizer(tiny.embeddings, TokenizerStage(model=DvaeConfig(**SMALL)))
    with pytest.raises(ValueError, match="suffix_order=popularity needs"):
        assign(tiny.tokenizer, tiny.embeddings, SidConfig(suffix_order="popularity"))


def test_an_item_that_keeps_its_codes_keeps_its_suffix_also_where_lengths_differ() -> None:
    before = codes_to_table(torch.tensor([[1, -1], [1, -1], [1, 2]]), [4, 4], 8, "", shared=True)
    after = codes_to_table(
        torch.tensor([[1, 2], [1, -1], [1, 2], [1, -1]]), [4, 4], 8, "", before, shared=True
    )
    assert before.codes["suffix"].to_list() == [0, 1, 0]
    assert after.codes["suffix"].to_list() == [1, 1, 0, 0]


def test_sinkhorn_is_refused_for_a_dvae(tiny) -> None:
    stage = TokenizerStage.model_validate(
        {"model": {"kind": "dvae", **SMALL}, "loop": {"epochs": 1}, "batch_size": 64}
    )
    tokenizer = train_tokenizer(tiny.embeddings, stage, split=tiny.split)
    with pytest.raises(ValueError, match="sids.assignment sinkhorn"):
        assign(tokenizer, tiny.embeddings, SidConfig(assignment="sinkhorn"))
