"""Parts of files: cut, scored and rendered for bulk scoring, on this machine or another one."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nin_text import inference, readers
from nin_text.errors import UserError
from nin_text.options import PredictOptions
from nin_text.word_table import clean

logger = logging.getLogger(__name__)

# A part ends with the row by which it has one or the other.
PART_ROWS = 16_384
PART_CHARACTERS = 2**22
FORMAT_OF_PARTS = 1  # to be raised when equal inputs no longer give equal parts


@dataclass
class Part:
    """Some rows of one file, in order.

    Attributes:
        name: names sort in the order of the rows.
        file: index of the file.
        first: number of the first row, from 1.
        rows: how many there are.
        share: share of the file that is read when the part is.
        texts, ids: of each row; both empty if the part was scored by an earlier run.
    """

    name: str
    file: int
    first: int
    rows: int
    share: float
    texts: list[str] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)


Scored = tuple[Part, bytes | None]  # a part, and the content of its file if that is new


def read_parts(
    files: Mapping[int, Path], options: PredictOptions, whole: frozenset[str]
) -> Iterator[Part]:
    """Cut files into parts; of those in `whole` the rows are counted and not kept.

    A file without rows has no part.

    Raises:
        UserError: as of `stream_texts`, with the number of the last good row.
    """
    left = options.limit
    for index, path in files.items():
        done = 0
        rows = readers.stream_texts(path, options.text_column, options.id_column)
        if left is not None:
            rows = itertools.islice(rows, left)
        try:
            for number, (share, texts, ids) in enumerate(_cut(rows)):
                part = Part(f"{index:05}-{number:07}", index, done + 1, len(texts), share)
                if part.name not in whole:
                    part.texts, part.ids = texts, ids
                yield part
                done += part.rows
        except readers.NoRowsError as error:  # one of many: not all of them are such
            logger.warning("%s", error)
        if left is not None:
            left -= done
            if left == 0:
                return


def _cut(
    rows: Iterable[tuple[float, str, Any]],
) -> Iterator[tuple[float, list[str], list[Any]]]:
    texts: list[str] = []
    ids: list[Any] = []
    characters = seen = 0
    share = 1.0
    try:
        for share, text, key in rows:
            seen += 1
            texts.append(text)
            ids.append(_plain(key))
            characters += len(text)
            if len(texts) >= PART_ROWS or characters >= PART_CHARACTERS:
                yield share, texts, ids
                texts, ids, characters = [], [], 0
    except UserError as error:
        if not seen:
            raise
        raise UserError(f"{error} (after row {seen:,})") from error
    if texts:
        yield share, texts, ids


def _plain(key: Any) -> Any:
    """The name of a row as JSON can say it."""
    if key is None or key != key:
        return None
    plain = isinstance(key, int) or (isinstance(key, float) and math.isfinite(key))
    return key if plain else clean(str(key))


class Scorer:
    """A model that scores parts.

    Args:
        options: of the model, and of what its answers are to tell.

    Raises:
        UserError: if the model cannot be loaded.
    """

    def __init__(self, options: PredictOptions) -> None:
        self.options = options
        self.predictor = inference.load_predictor(options)

    def __call__(self, part: Part, file: str | None) -> bytes:
        """The answers to a part, as the file that it becomes.

        Args:
            part: its rows.
            file: name of the input to be told in each row, or None.
        """
        probabilities = self.predictor.predict_proba(part.texts)
        names = self.predictor.label_names
        columns = _columns(part, file, probabilities, names, self.options)
        assert self.options.output is not None
        return _RENDER[self.options.output.suffix.lower()](columns, names)


Columns = dict[str, list[Any]]


def _columns(
    part: Part,
    file: str | None,
    probabilities: np.ndarray,
    names: Sequence[str],
    options: PredictOptions,
) -> Columns:
    answers = probabilities.argmax(axis=1)
    rounded = probabilities.astype(np.float64).round(6)
    columns: Columns = {}
    if file is not None:
        columns["file"] = [clean(file)] * part.rows
    if options.id_column is None:
        columns["row"] = list(range(part.first, part.first + part.rows))
    else:
        columns["id"] = part.ids
    if options.keep_text:
        columns["text"] = [clean(text) for text in part.texts]
    columns["label"] = [clean(names[answer]) for answer in answers]
    columns["probability"] = rounded[np.arange(part.rows), answers].tolist()
    for i, name in enumerate(names):
        columns[f"probability_{clean(name)}"] = rounded[:, i].tolist()
    return columns


def _to_jsonl(columns: Columns, names: Sequence[str]) -> bytes:
    """As predict_text.py prints, with the probabilities of the classes in an object."""
    head = {key: values for key, values in columns.items() if not key.startswith("probability_")}
    classes = list(columns.values())[len(head) :]
    lines = [
        json.dumps(
            dict(zip(head, values, strict=True))
            | {"probabilities": dict(zip(names, probabilities, strict=True))},
            ensure_ascii=False,
        )
        for values, probabilities in zip(
            zip(*head.values(), strict=True), zip(*classes, strict=True), strict=True
        )
    ]
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


class _Lines(io.StringIO):
    """Rows of a csv.writer, each ended by a line feed.

    Told to end them so, the writer would not quote a carriage return, which ends a row for readers.
    """

    def write(self, row: str) -> int:
        return super().write(row.removesuffix("\r\n") + "\n")


def _to_csv(columns: Columns, names: Sequence[str]) -> bytes:
    text = _Lines()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode("utf-8", "replace")


def _to_parquet(columns: Columns, names: Sequence[str]) -> bytes:
    kinds = {"row": pa.int64(), "probability": pa.float64()}
    arrays = {}
    for key, values in columns.items():
        kind = pa.float64() if key.startswith("probability_") else kinds.get(key, pa.string())
        if key == "id":
            values = [None if value is None else str(value) for value in values]
        arrays[key] = pa.array(values, kind)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays), sink)
    return sink.getvalue().to_pybytes()


_RENDER: dict[str, Callable[[Columns, Sequence[str]], bytes]] = {
    ".jsonl": _to_jsonl,
    ".csv": _to_csv,
    ".parquet": _to_parquet,
}
FORMATS = tuple(_RENDER)


def join_parts(parts: Sequence[Path], target: Path) -> None:
    """One file of the parts, in order."""
    if parts[0].suffix == ".parquet":
        with pq.ParquetWriter(target, pq.read_schema(parts[0])) as writer:
            for path in parts:
                writer.write_table(pq.read_table(path))
        return
    header = _csv_header(parts[0]) if parts[0].suffix == ".csv" else b""
    with target.open("wb") as joined:
        joined.write(header)
        for path in parts:
            with path.open("rb") as part:
                part.seek(len(header))
                shutil.copyfileobj(part, joined)


def _csv_header(path: Path) -> bytes:
    """The first row as it is written; a class name may hold a line end."""
    text = _Lines()
    with path.open(encoding="utf-8", newline="") as file:
        csv.writer(text).writerow(next(csv.reader(file)))
    return text.getvalue().encode()


def input_name(files: Sequence[Path], part: Part) -> str | None:
    """What each row tells of its file: nothing if there is but one."""
    return str(files[part.file]) if len(files) > 1 else None
