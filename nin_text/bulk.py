"""Score files of any size: in little memory, in parts, and on from any stop.

The input is cut into parts of some thousand rows. A part is scored as a whole and its answers are
written aside and renamed, so that a part that is there is whole. At the end the parts are joined.
A manifest beside the output says what the answers are of; `--resume` goes on only with the same.
Both engines read, score and write a part by the same functions.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nin_text import inference, readers, report
from nin_text.errors import UserError
from nin_text.options import PredictOptions
from nin_text.word_table import clean

logger = logging.getLogger(__name__)

FORMATS = (".jsonl", ".csv", ".parquet")
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


def score_files(options: PredictOptions) -> dict[str, Any]:
    """Classify the rows of files and leave the answers in one file, in the order of the rows.

    Args:
        options: `file` and `output` must be given.

    Returns:
        The output, how many rows it has, seconds, and the peak memory of this process.

    Raises:
        UserError: whatever the user can mend, in one sentence. What was scored is kept.
    """
    started = time.perf_counter()
    options = dataclasses.replace(options)  # what is left open will be filled in
    files, output = _check(options)
    if options.engine == "ray":
        options.device = "cpu"
    scorer = Scorer(options)
    record = _record(options, files, scorer)
    rows = _open(options, output, record)
    if rows is not None:
        logger.info("%s is finished; nothing is left to do", output)
    else:
        rows = _score(options, files, output, scorer)
        report.write_json(_manifest(output), record | {"rows": rows})
    shutil.rmtree(_parts(output), ignore_errors=True)
    return {
        "output": str(output),
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_mb": round(report.peak_memory_mb(), 1),
    }


def _score(options: PredictOptions, files: list[Path], output: Path, scorer: Scorer) -> int:
    """Score the parts that are not there, and join all; the number of rows."""
    parts, suffix = _parts(output), output.suffix.lower()
    whole = frozenset(path.stem for path in parts.glob(f"*{suffix}"))
    engine = _score_here
    if options.engine == "ray":
        from nin_text.bulk_ray import score_by_ray as engine
    names: list[str] = []
    rows = 0
    try:
        for part, content in _shown(engine(options, files, whole, scorer), files):
            if content is not None:
                report.write_bytes(parts / (part.name + suffix), content)
            names.append(part.name)
            rows += part.rows
    except KeyboardInterrupt:
        logger.error(
            "stopped; the same command with --resume goes on from the last whole part in %s", parts
        )
        raise
    except UserError as error:
        if rows:
            raise UserError(f"{error}; the answers to {rows:,} rows are kept in {parts}") from error
        with contextlib.suppress(OSError):  # nothing was begun, unless another run left parts
            parts.rmdir()
        raise
    joined = parts / ".joined"  # on the same disk as the output
    in_order = sorted(names, key=lambda name: [int(number) for number in name.split("-")])
    _join([parts / (name + suffix) for name in in_order], joined)
    joined.replace(output)
    return rows


# ---- what is to be done, and what was ------------------------------------------------------------


def _parts(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def _manifest(output: Path) -> Path:
    return output.with_name(f"{output.name}.manifest.json")


def _check(options: PredictOptions) -> tuple[list[Path], Path]:
    """Input files and output; whatever can be refused at once is."""
    if options.file is None or options.output is None or options.texts:
        raise UserError("--output takes the texts of --file alone; name the file, or leave it out")
    if options.explain or options.explain_file is not None:
        raise UserError("--explain shows texts one by one; leave it out with --output")
    if options.ray_address is not None and options.engine != "ray":
        raise UserError("--ray-address needs --engine ray")
    if options.engine == "ray" and options.device not in ("auto", "cpu"):
        raise UserError("--engine ray computes on CPU cores; leave out --device")
    output = options.output
    if output.suffix.lower() not in FORMATS or output.is_dir():
        raise UserError(f"--output must be a file that ends in {', '.join(FORMATS)}, not {output}")
    if options.resume and options.overwrite:
        raise UserError("--resume keeps what was scored and --overwrite does not: give one of them")
    if not options.resume and not options.overwrite:
        if _parts(output).exists():
            raise UserError(
                f"{output} was begun; go on with --resume, or start anew with --overwrite"
            )
        if output.exists():
            raise UserError(f"{output} exists; replace it with --overwrite, or name another")
    # An earlier start may have left its answers in the folder of the texts.
    ours = {place.resolve() for place in (output, _manifest(output), _parts(output))}
    files = [
        path
        for path in readers.find_files(options.file)
        if ours.isdisjoint((path.resolve(), *path.resolve().parents))
    ]
    if not files:
        raise UserError(f"there are no texts in {options.file} but the --output itself")
    # A wrong column and the like are refused before anything is written.
    for path in files[1:]:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty")
    for path in files:
        try:
            next(readers.stream_texts(path, options.text_column, options.id_column))
            break
        except readers.NoRowsError:  # it will be passed over, unless it is the last
            if path == files[-1]:
                raise
    return files, output


def _record(options: PredictOptions, files: Sequence[Path], scorer: Scorer) -> dict[str, Any]:
    """What decides the answers, as JSON values."""
    stats = [(path.resolve(), path.stat()) for path in files]
    return {
        "format": FORMAT_OF_PARTS,
        "model": scorer.predictor.fingerprint(),
        "inputs": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "text_column": options.text_column,
        "id_column": options.id_column,
        "keep_text": options.keep_text,
        "limit": options.limit,
        "max_length": options.max_length,
        "precision": options.precision,
    }


def _open(options: PredictOptions, output: Path, record: dict[str, Any]) -> int | None:
    """Make the folder of parts, or go on with it; the number of rows if nothing is left to do."""
    parts, manifest = _parts(output), _manifest(output)
    if options.resume and manifest.is_file():
        before = _saved(manifest)
        for name, value in record.items():
            if before.get(name) != value:
                raise UserError(
                    f"{output} was begun with another {name.replace('_', ' ')}: repeat the command "
                    f"to resume it, or start anew with --overwrite"
                )
        if "rows" in before and output.is_file():
            return int(before["rows"])
        parts.mkdir(exist_ok=True)
        return None
    if options.resume and (output.exists() or parts.exists()):
        raise UserError(
            f"{output} has no {manifest.name} that says what it was made of; start anew with "
            f"--overwrite"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    if parts.exists():  # first: parts must never be found beside the manifest of another run
        shutil.rmtree(parts)
    report.write_json(manifest, record)
    parts.mkdir()
    return None


def _saved(manifest: Path) -> dict[str, Any]:
    try:
        saved = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError(f"{manifest} is damaged; start anew with --overwrite")
    return saved


# ---- parts ---------------------------------------------------------------------------------------


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
        options: of the model; `max_length` is filled in if it is None.

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


def _join(parts: Sequence[Path], target: Path) -> None:
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


# ---- engines -------------------------------------------------------------------------------------


def _score_here(
    options: PredictOptions, files: list[Path], whole: frozenset[str], scorer: Scorer
) -> Iterator[Scored]:
    """In this process, part after part."""
    for part in read_parts(dict(enumerate(files)), options, whole):
        content = scorer(part, input_name(files, part)) if part.texts else None
        yield part, content


def input_name(files: Sequence[Path], part: Part) -> str | None:
    """What each row tells of its file: nothing if there is but one."""
    return str(files[part.file]) if len(files) > 1 else None


def _shown(scored: Iterable[Scored], files: Sequence[Path]) -> Iterator[Scored]:
    """Pass on what is scored, with a progress bar over the bytes of the files."""
    sizes = [path.stat().st_size for path in files]
    shares = [0.0] * len(files)
    new, started = 0, time.perf_counter()
    with tqdm(
        total=sum(sizes), desc="scoring", unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        for part, content in scored:
            yield part, content
            shares[part.file] = max(shares[part.file], part.share)
            new += part.rows if content is not None else 0
            rate = new / (time.perf_counter() - started)
            bar.set_postfix_str(f"{new:,} rows, {rate:,.0f} rows/s", refresh=False)
            position = sum(size * share for size, share in zip(sizes, shares, strict=True))
            bar.update(int(position) - bar.n)
