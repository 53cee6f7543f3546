"""Read labelled text from files and folders into plain tables.

A table is a dict of column name to list of values. Everything a person can get wrong about a file
is answered with one sentence (`UserError`).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from nin_text.errors import UserError, in_one_line

Table = dict[str, list[Any]]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
STREAMED = (*SUFFIXES, ".txt")
JSON_SUFFIXES = (".jsonl", ".json")
# First bytes that tell an encoding; those of UTF-32 begin like one of UTF-16.
MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
HEAD_BYTES = 65_536
CHUNK_BYTES = 2**20
SAMPLE = 1000  # JSON objects whose keys are the columns of a stream
# A longer field is a quote that is never closed, a longer line no text; neither must take the
# memory of a whole file, which may have been a thousand times smaller before it was unpacked.
MAX_CHARACTERS = 2**26
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
LABELLED_SPLITS = ("train", "validation", "test")


class NoRowsError(UserError):
    """A file of the right kind that holds no row."""


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
    with reading(path, SUFFIXES):
        table = _read(path)
    if not table or not next(iter(table.values())):
        raise UserError(f"{path} holds no rows")
    return table


def find_files(place: Path) -> list[Path]:
    """The files that a path stands for: itself, those of a folder, or those that a pattern matches.

    Args:
        place: a file, a folder with files that `stream_texts` reads, or a pattern such as
            `data/*.csv` (`**` for any folders between). The files come in the order of their names.

    Raises:
        UserError: if there are none.
    """
    place = place.expanduser()  # a pattern in quotes has not seen a shell
    if place.is_dir():
        files = [path for path in place.iterdir() if suffix_of(path) in STREAMED]
        message = f"{place} holds no files that end in {', '.join(STREAMED)}"
    elif place.exists() or not set("*?[") & set(str(place)):
        return [place]
    else:
        try:
            files = list(Path(place.anchor).glob(str(place.relative_to(place.anchor))))
        except ValueError as error:
            raise UserError(f"{place} is no pattern of files ({in_one_line(error)})") from error
        message = f"no file matches {place}"
    files = [path for path in files if path.is_file() and not path.name.startswith(".")]
    if not files:
        raise UserError(message)
    return sorted(files)


def stream_texts(
    path: Path, text_column: str | None = None, id_column: str | None = None
) -> Iterator[tuple[float, str, Any]]:
    """The texts of a file of any size, one after another, in little memory.

    Besides the formats of `read_file` there is .txt with a text on each line, of which lines
    without any text are left out. The columns of JSON lines are those of the first `SAMPLE`
    objects. A JSON array is read as a whole.

    Args:
        path: the file.
        text_column: column that holds the text, None to guess it; .txt has but one.
        id_column: another column whose values are wanted, or None.

    Yields:
        For each row: the share of the file that has been read (0 to 1), the text (empty if it is
        missing), and the value of the id column (None if there is none).

    Raises:
        NoRowsError: if there is no row.
        UserError: as of `read_file`, at the row where the trouble is; or if a column is missing.
    """
    lines_alone = suffix_of(path) == ".txt"

    def pick(columns: Iterable[str]) -> list[str]:
        table: Table = {name: [] for name in columns}
        wanted = None if lines_alone else text_column
        picked = [pick_column(table, wanted, TEXT_COLUMNS, "--text-column")]
        if id_column is not None:
            picked.append(pick_column(table, id_column, [], "--id-column"))
        return picked

    empty = True
    with reading(path, STREAMED):
        for share, (text, *others) in _stream(path, pick):
            empty = False
            missing = text is None or text != text  # NaN, which alone differs from itself
            if isinstance(text, (list, dict, bytes)):
                raise UserError(
                    f"{path} holds {type(text).__name__} values where texts are expected; name "
                    f"the text column with --text-column"
                )
            yield share, "" if missing else str(text), others[0] if others else None
    if empty:
        raise NoRowsError(f"{path} {'is empty' if lines_alone else 'holds no rows'}")


@contextmanager
def reading(path: Path, suffixes: Sequence[str]) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one sentence."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if suffix_of(path) not in suffixes:
        raise UserError(f"{path} has an ending that is not one of {', '.join(suffixes)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = in_one_line(error)
        raise UserError(
            f"{path} could not be read as {suffix_of(path)[1:].upper()} ({reason})"
        ) from error


def _read(path: Path) -> Table:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pydict()
    with open_text(path) as (lines, _):
        if suffix in JSON_SUFFIXES:
            objects = list(_json_objects(lines, path))
            names = dict.fromkeys(name for row in objects for name in row)
            return {name: [row.get(name) for row in objects] for name in names}
        header, rows = _delimited(lines, path)
        columns: list[list[Any]] = [[] for _ in header]
        for row in rows:
            for column, value in zip(columns, row, strict=True):
                column.append(value)
        return dict(zip(header, columns, strict=True))


def _stream(
    path: Path, pick: Callable[[Iterable[str]], list[str]]
) -> Iterator[tuple[float, Sequence[Any]]]:
    """For each row, the share of the file that is read, and the values of the columns picked."""
    suffix = suffix_of(path)
    if suffix == ".parquet":
        yield from _stream_parquet(path, pick)
        return
    with open_text(path) as (lines, share):
        if suffix == ".txt":
            pick(["text"])
            for line in lines:
                if line.strip():
                    yield share(), [line.rstrip("\r\n")]
        elif suffix in JSON_SUFFIXES:
            objects = _json_objects(lines, path)
            first = list(itertools.islice(objects, SAMPLE))
            if first:
                names = pick(dict.fromkeys(name for row in first for name in row))
                for row in itertools.chain(first, objects):
                    yield share(), [row.get(name) for name in names]
        else:
            header, rows = _delimited(lines, path)
            places = [header.index(name) for name in pick(header)]
            for values in rows:
                yield share(), [values[place] for place in places]


def _stream_parquet(
    path: Path, pick: Callable[[Iterable[str]], list[str]]
) -> Iterator[tuple[float, Sequence[Any]]]:
    import pyarrow.parquet

    # So pages are read as they are needed, and not a whole row group, which may be the whole file.
    streaming: dict[str, Any] = {"buffer_size": CHUNK_BYTES, "pre_buffer": False}
    with pyarrow.parquet.ParquetFile(path, **streaming) as file:
        names = pick(file.schema_arrow.names)
        total, done = file.metadata.num_rows, 0
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        widest = max((g.total_byte_size / max(g.num_rows, 1) for g in groups), default=1)
        rows = int(min(max(CHUNK_BYTES / max(widest, 1), 1), SAMPLE))
        for batch in file.iter_batches(rows, columns=names, use_threads=False):
            for values in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                done += 1
                yield done / total, values


@contextmanager
def open_text(
    path: Path, errors: str = "strict"
) -> Iterator[tuple[Iterable[str], Callable[[], float]]]:
    """The decoded lines of a file, and what tells the share of it that has been read.

    UTF-8, or UTF-16 or UTF-32 if it says so in its first bytes. Line ends stay as they are; those
    of JSON are line feeds alone. `errors` is what to do about bytes that are no text, as of `open`.
    """
    with path.open("rb") as file, _decompressed(file, path) as stream:
        counted: Any = _Counted(stream)
        marked = (name for mark, name in MARKS.items() if counted.head.startswith(mark))
        encoding = next(marked, "utf-8-sig")
        if b"\0" in counted.head and encoding == "utf-8-sig":
            raise UserError(
                f"{path} is a binary file, not text; check that it is what its name says"
            )
        newline = "\n" if suffix_of(path) in JSON_SUFFIXES else ""
        lines = io.TextIOWrapper(counted, encoding=encoding, errors=errors, newline=newline)
        size = path.stat().st_size
        try:
            yield _bounded(lines, path), lambda: min(file.tell() / size, 1.0)
        except UnicodeDecodeError as error:
            place = counted.given - len(error.object) + error.start
            raise UserError(
                f"{path} is not {encoding.removesuffix('-sig').upper()} text (byte {place}); "
                f"save it as UTF-8"
            ) from error


def _bounded(lines: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """The lines, none longer than may be; a JSON array, which is read as a whole, may be one."""
    while line := lines.readline(MAX_CHARACTERS):
        if len(line) == MAX_CHARACTERS:
            if not (suffix_of(path) in JSON_SUFFIXES and line.lstrip().startswith("[")):
                raise UserError(
                    f"{path} has a line of more than {MAX_CHARACTERS:,} characters; split it, or "
                    f"check that the file is what its name says"
                )
            line += lines.readline()
        yield line


def _decompressed(file: BinaryIO, path: Path) -> Any:
    """What the bytes of a file are read from, by the last part of its name."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(file, "rb")
        case ".bz2":
            return bz2.open(file, "rb")
        case ".xz":
            return lzma.open(file, "rb")
        case ".zst":
            import pyarrow

            return pyarrow.CompressedInputStream(file, "zstd")
    return nullcontext(file)


class _Counted(io.BufferedIOBase):
    """The bytes of a stream, counted, so that one which cannot be decoded has a place."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.head = b""  # the first bytes, looked at before they are given
        while len(self.head) < HEAD_BYTES and (chunk := stream.read(HEAD_BYTES - len(self.head))):
            self.head += chunk
        self.given = 0

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1) -> bytes:
        chunk = self.stream.read(HEAD_BYTES) if self.given else self.head
        self.given += len(chunk)
        return chunk


def _json_objects(lines: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    numbered = ((i, line) for i, line in enumerate(lines, start=1) if line.strip())
    number, first = next(numbered, (1, ""))
    if first.lstrip().startswith("["):
        values = iter(json.loads(first + "".join(line for _, line in numbered)))
    else:
        values = _json_lines(itertools.chain([(number, first)] if first else [], numbered), path)
    for value in values:
        if not isinstance(value, dict):
            raise UserError(f"{path} must hold one JSON object on each line")
        yield value


def _json_lines(numbered: Iterable[tuple[int, str]], path: Path) -> Iterator[Any]:
    for number, line in numbered:
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, is not JSON: {error.msg}") from error


def _delimited(lines: Iterable[str], path: Path) -> tuple[list[str], Iterator[list[str]]]:
    """Header and rows."""
    csv.field_size_limit(MAX_CHARACTERS)
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = next(filter(None, reader), None)  # of a blank line there is nothing
    if header is None:
        raise UserError(f"{path} holds no rows")
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise UserError(f"{path} has several columns named {repeated[0]!r}")
    for mark in ";\t|,":  # one column whose name holds that of a usual one
        if len(header) == 1 and {*TEXT_COLUMNS, *LABEL_COLUMNS} & {
            *header[0].lower().split(mark)[1:]
        }:
            raise UserError(
                f"the columns of {path} are separated by {mark!r}, not by {delimiter!r}; save it "
                f"with commas, or with tabs as .tsv"
            )

    def rows() -> Iterator[list[str]]:
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}, has {len(row)} fields where the header has "
                    f"{len(header)}; texts that hold a {delimiter!r} must be quoted"
                )
            yield row

    return header, rows()


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
    paths = sorted(path for path in folder.iterdir() if suffix_of(path) == ".txt")
    texts = []
    for path in paths:
        with open_text(path) as (lines, _):
            texts.append("".join(lines))
    return {"text": texts}


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


def pick_splits(
    there: Callable[[str], bool], splits: Iterable[str] = LABELLED_SPLITS
) -> dict[str, str]:
    """For each split the name that it has: of several, the most telling one.

    Args:
        there: whether something of a name exists.
        splits: which ones to look for, of `SPLIT_NAMES`.
    """
    found = {split: next(filter(there, SPLIT_NAMES[split]), None) for split in splits}
    return {split: name for split, name in found.items() if name is not None}


def pick_column(table: Table, wanted: str | None, usual: list[str], option: str) -> str:
    """The column asked for, or the first of the usual names that the table has.

    Raises:
        UserError: if the table lacks it; the message names the columns that are there.
    """
    columns = ", ".join(repr(name) for name in list(table)[:20]) or "none"
    if wanted is not None:
        if wanted not in table:
            raise UserError(f"there is no column {wanted!r}; the columns are {columns}")
        return wanted
    lower = {str(name).lower(): name for name in reversed(table)}
    for name in usual:
        if name in lower:
            return lower[name]
    raise UserError(f"cannot tell which column to use among {columns}; name it with {option}")
