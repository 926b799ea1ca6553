"""The HSTU stack against itself with one position changed, and against a loop over positions."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from components.recommenders.backbones import StackConfig
from components.recommenders.hstu import HstuLayer, HstuStack

BATCH, LENGTH, DIM, HEADS, HEAD_DIM = 3, 40, 12, 2, 5


@pytest.fixture
def stack() -> HstuStack:
    """Weights so large that every part shows in the result."""
    torch.manual_seed(0)
    config = StackConfig(dim=DIM, layers=2, heads=HEADS, head_dim=HEAD_DIM, hidden=1, dropout=0.5)
    stack = HstuStack(config).eval()
    with torch.no_grad():
        for weight in stack.parameters():
            weight.normal_(std=0.7)
    return stack


def sequences(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1))


def bucket(distance: int) -> int:
    """T5's 32 buckets: 16 exact distances, then logarithms up to 128."""
    if distance < 16:
        return distance
    return min(16 + int(math.log(distance / 16) / math.log(128 / 16) * 16), 31)


def rms_norm(x_D: Tensor, weight_D: Tensor) -> Tensor:
    return x_D / (x_D.square().mean() + 1e-6).sqrt() * weight_D


def naive_layer(layer: HstuLayer, x_ND: Tensor) -> Tensor:
    """One row, position after position, head after head, in the words of the specification."""
    inner = HEADS * HEAD_DIM
    parts = [layer.up.weight @ rms_norm(x_D, layer.norm.weight) for x_D in x_ND]
    out = []
    for n, x_D in enumerate(x_ND):
        gated = torch.zeros(inner, dtype=x_ND.dtype)
        for head in range(HEADS):
            u, v, q, k = (
                slice(part * inner + head * HEAD_DIM, part * inner + (head + 1) * HEAD_DIM)
                for part in range(4)
            )
            weights = [
                F.softplus(
                    parts[n][q] @ parts[m][k] / math.sqrt(HEAD_DIM)
                    + layer.bias.table.weight[bucket(n - m), head]
                )
                for m in range(n + 1)
            ]
            attended = sum(w * parts[m][v] for m, w in enumerate(weights)) / sum(weights)
            gate = parts[n][u] * torch.sigmoid(parts[n][u])
            gated[head * HEAD_DIM : (head + 1) * HEAD_DIM] = attended * gate
        out.append(x_D + layer.down.weight @ gated)
    return torch.stack(out)


@torch.no_grad()
def test_hidden_states_are_those_of_a_loop_over_positions(stack: HstuStack) -> None:
    x_BND = sequences(batch=2)
    found = stack(x_BND)
    stack.double()
    for row, x_ND in enumerate(x_BND.double()):
        for layer in stack.layers:
            x_ND = naive_layer(layer, x_ND)
        expected = torch.stack([rms_norm(x_D, stack.norm.weight) for x_D in x_ND])
        torch.testing.assert_close(found[row].double(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 7, LENGTH - 1])
def test_a_change_reaches_its_own_position_and_later_ones_alone(stack: HstuStack, place: int) -> None:
    x_BND = sequences()
    changed = x_BND.clone()
    changed[:, place] += 1
    differs = (stack(x_BND) != stack(changed)).any(dim=-1)
    assert not bool(differs[:, :place].any())
    assert bool(differs[:, place:].all())


@torch.no_grad()
def test_padding_on_the_right_leaves_a_row_as_it_is(stack: HstuStack) -> None:
    x_BND = sequences()
    for length in (1, 5, 20):
        alone = stack(x_BND[:1, :length])
        torch.testing.assert_close(stack(x_BND)[:1, :length], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [1.0, 300.0], ids=["ordinary scores", "scores at which softplus is 0"])
def test_weights_sum_to_one_so_that_a_constant_value_passes_unchanged(stack: HstuStack, size: float) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = (size * torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, generator=generator) for _ in range(2))
    k[0] = -q[0]  # every score of a first position is far below 0
    weights = stack.layers[0].weights(q, k)
    assert bool((weights >= 0).all()) and not bool(weights.triu(1).any())
    constant = torch.tensor([1.0, -2.0, 0.5, 3.0, 7.0]).expand(BATCH, HEADS, LENGTH, HEAD_DIM)
    torch.testing.assert_close(weights @ constant, constant, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter(stack: HstuStack) -> None:
    hidden = stack(sequences(length=200))  # so long that every bucket of distances occurs
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    for name, weight in stack.named_parameters():
        assert weight.grad is not None and bool((weight.grad != 0).all()), name


def test_dropout_is_drawn_in_training_alone(stack: HstuStack) -> None:
    x_BND = sequences()
    assert torch.equal(stack(x_BND), stack(x_BND))
    stack.train()
    assert not torch.equal(stack(x_BND), stack(x_BND))
