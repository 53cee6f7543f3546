"""Products that oneDNN fuses with what follows: as exact as apart, or more so."""

import pytest
import torch
import torch.nn.functional as F

from nin_text import products


@pytest.mark.skipif(products.FUSED is None, reason="no fused bfloat16 products on this processor")
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("act", sorted(products.ACTIVATIONS))
def test_fused_products_are_rounded_once(
    act: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearer to the exact value than one after the other, whose first result is rounded, too."""
    x, weight, bias, other = (
        torch.randn(shape).to(torch.bfloat16) for shape in ((rows, 48), (32, 48), (32,), (rows, 32))
    )
    linear = F.linear(x.double(), weight.double(), bias.double())
    exact = products.ACTIVATIONS[act](linear)
    added = F.linear(x.double(), weight.double()) + other.double()
    step = torch.finfo(torch.bfloat16).eps / 2
    for found, expected in (
        (products.linear_act(x, products.prepacked(weight, rows), bias, act), exact),
        (products.linear(x, weight, bias), linear),
        (products.linear_add(x, products.prepacked(weight, rows), other), added),
    ):
        error = (found.double() - expected).abs()
        assert (error <= expected.abs() * step * 1.01 + 1e-5).all()
    monkeypatch.setattr(products, "FUSED", None)
    plain = products.linear_act(x, weight, bias, act)
    torch.testing.assert_close(plain.double(), exact, atol=0.1, rtol=0.02)
