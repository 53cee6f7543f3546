"""The Network in Network block (mlpconv), one definition for text and for images.

Lin, Chen & Yan, "Network In Network", 2013 (arXiv 1312.4400). An mlpconv layer is a spatial
convolution followed by 1x1 convolutions, each with its activation: a small multilayer perceptron
slid over the input (section 3.1). The classifier ends in global average pooling of one map per
class instead of fully connected layers (section 3.2).

Everything is channels-last, so a 1x1 convolution is `nn.Linear` and only the spatial convolution
knows how many dimensions there are. Three layouts are accepted:

    (N, C)        rows: texts laid end to end with separator rows between them (see `Rows`)
    (B, T, C)     padded texts
    (B, H, W, C)  images

The rows layout is what the text models run on: no arithmetic is spent on padding and every layer
is a few large matrix products. The other two call `nn.Conv1d` / `nn.Conv2d`, the definition that
the rows layout is tested against.

Letters in shapes: B texts or images, T tokens, N rows, C channels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin_text.cpu_gradients import Linear, RowConvolution, written_out
from nin_text.products import in_autocast, reach, taps

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "hardswish": nn.Hardswish}


@dataclass(frozen=True)
class Rows:
    """Where each token of a padded batch lies in the rows layout.

    Texts are laid end to end, left and right padding removed, with at least `gap` rows of zeros
    after each, so that no convolution or pooling window reaches from one text into the next.
    Every text starts at a multiple of `stride`; pooling windows then fall on the same tokens
    wherever a text lies in the batch, and a pooled layer keeps every second row of the mask.

    Attributes:
        index: (B, T) int64, the row of each token; padding positions hold 0.
        token_mask: (B, T) bool, true where there is a token.
        tokens: (M,) int64, where it is true in the flattened batch. Found once: a GPU would have
            to be waited for whenever a mask is an index.
        mask: (N, 1) bool, true in the rows that hold a token.
        text: (N,) int64, the text that each row belongs to, separators included.
    """

    index: Tensor
    token_mask: Tensor
    tokens: Tensor
    mask: Tensor
    text: Tensor

    @classmethod
    def from_attention_mask(cls, attention_mask: Tensor, gap: int, stride: int = 1) -> Rows:
        """Lay out a batch from its (B, T) attention mask; padding may be on either side."""
        token_mask = attention_mask.bool()
        lengths = token_mask.sum(dim=1)  # (B,)
        spans = (lengths + gap + stride - 1) // stride * stride  # (B,), never 0: gap >= 1
        ends = spans.cumsum(0)
        rank = token_mask.cumsum(1) - 1  # (B, T), the place of each token in its own text
        index = ((ends - spans)[:, None] + rank).masked_fill(~token_mask, 0)
        # Few different sizes: batch after batch then fits into the memory that the last one freed.
        needed = int(ends[-1])
        granule = max(stride, 1 << max(0, needed.bit_length() - 6))  # adds 3 % at most
        total = -(-needed // granule) * granule
        spans[-1] += total - needed
        tokens = token_mask.flatten().nonzero()[:, 0]
        mask = torch.zeros(total, 1, dtype=torch.bool, device=token_mask.device)
        mask[index.flatten()[tokens]] = True
        text = torch.arange(len(spans), device=spans.device).repeat_interleave(
            spans, output_size=total
        )
        return cls(index, token_mask, tokens, mask, text)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Rows(**{n: t.to(device, non_blocking=non_blocking) for n, t in tensors.items()})

    def token_rows(self, stride: int = 1) -> Tensor:
        """(M,) the row of each token, of those that are left by pooling if `stride` > 1."""
        rows = self.index.flatten()[self.tokens]
        return rows if stride == 1 else rows // stride

    def pack(self, padded: Tensor, fill: int = 0) -> Tensor:
        """(B, T) token values to (N,) rows; separators hold `fill`."""
        rows = padded.new_full((self.mask.shape[0],), fill)
        rows[self.token_rows()] = padded.flatten()[self.tokens]
        return rows

    def unpack(self, rows: Tensor, stride: int = 1) -> Tensor:
        """(N / stride, C) rows to (B, T, C), zeros at padding.

        With `stride` > 1 the tokens that one pooled row stands for all receive its value.
        """
        padded = rows.index_select(0, (self.index // stride).flatten())  # (B * T, C)
        padded = padded.view(*self.index.shape, rows.shape[-1])  # (B, T, C)
        return padded.masked_fill(~self.token_mask[..., None], 0)


def convolve(conv: nn.Conv1d | nn.Conv2d, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Apply a convolution, padded as by `SpatialConv`, to channels-last input.

    Args:
        conv: the weights and the geometry; the rows layout needs stride 1.
        x: (N, C) rows, (B, T, C) or (B, H, W, C).
        mask: broadcastable to x, true or 1 where there is input; everywhere else the convolution
            sees zeros. None for images and for rows that are zero already.

    Returns:
        The same layout with `conv.out_channels` channels; height and width (or T) are divided by
        the stride and rounded up. Of rows on a CPU there are gradients of x and the weights, but
        no gradients of these gradients.
    """
    if x.dim() > 2:
        x = x if mask is None else x * mask
        return conv(x.movedim(-1, 1)).movedim(1, -1)
    x = in_autocast(x)
    assert conv.bias is not None
    weight, bias = conv.weight.to(x.dtype), conv.bias.to(x.dtype)  # (C_out, C, taps), (C_out,)
    if written_out(x, weight):
        return cast(Tensor, RowConvolution.apply(x, mask, weight, bias, conv.dilation[0]))
    x = x if mask is None else x * mask
    before, after = reach(weight, conv.dilation[0])
    return taps(F.pad(x, (0, 0, before, after)), weight, bias, conv.dilation[0])


def max_pool_rows(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Max pooling of width 3 and stride 2 over rows, window j centred on row 2j.

    Args:
        x: (N, C), N even, texts starting at even rows with at least one separator between them.
        mask: (N, 1), true where there is a token. Rows without one never win the maximum.

    Returns:
        (N / 2, C) with zeros outside the texts, and its mask (N / 2, 1): a text of L tokens
        keeps ceil(L / 2) of them, as `nn.MaxPool1d(3, 2, padding=1)` does.
    """
    x = x.masked_fill(~mask, -torch.inf)
    even, odd = x[0::2], x[1::2]  # (N / 2, C) each
    before = F.pad(odd[:-1], (0, 0, 1, 0), value=-torch.inf)
    pooled_mask = mask[0::2]
    pooled = torch.maximum(torch.maximum(before, even), odd)
    return pooled.masked_fill(~pooled_mask, 0), pooled_mask


class Dropout(nn.Module):
    """Element-wise dropout whose random numbers cost little on a CPU.

    `nn.Dropout` draws one random float for each element, which on a CPU takes longer than the
    convolution it follows. Here each 64-bit draw decides eight elements, so p is rounded to a
    multiple of 1 / 256. The draws, of a seed from torch's generator, and the comparison are
    NumPy's, which take a sixth of the time of torch's. On other devices, and where it is compiled,
    this is `F.dropout`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        threshold = round(self.p * 256)
        if not self.training or threshold == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        return x * _factors(x, threshold)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _factors(x: Tensor, threshold: int) -> Tensor:
    """Random factors for `Dropout` of x, of its shape and type: zero, or what keeps the mean."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    draws = np.random.SFC64(seed).random_raw((x.numel() + 7) // 8).view(np.uint8)[: x.numel()]
    factor = torch.tensor([256 / (256 - threshold)], dtype=x.dtype)
    # NumPy knows no bfloat16, but its bits as an integer, which are multiplied by zero or one.
    bits = factor.view(torch.uint8).numpy().view(f"u{x.element_size()}")  # (1,)
    return torch.from_numpy((draws >= threshold) * bits).view(x.dtype).view(x.shape)


class SpatialConv(nn.Module):
    """The spatial convolution of an mlpconv block: one width, or several in parallel.

    With several widths (inception, Szegedy et al. 2014, arXiv 1409.4842) each branch first reduces
    the channels with a 1x1 convolution and its activation; the branches share `out_channels` and
    are concatenated.

    Args:
        in_channels, out_channels: channels before and after.
        kernel_sizes: one width, or two and more for inception.
        dims: 1 for text, 2 for images.
        dilation: distance between neighbouring taps.
        stride: distance between neighbouring outputs; above 1, kernel sizes must be odd.
        activation: after the 1x1 reductions of inception.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int],
        *,
        dims: int = 1,
        dilation: int = 1,
        stride: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if stride > 1 and any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"with a stride above 1 kernel sizes must be odd, not {kernel_sizes}")
        conv_type = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        branches = len(kernel_sizes)
        share, rest = divmod(out_channels, branches)
        widths = [share + (i < rest) for i in range(branches)]
        if branches == 1:
            self.reductions = None
            inputs = [in_channels]
        else:
            inputs = widths
            self.reductions = nn.ModuleList(Linear(in_channels, width) for width in widths)
            self.act = ACTIVATIONS[activation]()
        self.convs = nn.ModuleList(
            conv_type(
                i,
                o,
                k,
                stride=stride,
                padding="same" if stride == 1 else dilation * (k // 2),
                dilation=dilation,
            )
            for i, o, k in zip(inputs, widths, kernel_sizes, strict=True)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., in_channels) to (..., out_channels); see `convolve` for the layouts."""
        convs = cast(Sequence[nn.Conv1d | nn.Conv2d], self.convs)
        if self.reductions is None:
            return convolve(convs[0], x, mask)
        return torch.cat(
            [
                convolve(conv, self.act(reduce(x)), mask)
                for reduce, conv in zip(self.reductions, convs, strict=True)
            ],
            dim=-1,
        )


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization (Ioffe & Szegedy 2015, arXiv 1502.03167) of channels-last input."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        return super().forward(x.flatten(0, -2)).view(x.shape)


NORMS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "layer": nn.LayerNorm,
    "batch": BatchNorm,
}


class MLPConv(nn.Module):
    """A spatial convolution, then any number of 1x1 convolutions, each with its activation.

    Args:
        in_channels: channels of the input.
        channels: output channels of the spatial convolution, then of each 1x1 convolution.
        kernel_sizes: width of the spatial convolution; several make it an inception block.
        dims: 1 for text, 2 for images.
        dilation, stride: of the spatial convolution.
        activation: "relu", "gelu", "silu" or "hardswish".
        norm: what normalizes the input: "layer" (over the channels of each position), "batch" (over
            the positions of a batch, each channel by itself; images only, since padding would
            count), or "none".
        residual: add the input to the output. The last 1x1 convolution then has no activation,
            so that the sum may move in either direction (He et al. 2016, arXiv 1603.05027).
        initial_scale: factor on the first weights of the last convolution.
        dropout: probability of zeroing an element of the block's output, before the sum.

    Raises:
        ValueError: if `residual` is asked for and input and output differ in size, and for batch
            normalization of texts.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        kernel_sizes: Sequence[int] = (3,),
        *,
        dims: int = 1,
        dilation: int = 1,
        stride: int = 1,
        activation: str = "relu",
        norm: str = "none",
        residual: bool = False,
        initial_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if residual and channels[-1] != in_channels:
            raise ValueError(
                f"a residual block must end with as many channels as it begins with, "
                f"not {in_channels} and {channels[-1]}"
            )
        if residual and stride > 1:
            raise ValueError(f"a residual block must have stride 1, not {stride}")
        self.residual = residual
        if norm == "batch" and dims == 1:
            raise ValueError("batch normalization is for images: padding of texts would count")
        self.norm = NORMS[norm](in_channels)
        self.spatial = SpatialConv(
            in_channels,
            channels[0],
            kernel_sizes,
            dims=dims,
            dilation=dilation,
            stride=stride,
            activation=activation,
        )
        self.pointwise = nn.ModuleList(Linear(i, o) for i, o in pairwise(channels))
        for layer in self.pointwise[-1:] if self.pointwise else self.spatial.convs:
            layer.initial_scale = initial_scale  # type: ignore[assignment]
        self.act = ACTIVATIONS[activation]()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., in_channels) to (..., channels[-1]).

        Positions outside `mask` hold arbitrary values on return: the next convolution and the
        pooling mask them.
        """
        y = self.spatial(self.norm(x), mask)  # (..., channels[0])
        for linear in self.pointwise:
            y = linear(self.act(y))
        if not self.residual:
            return self.dropout(self.act(y))  # (..., channels[-1])
        return x + self.dropout(y)


def pooling_weights(mask: Tensor, scores: Tensor | None = None) -> Tensor:
    """The weight of each token in the pooled sum; the weights of a text sum to one.

    Args:
        mask: (B, T) bool, true where there is a token.
        scores: (B, T) attention scores; None for the mean (global average pooling).

    Returns:
        (B, T) float32, zero at padding. A text without tokens has all weights zero.
    """
    if scores is None:
        scores = torch.zeros(mask.shape, device=mask.device)
    # Finite fill: a text without tokens would otherwise turn softmax, and its gradient, into NaN.
    scores = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min)
    return scores.softmax(dim=1) * mask


def pool_image(x: Tensor, kind: str) -> Tensor:
    """3x3 pooling of stride 2 over (B, H, W, C), incomplete windows at the far edges included.

    Args:
        x: height and width of at least 1.
        kind: "max" or "average" (of the pixels that there are).

    Returns:
        (B, H', W', C), where H' is `pooled_size(H)`.
    """
    planes = x.movedim(-1, 1)  # (B, C, H, W)
    # A window no larger than the image, so that one of a single pixel can be pooled, too.
    window = (min(3, planes.shape[2]), min(3, planes.shape[3]))
    if kind == "max":
        pooled = F.max_pool2d(planes, window, 2, ceil_mode=True)
    else:
        pooled = F.avg_pool2d(planes, window, 2, ceil_mode=True, count_include_pad=False)
    return pooled.movedim(1, -1)


def pooled_size(size: int) -> int:
    """Height or width after `pool_image`."""
    return max(1, math.ceil((size - 3) / 2) + 1)


def global_average_pool(x: Tensor) -> Tensor:
    """(B, *S, C) to (B, C): the mean over all positions (section 3.2 of the paper)."""
    return x.flatten(1, -2).mean(dim=1)
