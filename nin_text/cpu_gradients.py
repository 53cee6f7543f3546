"""Layers of the rows layout (see `blocks.py`) with backward passes of their own, for a CPU.

What autograd derives spends much of its time on what is no product: matrices of zeros that the
gradient of a slice or of a sum is added to, copies, a scan of all ids by each thread. The
functions here compute the same gradients, but no gradients of those. Letters in shapes: see
`blocks.py`; V is the size of the vocabulary, M the number of tokens of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nin_text.products import in_autocast, linear, reach, taps

# Of the rows in the gradient of weights: eight products take up to a fifth less time than one on
# a processor with AVX-512, and no more with AMX.
SLICES = 8


def written_out(x: Tensor, *weights: Tensor) -> bool:
    """Whether a layer should take its backward pass from here: not where none is wanted, not on
    other devices, nor where operations are recorded, which must see those of torch."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))


def of_weights(dy: Tensor, x: Tensor) -> Tensor:
    """(N, C_out) and (N, C) to the gradient of weights (C_out, C)."""
    if len(x) % SLICES:
        return dy.t() @ x
    dy, x = (t.unflatten(0, (SLICES, -1)) for t in (dy, x))  # (S, N / S, C_out), (S, N / S, C)
    return torch.bmm(dy.transpose(1, 2), x).sum(dim=0)  # (C_out, C)


class RowConvolution(torch.autograd.Function):
    """`taps` of rows (N, C) times a mask (N, 1), or None, to (N, C_out).

    The backward pass of a slice, which autograd would take, fills a matrix with zeros for each tap.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, dilation: int
    ) -> Tensor:
        before, after = reach(weight, dilation)
        padded = x.new_empty(before + len(x) + after, x.shape[1])  # (N + reach, C)
        padded[:before] = 0
        padded[before + len(x) :] = 0
        inside = padded[before : before + len(x)]
        if mask is None:
            inside.copy_(x)
        else:
            torch.mul(x, mask, out=inside)
        ctx.save_for_backward(padded, mask, weight)
        ctx.dilation = dilation
        return taps(padded, weight, bias, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        padded, mask, weight = ctx.saved_tensors
        before, after = reach(weight, ctx.dilation)
        n = len(dy)
        starts = range(0, before + after + 1, ctx.dilation)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = padded.new_zeros(padded.shape)  # (N + reach, C)
            for tap, start in enumerate(starts):
                dx[start : start + n].addmm_(dy, weight[:, :, tap])
            dx = dx[before : before + n]  # (N, C)
            dx = dx if mask is None else dx * mask
        if ctx.needs_input_grad[2]:
            of_taps = [of_weights(dy, padded[start : start + n]) for start in starts]
            dweight = torch.stack(of_taps, dim=2)  # (C_out, C, taps)
        if ctx.needs_input_grad[3]:
            dbias = dy.sum(dim=0)  # (C_out,)
        return dx, None, dweight, dbias, None


class _RowLinear(torch.autograd.Function):
    """Rows (N, C) times weights (C_out, C), plus a bias (C_out,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None  # (N, C)
        dweight = of_weights(dy, x) if ctx.needs_input_grad[1] else None  # (C_out, C)
        dbias = dy.sum(dim=0) if ctx.needs_input_grad[2] else None  # (C_out,)
        return dx, dweight, dbias


class Linear(nn.Linear):
    """`nn.Linear`, whose gradient of the weights is summed over slices of the rows."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C_out)."""
        if x.dim() != 2 or not written_out(x, self.weight):
            return super().forward(x)
        x = in_autocast(x)
        return _RowLinear.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class _Lookup(torch.autograd.Function):
    """Rows of a table (V, E) of which ids (N,) tell the numbers."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding = table.shape, padding
        return table.index_select(0, ids)  # (N, E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        dtable = dy.new_zeros(ctx.shape).index_add_(0, ids, dy)  # (V, E)
        if ctx.padding is not None:
            dtable[ctx.padding] = 0
        return dtable, None, None


class Embedding(nn.Embedding):
    """`nn.Embedding`, whose gradient takes two thirds of the time."""

    def forward(self, ids: Tensor) -> Tensor:
        """(N,) or more dimensions to the same and (E,)."""
        if ids.dim() != 1 or not written_out(self.weight):
            return super().forward(ids)
        return _Lookup.apply(self.weight, ids, self.padding_idx)
