"""Score files of any size: in little memory, in parts, and on from any stop.

The input is cut into parts of some thousand rows. A part is scored as a whole and its answers are
written aside and renamed, so that a part that is there is whole. At the end the parts are joined.
A manifest beside the output says what the answers are of; `--resume` goes on only with the same.
Both engines read, score and write a part by the same functions (`bulk_parts.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nin_text import readers, report
from nin_text.bulk_parts import (
    FORMAT_OF_PARTS,
    FORMATS,
    Scored,
    Scorer,
    input_name,
    join_parts,
    read_parts,
)
from nin_text.errors import UserError
from nin_text.options import PredictOptions

logger = logging.getLogger(__name__)


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
    files, output = _check(options)
    if options.engine == "ray":
        options = dataclasses.replace(options, device="cpu")
    scorer = Scorer(options)
    # What "auto" means here, so that no part is scored otherwise, wherever and whenever it is.
    options = dataclasses.replace(options, precision=scorer.predictor.precision)
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
    join_parts([parts / (name + suffix) for name in in_order], joined)
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
    without_rows = 0
    for path in files:
        try:
            next(readers.stream_texts(path, options.text_column, options.id_column))
        except readers.NoRowsError:  # it will be passed over
            without_rows += 1
            if without_rows == len(files):
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
        "max_length": scorer.predictor.max_length,
        "precision": options.precision,
    }


def _open(options: PredictOptions, output: Path, record: dict[str, Any]) -> int | None:
    """Make the folder of parts, or go on with it; the number of rows if nothing is left to do."""
    parts, manifest = _parts(output), _manifest(output)
    if options.resume and manifest.is_file():
        before = _saved(manifest)
        for name, value in record.items():
            if before.get(name) != value:
                other = "other inputs" if name == "inputs" else f"another {name.replace('_', ' ')}"
                raise UserError(
                    f"{output} was begun with {other}: repeat the command to resume it, or start "
                    f"anew with --overwrite"
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


# ---- engines -------------------------------------------------------------------------------------


def _score_here(
    options: PredictOptions, files: list[Path], whole: frozenset[str], scorer: Scorer
) -> Iterator[Scored]:
    """In this process, part after part."""
    for part in read_parts(dict(enumerate(files)), options, whole):
        content = scorer(part, input_name(files, part)) if part.texts else None
        yield part, content


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
