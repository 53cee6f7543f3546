"""Where `--dataset` leads: built-in corpora, known names, files, folders and hub ids, as tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nin_text import demo_data, readers
from nin_text.errors import UserError
from nin_text.hub import is_hub_id, load_from_hub
from nin_text.readers import Table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """Where a well-known data set lives.

    Attributes:
        hub_id: its id on the Hugging Face hub.
        labels: class names by index; None to take those that the data set brings.
        train_rows: size of the whole training set, to say so when a copy holds a part of it.
        text_columns: columns of the hub's copy that make up the text, joined by a space.
        label_column: column of the hub's copy that holds the label. Those of a copy in a folder are
            guessed where it has others.
    """

    hub_id: str
    labels: tuple[str, ...] | None
    train_rows: int
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"


KNOWN = {
    "imdb": Known("stanfordnlp/imdb", ("negative", "positive"), 25_000),
    "ag_news": Known("fancyzhx/ag_news", ("World", "Sports", "Business", "Sci/Tech"), 120_000),
    # GLUE's copy has no labels for the test sentences; this one has.
    "sst2": Known("SetFit/sst2", ("negative", "positive"), 67_349),
    "trec": Known(
        "CogComp/trec",
        ("abbreviation", "entity", "description", "human", "location", "number"),
        5_452,
        label_column="coarse_label",
    ),
    "yelp_polarity": Known("fancyzhx/yelp_polarity", ("negative", "positive"), 560_000),
    "dbpedia_14": Known("fancyzhx/dbpedia_14", None, 560_000, text_columns=("title", "content")),
    "20newsgroups": Known("SetFit/20_newsgroups", None, 11_314, label_column="label_text"),
    "rotten_tomatoes": Known(
        "cornell-movie-review-data/rotten_tomatoes", ("negative", "positive"), 8_530
    ),
}


@dataclass
class Raw:
    """A data set as found: what reads the table of each split, and what is known about it."""

    source: str
    tables: dict[str, Callable[[], Table]]
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    label_names: Sequence[str] | None = None  # of the usual label column
    names_by_column: dict[str, list[str]] = field(default_factory=dict)
    train_rows: int = 0  # of the whole data set, of which this may be a part
    is_copy: bool = False  # which may have other columns than these
    notes: list[str] = field(default_factory=list)


def local_path(name: str) -> Path:
    """What `--dataset` names, as a path, whether there is such a file or not.

    Raises:
        UserError: if it can be none.
    """
    if not name:
        raise UserError("--dataset is empty; give a name, a file, a folder or a hub id")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"there is no file or folder {name}") from error


def find(name: str, data_dir: Path | None, configuration: str | None) -> Raw:
    if name in demo_data.LABELS:
        tables: dict[str, Callable[[], Table]] = {
            part: partial(dict, text=texts, label=labels)
            for part, (texts, labels) in demo_data.generate(name).items()
        }
        return Raw("generated", tables, ("text",), "label", demo_data.LABELS[name])
    if name in KNOWN:
        return _find_known(name, data_dir)
    path = local_path(name)
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return Raw(str(path), {"train": partial(readers.read_file, path)})
    if readers.suffix_of(path) in readers.SUFFIXES or name.startswith((".", "/", "~")):
        raise UserError(f"there is no file or folder {name}")
    if not is_hub_id(name):
        raise UserError(
            f"there is no data set {name!r}: it is not a file or folder, not a hub id "
            f"(owner/name), and not one of {', '.join([*demo_data.LABELS, *KNOWN])}"
        )
    return _from_hub(name, [], configuration)


def places_of(name: str, data_dir: Path | None) -> list[Path]:
    """Where a known data set is looked for, in this order, before the hub."""
    folders = [data_dir, os.environ.get("NIN_TEXT_DATA"), "data"]
    return [Path(folder) / name for folder in folders if folder]


def _find_known(name: str, data_dir: Path | None) -> Raw:
    known = KNOWN[name]
    places = places_of(name, data_dir)
    copy = next((place for place in places if place.is_dir()), None)
    if copy is not None:
        raw = _read_folder(copy)
        raw.is_copy = True
    else:
        raw = _from_hub(known.hub_id, [str(place) for place in places])
    raw.text_columns = known.text_columns
    raw.label_column = known.label_column
    raw.label_names = raw.label_names or known.labels
    raw.train_rows = known.train_rows
    return raw


def _read_folder(folder: Path) -> Raw:
    if (saved := load_from_disk(folder)) is not None:
        return _from_datasets(saved, str(folder))
    files = readers.split_files(folder)
    if files:
        raw = Raw(str(folder), {})
        for split, paths in files.items():
            raw.tables[split] = partial(readers.read_file, paths[0])
            if len(paths) > 1:
                others = ", ".join(path.name for path in paths[1:])
                logger.info("%s: %s is used, not %s", folder, paths[0].name, others)
        if "train" in files and "subset" in files["train"][0].name:
            raw.notes.append(f"the training file {files['train'][0].name} is a subset")
        return raw
    names = readers.pick_splits(lambda name: (folder / name).is_dir())
    parts = {split: folder / name for split, name in names.items()}
    if parts:  # aclImdb and its like: train/<class>/*.txt
        tables: dict[str, Callable[[], Table]] = {
            split: partial(readers.read_class_folders, part) for split, part in parts.items()
        }
        for name in readers.SPLIT_NAMES["unsupervised"]:
            for place in (folder / name, folder / "train" / name):
                if place.is_dir():
                    tables["unsupervised"] = partial(readers.read_text_files, place)
        return Raw(str(folder), tables)
    return Raw(str(folder), {"train": partial(readers.read_class_folders, folder)})


def load_from_disk(folder: Path) -> Any:
    """What `save_to_disk` of `datasets` left in a folder; None if it holds something else.

    Raises:
        UserError: if it is damaged.
    """
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder} is not a readable saved data set ({error})") from error


def _from_hub(hub_id: str, places: list[str], configuration: str | None = None) -> Raw:
    """Load a data set from the Hugging Face hub or its local cache."""
    advice = (
        f"looked in {', '.join(places)}; put train.parquet and test.parquet (columns text and "
        f"label) there, or name the folder above it with --data-dir or NIN_TEXT_DATA"
        if places
        else "give the path of a local copy"
    )
    source = f"hub:{hub_id}" + (f", {configuration}" if configuration else "")
    option = "" if places else "--dataset-config"  # known names have what they need
    return _from_datasets(load_from_hub(hub_id, advice, configuration, option), source)


def _from_datasets(loaded: Any, source: str) -> Raw:
    """A `datasets.Dataset` or `DatasetDict` as tables."""
    import datasets

    parts = loaded if isinstance(loaded, dict) else {"train": loaded}
    raw = Raw(source, {})
    for split, name in readers.pick_splits(parts.__contains__, readers.SPLIT_NAMES).items():
        raw.tables[split] = parts[name].to_dict
    if not raw.tables:
        raise UserError(f"{source} has no split named train or test, only {', '.join(parts)}")
    features = next(iter(parts.values())).features
    raw.names_by_column = {
        name: list(feature.names)
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return raw
