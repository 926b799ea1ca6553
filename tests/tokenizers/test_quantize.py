"""Laws of residual quantisation, the straight-through sum and Sinkhorn balance."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


def log_plan(distances_NK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Log of the plan that the potentials of ``balance`` stand for."""
    row_N, column_K, sharpness = balance(distances_NK, epsilon, iterations)
    return row_N[:, None] + column_K - sharpness * distances_NK.double()


def scaled_whole(d_NK: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sinkhorn by the book: log of the plan, row and column potentials, from whole float64 matrices."""
    d_NK = d_NK.double()
    log_k_NK = -d_NK / ((d_NK.max() - d_NK.min()) / 2 + 1e-5) / epsilon
    row_N1, column_K = torch.zeros_like(d_NK[:, :1]), torch.zeros_like(d_NK[0])
    for _ in range(iterations):
        row_N1 = -(log_k_NK + column_K).logsumexp(1, keepdim=True)
        column_K = math.log(d_NK.shape[0] / d_NK.shape[1]) - (log_k_NK + row_N1).logsumexp(0)
    return log_k_NK + row_N1 + column_K, row_N1[:, 0], column_K


class LargestTensor(TorchDispatchMode):
    """Counts the entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


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
    plan_NK = log_plan(distances_NK, epsilon=0.003, iterations=50).exp()
    assert bool(torch.isfinite(plan_NK).all())
    assert torch.allclose(plan_NK.sum(0), torch.full((columns,), rows / columns, dtype=torch.float64))


def test_sinkhorn_rows_settle_and_follow_the_distances() -> None:
    distances_NK = normal(64, 8).square()
    plan_NK = log_plan(distances_NK, epsilon=0.5, iterations=200).exp()
    assert torch.allclose(plan_NK.sum(1), torch.ones(64, dtype=torch.float64), atol=1e-6)
    balanced = torch.eye(8).repeat(4, 1)
    assert torch.equal(sinkhorn(1 - balanced, 0.003, 50), balanced.argmax(1))


def test_sinkhorn_survives_the_published_epsilon_at_both_ends() -> None:
    distances_NK = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    codes_N = sinkhorn(distances_NK, epsilon=0.003, iterations=50)
    assert codes_N.tolist() == [0, 1, 0, 1]
    assert bool(torch.isfinite(log_plan(distances_NK, epsilon=0.003, iterations=50)).all())


@pytest.mark.parametrize("entries", [1, 30, 100, 1 << 16])
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.003, 1), (0.003, 50), (0.5, 2), (1e-4, 50)])
def test_blocks_do_not_change_the_balance(
    entries: int, epsilon: float, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances_NK = normal(101, 13).square()
    wanted_NK, row_N, column_K = scaled_whole(distances_NK, epsilon, iterations)
    monkeypatch.setattr(quantize, "BLOCK_ENTRIES", entries)
    found = balance(distances_NK, epsilon, iterations)
    assert torch.allclose(found.row_N, row_N, rtol=1e-9, atol=1e-9)
    assert torch.allclose(found.column_K, column_K, rtol=1e-9, atol=1e-9)
    assert torch.equal(sinkhorn(distances_NK, epsilon, iterations), wanted_NK.argmax(1))


def test_sinkhorn_serves_a_code_that_is_far_from_every_row() -> None:
    distances_NK = torch.cat([0.1 * normal(60, 5).square(), 10 + normal(60, 1)], dim=1)
    plan_NK = log_plan(distances_NK, epsilon=1e-4, iterations=50).exp()
    assert torch.allclose(plan_NK.sum(0), torch.full((6,), 10.0, dtype=torch.float64))


def test_sinkhorn_makes_no_tensor_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    distances_NK = normal(200, 16).square()
    monkeypatch.setattr(quantize, "BLOCK_ENTRIES", 20 * 16)
    with LargestTensor() as largest:
        sinkhorn(distances_NK, 0.003, 3)
    assert largest.entries == 20 * 16


@pytest.mark.parametrize("entries", [50, 1 << 16])
def test_sinkhorn_codes_equal_whole_levels_on_the_residual(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    z_NZ = normal(150, 6).double()
    codebooks = [normal(size, 6, seed=size).double() for size in (8, 12, 5)]
    monkeypatch.setattr(quantize, "BLOCK_ENTRIES", entries)
    residual_NZ, levels = z_NZ, sinkhorn_codes(z_NZ, codebooks, 0.003, 50).unbind(1)
    for codebook_KZ, codes_N in zip(codebooks, levels, strict=True):
        distances_NK = (residual_NZ[:, None] - codebook_KZ).square().sum(-1)
        assert torch.equal(codes_N, scaled_whole(distances_NK, 0.003, 50)[0].argmax(1))
        residual_NZ = residual_NZ - codebook_KZ[codes_N]


@pytest.mark.gpu
def test_sinkhorn_gives_the_same_codes_on_a_gpu() -> None:
    distances_NK = normal(3000, 32).square().double()
    codes_N = sinkhorn(distances_NK.cuda(), 0.003, 50)
    assert codes_N.is_cuda
    assert torch.equal(codes_N.cpu(), sinkhorn(distances_NK, 0.003, 50))


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
