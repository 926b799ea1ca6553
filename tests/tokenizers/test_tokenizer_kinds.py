"""Laws that every tokenizer by residual quantisation keeps, and those of each kind."""

import sys
import typing
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from components.artifacts import TokenizerCheckpoint
from components.folders import ArtifactError
from components.tokenizers.build import TokenizerConfig, build_tokenizer, checkpoint_of, load_tokenizer
from components.tokenizers.dvae import DvaeConfig
from components.tokenizers.prefixes import prefix_errors
from components.tokenizers.quantize import reconstruct
from components.tokenizers.rkmeans import RkMeans, RkMeansConfig, kmeans, residual_kmeans
from components.tokenizers.rqvae import RqVae, RqVaeConfig, SinkhornConfig, mean_cosine
from components.tokenizers.sids import SidConfig, assign, padded_codes
from components.training.loop import LoopConfig
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage

KINDS = (RqVaeConfig, RkMeansConfig)
SMALL = {"codebook_sizes": [8, 4, 4]}


def clusters(rows: int = 120, width: int = 10, seed: int = 0) -> Tensor:
    """Rows around 8 centres, far from length 1."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, width, generator=g)
    return 0.05 * (centres[torch.arange(rows) % 8] + 0.2 * torch.randn(rows, width, generator=g))


def prepared(kind: type, x_ND: Tensor) -> RqVae | RkMeans:
    """An untrained tokenizer of a kind, with codebooks in place."""
    tokenizer = build_tokenizer(kind(**SMALL), x_ND.shape[1])
    if isinstance(tokenizer, RqVae):
        tokenizer.draw_weights(torch.Generator().manual_seed(0))
        tokenizer.standardise(x_ND)
        tokenizer.fit_codebooks(x_ND, seed=0)
        tokenizer.fold_scale(x_ND)
    else:
        tokenizer.fit(x_ND, seed=0)
    return tokenizer


def test_the_union_has_the_kinds() -> None:
    assert set(typing.get_args(typing.get_args(TokenizerConfig)[0])) == {*KINDS, DvaeConfig}


EVERY = typing.get_args(typing.get_args(TokenizerConfig)[0])
QUICK = {"dvae": {"price": 5.0, "vocabulary": 16}}
"""What a kind needs beside its defaults for a short run."""


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_names_all_items_the_same_before_and_after_a_round_trip(kind, tiny, tmp_path) -> None:
    sizes = {"codebook_sizes": [8, 8]} if "codebook_sizes" in kind.model_fields else {}
    name = kind.model_fields["kind"].default
    stage = TokenizerStage(model=kind(**sizes, **QUICK.get(name, {})), loop=LoopConfig(epochs=2))
    checkpoint = train_tokenizer(tiny.embeddings, stage, split=tiny.split)
    config = SidConfig(suffix_size=200)
    table = assign(checkpoint, tiny.embeddings, config)
    assert table.num_items == tiny.catalog.num_items
    assert table.codebook_sizes == stage.model.codebook_sizes
    checkpoint.save(tmp_path / "tokenizer")
    loaded = TokenizerCheckpoint.load(tmp_path / "tokenizer")
    assert assign(loaded, tiny.embeddings, config).fingerprint == table.fingerprint
    errors = prefix_errors(load_tokenizer(loaded), tiny.embeddings.matrix, padded_codes(table))
    assert errors[:, 0].isfinite().all() and float(errors.nan_to_num().max()) <= 4
    with pytest.raises(ArtifactError, match="columns"):
        narrow = {"vectors": tiny.embeddings.matrix[:, :5].contiguous()}
        assign(checkpoint, replace(tiny.embeddings, vectors=narrow), config)


@pytest.mark.parametrize("kind", KINDS)
def test_the_common_surface(kind: type) -> None:
    x_ND = clusters()
    tokenizer = prepared(kind, x_ND)
    codes_NL = tokenizer.encode(x_ND)
    z_NZ = tokenizer.latents(x_ND).detach()
    assert tokenizer.codebook_sizes == [8, 4, 4]
    assert [tuple(codebook.shape) for codebook in tokenizer.codebooks] == [
        (k, z_NZ.shape[1]) for k in (8, 4, 4)
    ]
    assert codes_NL.shape == (120, 3) and codes_NL.dtype == torch.long and not codes_NL.requires_grad
    assert bool((codes_NL < torch.tensor([8, 4, 4])).all())
    assert float(z_NZ.square().mean().sqrt()) == pytest.approx(1, abs=1e-6)
    assert torch.equal(tokenizer.encode(x_ND.flip(0)), codes_NL.flip(0))
    error = (z_NZ - reconstruct(codes_NL, list(tokenizer.codebooks)).detach()).square().mean()
    assert float(error) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_term_reaches_what_it_should(kind: type) -> None:
    tokenizer = prepared(kind, clusters())
    reached = {}
    for name, value in tokenizer.losses(clusters()).items():
        assert value.ndim == 0 and torch.isfinite(value)
        tokenizer.zero_grad()
        value.backward(retain_graph=True)
        reached[name] = {
            part.split(".")[0]
            for part, weight in tokenizer.named_parameters()
            if weight.grad is not None and bool(weight.grad.any())
        }
    assert reached["codebook"] == {"codebooks"}
    if isinstance(tokenizer, RqVae):
        assert reached["reconstruction"] == {"encoder", "decoder"}
        assert reached["commitment"] == {"encoder"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_back_the_same_codes(kind: type) -> None:
    x_ND = clusters()
    tokenizer = prepared(kind, x_ND)
    checkpoint = checkpoint_of(tokenizer, embeddings="e", steps=3, metrics={"collision_rate": 0.5})
    codes_NL = tokenizer.encode(x_ND)
    with torch.no_grad():
        tokenizer.codebooks[0].zero_()
    assert torch.equal(load_tokenizer(checkpoint).encode(x_ND), codes_NL)
    assert not load_tokenizer(checkpoint).training


@pytest.mark.parametrize("kind", KINDS)
def test_loading_is_strict(kind: type) -> None:
    checkpoint = checkpoint_of(prepared(kind, clusters()), embeddings="e", steps=0, metrics={})
    without = {name: value for name, value in checkpoint.weights.items() if name != "codebooks.1"}
    with pytest.raises(ArtifactError, match=r"codebooks\.1 wanted \(4, \d+\), found None"):
        load_tokenizer(replace(checkpoint, weights=without))
    with pytest.raises(ArtifactError, match="stranger wanted None"):
        load_tokenizer(replace(checkpoint, weights={**checkpoint.weights, "stranger": torch.zeros(1)}))
    with pytest.raises(ArtifactError, match="disagree"):
        load_tokenizer(replace(checkpoint, input_dim=checkpoint.input_dim + 1))


def test_kmeans_is_deterministic_and_finds_planted_clusters() -> None:
    x_ND = clusters()
    centroids_KZ = kmeans(x_ND, 8, iterations=25, redos=1, seed=3)
    assert torch.equal(kmeans(x_ND, 8, iterations=25, redos=1, seed=3), centroids_KZ)
    assert not torch.equal(kmeans(x_ND, 8, iterations=25, redos=1, seed=4), centroids_KZ)
    nearest_N = torch.cdist(x_ND, centroids_KZ).argmin(1)
    assert len({(row % 8, int(code)) for row, code in enumerate(nearest_N)}) == 8


def test_more_redos_are_never_worse() -> None:
    x_ND = clusters(rows=200, width=4, seed=5)

    def error(redos: int) -> float:
        return float(
            torch.cdist(x_ND, kmeans(x_ND, 20, iterations=3, redos=redos, seed=0)).amin(1).square().sum()
        )

    assert error(6) <= error(1)


def test_fewer_items_than_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="codebook of 8 codes needs at least as many items, got 5"):
        residual_kmeans(clusters(rows=5), [8], 5, 1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_equal_text_do_not_stop_the_codebooks(kind: type) -> None:
    x_ND = clusters(rows=3).repeat(10, 1)
    tokenizer = prepared(kind, x_ND)
    codes_NL = tokenizer.encode(x_ND)
    assert len(torch.unique(codes_NL, dim=0)) == 3
    assert all(bool(torch.isfinite(codebook).all()) for codebook in tokenizer.codebooks)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_zeros_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="all content vectors are zero"):
        prepared(kind, torch.zeros(20, 4))


def test_folding_the_scale_keeps_codes_and_reconstruction() -> None:
    x_ND = clusters()
    tokenizer = RqVae(RqVaeConfig(**SMALL, hidden=[16], latent_dim=6), 10)
    tokenizer.draw_weights(torch.Generator().manual_seed(1))
    tokenizer.standardise(x_ND)
    tokenizer.fit_codebooks(x_ND, seed=0)
    with torch.no_grad():
        before_NL = tokenizer.encode(x_ND)
        rebuilt_ND = tokenizer.decoder(reconstruct(before_NL, list(tokenizer.codebooks)))
        assert abs(float(tokenizer.latents(x_ND).square().mean().sqrt()) - 1) > 0.05
        tokenizer.fold_scale(x_ND)
        assert float(tokenizer.latents(x_ND).square().mean().sqrt()) == pytest.approx(1, abs=1e-6)
        assert torch.equal(tokenizer.encode(x_ND), before_NL)
        again_ND = tokenizer.decoder(reconstruct(before_NL, list(tokenizer.codebooks)))
    assert torch.allclose(again_ND, rebuilt_ND, atol=1e-5)


def test_the_decoder_reads_the_sum_of_codewords() -> None:
    x_ND = clusters()
    tokenizer = prepared(RqVaeConfig, x_ND)
    assert isinstance(tokenizer, RqVae)
    with torch.no_grad():
        rebuilt_ND = tokenizer.decoder(reconstruct(tokenizer.encode(x_ND), list(tokenizer.codebooks)))
        error = (rebuilt_ND - x_ND * tokenizer.input_scale).square().mean()
    assert tokenizer.losses(x_ND)["reconstruction"].item() == pytest.approx(float(error), rel=1e-4)


def test_revival_moves_unused_codes_and_leaves_used_ones() -> None:
    x_ND = clusters()
    tokenizer = prepared(RqVaeConfig, x_ND)
    assert isinstance(tokenizer, RqVae)
    with torch.no_grad():
        tokenizer.codebooks[0][2:] = 1e4
    used_N = tokenizer.encode(x_ND)[:, 0].unique()
    kept = tokenizer.codebooks[0][used_N].clone()
    moved = tokenizer.revive(x_ND, torch.Generator().manual_seed(0))
    assert moved >= 8 - len(used_N) > 0
    assert torch.equal(tokenizer.codebooks[0][used_N], kept)
    assert len(tokenizer.encode(x_ND)[:, 0].unique()) > len(used_N)
    latents = {tuple(row.tolist()) for row in tokenizer.latents(x_ND).detach()}
    revived = set(range(8)) - set(used_N.tolist())
    assert all(tuple(tokenizer.codebooks[0][code].tolist()) in latents for code in revived)


def test_sinkhorn_balances_the_levels_it_is_asked_to() -> None:
    x_ND = clusters()
    tokenizer = prepared(RqVaeConfig, x_ND)
    assert isinstance(tokenizer, RqVae)
    with torch.no_grad():
        tokenizer.codebooks[0][1:] += 50  # nearest: everything on code 0
    residual_NZ = tokenizer.latents(x_ND)
    assert tokenizer._training_codes(residual_NZ, 0).unique().tolist() == [0]
    tokenizer.config = tokenizer.config.model_copy(
        update={"sinkhorn": SinkhornConfig(epsilon=0.05, levels=[1])}
    )
    assert len(tokenizer._training_codes(residual_NZ, 0).unique()) >= 6
    tokenizer.config = tokenizer.config.model_copy(update={"sinkhorn": SinkhornConfig(levels=[2])})
    assert tokenizer._training_codes(residual_NZ, 0).unique().tolist() == [0]


def test_collapsed_latents_are_refused_with_their_figure() -> None:
    x_ND = torch.ones(40, 10) + 1e-3 * clusters(rows=40)
    with pytest.raises(ValueError, match=r"mean cosine is (0\.999\d\d|1\.00000), above 0\.999"):
        prepared(RqVaeConfig, x_ND)


def test_mean_cosine_equals_the_mean_over_pairs() -> None:
    z_NZ = clusters(rows=15)
    unit = torch.nn.functional.normalize(z_NZ.double(), dim=1)
    pairs = (unit @ unit.T)[~torch.eye(15, dtype=torch.bool)]
    assert mean_cosine(z_NZ) == pytest.approx(float(pairs.mean()))


def test_faiss_missing_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r"sidflow\[cpu\] or sidflow\[gpu\]"):
        kmeans(clusters(), 4, 1, 1, 0)


def test_weights_count_a_row_as_often_as_it_is_met() -> None:
    x_NZ = clusters(60)
    weights = torch.ones(60)
    weights[:7] = 5
    repeated = torch.cat([x_NZ, *[x_NZ[:7]] * 4])
    centroids = kmeans(x_NZ, 4, 30, 8, 0, weights)

    def error(centroids_KZ: Tensor) -> float:
        return float(torch.cdist(repeated, centroids_KZ).amin(dim=1).square().sum())

    plain = kmeans(x_NZ, 4, 30, 8, 0)
    assert error(centroids) < error(plain)
    assert error(centroids) == pytest.approx(error(kmeans(repeated, 4, 30, 8, 0)), rel=0.02)


def test_rows_of_weight_zero_do_not_count_and_too_few_others_are_refused() -> None:
    x_NZ, weights = clusters(60), torch.zeros(60)
    weights[:10] = 1
    torch.testing.assert_close(kmeans(x_NZ, 4, 10, 1, 0, weights), kmeans(x_NZ[:10], 4, 10, 1, 0))
    with pytest.raises(ValueError, match="needs at least as many items, got 10"):
        kmeans(x_NZ, 11, 10, 1, 0, weights)


def test_interaction_weights_reach_the_codebooks(tiny) -> None:
    def fitted(weights: str):
        model = {"kind": "rkmeans", "codebook_sizes": [8, 8], "weights": weights}
        return train_tokenizer(
            tiny.embeddings, TokenizerStage.model_validate({"model": model}), split=tiny.split
        )

    items, interactions = (fitted(weights).weights["codebooks.0"] for weights in ("items", "interactions"))
    assert not torch.equal(items, interactions)
    with pytest.raises(ValueError, match="counts items by interactions"):
        model = RkMeansConfig(codebook_sizes=[8, 8], weights="interactions")
        train_tokenizer(tiny.embeddings, TokenizerStage(model=model))
