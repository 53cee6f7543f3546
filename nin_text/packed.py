"""Classifiers on packed tokens: what a saved model computes, as fast as it can be had.

The texts of a job lie end to end in one array of rows, without padding, as in `blocks.Rows`. The
rows go through the network a slice at a time, so that what it works on stays near the processor and
memory does not grow with the length of a text. Each slice leaves for each of its texts the greatest
attention score, the sum of weights and the weighted sum of token vectors: a softmax over the whole
text in pieces. Neighbours across the edge of a slice are seen, so a slice changes no result.

Letters in shapes: B texts, N rows, n rows of a slice, V tokens of the vocabulary, C channels,
K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nin_text.ngrams import distinct_ngrams, sum_of_distinct

NORM_EPSILON = 1e-5  # of nn.LayerNorm
# Rows of a slice. On a CPU those of a slice stay in the cache; a GPU wants large products.
SLICE_ROWS = {"cpu": 4096, "cuda": 2**17}
SHORT_ROWS = 512  # of a text whose sums may be rounded in another order than those of long ones

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
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


@dataclass(frozen=True)
class Packed:
    """Texts end to end, with `gap` rows or more that hold no token after each.

    Attributes:
        rows: (N + 2 * halo,) int64 token ids, `no_token` where there is none; `halo` rows without
            a token before the first text and after the last.
        starts: (B,) first row of each text, not counting the halo.
        total: N.
    """

    rows: Tensor
    starts: np.ndarray
    total: int

    @classmethod
    def of(
        cls,
        ids: np.ndarray,
        lengths: np.ndarray,
        *,
        no_token: int,
        gap: int,
        halo: int,
        stride: int = 1,
    ) -> Packed:
        """Lay out token ids (M,) of texts of these lengths (B,); see `blocks.Rows` for `stride`."""
        spans = -(-(lengths + gap) // stride) * stride  # (B,)
        ends = spans.cumsum()
        starts, total = ends - spans, int(ends[-1])
        # Few different sizes: a product of a new one is compiled first, which takes longer still.
        granule = max(stride, 8, 1 << max(0, min(total, 4096).bit_length() - 5))  # 6 % at most
        total = -(-total // granule) * granule
        rows: np.ndarray = np.full(total + 2 * halo, no_token, dtype=np.int64)
        before = starts - (lengths.cumsum() - lengths)  # rows without a token before each text
        rows[np.repeat(before + halo, lengths) + np.arange(len(ids))] = ids
        return cls(torch.from_numpy(rows), starts, total)


class FoldedBlock:
    """Encoder of one block whose convolution is a sum of table rows.

    Before the convolution there are only the embedding and its norm, which see one token each: what
    a tap of the convolution makes of a token is one of V vectors, computed once.

    Args:
        config: that of the model, as a dict.
        weights: of the encoder, by their names in it, float32.
        dtype: of tables and products.
    """

    stride = 1
    normed = False  # the final norm is left to the classifier
    centred: bool  # whether weights are such that the channels of each row have a mean of zero

    def __init__(
        self, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        embeddings, width = weights["embeddings.weight"], config["kernel_sizes"][0][0]
        normed = embeddings
        if config["norm"]:
            scale, shift = weights["blocks.0.norm.weight"], weights["blocks.0.norm.bias"]
            normed = F.layer_norm(embeddings, scale.shape, scale, shift, NORM_EPSILON)
        conv = weights["blocks.0.spatial.convs.0.weight"]  # (C, E, width)
        taps = normed @ conv.permute(2, 1, 0)  # (width, V, C)
        taps[width // 2] += weights["blocks.0.spatial.convs.0.bias"]
        # One more row for where there is no token.
        self.taps = F.pad(taps, (0, 0, 0, 1)).flatten(0, 1).to(dtype)  # (width * (V + 1), C)
        self.no_token = len(embeddings)
        self.first_rows = torch.arange(width, device=conv.device) * (self.no_token + 1)
        self.dilation = config["dilations"][0]
        self.gap = self.halo = width // 2 * self.dilation
        self.gap = max(self.gap, 1)
        linears = [
            (weights[f"blocks.0.pointwise.{i}.weight"], weights[f"blocks.0.pointwise.{i}.bias"])
            for i in range(len(config["block_channels"][0]) - 1)
        ]
        self.act = config["hidden_act"]
        self.embeddings = None
        self.centred = config["residual"] and config["norm"] and bool(linears)
        if config["residual"]:
            self.embeddings = F.pad(embeddings, (0, 0, 0, 1))
            if linears:  # whose last bias comes with it
                weight, bias = linears[-1]
                self.embeddings += bias
                if self.centred:
                    self.embeddings -= self.embeddings.mean(dim=1, keepdim=True)
                    weight = weight - weight.mean(dim=0)
                linears[-1] = weight, torch.zeros_like(bias)
            self.embeddings = self.embeddings.to(dtype)
        self.linears = [(weight.to(dtype), bias.to(dtype)) for weight, bias in linears]

    @staticmethod
    def supports(config: dict[str, Any]) -> bool:
        """Whether a network has but one block, of one odd width and without max pooling."""
        return (
            len(config["block_channels"]) == 1
            and len(config["kernel_sizes"][0]) == 1
            and config["kernel_sizes"][0][0] % 2 == 1
            and not config["pool"][0]
        )

    def __call__(self, rows: Tensor) -> Tensor:
        """(n + 2 * halo,) token ids to (n, C), before the final norm."""
        reach = 2 * self.halo + 1
        windows = rows.unfold(0, reach, 1)[:, :: self.dilation] + self.first_rows  # (n, width)
        x = F.embedding_bag(windows, self.taps, mode="sum")  # (n, C)
        if self.embeddings is None:
            x = ACTIVATIONS[self.act](x)
            for weight, bias in self.linears:
                x = linear_act(x, weight, bias, self.act)
            return x
        tokens = F.embedding(rows[self.halo : len(rows) - self.halo], self.embeddings)
        if not self.linears:
            return tokens + x
        x = ACTIVATIONS[self.act](x)
        for weight, bias in self.linears[:-1]:
            x = linear_act(x, weight, bias, self.act)
        return linear_add(x, self.linears[-1][0], tokens)


class PackedClassifier:
    """Logits of packed texts.

    Args:
        encoder: `FoldedBlock`, or what has its attributes and call.
        weights: of the classifier and what follows the encoder, by their names in the model.
        config: that of the model, as a dict.
    """

    def __init__(self, encoder: Any, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.encoder = encoder
        self.norm_weight = self.norm_bias = None
        if config["norm"] and not encoder.normed:
            self.norm_weight = weights["nin.final_norm.weight"]
            self.norm_bias = weights["nin.final_norm.bias"]
        self.classifier = weights["classifier.weight"], weights["classifier.bias"]
        self.device = self.classifier[0].device
        self.ngram_size = config["ngram_size"]
        if self.ngram_size:
            self.ngrams = weights["ngrams.weight"], weights["ngrams.bias"]
        # What a token's vector is multiplied by for its attention score, (C,).
        attention = weights.get("nin.attention.weight")
        self.attention = None if attention is None else attention[0]
        if self.attention is not None and self.norm_weight is not None:
            scaled = self.attention * self.norm_weight
            self.attention = scaled - scaled.mean()  # blind to the mean of the channels
        self.slice_rows = SLICE_ROWS.get(self.device.type, SLICE_ROWS["cuda"])

    @classmethod
    def folded(
        cls, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
    ) -> PackedClassifier:
        """One whose encoder is a `FoldedBlock`, of the weights of a whole model."""
        nin = {name[4:]: value for name, value in weights.items() if name.startswith("nin.")}
        return cls(FoldedBlock(config, nin, dtype), weights, config)

    def logits(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(B, K) float32 logits of texts with token ids (M,) and these lengths (B,), none 0."""
        encoder = self.encoder
        packed = Packed.of(
            ids,
            lengths,
            no_token=encoder.no_token,
            gap=encoder.gap,
            halo=encoder.halo,
            stride=encoder.stride,
        )
        with torch.inference_mode():
            rows = packed.rows.to(self.device)
            pooled = self._pool(rows, packed)  # (B, C)
            logits = F.linear(pooled, *self.classifier)  # (B, K)
            if self.ngram_size:
                logits += self._ngram_evidence(ids, lengths) + self.ngrams[1]
            return logits.float().cpu().numpy()

    def _pool(self, rows: Tensor, packed: Packed) -> Tensor:
        """(N + 2 * halo,) rows to (B, C): the weighted mean of the token vectors of each text."""
        step = self.slice_rows // self.encoder.stride * self.encoder.stride
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        texts: list[int] = []
        for start in range(0, packed.total, step):
            end = min(start + step, packed.total)
            first = int(np.searchsorted(packed.starts, start, "right")) - 1
            last = int(np.searchsorted(packed.starts, end))
            offsets = np.append(np.maximum(packed.starts[first:last] - start, 0), end - start)
            window = rows[start : end + 2 * self.encoder.halo]
            parts.append(self._slice(window, torch.from_numpy(offsets).to(self.device)))
            texts += range(first, last)
        tops, totals, sums = (
            parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        )
        count = len(packed.starts)
        if len(texts) > count:  # some text lies in several slices
            text = torch.tensor(texts, device=self.device)
            top = tops.new_full((count,), -torch.inf).scatter_reduce(0, text, tops, "amax")
            scale = (tops - top[text]).exp()
            totals = totals.new_zeros(count).index_add(0, text, totals * scale)
            sums = sums.new_zeros(count, sums.shape[1]).index_add(0, text, sums * scale[:, None])
        return self._normed(sums / totals[:, None])

    def _slice(self, window: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a slice adds to the pooled sum of each text in it.

        Args:
            window: (n + 2 * halo,) token ids.
            offsets: (b + 1,) where each text begins in the slice, and n.

        Returns:
            The greatest score (b,), the sum of weights (b,) relative to it, and the weighted sum
            (b, C) of token vectors divided by their standard deviation.
        """
        halo = self.encoder.halo
        tokens = window[halo : len(window) - halo] != self.encoder.no_token  # (n,)
        x = self.encoder(window).float()  # (n, C)
        score = None if self.attention is None else torch.mv(x, self.attention)  # (n,)
        inverse = None
        if self.norm_weight is not None:
            variance = torch.linalg.vector_norm(x, dim=1).square() / x.shape[1]
            if not self.encoder.centred:
                variance -= x.mean(dim=1).square()
            inverse = (variance + NORM_EPSILON).rsqrt()  # (n,), 1 / deviation
        alone = len(offsets) == 2 and len(x) <= SHORT_ROWS  # in fewer operations, then
        if score is None:
            top, weights = x.new_zeros(len(offsets) - 1), tokens.float()  # (b,), (n,)
        else:
            if inverse is not None:
                score = score * inverse
            score = score.masked_fill(~tokens, torch.finfo(score.dtype).min)
            if alone:
                top = spread = score.amax(dim=0, keepdim=True)  # (1,)
            else:
                top = torch.segment_reduce(score, "max", offsets=offsets)  # (b,)
                spread = torch.repeat_interleave(top, offsets.diff(), output_size=len(score))
            weights = (score - spread).exp() * tokens
        scaled = weights if inverse is None else weights * inverse
        if alone:
            return top, weights.sum(dim=0, keepdim=True), scaled[None] @ x
        total = torch.segment_reduce(weights, "sum", offsets=offsets)  # (b,)
        each = torch.arange(len(x), device=x.device)
        sums = F.embedding_bag(each, x, offsets[:-1], mode="sum", per_sample_weights=scaled)
        return top, total, sums

    def _normed(self, pooled: Tensor) -> Tensor:
        """What remains of the final norm: (B, C) to (B, C).

        The mean of tokens divided by their deviation still has to be centred, scaled and shifted,
        which is the same for every token and so can wait until they are summed.
        """
        if self.norm_weight is None or self.norm_bias is None:
            return pooled
        return (pooled - pooled.mean(dim=1, keepdim=True)) * self.norm_weight + self.norm_bias

    def _ngram_evidence(self, ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        """(B, K) evidence of the distinct n-grams of each text, without the bias."""
        keys = distinct_ngrams(ids, lengths, self.ngram_size, len(self.ngrams[0]))
        return sum_of_distinct(keys.to(self.device), len(lengths), self.ngrams[0])


class BlocksEncoder:
    """Encoder of any number of blocks: those of the model, on windows that overlap.

    Args:
        nin: the encoder, a `NiNTextModel`.
        autocast: dtype of the matrix products, or None for float32.
    """

    normed = True

    def __init__(self, nin: Any, autocast: torch.dtype | None) -> None:
        self.nin = nin
        self.autocast = autocast
        self.stride, self.gap = nin.stride, nin.gap
        self.no_token = nin.config.vocab_size
        self.pad = nin.config.pad_token_id or 0
        reach, stride = 0, 1  # how far a token sees, to either side
        for sizes, dilation, pool in zip(
            nin.config.kernel_sizes, nin.config.dilations, nin.config.pool, strict=True
        ):
            reach += stride * (dilation * (max(sizes) // 2) + pool)
            stride *= 1 + pool
        self.halo = math.ceil(reach / stride) * stride

    def __call__(self, rows: Tensor) -> Tensor:
        """(n + 2 * halo,) token ids to (n, C), after the final norm."""
        tokens = rows != self.no_token
        ids = rows.masked_fill(~tokens, self.pad)
        with torch.autocast(rows.device.type, self.autocast, self.autocast is not None):
            x = self.nin.run_blocks(ids, tokens[:, None])  # ((n + 2 * halo) / stride, C)
        halo = self.halo // self.stride
        x = x[halo : len(x) - halo]
        return x.repeat_interleave(self.stride, dim=0) if self.stride > 1 else x
