"""Linear maps and convolutions of rows, and what follows on each, as fast as they can be had.

On a CPU that multiplies bfloat16 these are products of oneDNN that add the bias, or apply the
activation, on their way to memory. Letters in shapes: n or N rows, C and D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def _fused_product() -> Any:
    """oneDNN's linear map that does what follows on its way to memory, for bfloat16 on a CPU.

    It is what torch.compile makes of both, and may go with another version of torch.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return product if torch.backends.mkldnn.is_available() and supported and supported() else None


FUSED = _fused_product()


def _is_fused(x: Tensor) -> bool:
    return FUSED is not None and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def prepacked(weight: Tensor, rows: int) -> Tensor:
    """A weight (C, D) in the order that oneDNN brings it into on every call of a product else.

    Args:
        rows: of most of the products that it is for.
    """
    reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    return reorder(weight, rows) if reorder and _is_fused(weight) else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(n, D) to (n, C): a linear map, whose weight must lie in memory row after row."""
    return FUSED(x, weight, bias, "none", [], "") if _is_fused(x) else F.linear(x, weight, bias)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """(n, D) to (n, C): a linear map and the activation of that name."""
    if _is_fused(x):
        name = "swish" if act == "silu" else act
        return FUSED(x, weight, bias, name, [], "none")
    return ACTIVATIONS[act](F.linear(x, weight, bias))


def linear_add(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """(n, D) to (n, C): a linear map without bias, and something to add to it."""
    if _is_fused(x):
        return FUSED.binary(x, other, weight, None, "add")
    return torch.addmm(other, x, weight.t())


def in_autocast(x: Tensor) -> Tensor:
    """x in the type that autocast, if it is on, would convert the inputs of a product to."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def reach(weight: Tensor, dilation: int) -> tuple[int, int]:
    """Rows before and after a row that its output depends on."""
    both = dilation * (weight.shape[2] - 1)
    return both // 2, both - both // 2


def taps(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """(N + reach, C) to (N, C_out): the sum of one matrix product for each tap of (C_out, C, taps).

    They are taken on shifted views of the same memory: nothing is transposed, copied or unfolded.
    """
    n = len(x) - sum(reach(weight, dilation))
    y = torch.addmm(bias, x[:n], weight[:, :, 0].t())  # (N, C_out)
    for tap in range(1, weight.shape[2]):
        start = tap * dilation
        y.addmm_(x[start : start + n], weight[:, :, tap].t())
    return y
