"""Backward passes written out for a CPU give what autograd makes of torch's own operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nin_text.blocks import Rows
from nin_text.cpu_gradients import Embedding, Linear
from nin_text.text import _Pooling, pool_rows


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of the sum of squares, so that every element of the output has another gradient."""
    return list(torch.autograd.grad(output.double().square().sum(), inputs))


@pytest.mark.parametrize("rows", [1, 7, 8, 48])
@pytest.mark.parametrize("sizes", [(5, 3), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_map_of_rows(rows: int, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    theirs, ours = nn.Linear(*sizes, dtype=dtype), Linear(*sizes, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(rows, sizes[0], dtype=dtype, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x))
    expected = gradients(theirs(x), x, *theirs.parameters())
    torch.testing.assert_close(gradients(ours(x), x, *ours.parameters()), expected)


@pytest.mark.parametrize("rows", [7, 48])
def test_a_linear_map_in_autocast_is_bfloat16_and_its_gradients_are_near(rows: int) -> None:
    layer, x = Linear(64, 32), torch.randn(rows, 64, requires_grad=True)
    expected = gradients(layer(x), x, *layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    for found, exact in zip(gradients(y, x, *layer.parameters()), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 0.02 * exact.norm()


def test_only_the_gradients_that_are_wanted() -> None:
    layer, x = Linear(5, 3).requires_grad_(False), torch.randn(8, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert not Linear(5, 3).requires_grad_(False)(torch.randn(8, 5)).requires_grad


@pytest.mark.parametrize("padding", [None, 0, 3])
@pytest.mark.parametrize("shape", [(40,), (8, 5), (0,)])
def test_a_table_of_embeddings(shape: tuple[int, ...], padding: int | None) -> None:
    theirs = nn.Embedding(10, 4, padding_idx=padding)
    ours = Embedding(10, 4, padding_idx=padding)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 9, shape)
    assert torch.equal(ours(ids), theirs(ids))
    (expected,) = gradients(theirs(ids), theirs.weight)
    (found,) = gradients(ours(ids), ours.weight)
    torch.testing.assert_close(found, expected)
    assert not found[9].any()
    assert padding is None or not found[padding].any()


@pytest.mark.parametrize("wanted", ["weights", "pooled", "both"])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_pooling(stride: int, attention: bool, wanted: str) -> None:
    """Texts of any length, one without tokens among them, in layers with and without pooling."""
    lengths = torch.tensor([7, 1, 0, 12, 5])
    mask = torch.arange(14) < lengths[:, None]
    mask[3:] = mask[3:].flip(1)  # padding on the left
    layout = Rows.from_attention_mask(mask, gap=stride, stride=stride)
    x = torch.randn(len(layout.mask) // stride, 6, requires_grad=True)
    scorer = torch.randn(6, requires_grad=True) if attention else None
    inputs = [x, scorer] if scorer is not None else [x]
    factor = torch.randn(5, 14)

    def answer(outputs: tuple[Tensor, Tensor]) -> Tensor:
        weights, pooled = outputs
        parts = {"weights": (weights * factor)[mask], "pooled": pooled.flatten()}
        if not attention and wanted != "pooled":  # the weights of a mean depend on nothing
            return parts["pooled"]
        return torch.cat([part for name, part in parts.items() if wanted in (name, "both")])

    given, defined = _Pooling.apply(x, scorer, layout, stride), pool_rows(x, scorer, layout, stride)
    for found, expected in zip(given, defined, strict=True):
        assert torch.equal(found, expected)
    expected = gradients(answer(defined), *inputs)
    assert all(gradient.any() for gradient in expected)
    torch.testing.assert_close(gradients(answer(given), *inputs), expected, atol=1e-5, rtol=1e-4)
