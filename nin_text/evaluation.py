"""Run a classifier over encoded texts, and say how good its answers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

BOOTSTRAP_SAMPLES = 1000
CALIBRATION_BINS = 15


def pad(rows: Sequence[np.ndarray], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of B texts as (B, T) input_ids and attention_mask, padded on the right."""
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.from_numpy(row)
        attention_mask[i, : len(row)] = 1
    return input_ids, attention_mask


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group texts of similar length so that no padded batch exceeds `batch_tokens`.

    A text longer than that has a batch of its own. Longest first: if memory is short, it shows at
    once.
    """
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches


def predict_logits(
    model: torch.nn.Module,
    rows: Sequence[np.ndarray],
    *,
    pad_token_id: int,
    batch_tokens: int = 32_768,
    autocast: torch.dtype | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Logits of each text, in the order given.

    Args:
        model: any sequence classifier of transformers.
        rows: token ids of each text.
        pad_token_id: id to pad with.
        batch_tokens: most tokens in a batch, padding included.
        autocast: dtype of the matrix products (torch.bfloat16), or None for float32.
        progress: title of a progress bar, or None for no bar.

    Returns:
        (len(rows), K) float32.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits: np.ndarray | None = None
    bar = tqdm(
        total=len(rows),
        desc=progress,
        disable=None if progress else True,
        unit="texts",
        leave=False,
    )
    with torch.inference_mode(), bar:
        for batch in batches_by_length([len(row) for row in rows], batch_tokens):
            input_ids, attention_mask = pad([rows[i] for i in batch], pad_token_id)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                output = model(
                    input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)
                )
            values = output.logits.float().cpu().numpy()
            if logits is None:
                logits = np.empty((len(rows), values.shape[1]), dtype=np.float32)
            logits[batch] = values
            bar.update(len(batch))
    model.train(was_training)
    if logits is None:
        raise ValueError("there are no texts to classify")
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """(n, K) logits to (n, K) float64 probabilities."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def most_confident_mistakes(probabilities: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Indices of the wrong answers, the most confident first.

    Args:
        probabilities: (n, K).
        labels: n true class indices.
    """
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != np.asarray(labels))
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")]


def bootstrap_interval(
    score: Callable[[np.ndarray], float], n: int, *, seed: int = 0
) -> list[float]:
    """95 % percentile bootstrap interval of `score(indices)` over n examples (Efron 1979)."""
    rng = np.random.default_rng(seed)
    scores = [score(rng.integers(0, n, n)) for _ in range(BOOTSTRAP_SAMPLES)]
    return [float(value) for value in np.quantile(scores, [0.025, 0.975])]


def paired_difference(correct: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Is one classifier more often right than another on the same examples?

    Args:
        correct, reference: (n,) bool, where each of the two is right.

    Returns:
        `difference` of the accuracies with a paired bootstrap `interval_95`, how often only one of
        them was right, and the p-value of McNemar's exact test (McNemar 1947): that of a fair coin
        for the examples on which they differ.
    """
    from scipy.stats import binomtest

    difference = correct.astype(float) - reference.astype(float)
    only_this, only_reference = int((difference > 0).sum()), int((difference < 0).sum())
    differing = only_this + only_reference
    return {
        "difference": float(difference.mean()),
        "interval_95": bootstrap_interval(lambda i: difference[i].mean(), len(difference)),
        "only_this_right": only_this,
        "only_reference_right": only_reference,
        "mcnemar_p": float(binomtest(only_this, differing).pvalue) if differing else 1.0,
    }


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error of the top class, 15 equal-width bins (Guo et al. 2017)."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(labels))


def classification_metrics(
    logits: np.ndarray, labels: Sequence[int], label_names: Sequence[str]
) -> dict[str, Any]:
    """Accuracy and everything else that a reader may ask of a single-label classifier.

    Args:
        logits: (n, K).
        labels: n class indices.
        label_names: K class names.

    Returns:
        Plain numbers, lists and dicts, ready for JSON. Fractions, not percent. `roc_auc` is
        one-vs-rest, averaged over classes, and None if a class does not occur. The interval of the
        accuracy is Wilson's (1927), that of macro F1 a bootstrap's; both are of the texts alone.
    """
    from scipy.stats import binomtest  # takes seconds to import; predicting does without
    from sklearn import metrics as sk

    truth = np.asarray(labels)
    classes = np.arange(len(label_names))
    probabilities = softmax(logits)
    predicted = logits.argmax(axis=1)
    correct = int((predicted == truth).sum())
    # Near 0 and 1, and of few texts, a bootstrap's interval is too narrow.
    interval = binomtest(correct, len(truth)).proportion_ci(method="wilson")
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        truth, predicted, labels=classes, zero_division=0
    )
    return {
        "n": len(truth),
        "accuracy": correct / len(truth),
        "accuracy_interval_95": [float(interval.low), float(interval.high)],
        "macro_f1": _macro_f1(truth, predicted, len(classes)),
        "macro_f1_interval_95": bootstrap_interval(
            lambda i: _macro_f1(truth[i], predicted[i], len(classes)), len(truth)
        ),
        "log_loss": float(sk.log_loss(truth, probabilities, labels=classes)),
        "roc_auc": _roc_auc(truth, probabilities),
        "calibration_error": calibration_error(probabilities, truth),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(label_names)
        },
        "confusion_matrix": sk.confusion_matrix(truth, predicted, labels=classes).tolist(),
    }


def _macro_f1(truth: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """F1, averaged over the classes that are true or predicted anywhere.

    As `f1_score(average="macro", zero_division=0)` of scikit-learn; fast enough for a bootstrap.
    """
    hits = np.bincount(truth[truth == predicted], minlength=classes)
    totals = np.bincount(truth, minlength=classes) + np.bincount(predicted, minlength=classes)
    return float((2 * hits[totals > 0] / totals[totals > 0]).mean())


def _roc_auc(truth: np.ndarray, probabilities: np.ndarray) -> float | None:
    from sklearn import metrics as sk

    if len(np.unique(truth)) < probabilities.shape[1]:
        return None
    if probabilities.shape[1] == 2:
        return float(sk.roc_auc_score(truth, probabilities[:, 1]))
    return float(
        sk.roc_auc_score(
            truth, probabilities, multi_class="ovr", labels=np.arange(probabilities.shape[1])
        )
    )
