"""What the scikit-learn estimators accept, and the state of the process that they leave alone."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.utils import compute_class_weight, compute_sample_weight
from sklearn.utils.multiclass import type_of_target, unique_labels

from nin_text.errors import UserError
from nin_text.splits import stratified

# Parameters of NiNTextClassifier.
WHOLE = "vocab_size max_length ngrams pretrain_epochs epochs batch_size n_iter_no_change".split()
SHARES = "learning_rate weight_decay dropout validation_fraction".split()
CHOSEN = "vocab_size pretrain_epochs batch_size dropout".split()  # if they are None


def as_texts(X: Any) -> list[str]:  # noqa: N803
    """The texts of a list, array, Series or table of one column.

    Raises:
        UserError: if it is none of these, is empty, or holds something else than strings.
    """
    if isinstance(X, (str, bytes)):
        raise UserError("X must be a list of texts, not a single text; put it into a list")
    if isinstance(X, Mapping):  # a list of it would be of its keys
        raise UserError(f"X must be a list of texts, not {type(X).__name__}")
    values = X.to_numpy() if hasattr(X, "to_numpy") else X
    shape = getattr(values, "shape", None)
    if shape is not None and len(shape) != 1:
        if len(shape) != 2 or shape[1] != 1:
            raise UserError(f"X must be one column of texts, not of shape {shape}")
        values = values[:, 0]
    try:
        texts = list(values)
    except TypeError as error:
        raise UserError(f"X must be a list of texts, not {type(X).__name__}") from error
    if not texts:
        raise UserError("there are no texts in X")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            shown = "missing" if _is_missing(text) else f"of type {type(text).__name__}"
            raise UserError(f"X must hold strings alone, but number {i} is {shown}")
    return [str(text) for text in texts]


def _is_missing(value: Any) -> bool:
    """None, NaN, or pandas.NA, whose comparisons are neither true nor false."""
    return value is None or type(value).__name__ == "NAType" or bool(np.all(value != value))


def as_labels(y: Any) -> np.ndarray:
    """(n,) or (n, K) labels as an array."""
    if y is None:
        raise UserError("y must hold a label for each text, not None")
    if hasattr(y, "toarray"):  # a sparse indicator matrix
        y = y.toarray()
    if isinstance(y, (list, tuple)) and any(map(_is_missing, y)):  # NumPy would make it a string
        raise UserError("y must hold a label for each text, but some are missing")
    labels = np.asarray(y)
    if labels.dtype.kind in "mM":
        raise UserError("labels cannot be dates or times; give them as strings")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    try:
        kind = type_of_target(labels) if len(labels) else "binary"
    except TypeError as error:  # strings and numbers, which have no order
        raise UserError(f"labels must be all of one type ({error})") from error
    if labels.ndim == 2 and kind != "multilabel-indicator":
        raise UserError("labels must be one for each text, or a matrix of zeros and ones")
    if kind not in ("binary", "multiclass", "multilabel-indicator"):
        raise UserError(f"labels of this kind cannot be learned: {kind}")
    return labels


def encode_labels(
    texts: Sequence[str], y: np.ndarray, classes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Class indices (n,), or (n, K) zeros and ones, and the sorted labels (K,)."""
    if len(y) != len(texts):
        raise UserError(f"there are {len(texts)} texts and {len(y)} labels")
    if y.ndim == 2:
        if not np.isin(y, (0, 1)).all():
            raise UserError("an indicator matrix of labels must hold zeros and ones alone")
        if classes is not None and y.shape[1] != len(classes):
            raise UserError(
                f"the matrix of labels has {y.shape[1]} columns for {len(classes)} classes"
            )
        return y.astype(np.float32), np.arange(y.shape[1]) if classes is None else classes
    found = unique_labels(y) if classes is None else np.sort(classes)
    unknown = set(y.tolist()) - set(found.tolist())
    if unknown:
        raise UserError(f"label {unknown.pop()!r} is not among the classes")
    return np.searchsorted(found, y), found


def weights_of(
    y: np.ndarray, labels: np.ndarray, classes: np.ndarray, given: Any, class_weight: Any
) -> np.ndarray | None:
    """(n,) weight of each text, class weights included; None if all are alike.

    Args:
        y, labels, classes: the labels as they are, and as `encode_labels` has them.
        given: (n,) `sample_weight`, or None.
        class_weight: as of the estimator.
    """
    if labels.ndim == 2:
        if class_weight not in (None, "balanced"):
            raise UserError("class_weight of a multi-label classifier is 'balanced' or None")
        class_weight = None  # yes and no are balanced for each class by itself, see `targets_of`
    if given is None and class_weight is None:
        return None
    weight = np.ones(len(y)) if given is None else np.array(given, dtype=np.float64)
    if weight.shape != (len(y),) or not np.isfinite(weight).all() or (weight < 0).any():
        raise UserError("sample_weight must hold one number for each text, none below zero")
    if isinstance(class_weight, dict):  # not all classes need be in every portion
        weight *= compute_class_weight(class_weight, classes=classes, y=classes)[labels]
    elif class_weight is not None:
        counted = weight > 0
        weight[counted] *= compute_sample_weight(class_weight, y[counted])
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise UserError("class_weight must hold numbers that are not below zero")
    return weight


def with_weight(
    texts: list[str], labels: np.ndarray, weight: np.ndarray | None
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Those texts whose weight is not zero."""
    if weight is None or weight.all():
        return texts, labels, weight
    kept = np.flatnonzero(weight)
    return [texts[i] for i in kept], labels[kept], weight[kept]


def hold_out(labels: np.ndarray, fraction: float) -> tuple[list[int], list[int]]:
    """Indices of the texts to judge by, and of those to learn from."""
    size = round(len(labels) * fraction)
    if labels.ndim == 2:
        order = np.random.default_rng(0).permutation(len(labels)).tolist()
        held, rest = order[:size], order[size:]
    else:
        held, rest = stratified(labels.tolist(), size)
    everything = list(range(len(labels)))
    # Of a handful of texts none can be spared.
    return (held, rest) if held and rest else (everything, everything)


def targets_of(
    labels: np.ndarray, weight: np.ndarray | None, classes: int, *, balanced: bool = False
) -> np.ndarray:
    """What the loss is computed from: labels, or one-hot rows times the weights.

    The cross-entropy is linear in the target, so that a weight of 2 does what the same text
    twice does. Only the proportions of the weights matter. For several labels a text there are
    two rows, of the classes that it is of, and of those that it is not of: (n, 2, K).

    Args:
        labels: (n,) class indices, or (n, K) zeros and ones.
        weight: (n,) how often each text counts; None if all are alike.
        classes: K.
        balanced: of several labels a text, let yes and no count the same for every class.
    """
    if labels.ndim == 2 and (balanced or weight is not None):
        sides = np.stack([labels, 1 - labels], axis=1)  # (n, 2, K)
        if weight is not None:
            sides *= (weight / weight.mean())[:, None, None]
        if balanced:
            totals = sides.sum(axis=0)  # (2, K)
            sides *= totals.sum(axis=0) / (2 * np.where(totals > 0, totals, 1))
        return sides.astype(np.float32)
    if weight is None:
        return labels
    one_hot = np.eye(classes, dtype=np.float32)[labels]  # (n, K)
    return one_hot * (weight / weight.mean()).astype(np.float32)[:, None]


def check_numbers(parameters: Mapping[str, Any]) -> None:
    """Refuse what is no number, or no whole number, where one is wanted.

    Raises:
        UserError: naming the parameter.
    """
    for names, kind, what in ((WHOLE, Integral, "a whole number"), (SHARES, Real, "a number")):
        for name in names:
            value = parameters[name]
            if value is None and name in CHOSEN:
                continue
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{name} must be {what}, not {value!r}")
    if parameters["n_iter_no_change"] < 1:  # of --patience, 0 is what early_stopping=False is
        raise UserError(
            f"n_iter_no_change must be at least 1, not {parameters['n_iter_no_change']}"
        )


def in_parameters(message: str) -> str:
    """A sentence on options of the scripts as one on the parameters that are given instead."""
    names = {"patience": "n_iter_no_change"}
    return re.sub(
        r"--([a-z][a-z-]*)",
        lambda flag: names.get(flag[1], flag[1].replace("-", "_")),
        message,
    )


def plain(value: Any) -> Any:
    """A label or parameter as a value that JSON knows."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") else value


@contextmanager
def threads(n_jobs: int | None) -> Iterator[None]:
    """Compute with so many threads, and with as many as before afterwards.

    Raises:
        UserError: if it is no number of threads.
    """
    whole = isinstance(n_jobs, Integral) and not isinstance(n_jobs, bool)
    if n_jobs is not None and (not whole or n_jobs == 0):
        raise UserError("n_jobs must be a number of threads, -1 for all cores, or None")
    before = torch.get_num_threads()
    if n_jobs is not None:
        torch.set_num_threads(n_jobs if n_jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + n_jobs))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Generators start from `seed`, and stand where they stood before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
