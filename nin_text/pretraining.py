"""Pretraining of the encoder: from one part of a text, predict the telling n-grams of the other.

Each text is cut in two at random. The encoder reads either part and a linear layer predicts, from
the pooled part, which n-grams the other part holds: what a whole text is about, or thinks, is in
both. No labels are needed for that, so unlabelled texts serve as well. It is the two-view embedding
of Johnson & Zhang (2015, arXiv 1504.01255) for whole texts instead of small regions. Labels choose
what is worth predicting: n-grams count by their evidence, as in the naive Bayes subsampling of
Zhang & Arefyev (2022, arXiv 2205.13357), and all n-grams of one bucket of `ngrams.py` are one.

A deep encoder can also learn what words tell of those around them: some tokens of each part are
hidden, and predicted from the others (masked language modelling, Devlin et al. 2019, arXiv
1810.04805). A hidden token is a vector of zeros, as in word dropout.

The predicting layers are thrown away; the encoder is then trained on the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from nin_text import ngrams
from nin_text.blocks import Rows
from nin_text.evaluation import pad
from nin_text.text import EncodedRows, NiNTextModel

MAX_TARGETS = 30_000
# N-grams in more than this share of the texts count less (Mikolov et al. 2013, arXiv 1310.4546).
FREQUENT = 0.01
# A word that labels say nothing of, though it is in `COMMON` texts and no more than `TOO_COMMON` of
# them: its evidence in units of the mean of the others.
UNKNOWN, COMMON, TOO_COMMON = 2.0, 5, 0.3
NEAREST_CUT = 0.25  # no part is shorter than this share of its text


@dataclass(frozen=True)
class Targets:
    """The n-grams that are predicted.

    Attributes:
        size, buckets: of the n-gram branch whose buckets they are.
        index: (buckets,) int32, number of the target in a bucket, -1 where there is none.
        weight: (F,) float32, what a target counts in the loss.
        share: (F,) float32, share of the texts that hold it.
    """

    size: int
    buckets: int
    index: np.ndarray
    weight: np.ndarray
    share: np.ndarray

    def __len__(self) -> int:
        return len(self.weight)


def choose_targets(branch: ngrams.NGramEvidence, rows: Sequence[np.ndarray]) -> Targets:
    """Up to `MAX_TARGETS` n-grams by their evidence and the square root of their frequency.

    Args:
        branch: fitted to the labels.
        rows: token ids of texts in which to count. They may be more than the labelled ones: what
            is in none of these may be worth predicting, too, if it is a single word.
    """
    weights = branch.weight.cpu().numpy()  # (buckets, K)
    evidence = weights.max(axis=1) - weights.min(axis=1)  # (buckets,)

    def counted(size: int) -> np.ndarray:
        found = ngrams.features(rows, size, branch.buckets).indices
        return np.bincount(found, minlength=branch.buckets)  # (buckets,)

    counts = counted(branch.size)
    unknown = (evidence == 0) & (counts >= COMMON)
    if unknown.any() and evidence.any():  # of the texts that the branch was fitted to none is
        words = counted(1)
        unknown &= (words >= COMMON) & (words <= TOO_COMMON * len(rows))
        evidence[unknown] = UNKNOWN * evidence[evidence > 0].mean()
    score = evidence * np.sqrt(counts)
    kept = np.argsort(-score, kind="stable")[:MAX_TARGETS]
    kept = np.sort(kept[score[kept] > 0])
    share = ((counts[kept] + 1) / (len(rows) + 1)).astype(np.float32)
    index = np.full(branch.buckets, -1, dtype=np.int32)
    index[kept] = np.arange(len(kept))
    weight = evidence[kept] * np.minimum(1, np.sqrt(FREQUENT / share))
    return Targets(branch.size, branch.buckets, index, weight.astype(np.float32), share)


class LongEnoughTexts(Dataset):
    """Token ids of the texts that can be cut in two: those of two tokens and more."""

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        self.rows = [row for row in rows if len(row) > 1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.rows[i]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(row) for row in self.rows]


def cut_in_two(
    rows: Sequence[np.ndarray], targets: Targets, pad_token_id: int, mlm_probability: float = 0.0
) -> dict[str, Tensor]:
    """A batch of 2B parts, with the targets of each part's other part.

    Args:
        rows: token ids of B texts, two and more each.
        targets: what is predicted.
        pad_token_id: id to pad with, and to hide tokens behind.
        mlm_probability: share of the tokens that are hidden.

    Returns:
        input_ids and attention_mask, (2B, T); part and target, (M,) int64 each: the part that is
        to predict, and what; if tokens are hidden, masked_positions and masked_ids, (H,) int64
        each: where in the flattened input_ids, and which. Cuts and tokens are drawn from torch's
        generator.
    """
    lengths = np.array([len(row) for row in rows])  # (B,)
    share = NEAREST_CUT + (1 - 2 * NEAREST_CUT) * torch.rand(len(rows), dtype=torch.float64).numpy()
    cuts = np.clip(np.rint(share * lengths).astype(np.int64), 1, lengths - 1)  # (B,)
    input_ids, attention_mask = pad(
        [part for row, cut in zip(rows, cuts, strict=True) for part in (row[:cut], row[cut:])],
        pad_token_id,
    )
    buckets, text = ngrams.buckets_of_texts(rows, targets.size, targets.buckets)  # (size, N), (N,)
    number = np.where(buckets >= 0, targets.index[buckets], -1)  # (size, N)
    order, last = np.nonzero(number >= 0)  # (M,) each
    found, text = number[order, last], text[last]
    last -= (np.cumsum(lengths + 1) - lengths - 1)[text]  # from the beginning of the text
    after, before = last - order >= cuts[text], last < cuts[text]  # what crosses the cut is neither
    part = 2 * text + before  # what lies before the cut is for the part after it
    # Not NumPy's, which takes several times as long.
    pairs = torch.from_numpy((part * len(targets) + found)[after | before]).unique()
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "part": pairs // len(targets),
        "target": pairs % len(targets),
    }
    if mlm_probability:
        tokens = attention_mask.flatten().nonzero()[:, 0]
        hidden = tokens[torch.rand(len(tokens)) < mlm_probability]
        flat = input_ids.view(-1)
        batch |= {"masked_positions": hidden, "masked_ids": flat[hidden]}
        flat[hidden] = pad_token_id
    return batch


class TwoViewModel(nn.Module):
    """An encoder, and the layers that predict n-grams from a pooled part, and hidden tokens.

    Args:
        encoder: is trained in place.
        targets: what to predict.
        masked_lm: whether tokens are hidden, and predicted. They take the place of all dropout in
            the encoder.
    """

    def __init__(self, encoder: NiNTextModel, targets: Targets, masked_lm: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.masked_lm = masked_lm
        size, width = encoder.config.hidden_size, encoder.config.embedding_size
        self.norm = nn.LayerNorm(size)
        self.predict = nn.Linear(size, len(targets))
        self.register_buffer("target_weight", torch.from_numpy(targets.weight))
        with torch.no_grad():
            self.predict.weight.normal_(std=0.02)
            expected = targets.share.astype(np.float64) * targets.weight  # (F,)
            # Not torch.log: that of torch 2.13 is, in one process of ten, off by 40 units in the
            # last place in the share of the second thread, the first time that there is one.
            self.predict.bias.copy_(torch.from_numpy(np.log(expected / expected.sum())))
        if masked_lm:
            self.transform = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.LayerNorm(width))
            self.token_bias = nn.Parameter(torch.zeros(encoder.config.vocab_size))

    target_weight: Tensor

    def train(self, mode: bool = True) -> Self:
        """As of nn.Module, but without dropout in the encoder if tokens are hidden."""
        super().train(mode)
        if self.masked_lm:
            self.encoder.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        part: Tensor,
        target: Tensor,
        masked_positions: Tensor | None = None,
        masked_ids: Tensor | None = None,
        layout: Rows | None = None,
    ) -> dict[str, Tensor]:
        """The loss: for each part the weighted mean of -log p(target), then the mean of the parts.

        The mean of -log p of the hidden tokens is added to it.

        Args:
            input_ids, attention_mask: (P, T).
            part, target: (M,), see `cut_in_two`.
            masked_positions, masked_ids: (H,), likewise.
            layout: see `NiNTextModel.encode`.
        """
        encoded = self.encoder.encode(input_ids, attention_mask, layout)
        pooled = self.norm(encoded.pooled)  # (P, C)
        log_p = F.log_softmax(self.predict(pooled).float(), dim=1)  # (P, F)
        weight = self.target_weight[target]  # (M,)
        total = weight.new_zeros(len(input_ids)).index_add(0, part, weight)  # (P,)
        weight = weight / total[part]
        loss = -(log_p[part, target] * weight).sum() / len(input_ids)
        if masked_positions is not None and masked_ids is not None:
            loss = loss + self._token_loss(encoded, masked_positions, masked_ids)
        return {"loss": loss}

    def _token_loss(self, encoded: EncodedRows, positions: Tensor, ids: Tensor) -> Tensor:
        """Mean of -log p of the hidden tokens, of which positions and ids are (H,) each.

        The embeddings are those of the answers, too (Press & Wolf 2017, arXiv 1608.05859).
        """
        rows = encoded.layout.index.flatten()[positions] // self.encoder.stride  # (H,)
        x = self.transform(encoded.rows.index_select(0, rows))  # (H, E)
        answers, pad = self.encoder.embeddings.weight, self.encoder.config.pad_token_id
        if pad is not None:  # never an answer; and as one its vector would not stay zero
            answers = answers.clone()
            answers[pad] = 0
        logits = F.linear(x, answers, self.token_bias).float()  # (H, V)
        return F.cross_entropy(logits, ids, reduction="sum") / max(1, len(ids))
