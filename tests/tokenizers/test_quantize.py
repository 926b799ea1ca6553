"""Laws of residual quantisation, the straight-through sum and Sinkhorn balance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.tokenizers import quantize
from components.tokenizers.quantize import (
    balance,
    reconstruct,
    residual_codes,
    sinkhorn,
    sinkhorn_codes,
    squared_distances,
    straight_through,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_distances_equal_the_definition() -> None:
    x_NZ, codebook_KZ = normal(20, 5), normal(7, 5, seed=1)
    wanted_NK = (x_NZ[:, None] - codebook_KZ[None]).square().sum(-1)
    assert torch.allclose(squared_distances(x_NZ, codebook_KZ), wanted_NK, atol=1e-5)


def test_residual_codes_equal_a_loop_over_rows() -> None:
    z_NZ, codebooks = (
        normal(30, 4),
        [normal(5, 4, seed=1), 0.5 * normal(9, 4, seed=2), 0.2 * normal(3, 4, seed=3)],
    )
    codes_NL = residual_codes(z_NZ, codebooks)
    for z_Z, codes_L in zip(z_NZ, codes_NL, strict=True):
        residual_Z = z_Z
        for codebook_KZ, code in zip(codebooks, codes_L, strict=True):
            assert int(code) == int((codebook_KZ - residual_Z).norm(dim=1).argmin())
            residual_Z = residual_Z - codebook_KZ[code]
    error_NZ = z_NZ - reconstruct(codes_NL, codebooks)
    assert error_NZ.square().mean() < (z_NZ - reconstruct(codes_NL[:, :1], codebooks[:1])).square().mean()


def test_chunks_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    z_NZ, codebooks = normal(101, 8), [normal(16, 8, seed=1), normal(16, 8, seed=2)]
    whole = residual_codes(z_NZ, codebooks)
    monkeypatch.setattr(quantize, "CHUNK_ENTRIES", 160)
    assert torch.equal(residual_codes(z_NZ, codebooks), whole)


def test_straight_through_is_the_onehot_in_value_and_the_assignment_in_gradient() -> None:
    logits_NK = (5 * normal(40, 11)).requires_grad_()
    codes_N = torch.randint(11, (40,), generator=torch.Generator().manual_seed(1))
    weight_NK = normal(40, 11, seed=2)
    probabilities_NK = logits_NK.softmax(1)
    s_NK = straight_through(codes_N, probabilities_NK)
    assert torch.equal(s_NK.detach(), torch.nn.functional.one_hot(codes_N, 11).float())
    to_probabilities, to_logits = torch.autograd.grad((s_NK * weight_NK).sum(), [probabilities_NK, logits_NK])
    assert torch.equal(to_probabilities, weight_NK)
    closed = probabilities_NK * (weight_NK - (probabilities_NK * weight_NK).sum(1, keepdim=True))
    assert torch.allclose(to_logits, closed, atol=1e-6)


def test_codebook_gradient_of_the_soft_assignment_has_its_closed_form() -> None:
    residual_NZ, codebook_KZ = normal(6, 3), normal(4, 3, seed=1).requires_grad_()
    weight_NK, tau, scale = normal(6, 4, seed=2), 2.0, 1.5
    p_NK = (-squared_distances(residual_NZ, codebook_KZ) / (scale * tau)).softmax(1)
    (gradient_KZ,) = torch.autograd.grad(
        (straight_through(p_NK.argmax(1), p_NK) * weight_NK).sum(), codebook_KZ
    )
    pull_NK = (p_NK * (weight_NK - (p_NK * weight_NK).sum(1, keepdim=True))).detach()
    towards_NKZ = residual_NZ[:, None] - codebook_KZ.detach()[None]
    closed_KZ = 2 / (scale * tau) * (pull_NK[..., None] * towards_NKZ).sum(0)
    assert torch.allclose(gradient_KZ, closed_KZ, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(2, 60),
    columns=st.integers(2, 12),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1, 1e4]),
)
def test_sinkhorn_balances_columns_at_any_scale(rows: int, columns: int, seed: int, scale: float) -> None:
    distances_NK = scale * normal(rows, columns, seed=seed).square()
    plan_NK = balance(distances_NK, epsilon=0.003, iterations=50).exp()
    assert bool(torch.isfinite(plan_NK).all())
    assert torch.allclose(plan_NK.sum(0), torch.full((columns,), rows / columns, dtype=torch.float64))


def test_sinkhorn_rows_settle_and_follow_the_distances() -> None:
    distances_NK = normal(64, 8).square()
    plan_NK = balance(distances_NK, epsilon=0.5, iterations=200).exp()
    assert torch.allclose(plan_NK.sum(1), torch.ones(64, dtype=torch.float64), atol=1e-6)
    balanced = torch.eye(8).repeat(4, 1)
    assert torch.equal(sinkhorn(1 - balanced, 0.003, 50), balanced.argmax(1))


def test_sinkhorn_survives_the_published_epsilon_at_both_ends() -> None:
    distances_NK = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    codes_N = sinkhorn(distances_NK, epsilon=0.003, iterations=50)
    assert codes_N.tolist() == [0, 1, 0, 1]


def test_sinkhorn_uses_codes_that_nearest_leaves_alone() -> None:
    z_NZ = normal(200, 4) + 3
    codebooks = [normal(16, 4, seed=1), 0.3 * normal(16, 4, seed=2)]
    nearest, balanced = residual_codes(z_NZ, codebooks), sinkhorn_codes(z_NZ, codebooks, 0.003, 50)
    for level in range(2):
        counts_K = torch.bincount(balanced[:, level], minlength=16)
        assert counts_K.max() < torch.bincount(nearest[:, level], minlength=16).max()
        assert counts_K.max() <= 2 * 200 / 16
    second = sinkhorn(squared_distances(z_NZ - codebooks[0][balanced[:, 0]], codebooks[1]), 0.003, 50)
    assert torch.equal(balanced[:, 1], second)


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.0, 50), (-1.0, 50), (0.1, 0)])
def test_sinkhorn_refuses_settings_without_meaning(epsilon: float, iterations: int) -> None:
    with pytest.raises(ValueError, match="epsilon > 0 and iterations >= 1"):
        sinkhorn(normal(4, 2), epsilon, iterations)
