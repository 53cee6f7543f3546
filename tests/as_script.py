"""A script in a process that has imported already what takes a new interpreter many seconds.

`Children` lets processes that the package starts begin there, too.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

TIMEOUT = 280  # seconds

# A server that only imports and then forks: what one script does, no other sees.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("nin_text.runs", "nin_text.inference", "nin_text.image_runs"),
        *("nin_text.comparison", "nin_text.systems"),
    ]
)


class Children:
    """Stands in for the context whose processes are new interpreters."""

    Pipe = staticmethod(_server.Pipe)

    @staticmethod
    def Process(target: Callable[..., None], args: tuple[Any, ...]) -> ForkServerProcess:  # noqa: N802
        """A process with the environment of this one, as a new interpreter has it."""
        return _server.Process(target=_with_environment, args=(dict(os.environ), target, args))


def _with_environment(
    environment: Mapping[str, str], target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    _begin(environment)
    target(*args)


def _begin(environment: Mapping[str, str]) -> None:
    """What a new interpreter does that this process, forked from a server, has not done."""
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # which torch reads when it is imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    np.random.seed()
    torch.seed()


def run(
    script: Path,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    streams: tuple[Path, Path, Path],
) -> int:
    """Run a script to its end.

    Args:
        script: path of the file.
        arguments: those of its command line.
        folder: to work in.
        environment: all variables. Those that libraries read when they are imported have the
            values that they had when the first script was run.
        streams: files for standard input, output and error; the first must exist.

    Returns:
        Its exit status. All scripts share the seed of Python's hashes, which `PYTHONHASHSEED` in
        a new interpreter changes.

    Raises:
        TimeoutError: if it takes longer than `TIMEOUT`.
    """
    process = _server.Process(
        target=_main, args=(script, list(arguments), folder, dict(environment), streams)
    )
    process.start()
    try:
        process.join(TIMEOUT)
        if process.exitcode is None:
            raise TimeoutError(f"{script.name} {' '.join(arguments)}")
        return process.exitcode
    finally:  # also if the test is interrupted
        process.kill()
        process.join()


def _main(
    script: Path,
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    streams: tuple[Path, Path, Path],
) -> None:
    _begin(environment)
    os.chdir(folder)
    for number, (path, mode) in enumerate(zip(streams, "rww", strict=True)):
        with path.open(f"{mode}b") as file:
            os.dup2(file.fileno(), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )
    sys.argv = [str(script), *arguments]
    tests = Path(__file__).parent
    sys.path[:] = [str(script.parent), *(path for path in sys.path if Path(path) != tests)]
    runpy.run_path(str(script), run_name="__main__")
