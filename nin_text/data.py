"""From `--dataset` to texts, labels and splits; where it leads is in `sources.py`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nin_text import readers
from nin_text.errors import UserError
from nin_text.hub import is_hub_id
from nin_text.readers import Table
from nin_text.sources import KNOWN, find, local_path
from nin_text.splits import (
    SPLIT_SEED,
    announce,
    check_present,
    finish_splits,
    is_empty,
    label_indices,
    label_names_of,
    subset,
)

logger = logging.getLogger(__name__)

MIN_LABELLED = 20
WITHHELD = (-1, "-1", "-1.0")  # a label, as files of different kinds give it


@dataclass
class Split:
    """Texts and their label indices; labels are -1 where there are none."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Split:
        return Split([self.texts[i] for i in indices], [self.labels[i] for i in indices])


@dataclass
class TextDataset:
    """A labelled text data set.

    Attributes:
        name: what `--dataset` said.
        source: where it was found, in words.
        label_names: class names by index.
        splits: "train", "validation", "test"; "unsupervised" (labels -1) where there is one.
        notes: what a reader of the results must know, such as a partial training set.
        tested_on: what the data set itself calls the split "test".
    """

    name: str
    source: str
    label_names: list[str]
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)
    tested_on: str = "test"

    def labelled(self) -> TextDataset:
        """The same without unlabelled texts."""
        kept = {name: part for name, part in self.splits.items() if name != "unsupervised"}
        return replace(self, splits=kept)

    def fingerprint(self) -> str:
        """A hash of every text and label of every split that was read, in order."""
        digest = hashlib.sha256()
        for split in [name for name in readers.SPLIT_NAMES if name in self.splits]:
            for text, label in zip(
                self.splits[split].texts, self.splits[split].labels, strict=True
            ):
                digest.update(f"{split}\0{label}\0".encode())
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()[:16]


def load_text_dataset(
    name: str,
    *,
    dataset_config: str | None = None,
    data_dir: Path | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    drop_empty: bool = False,
    limit: int | None = None,
    unsupervised: bool = False,
    unlabelled_file: Path | None = None,
    labelled: int | None = None,
) -> TextDataset:
    """Find and read a data set, and make the splits that it does not bring.

    Args:
        name: a built-in corpus, a known name, a file, a folder, or a hub id; see README.
        dataset_config: which configuration of a hub id.
        data_dir: the first folder in which known names are looked for.
        text_column, label_column: columns to use; guessed from their names if None.
        drop_empty: leave out rows whose text is empty or missing instead of refusing them.
        limit: keep this many examples of each split, drawn with a fixed seed.
        unsupervised: also read the unlabelled texts, where there are any.
        unlabelled_file: more of them, see `readers.find_files`; those that are in the validation or
            test split are left out.
        labelled: use the labels of so many examples of training and validation split alone; the
            texts of the others are added to the unlabelled ones, if these are read.

    Raises:
        UserError: whatever is wrong with the data, in one sentence.
    """
    _check_config(name, dataset_config)
    raw = find(name, data_dir, dataset_config)
    if text_column is None and raw.text_columns:
        texts_from: tuple[str, ...] | None = raw.text_columns
    else:
        texts_from = None if text_column is None else (text_column,)
    usual_column = label_column is None
    label_column = label_column or raw.label_column
    columns: dict[str, tuple[list[str], list[Any] | None]] = {}
    notes, rows = list(raw.notes), 0
    for split, read in raw.tables.items():
        if split != "unsupervised" or unsupervised:
            table = read()
            if split == "train":
                rows = len(next(iter(table.values()), ()))
            if raw.is_copy and split != "unsupervised":
                if text_column is None and not set(raw.text_columns) <= set(table):
                    texts_from = None
                if usual_column and label_column not in table:
                    label_column = None
            columns[split] = _columns(table, split, texts_from, label_column, drop_empty, notes)
            if label_column is None and split != "unsupervised":
                label_column = readers.pick_column(
                    table, None, readers.LABEL_COLUMNS, "--label-column"
                )
    tested_on = _replace_withheld(columns, notes)
    if rows < raw.train_rows:
        notes.append(f"partial training set: {rows:,} of the {raw.train_rows:,} rows of {name}")
    given = list(raw.label_names or []) if usual_column else []
    given = given or raw.names_by_column.get(label_column or "", [])
    label_names = label_names_of(given, {split: part[1] for split, part in columns.items()})
    splits = {
        split: Split(texts, label_indices(labels, label_names, split))
        for split, (texts, labels) in columns.items()
    }
    if "unsupervised" in splits:
        splits["unsupervised"] = _unlabelled(splits["unsupervised"].texts)
    splits = finish_splits(splits, label_names, notes, limit)
    dataset = TextDataset(name, raw.source, label_names, splits, notes, tested_on)
    _finish_unlabelled(dataset, unlabelled_file, text_column, limit)
    if labelled is not None:
        dataset = _without_labels(dataset, labelled, keep_texts=unsupervised)
    announce(name, raw.source, label_names, dataset.splits, dataset.notes)
    return dataset


def _finish_unlabelled(
    dataset: TextDataset, file: Path | None, text_column: str | None, limit: int | None
) -> None:
    """Leave out of the unlabelled texts those that are judged by, and add those of a file."""
    splits = dataset.splits
    known = {text for split in ("validation", "test") for text in splits[split].texts}
    if "unsupervised" in splits and dataset.name not in KNOWN:  # which are taken as published
        texts = splits["unsupervised"].texts
        splits["unsupervised"] = _unlabelled([text for text in texts if text not in known])
        if left_out := len(texts) - len(splits["unsupervised"]):
            dataset.notes.append(f"{left_out:,} unlabelled texts are left out: they are judged by")
    if file is not None:
        more = _read_unlabelled(file, text_column, known)
        before = splits.get("unsupervised", Split([], [])).texts
        splits["unsupervised"] = _unlabelled([*before, *more])
        if limit is not None:
            splits["unsupervised"] = subset(splits["unsupervised"], limit)


def load_data_of_run(metrics: Mapping[str, Any], **given: Any) -> TextDataset:
    """The data set that a finished run was trained on, read and split as it was then.

    Args:
        metrics: of the run, see `options.run_metrics`.
        given: arguments of `load_text_dataset` that come before the recorded ones, unless empty.

    Raises:
        UserError: if the metrics do not tell, or the data cannot be had.
    """
    name, recorded = dataset_of_run(metrics), metrics.get("options", {})
    if name is None:
        raise UserError("it is no run that tells what it was trained on")
    kinds: dict[str, type] = dict.fromkeys(("dataset_config", "text_column", "label_column"), str)
    kinds |= {"drop_empty": bool, "limit": int, "labelled": int}
    arguments: dict[str, Any] = {
        option: recorded[option]
        for option, kind in kinds.items()
        if isinstance(recorded.get(option), kind)
    }
    arguments |= {option: value for option, value in given.items() if value}
    return load_text_dataset(name, **arguments)


def dataset_of_run(metrics: Mapping[str, Any]) -> str | None:
    """What `--dataset` of a finished run was; None if its metrics do not tell."""
    recorded = metrics.get("options")
    name = recorded.get("dataset") if isinstance(recorded, dict) else None
    return name if isinstance(name, str) else None


def load_split(
    name: str,
    split: str,
    label_names: Sequence[str],
    *,
    dataset_config: str | None = None,
    data_dir: Path | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    drop_empty: bool = False,
    limit: int | None = None,
) -> tuple[Split, str, list[str]]:
    """One split of a data set, labelled with the class indices of a trained model.

    Args:
        name: as for `load_text_dataset`; of a single file, all rows are taken.
        split: "train", "validation" or "test".
        label_names: the model's class names by index.
        dataset_config, data_dir, text_column, label_column, drop_empty, limit: as for
            `load_text_dataset`.

    Returns:
        The split, where it was found, and notes.

    Raises:
        UserError: also if the data has a class that the model does not know.
    """
    path = local_path(name)
    if path.is_file():
        _check_config(name, dataset_config)
        notes: list[str] = []
        columns = None if text_column is None else (text_column,)
        table = readers.read_file(path)
        texts, labels = _columns(table, path.name, columns, label_column, drop_empty, notes)
        check_present({path.name: labels})
        part = Split(texts, label_indices(labels, label_names, path.name))
        return (part if limit is None else subset(part, limit)), str(path), notes
    data = load_text_dataset(
        name,
        dataset_config=dataset_config,
        data_dir=data_dir,
        text_column=text_column,
        label_column=label_column,
        drop_empty=drop_empty,
        limit=limit,
    )
    part = data.splits["test" if split == data.tested_on else split]
    if data.label_names != list(label_names):
        part = Split(
            part.texts,
            label_indices([data.label_names[label] for label in part.labels], label_names, split),
        )
    return part, data.source, data.notes


def labelled_examples(dataset: TextDataset) -> int:
    """How many there are to learn from and to choose by: training and validation split."""
    return len(dataset.splits["train"]) + len(dataset.splits["validation"])


def fewest_labelled(dataset: TextDataset) -> int:
    """How many labelled examples training takes at the least."""
    return max(MIN_LABELLED, 2 * len(dataset.label_names))


def reduced(dataset: TextDataset, size: int) -> TextDataset:
    """The data set with `size` labelled examples in all, and the whole test split.

    Training and validation split keep their shares; smaller sizes are parts of larger ones.
    """
    splits = dict(dataset.splits)
    held_out = max(1, round(size * len(splits["validation"]) / labelled_examples(dataset)))
    held_out = min(held_out, size // 2)  # the rest has an example of each class
    for split, kept in (("validation", held_out), ("train", size - held_out)):
        splits[split] = splits[split].take(_order(splits[split])[:kept])
    return replace(dataset, splits=splits)


def _without_labels(dataset: TextDataset, size: int, *, keep_texts: bool) -> TextDataset:
    """`reduced`, whose other texts are unlabelled ones if they are kept."""
    least, most = fewest_labelled(dataset), labelled_examples(dataset)
    if not least <= size <= most:
        raise UserError(
            f"--labelled must be between {least} and the {most:,} labelled examples that there "
            f"are, not {size}"
        )
    small = reduced(dataset, size)
    what = "the others are left out"
    if keep_texts:
        others = [
            text
            for split in ("train", "validation")
            for text in dataset.splits[split]
            .take(_order(dataset.splits[split])[len(small.splits[split]) :])
            .texts
        ]
        small.splits["unsupervised"] = _unlabelled(
            [*small.splits.get("unsupervised", Split([], [])).texts, *others]
        )
        what = f"the texts of the other {most - size:,} are used without theirs"
    note = f"the labels of {size:,} of {most:,} examples are used; {what}"
    return replace(small, notes=[*small.notes, note])


def _order(split: Split) -> list[int]:
    """A fixed order of the indices that puts one example of each class in front."""
    import numpy as np

    order = np.random.default_rng(SPLIT_SEED).permutation(len(split))
    _, first = np.unique(np.asarray(split.labels)[order], return_index=True)
    first.sort()  # by that order, not by class: the split may have fewer examples than classes
    return np.concatenate([order[first], np.delete(order, first)]).tolist()


def _unlabelled(texts: list[str]) -> Split:
    return Split(texts, [-1] * len(texts))


def _read_unlabelled(place: Path, text_column: str | None, known: set[str]) -> list[str]:
    """The texts of one or more files that are not empty and not among the known ones."""
    texts: list[str] = []
    for path in readers.find_files(place):
        try:
            texts += [text for _, text, _ in readers.stream_texts(path, text_column)]
        except UserError:
            if text_column is None:
                raise
            # The column may have that name in the labelled data alone.
            texts += [text for _, text, _ in readers.stream_texts(path)]
    kept = [text for text in texts if not is_empty(text) and text not in known]
    if not kept:
        raise UserError(f"{place} holds no text but empty ones and those that are judged by")
    if len(kept) < len(texts):
        left_out = len(texts) - len(kept)
        logger.info("%s: %s texts are empty or in validation or test split", place, left_out)
    return kept


def _check_config(name: str, configuration: str | None) -> None:
    if configuration is not None and not is_hub_id(name):
        raise UserError(
            f"--dataset-config is for data sets on the hub (owner/name), and {name} is none"
        )


# ---- texts and labels --------------------------------------------------------------------------


def _replace_withheld(
    columns: dict[str, tuple[list[str], list[Any] | None]], notes: list[str]
) -> str:
    """Judge by the validation split where all labels of the test split are withheld (-1, GLUE).

    Returns:
        What the data set itself calls the split that is "test" now.
    """
    withheld = {
        split
        for split, (_, labels) in columns.items()
        if labels and all(label in WITHHELD for label in labels)
    }
    train = columns.get("train", ([], None))[1] or []
    if "test" not in withheld or any(label in WITHHELD for label in train):
        return "test"
    for split in withheld:
        del columns[split]
    if "validation" not in columns:
        notes.append("the test split has no labels (all are -1) and is left out")
        return "test"
    columns["test"] = columns.pop("validation")
    notes.append("the labels of the test split are withheld: its validation split is tested on")
    return "validation"


def _columns(
    table: Table,
    split: str,
    text_columns: tuple[str, ...] | None,
    label_column: str | None,
    drop_empty: bool,
    notes: list[str],
) -> tuple[list[str], list[Any] | None]:
    """Texts and labels of one split; labels are None for the unlabelled one."""
    if text_columns is None:
        text_columns = (readers.pick_column(table, None, readers.TEXT_COLUMNS, "--text-column"),)
    for name in text_columns:
        readers.pick_column(table, name, [], "--text-column")
    texts = table[text_columns[0]]
    if len(text_columns) > 1:
        parts = zip(*(table[name] for name in text_columns), strict=True)
        texts = [" ".join(str(part) for part in row if part is not None) for row in parts]
    labels = None
    if split != "unsupervised":
        label_column = readers.pick_column(
            table, label_column, readers.LABEL_COLUMNS, "--label-column"
        )
        if label_column in text_columns:
            raise UserError(f"the text and the label cannot both be column {label_column!r}")
        labels = table[label_column]
    empty = [i for i, text in enumerate(texts) if is_empty(text)]
    if empty and not drop_empty:
        raise UserError(
            f"{len(empty)} of {len(texts)} texts of the {split} split are empty or missing "
            f"(the first in row {empty[0] + 1}); correct them or leave them out with --drop-empty"
        )
    if empty:
        notes.append(f"{len(empty)} empty rows of the {split} split were left out")
        keep = sorted(set(range(len(texts))) - set(empty))
        texts = [texts[i] for i in keep]
        labels = None if labels is None else [labels[i] for i in keep]
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise UserError(
            f"column {text_columns[0]!r} holds {type(texts[wrong]).__name__} values, not text "
            f"(row {wrong + 1}); name the text column with --text-column"
        )
    return texts, labels
