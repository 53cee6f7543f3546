"""Bulk scoring by Ray Data: the parts of files, scored on all cores of one or more machines."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from nin_text.bulk_parts import Part, Scored, Scorer, input_name, read_parts
from nin_text.errors import UserError, in_one_line
from nin_text.options import PredictOptions


def score_by_ray(
    options: PredictOptions, files: list[Path], whole: frozenset[str], scorer: Scorer
) -> Iterator[Scored]:
    """By Ray Data: one task reads each file, one actor on each core scores; parts come as they end.

    Parts travel as JSON, because Arrow has no columns of ids of any type, nor lone surrogates.
    """
    ray = _start_ray(options)
    try:
        actors = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        places = {i: path.resolve() for i, path in enumerate(files)}
        # What is read in one task: a limit is one for all files.
        tasks = [places] if options.limit is not None else [{i: p} for i, p in places.items()]
        # Every machine cuts texts as this one does.
        options = dataclasses.replace(options, max_length=scorer.predictor.max_length)
        if Path(options.model).is_dir():
            options = dataclasses.replace(options, model=str(Path(options.model).resolve()))
        scored = (
            ray.data.from_items(list(range(len(tasks))), override_num_blocks=len(tasks))
            .map_batches(
                partial(_read_by_ray, tasks, options, whole),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=0.01,  # the cores are for the actors
            )
            .map_batches(
                _RayScorer,
                fn_constructor_args=(
                    options,
                    [str(p) for p in files],
                    scorer.predictor.fingerprint(),
                ),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=0.9,
            )
        )
        yield from _from_ray(scored.iter_batches(batch_size=1, batch_format="pyarrow"))
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise UserError(f"Ray stopped ({reason}); --resume goes on from the last part") from error
    finally:
        ray.shutdown()


def _start_ray(options: PredictOptions) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    if not options.verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            "--engine ray needs Ray Data; pip install 'nin-text[ray]', or leave it out"
        ) from error
    try:
        _knock(options.ray_address)
        with nullcontext() if options.verbose else _hushed():
            ray.init(
                address=options.ray_address,
                include_dashboard=None if options.ray_address else False,
                log_to_driver=options.verbose,
                logging_level=logging.INFO if options.verbose else logging.ERROR,
            )
    except (OSError, ValueError, RuntimeError) as error:
        place = (
            f"was reached at {options.ray_address}" if options.ray_address else "could be started"
        )
        raise UserError(
            f"no Ray cluster {place} ({in_one_line(error)}); start one with "
            f"`ray start --head`, or use --engine local"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = options.verbose
    context.print_on_execution_start = options.verbose
    context.target_max_block_size = 1  # each part is a block of its own, and goes its own way
    if not options.verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def _knock(address: str | None) -> None:
    """Find out at once that nobody is there; Ray would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep from standard error what the C++ of Ray writes there, past Python's own stream."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _read_by_ray(
    tasks: list[dict[int, Path]], options: PredictOptions, whole: frozenset[str], batch: pa.Table
) -> Iterator[pa.Table]:
    for task in batch.column("item").to_pylist():
        try:
            for part in read_parts(tasks[task], options, whole):
                yield _as_table(dataclasses.asdict(part))
        except UserError as error:  # as a value: an exception would stop the other files, too
            yield _as_table({"error": str(error)})


def _as_table(value: dict[str, Any], content: bytes | None = None) -> pa.Table:
    return pa.table(
        {
            "part": pa.array([json.dumps(value).encode()], pa.large_binary()),
            "content": pa.array([content], pa.large_binary()),
        }
    )


class _RayScorer:
    """What scores parts in a process of Ray."""

    def __init__(self, options: PredictOptions, files: list[str], fingerprint: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each core has its own actor
        self.files = [Path(file) for file in files]
        self.error: str | None = None
        try:
            self.scorer = Scorer(options)
            if self.scorer.predictor.fingerprint() != fingerprint:
                self.error = f"{options.model} is another model on another machine of the cluster"
        except UserError as error:
            self.error = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        value = json.loads(batch.column("part")[0].as_py())
        if "error" in value:
            return _as_table(value)
        if self.error is not None:
            return _as_table({"error": self.error})
        part = Part(**value)
        content = self.scorer(part, input_name(self.files, part)) if part.texts else None
        return _as_table(dataclasses.asdict(_without_rows(part)), content)


def _without_rows(part: Part) -> Part:
    return dataclasses.replace(part, texts=[], ids=[])


def _from_ray(batches: Iterable[pa.Table]) -> Iterator[Scored]:
    """What comes back; the first error, if any, when all else is there."""
    message: str | None = None
    for batch in batches:
        value = json.loads(batch.column("part")[0].as_py())
        if "error" in value:
            message = message or value["error"]
        else:
            yield Part(**value), batch.column("content")[0].as_py()
    if message is not None:
        raise UserError(message)
