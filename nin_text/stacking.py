"""Stacking: models weighed by what they say of texts that they were not fitted to (Wolpert 1992).

Of one model alone that is temperature scaling (Guo et al. 2017, arXiv 1706.04599).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_SCALE = 0.01
PRIOR_STRENGTH = 30.0  # of `cautious_scales`
FOLDS = 5
FEW = 5_000  # labelled texts, at most, of which every one is worth being learned from and judged by


def are_few(count: int) -> bool:
    """Whether labelled texts are as many as `folds` divides: few, but enough to be divided."""
    return FOLDS <= count <= FEW


def folds(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices of the rest and of the fold, `FOLDS` times; none if texts are too few or many."""
    if not are_few(count):
        return []
    order = np.random.default_rng(0).permutation(count)
    return [(np.setdiff1d(order, held), held) for held in np.array_split(order, FOLDS)]


def best_scales(
    parts: Sequence[np.ndarray],
    labels: np.ndarray,
    prior: Sequence[float] | None = None,
    strength: float = 1.0,
) -> np.ndarray:
    """Factors s for which sum(s[i] * parts[i]) are the logits of least log loss.

    A normal prior keeps the factors finite on a validation split without a single mistake, and near
    its mean where there are few examples; `LEAST_SCALE` keeps an answer where no part is of any
    use. One part alone is temperature scaling (Guo et al. 2017, arXiv 1706.04599).

    Args:
        parts: (n, K) logits each.
        labels: (n,) class index of each example, or (n, K) class probabilities.
        prior: mean of the prior of each factor; 1 each if None.
        strength: of the prior, one over its variance: the loss summed over all examples grows by
            half of this at a distance of 1.
    """
    from scipy.optimize import minimize

    stacked = np.stack(parts).astype(np.float64)  # (parts, n, K)
    centre = np.ones(len(parts)) if prior is None else np.asarray(prior)
    target = np.eye(stacked.shape[2])[labels] if labels.ndim == 1 else labels  # (n, K)

    def loss(scales: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.tensordot(scales, stacked, 1)  # (n, K)
        logits -= logits.max(axis=1, keepdims=True)
        probabilities = np.exp(logits)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        value = -(target * np.log(np.maximum(probabilities, 1e-300))).sum()
        value += strength * ((scales - centre) ** 2).sum() / 2
        gradient = np.tensordot(stacked, probabilities - target, 2) + strength * (scales - centre)
        return value / len(labels), gradient / len(labels)

    start = np.full(len(parts), 0.5)
    return np.asarray(minimize(loss, start, jac=True, bounds=[(LEAST_SCALE, None)] * len(parts)).x)


def cautious_scales(
    parts: Sequence[np.ndarray], labels: np.ndarray, prior: Sequence[float]
) -> np.ndarray:
    """`best_scales` with a strong prior, unless the labels refute it.

    They do if they are more than 20 times (e to the 3rd) as likely with a weak one. Chance alone
    rarely brings that about: two factors fitted to noise gain about one on average.
    """
    from scipy.special import log_softmax

    pulled = best_scales(parts, labels, prior, PRIOR_STRENGTH)
    free = best_scales(parts, labels, prior)

    def loss(scales: np.ndarray) -> float:
        logits = np.tensordot(scales, np.stack(parts).astype(np.float64), 1)  # (n, K)
        return -float(log_softmax(logits, axis=1)[np.arange(len(labels)), labels].sum())

    return free if loss(pulled) - loss(free) > 3 else pulled
