"""A linear probe: what a pretrained encoder lets a linear model tell from a few labelled texts.

A network that is trained whole on a few hundred texts learns them by heart and forgets what it was
pretrained on; logistic regression on what the encoder makes of the texts does not. (Going on from
it by training the whole network, as Kumar et al. 2022, arXiv 2202.10054, do, did not help here.)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from nin_text.evaluation import predict_logits
from nin_text.stacking import folds
from nin_text.text import NiNTextForSequenceClassification, NiNTextModel

INVERSE_REGULARIZATION = 3.0  # C of the logistic regression, for vectors whose mean square is one


class _Pooled(nn.Module):
    """An encoder whose pooled output passes for logits."""

    def __init__(self, encoder: NiNTextModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.encoder(input_ids, attention_mask).pooler_output)


def vectors(encoder: NiNTextModel, rows: Sequence[np.ndarray]) -> np.ndarray:
    """(n, C) float32: the pooled output of an encoder for the token ids of each text."""
    pooled = _Pooled(encoder).train(encoder.training)  # a new module trains, and takes it along
    return predict_logits(pooled, rows, pad_token_id=encoder.config.pad_token_id or 0)


def fit_head(
    model: NiNTextForSequenceClassification,
    rows: Sequence[np.ndarray],
    labels: np.ndarray,
    sample_weight: np.ndarray | None = None,
) -> np.ndarray | None:
    """Set the head of a classifier to logistic regression on the output of its encoder.

    Args:
        model: its encoder has been pretrained; classes count by its class weights.
        rows: token ids of n texts.
        labels: (n,) class index of each text.
        sample_weight: (n,) how often each text counts, instead of by class weights.

    Returns:
        (n, K) logits of each text by a head fitted to the other folds; None if `folds` has none.
    """
    classes = model.classifier.out_features
    weights = model.config.class_weights
    if sample_weight is None and weights is not None:
        sample_weight = np.asarray(weights)[labels]
    x = vectors(model.nin, rows)
    weight, bias = fit_probe(x, labels, classes, sample_weight)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(weight))
        model.classifier.bias.copy_(torch.from_numpy(bias))
    logits: np.ndarray = np.zeros((len(rows), classes), dtype=np.float32)
    parts = folds(len(rows))
    for rest, held in parts:
        counts = None if sample_weight is None else sample_weight[rest]
        weight, bias = fit_probe(x[rest], labels[rest], classes, counts)
        logits[held] = x[held] @ weight.T + bias
    return logits if parts else None


def fit_probe(
    x: np.ndarray, labels: np.ndarray, classes: int, sample_weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression on standardized vectors, as a map of the vectors as they are.

    Some directions of a pretrained encoder have a hundred times the variance of others that say
    more about the class (IMDB: 0.79 instead of 0.72 with 500 reviews).

    Args:
        x: (n, C) vectors.
        labels: (n,) class indices; a class without a text is taken for a rare one.
        classes: K.
        sample_weight: (n,) how often each text counts; once if None.

    Returns:
        Weight (K, C) and bias (K,) of the logits, float32.
    """
    from sklearn.linear_model import LogisticRegression

    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, -np.log(len(x) + 1))
    present = np.unique(labels)
    if len(present) > 1:
        mean, scale = x.mean(axis=0), (x.std(axis=0) + 1e-6) * np.sqrt(x.shape[1])  # (C,)
        regression = LogisticRegression(C=INVERSE_REGULARIZATION, max_iter=1000)
        regression.fit((x - mean) / scale, labels, sample_weight)
        coef, intercept = regression.coef_, regression.intercept_
        if len(present) == 2:  # one map, for the second
            coef = np.concatenate([-coef, coef]) / 2
            intercept = np.append(-intercept, intercept) / 2
        weight[present] = coef / scale
        bias[present] = intercept - weight[present] @ mean
    else:
        bias[present] = 0.0
    return weight.astype(np.float32), bias.astype(np.float32)
