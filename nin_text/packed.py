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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nin_text.ngrams import distinct_ngrams, sum_of_distinct
from nin_text.products import ACTIVATIONS, linear_act, linear_add, prepacked

NORM_EPSILON = 1e-5  # of nn.LayerNorm
# Rows of a slice. On a CPU those of a slice stay in the cache; a GPU wants large products.
SLICE_ROWS = {"cpu": 4096, "cuda": 2**17}
SHORT_ROWS = 512  # of a text whose sums may be rounded in another order than those of long ones


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
        if len(lengths) == 1:
            rows[halo : halo + len(ids)] = ids
        else:
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
        self.no_token = len(embeddings)
        # One more row for where there is no token. One tap after the other: they are large.
        taps = torch.zeros(width, self.no_token + 1, len(conv), dtype=dtype, device=conv.device)
        exact = conv.new_empty(self.no_token, len(conv))  # (V, C)
        for i, tap in enumerate(conv.unbind(dim=2)):  # (C, E)
            torch.mm(normed, tap.t(), out=exact)
            if i == width // 2:
                exact += weights["blocks.0.spatial.convs.0.bias"]
            taps[i, :-1] = exact
        self.taps = taps.flatten(0, 1)  # (width * (V + 1), C)
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
        rows = SLICE_ROWS["cpu"]
        self.linears = [(prepacked(w.to(dtype), rows), bias.to(dtype)) for w, bias in linears]

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
        weight, bias = weights["classifier.weight"], weights["classifier.bias"]  # (K, C), (K,)
        self.device = weight.device
        self.ngram_size = config["ngram_size"]
        if self.ngram_size:
            self.ngrams = weights["ngrams.weight"]
            bias = bias + weights["ngrams.bias"]
        # What a token's vector is multiplied by for its attention score, (C,).
        attention = weights.get("nin.attention.weight")
        self.attention = None if attention is None else attention[0]
        self.norm = config["norm"] and not encoder.normed
        if self.norm:
            # Its scale and shift are the same for every token, and so can be those of what comes
            # after; and this is blind to the mean of the channels, which the norm takes away.
            scale, shift = weights["nin.final_norm.weight"], weights["nin.final_norm.bias"]
            bias = bias + weight @ shift
            weight = _centred(weight * scale)
            if self.attention is not None:
                self.attention = _centred(self.attention * scale)
        self.classifier = weight, bias
        self.slice_rows = SLICE_ROWS.get(self.device.type, SLICE_ROWS["cuda"])

    @classmethod
    def folded(
        cls, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
    ) -> PackedClassifier:
        """One whose encoder is a `FoldedBlock`, of the weights of a whole model."""
        nin = {name[4:]: value for name, value in weights.items() if name.startswith("nin.")}
        return cls(FoldedBlock(config, nin, dtype), weights, config)

    def logits(
        self, ids: np.ndarray, lengths: np.ndarray, map_fn: Callable[..., Iterable[Any]] = map
    ) -> np.ndarray:
        """Logits of texts that lie end to end.

        Args:
            ids: (M,) token ids.
            lengths: (B,) tokens of each text, none 0.
            map_fn: calls a function with each of several items, as `map` does, or several at once.

        Returns:
            (B, K) float32.
        """
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
            if len(lengths) == 1 and packed.total <= SHORT_ROWS:
                return self._one(ids, lengths, packed)
            texts, parts, jobs = self._slices(packed)
            if self.ngram_size:  # the longest job comes first
                jobs.insert(0, partial(self._ngram_evidence, ids, lengths))
            results = list(map_fn(_infer, jobs))
            logits = F.linear(_joined(parts, texts, len(lengths)), *self.classifier)  # (B, K)
            if self.ngram_size:
                logits += results[0]
            return logits.cpu().numpy()

    def _one(self, ids: np.ndarray, lengths: np.ndarray, packed: Packed) -> np.ndarray:
        """(1, K) logits of a short text, in as few operations as there may be."""
        x = self.encoder(packed.rows.to(self.device))[: len(ids)].float()  # (M, C)
        inverse = self._inverse_deviation(x) if self.norm else 1.0  # (M,)
        if self.attention is None:
            weights = x.new_full((len(ids),), 1 / len(ids))  # (M,)
        else:
            weights = (torch.mv(x, self.attention) * inverse).softmax(dim=0)  # (M,)
        logits = F.linear((weights * inverse)[None] @ x, *self.classifier)  # (1, K)
        if self.ngram_size:
            logits += self._ngram_evidence(ids, lengths)
        return logits.cpu().numpy()

    def _slices(self, packed: Packed) -> tuple[list[int], Tensor, list[Callable[[], Any]]]:
        """The work on all slices, yet to be done.

        Returns:
            The texts that lie in each slice, one slice after another: P parts; an array for what
            `_slice` makes of each part, (P, C + 2); and the jobs that fill it.
        """
        rows = packed.rows.to(self.device)  # (N + 2 * halo,)
        step = self.slice_rows // self.encoder.stride * self.encoder.stride
        texts: list[int] = []
        slices: list[tuple[Tensor, Tensor, slice]] = []
        for start in range(0, packed.total, step):
            end = min(start + step, packed.total)
            first = int(np.searchsorted(packed.starts, start, "right")) - 1
            last = int(np.searchsorted(packed.starts, end))
            offsets = np.append(np.maximum(packed.starts[first:last] - start, 0), end - start)
            window = rows[start : end + 2 * self.encoder.halo]
            place = slice(len(texts), len(texts) + last - first)
            slices.append((window, torch.from_numpy(offsets).to(self.device), place))
            texts += range(first, last)
        # One array for all: what each slice left of its own would lie between its freed buffers,
        # which the C library could then not use again for the next.
        width = self.classifier[0].shape[1] + 2
        parts = self.classifier[0].new_empty(len(texts), width)  # (P, C + 2)
        jobs: list[Callable[[], Any]] = [
            partial(self._slice, window, offsets, parts[place]) for window, offsets, place in slices
        ]
        return texts, parts, jobs

    def _slice(self, window: Tensor, offsets: Tensor, out: Tensor) -> None:
        """What a slice adds to the pooled sums of the texts in it.

        Args:
            window: (n + 2 * halo,) token ids.
            offsets: (b + 1,) where each part begins in the slice, and n.
            out: (b, C + 2) is filled with the greatest score, the sum of weights relative to it,
                and the weighted sum of token vectors divided by their standard deviation.
        """
        halo = self.encoder.halo
        tokens = window[halo : len(window) - halo] != self.encoder.no_token  # (n,)
        x = self.encoder(window).float()  # (n, C)
        inverse = self._inverse_deviation(x) if self.norm else 1.0  # (n,)
        if self.attention is None:
            out[:, 0], weights = 0, tokens.float()  # (n,)
        else:
            score = torch.mv(x, self.attention) * inverse  # (n,)
            score = score.masked_fill(~tokens, torch.finfo(score.dtype).min)
            top = torch.segment_reduce(score, "max", offsets=offsets)  # (b,)
            out[:, 0] = top
            spread = torch.repeat_interleave(top, offsets.diff(), output_size=len(score))
            weights = (score - spread).exp() * tokens
        out[:, 1] = torch.segment_reduce(weights, "sum", offsets=offsets)
        scaled = weights * inverse
        rows = torch.arange(len(x), device=x.device)
        out[:, 2:] = F.embedding_bag(rows, x, offsets[:-1], mode="sum", per_sample_weights=scaled)

    def _inverse_deviation(self, x: Tensor) -> Tensor:
        """(n, C) to (n,): what the norm multiplies each row by once its mean is gone."""
        variance = torch.linalg.vector_norm(x, dim=1).square_().div_(x.shape[1])
        if not self.encoder.centred:
            variance -= x.mean(dim=1).square_()
        return variance.add_(NORM_EPSILON).rsqrt_()

    def _ngram_evidence(self, ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        """(B, K) evidence of the distinct n-grams of each text, without the bias."""
        keys = distinct_ngrams(ids, lengths, self.ngram_size, len(self.ngrams))
        return sum_of_distinct(keys.to(self.device), len(lengths), self.ngrams)


def _centred(weight: Tensor) -> Tensor:
    """(..., C): the same without its mean, and so blind to a mean of what it is multiplied by."""
    return weight - weight.mean(dim=-1, keepdim=True)


def _infer(job: Callable[[], Any]) -> Any:
    """Do a job in inference mode, which each thread has to be told of."""
    with torch.inference_mode():
        return job()


def _joined(parts: Tensor, texts: list[int], count: int) -> Tensor:
    """(B, C): the weighted mean of the token vectors of each text.

    Args:
        parts: (P, C + 2) what `PackedClassifier._slice` made of each part of a text.
        texts: P texts that these are of.
        count: B.
    """
    tops, totals, sums = parts[:, 0], parts[:, 1], parts[:, 2:]  # (P,), (P,), (P, C)
    if len(texts) > count:  # some text has several parts
        text = torch.tensor(texts, device=tops.device)
        top = tops.new_full((count,), -torch.inf).scatter_reduce(0, text, tops, "amax")
        scale = (tops - top[text]).exp()
        totals = totals.new_zeros(count).index_add(0, text, totals * scale)
        sums = sums.new_zeros(count, sums.shape[1]).index_add(0, text, sums * scale[:, None])
    return sums / totals[:, None]


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
