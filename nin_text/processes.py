"""Work in processes of its own, which end with the one that started them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from nin_text import cli
from nin_text.errors import UserError
from nin_text.options import CommonOptions

logger = logging.getLogger(__name__)

CONTEXT = multiprocessing.get_context("spawn")
JOIN_SECONDS = 10


@dataclass
class Child:
    """A running process, and the connection to it."""

    process: SpawnProcess
    connection: Connection

    def send(self, value: Any) -> None:
        """Hand a value to the work, which receives it from its connection.

        Raises:
            UserError: if the process has died.
        """
        try:
            self.connection.send(value)
        except OSError as error:
            raise self._dead() from error

    def receive(self) -> Any:
        """What the work has sent or returned.

        Raises:
            UserError: as the work did; also if it failed in another way or the process died.
        """
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._dead() from error
        if kind == "error":
            raise UserError(value)
        return value

    def _dead(self) -> UserError:
        self.process.join(JOIN_SECONDS)
        return UserError(
            f"its process died (exit code {self.process.exitcode}), for want of memory perhaps"
        )

    def join(self) -> None:
        """Wait for the end of a process that has nothing left to do."""
        self.process.join(JOIN_SECONDS)

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.connection.close()


def call(work: Callable[..., Any], options: CommonOptions, *arguments: Any) -> Any:
    """What `work(options, *arguments)` returns, computed in a process of its own.

    Args:
        work: a function of a module; its memory is measured alone.
        options: also set up logging there.
        arguments: whatever can be pickled.

    Raises:
        UserError: see `Child.receive`.
    """
    child = start(_without_connection, options, work, *arguments)
    try:
        result = child.receive()
        child.join()
        return result
    finally:
        child.kill()


def start(work: Callable[..., Any], options: CommonOptions, *arguments: Any) -> Child:
    """Start `work(connection, options, *arguments)` in another process.

    `Child.receive` has what it sends, and at last what it returns.
    """
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_run, args=(work, there, options, *arguments))
    # Ctrl-C reaches the children as well. They ignore it from their first moment: it is this
    # process that ends them.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # no other may say what a signal does
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    except OSError as error:  # it died while its arguments were handed over
        raise UserError(f"a process could not be started ({error})") from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
    there.close()
    return Child(process, here)


def _without_connection(
    connection: Connection, options: CommonOptions, work: Callable[..., Any], *arguments: Any
) -> Any:
    return work(options, *arguments)


def _run(
    work: Callable[..., Any], connection: Connection, options: CommonOptions, *arguments: Any
) -> None:
    """What the process does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cli.set_up_logging(quiet=options.quiet, verbose=options.verbose)
    try:
        connection.send(("result", work(connection, options, *arguments)))
    except UserError as error:
        connection.send(("error", str(error)))
    except Exception as error:
        if options.verbose:
            logger.exception("the work failed")
        message = cli.resource_message(error) or f"{type(error).__name__}: {error}"
        connection.send(("error", " ".join(message.split())[:300]))


def _end_with_parent() -> None:
    """A process whose parent was killed must not go on behind the back of the next one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def environment_of_threads(threads: int) -> Iterator[None]:
    """What the processes started in between read when they start: how many threads to use."""
    names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def available_cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
