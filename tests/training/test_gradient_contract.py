"""The recommendation loss reaches every codebook, on each path alone, and on no path when all are detached."""

from typing import Any

import pytest
import torch

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
from components.tokenizers.rqvae import RqVaeConfig
from components.tokenizers.sids import SidConfig, assign
from components.tokenizers.sources import LiveSids, Paths
from components.training.loop import LoopConfig
from components.training.tokenizer import train_tokenizer
from components.training.tokenizer_stage import TokenizerStage

FLOOR = 1e-10
SIZE: dict[str, Any] = dict(dim=16, layers=1, heads=2, head_dim=8, hidden=32, dropout=0.0)
MODELS = [CausalConfig(**SIZE), TigerConfig(**SIZE)]
ALL = Paths(history=True, teacher_forcing=True, target=True)
NONE = Paths(history=False, teacher_forcing=False, target=False)
# Momentum 0: the shares are those of this batch, so that some codes are hot from the first step on.
KINDS = [
    NoNoiseConfig(),
    SteConfig(),
    GumbelConfig(),
    GumbelConfig(noise=3.0, tau=2.0),
    GumbelConfig(forward="sample"),
    SdudConfig(),
    FrqudConfig(momentum=0.0),
    FrqudConfig(momentum=0.0, scope="item"),
    SdudFrqudConfig(momentum=0.0),
]


def _loss(tiny, live: LiveSids, model) -> torch.Tensor:
    return _loss_and_assignment(tiny, live, model)[0]


def _loss_and_assignment(tiny, live: LiveSids, model) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    recommender = build_recommender(model, live.space)
    # Fresh tied tables are too small for their logits to tell codes apart; trained ones are not.
    recommender.symbols.weight.data.normal_(std=0.3)
    batch = pad(held_out_rows(tiny.split.valid), torch.arange(32).numpy())
    tokens, quantized = live.assign(batch.unique)
    return recommender.loss(batch, tokens).total, quantized.probabilities


def _norms(live: LiveSids) -> list[float | None]:
    return [None if book.grad is None else float(book.grad.norm()) for book in live.tokenizer.codebooks]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.kind)
@pytest.mark.parametrize("exploration", KINDS, ids=str)
@pytest.mark.parametrize("residual", ["sampled", "table"])
def test_recommendation_loss_alone_reaches_every_codebook(
    tiny, live_sids, model, exploration, residual
) -> None:
    live = live_sids(exploration, ALL, residual=residual)
    loss, assignment = _loss_and_assignment(tiny, live, model)
    for soft in assignment:
        soft.retain_grad()
    loss.backward()
    norms = [*_norms(live), *(float(soft.grad.norm()) for soft in assignment)]
    assert all(norm is not None and FLOOR < norm < float("inf") for norm in norms), norms


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.kind)
@pytest.mark.parametrize("exploration", KINDS, ids=str)
def test_all_paths_detached_send_nothing(tiny, live_sids, model, exploration) -> None:
    live = live_sids(exploration, NONE)
    _loss(tiny, live, model).backward()
    assert _norms(live) == [None, None, None]


@pytest.mark.parametrize(
    ("model", "paths"),
    [
        (MODELS[0], Paths(True, True, False)),
        (MODELS[0], Paths(False, False, True)),
        (MODELS[1], Paths(True, False, False)),
        # Known codes of the target: those of level 3 are read before the suffix is written.
        (MODELS[1], Paths(False, True, False)),
        (MODELS[1], Paths(False, False, True)),
    ],
    ids=["causal-input", "causal-target", "tiger-history", "tiger-forcing", "tiger-target"],
)
@pytest.mark.parametrize("exploration", KINDS, ids=str)
def test_each_path_alone_reaches_the_assignment(tiny, live_sids, model, paths, exploration) -> None:
    live = live_sids(exploration, paths)
    loss, assignment = _loss_and_assignment(tiny, live, model)
    for soft in assignment:
        soft.retain_grad()
    loss.backward()
    norms = [*_norms(live), *(float(soft.grad.norm()) for soft in assignment)]
    assert all(norm is not None and norm > FLOOR for norm in norms), norms


def test_causal_refuses_to_split_what_it_reads_in_one_token(tiny, live_sids) -> None:
    live = live_sids(GumbelConfig(), Paths(history=True, teacher_forcing=False))
    with pytest.raises(ValueError, match="history and as teacher forcing in one token"):
        _loss(tiny, live, MODELS[0])


def test_target_weight_scales_only_the_gradient_through_the_target(tiny, live_sids) -> None:
    gradients = []
    for weight in (1.0, 0.25):
        live = live_sids(GumbelConfig(), Paths(False, False, True, target_weight=weight))
        loss = _loss(tiny, live, MODELS[1])
        loss.backward()
        gradients.append((loss.item(), [book.grad for book in live.tokenizer.codebooks]))
    (full, full_grads), (quarter, quarter_grads) = gradients
    assert full == quarter
    for a, b in zip(full_grads, quarter_grads, strict=True):
        torch.testing.assert_close(0.25 * a, b)


@pytest.fixture(scope="module")
def trained_rqvae(tiny):
    stage = TokenizerStage(
        model=RqVaeConfig(codebook_sizes=[8, 8, 8], hidden=[32], latent_dim=8),
        loop=LoopConfig(epochs=30, validate_every=30),
        batch_size=40,
    )
    tokenizer = train_tokenizer(tiny.embeddings, stage)
    return tokenizer, assign(tokenizer, tiny.embeddings, SidConfig(suffix_size=64))


def test_on_trained_latents_the_gradient_is_not_a_trickle(tiny, live_sids, trained_rqvae) -> None:
    """A saturated assignment passes the floor and teaches nothing: compare with the tokenizer's own losses."""
    tokenizer, sids = trained_rqvae
    live = live_sids(GumbelConfig(), ALL, tokenizer=tokenizer, sids=sids)
    _loss(tiny, live, MODELS[0]).backward()
    from_recommender = _norms(live)
    live.zero_grad()
    _, quantized = live.assign(torch.arange(tiny.sids.num_items))
    sum(quantized.losses.values()).backward()
    from_tokenizer = _norms(live)
    assert all(a > 1e-4 * b for a, b in zip(from_recommender, from_tokenizer, strict=True)), (
        from_recommender,
        from_tokenizer,
    )


@pytest.mark.parametrize("train_encoder", [False, True])
def test_encoder_learns_only_when_asked(tiny, live_sids, trained_rqvae, train_encoder) -> None:
    tokenizer, sids = trained_rqvae
    live = live_sids(GumbelConfig(), ALL, tokenizer=tokenizer, sids=sids, train_encoder=train_encoder)
    _loss(tiny, live, MODELS[0]).backward()
    gradients = [p.grad for name, p in live.tokenizer.named_parameters() if name.startswith("encoder.")]
    assert all((g is not None and float(g.norm()) > FLOOR) == train_encoder for g in gradients)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.kind)
@pytest.mark.parametrize("exploration", KINDS, ids=str)
def test_soft_tokens_cost_what_their_hard_codes_cost(tiny, live_sids, model, exploration) -> None:
    """Gradient is all that a soft token adds: with the same codes, the loss is that of integers."""
    soft, hard = (_loss(tiny, live_sids(exploration, paths), model).item() for paths in (ALL, NONE))
    assert soft == pytest.approx(hard, rel=1e-5)
