"""Read labelled text from files and folders into plain tables.

A table is a dict of column name to list of values. Everything a person can get wrong about a file
is answered with one sentence (`UserError`).
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from nin_text.errors import UserError

Table = dict[str, list[Any]]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TEXT_COLUMNS = (
    "text sentence review content document question body comment message title headline".split()
)
LABEL_COLUMNS = "label labels sentiment category class topic target coarse_label stars".split()
# The names that the parts of a data set go by, most telling first.
SPLIT_NAMES = {
    "train": ("train", "train_phrases", "train_subset", "train_sentences", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
    "unsupervised": ("unsupervised", "unlabelled", "unlabeled", "unsup"),
}


def suffix_of(path: Path) -> str:
    """The ending that tells the format: `.csv` for both `a.csv` and `a.csv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2", ".xz", ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(path: Path) -> Table:
    """Read a CSV, TSV, JSON-lines or Parquet file (gzip and the like included).

    Raises:
        UserError: if the file is missing, empty, in another format or damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if suffix_of(path) not in SUFFIXES:
        raise UserError(f"{path} has an ending that is not one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    try:
        table = _read(path)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path} could not be read as {suffix_of(path)[1:].upper()} ({reason})"
        ) from error
    if not table or not next(iter(table.values())):
        raise UserError(f"{path} holds no rows")
    return table


def _read(path: Path) -> Table:
    import pandas as pd

    suffix = suffix_of(path)
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pydict()
    with pd.io.common.get_handle(path, "rb", compression="infer", is_text=False) as handles:
        raw = handles.handle.read()
    if b"\0" in raw[:65536] and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is a binary file, not text; check that it is what its name says")
    text = _decode(raw, path)
    if suffix in (".jsonl", ".json"):
        return _read_json(text, path)
    return _read_delimited(text, path, "\t" if suffix == ".tsv" else ",")


def _decode(raw: bytes, path: Path) -> str:
    """UTF-8, or UTF-16 if it says so in its first bytes."""
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not {encoding.removesuffix('-sig').upper()} text (byte {error.start}); "
            f"save it as UTF-8"
        ) from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends; lines without any text are left out.

    Raises:
        UserError: if the file is missing, empty or not text.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    lines = [line for line in _decode(path.read_bytes(), path).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


def _read_json(text: str, path: Path) -> Table:
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}, is not JSON: {error.msg}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must hold one JSON object on each line")
    columns = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in columns}


def _read_delimited(text: str, path: Path, delimiter: str) -> Table:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = next(reader, None)
    if header is None:
        raise UserError(f"{path} holds no rows")
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise UserError(f"{path} has several columns named {sorted(repeated)[0]!r}")
    columns: list[list[Any]] = [[] for _ in header]
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {reader.line_num}, has {len(row)} fields where the header has "
                f"{len(header)}; texts that hold a {delimiter!r} must be quoted"
            )
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    return dict(zip(header, columns, strict=True))


def read_class_folders(folder: Path) -> Table:
    """Read `<folder>/<class>/*.txt`: one text a file, the folder names are the labels.

    A class folder named like unlabelled data (`unsup` in aclImdb) is left out.
    """
    texts: list[str] = []
    labels: list[str] = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        if class_folder.name in SPLIT_NAMES["unsupervised"]:
            continue
        read = read_text_files(class_folder)["text"]
        texts += read
        labels += [class_folder.name] * len(read)
    if not texts:
        raise UserError(f"{folder} holds no .txt files in folders named after the classes")
    return {"text": texts, "label": labels}


def read_text_files(folder: Path) -> Table:
    """Read `<folder>/*.txt`: one text a file, without labels."""
    paths = sorted(folder.glob("*.txt"))
    return {"text": [_decode(path.read_bytes(), path) for path in paths]}


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder that hold a part of a data set, by the part's name."""
    found: dict[str, list[Path]] = {}
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and suffix_of(p) in SUFFIXES]
    for split, names in SPLIT_NAMES.items():
        for name in names:
            found.setdefault(split, []).extend(
                path for path in files if path.name.split(".")[0] == name
            )
    return {split: paths for split, paths in found.items() if paths}


def pick_column(table: Table, wanted: str | None, usual: list[str], option: str) -> str:
    """The column asked for, or the first of the usual names that the table has.

    Raises:
        UserError: if the table lacks it; the message names the columns that are there.
    """
    columns = ", ".join(repr(name) for name in list(table)[:20])
    if wanted is not None:
        if wanted not in table:
            raise UserError(f"there is no column {wanted!r}; the columns are {columns}")
        return wanted
    lower = {str(name).lower(): name for name in reversed(table)}
    for name in usual:
        if name in lower:
            return lower[name]
    raise UserError(f"cannot tell which column to use among {columns}; name it with {option}")
