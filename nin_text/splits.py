"""What data sets of texts and of images share: splits that they lack, labels, checks."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

from nin_text.errors import UserError

logger = logging.getLogger(__name__)

SPLIT_SEED = 20131216  # the day the paper was posted; never the training seed
VALIDATION_SHARE = 0.1
MAX_VALIDATION = 5000
MIN_EXAMPLES = 10


class Examples(Protocol):
    """Texts or images and their label indices; labels are -1 where there are none."""

    labels: list[int]

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Self:
        """Those of the given indices, in that order."""
        ...


Part = TypeVar("Part", bound=Examples)


def finish_splits(
    splits: Mapping[str, Part], names: Sequence[str], notes: list[str], limit: int | None
) -> dict[str, Part]:
    """Splits "train", "validation" and "test" of what a data set brings, checked.

    Validation, and test where there is none, are carved from train with a fixed seed.

    Args:
        splits: those that there are.
        names: class names by index.
        notes: what a reader of the results must know is added here.
        limit: keep this many examples of each split, drawn with a fixed seed.

    Raises:
        UserError: if no classifier could be trained or judged.
    """
    finished = dict(splits)
    if "train" not in finished:
        raise UserError("there is no training split (a file named train.*)")
    total = len(finished["train"])
    for split in ("test", "validation"):
        if split not in finished:
            train = finished["train"]
            size = min(math.ceil(len(train) * VALIDATION_SHARE), MAX_VALIDATION)
            if total < MIN_EXAMPLES:
                raise UserError(f"{total} examples are too few to train and test on")
            taken, rest = stratified(train.labels, size)
            finished[split], finished["train"] = train.take(taken), train.take(rest)
            notes.append(
                f"the {split} split is {len(taken):,} examples carved from train (fixed seed)"
            )
    if limit is not None:
        finished = {split: subset(part, limit) for split, part in finished.items()}
        notes.append(f"at most {limit} examples of each split were used (--limit)")
    _check_labels(finished, names, notes)
    return finished


def announce(
    name: str,
    source: str,
    label_names: Sequence[str],
    splits: Mapping[str, Examples],
    notes: Sequence[str],
) -> None:
    """Log what was read."""
    counts = ", ".join(f"{len(part):,} {split}" for split, part in splits.items())
    logger.info("%s from %s: %s", name, source, counts)
    logger.info("classes: %s", ", ".join(label_names))
    for note in notes:
        logger.warning("note: %s", note)


def stratified(
    labels: Sequence[int], size: int, *, leave_one: bool = True
) -> tuple[list[int], list[int]]:
    """Indices of `size` examples with the class shares of all, and of the rest; both in order.

    Args:
        labels: of all examples.
        size: how many are taken.
        leave_one: of each class at least one stays with the rest.
    """
    import numpy as np

    rng = np.random.default_rng(SPLIT_SEED)
    order = rng.permutation(len(labels))
    by_class: dict[int, list[int]] = {}
    for i in order:
        by_class.setdefault(labels[i], []).append(int(i))
    # Interleave the classes by the share of each that has been dealt: every prefix is stratified.
    ranked = sorted(
        ((rank + 0.5) / len(members), label, i)
        for label, members in by_class.items()
        for rank, i in enumerate(members[:-1] if leave_one else members)
    )
    taken = sorted(i for _, _, i in ranked[:size])
    chosen = set(taken)
    return taken, [i for i in range(len(labels)) if i not in chosen]


def subset(split: Part, limit: int) -> Part:
    """At most `limit` examples, drawn with a fixed seed and, where there are labels, by class."""
    if limit >= len(split):
        return split
    if split.labels and split.labels[0] >= 0:
        return split.take(stratified(split.labels, limit, leave_one=False)[0])
    import numpy as np

    drawn = np.random.default_rng(SPLIT_SEED).permutation(len(split))[:limit]
    return split.take(sorted(drawn.tolist()))


def _check_labels(splits: Mapping[str, Examples], names: Sequence[str], notes: list[str]) -> None:
    counts = Counter(splits["train"].labels)
    if len(counts) < 2:
        raise UserError(
            f"all training examples have the same label ({names[next(iter(counts))]}); "
            f"a classifier needs at least two classes"
        )
    for split in ("validation", "test"):
        if not len(splits[split]):
            raise UserError(
                f"the {split} split is empty; there must be classes with two examples and more"
            )
    for split in ("train", "test"):
        missing = sorted(set(range(len(names))) - set(splits[split].labels))
        if missing:
            shown = ", ".join(names[i] for i in missing[:10])
            notes.append(f"{len(missing)} classes have no example in the {split} split: {shown}")


# ---- labels ------------------------------------------------------------------------------------


def is_empty(value: Any) -> bool:
    """Whether a cell of a table holds nothing: None, NaN or blanks."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return missing or (isinstance(value, str) and not value.strip())


def _is_missing(label: Any) -> bool:
    """Empty, or what programs write for a number that is missing or has overflowed."""
    if isinstance(label, float):
        return not math.isfinite(label)
    return is_empty(label) or (isinstance(label, str) and label.strip().lower() == "nan")


def label_key(value: Any) -> int | str:
    """A label as a number where it is one (1, 1.0, "1", True), else as text."""
    if isinstance(value, (list, tuple, dict, bytes)):
        raise UserError(f"labels must be single values, not {type(value).__name__} values")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (bool, int)):
        return int(value)
    # Lone surrogates, which no file can hold, become question marks.
    text = str(value).strip().encode("utf-8", "replace").decode()
    number = text.isdecimal() and text.isascii() and len(text) < 19 and str(int(text)) == text
    return int(text) if number else text


def label_names_of(given: list[str], labels: Mapping[str, Sequence[Any] | None]) -> list[str]:
    """Class names by index: those that the data set brings, or its training labels in order.

    Args:
        given: names that the data set brings, if any.
        labels: of each split, as they were found; None where there are none.

    Raises:
        UserError: if a label is missing.
    """
    check_present(labels)
    reference = labels["train"] if "train" in labels else next(iter(labels.values()))
    keys = {label_key(label) for label in reference or []}
    if given and keys <= set(range(len(given))):
        return given
    numbers = sorted(key for key in keys if isinstance(key, int))
    words = sorted(key for key in keys if isinstance(key, str))
    return [str(key) for key in [*numbers, *words]]


def check_present(by_split: Mapping[str, Sequence[Any] | None]) -> None:
    """Refuse labels that are missing."""
    for split, labels in by_split.items():
        bad = [i for i, label in enumerate(labels or []) if _is_missing(label)]
        if bad:
            raise UserError(
                f"{len(bad)} of {len(labels or [])} labels of the {split} split are missing or "
                f"NaN (the first in row {bad[0] + 1}); correct these rows or leave them out"
            )


def label_indices(labels: Sequence[Any] | None, names: Sequence[str], split: str) -> list[int]:
    """Class indices from labels that are names, indices, or either as text."""
    index = {name: i for i, name in enumerate(names)}
    # Numbers count classes only where no class is itself named by a number: a label 0 beside the
    # classes "1" and "2" is unknown, not the first of them.
    named_by_number = any(isinstance(label_key(name), int) for name in names)
    if labels is None:
        return []
    result = []
    for row, label in enumerate(labels):
        key = label_key(label)
        if str(key) in index:
            result.append(index[str(key)])
        elif isinstance(key, int) and not named_by_number and 0 <= key < len(names):
            result.append(key)
        else:
            raise UserError(
                f"the {split} split has the label {label!r} (row {row + 1}), which is not among "
                f"the classes trained on: {', '.join(map(repr, names[:20]))}"
            )
    return result
