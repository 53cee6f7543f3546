"""What the scripts share: options from the command line, JSON on standard output, one sentence for
a user's mistake.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import logging
import os
import signal
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from nin_text.errors import UserError, in_one_line
from nin_text.options import CommonOptions, check
from nin_text.recipes import DEFAULT_RECIPE

Options = TypeVar("Options", bound=CommonOptions)
Results = dict[str, Any] | Iterator[dict[str, Any]]

# What the libraries that write weights say, in exceptions of every type, when the disk is full.
DISK_FULL = (
    "No space left on device",
    "File too large",  # a limit on the size of files, or of the file system
    "Disk quota exceeded",
    "PytorchStreamWriter failed",
    "inline_container.cc",
)
TOO_LITTLE_MEMORY = (
    "there is too little memory; lower --batch-tokens or --max-length (of images: --batch-size or "
    "--image-size)"
)
IMPORT_SECONDS = 0.05  # a signal that arrives within an import waits for so long, and again
FILE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR),
    *(errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.ENOTEMPTY),
    *(errno.EBUSY, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EFBIG),
}


_waiting: list[threading.Timer] = []  # the signal that came within an import last


class Terminated(KeyboardInterrupt):
    """SIGTERM: what stops cleanly at Ctrl-C does so at this, too."""


def main(
    cls: type[Options],
    description: str | None,
    examples: str,
    work: Callable[[Options], Results],
) -> None:
    """A whole script: `parse`, refuse options that no run can have, `run` the work with the rest.

    Args:
        cls, description, examples: as of `parse`.
        work: imports torch itself, so that neither `--help` nor a mistake waits for that.
    """
    options = parse(cls, description, examples)

    def checked() -> Results:
        check(options)
        return work(options)

    run(checked)


def parse(cls: type[Options], description: str | None, examples: str) -> Options:
    """Options from the command line, and logging set up as they say.

    To be called before anything heavy is imported: `--help` must answer at once, and the libraries
    read their settings when they are imported.

    Args:
        cls: the dataclass of options.
        description: first part of the help.
        examples: last part of the help, lines that run as they stand.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser, cls)
    options = parse_options(cls, parser.parse_args(spelled_out(cls, sys.argv[1:])))
    set_up_logging(quiet=options.quiet, verbose=options.verbose)
    return options


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add one argument to the parser for each field of an options dataclass."""
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        arguments = dict(spec.metadata)
        kind = hints[spec.name]
        if arguments.get("nargs", "?") != "?":
            (kind,) = typing.get_args(kind)
        if isinstance(kind, types.UnionType):
            kind = next(part for part in kind.__args__ if part is not type(None))
        text = arguments.pop("help")
        if arguments.pop("positional", False):
            parser.add_argument(spec.name, type=kind, help=text, **arguments)
            continue
        flag = "--" + spec.name.replace("_", "-")
        if arguments.get("required"):
            text += " (required)"
        elif spec.default is None and "default" not in text:
            recipe = DEFAULT_RECIPE.get(spec.name, "unset")
            text += f" (default: {recipe}{', unless the recipe differs' * (recipe != 'unset')})"
        elif isinstance(spec.default, tuple):
            text += f" (default: {' '.join(spec.default) or 'none'})"
        elif spec.default is not None and kind is not bool:
            text += " (default: %(default)s)"
        if kind is bool:
            if spec.default is not False:
                arguments["action"] = argparse.BooleanOptionalAction
            else:
                arguments["action"] = "store_true"
        else:
            arguments["type"] = kind
            if "choices" not in arguments:
                arguments.setdefault("metavar", kind.__name__.upper())
        parser.add_argument(flag, default=spec.default, help=text, **arguments)


def spelled_out(cls: type, arguments: Sequence[str]) -> list[str]:
    """Arguments in which no option whose value may be left out takes a positional for its value.

    `--explain "The plot ..."` is `--explain` and a text: what follows is a value only if it is one
    of the choices.
    """
    flags = {
        "--" + spec.name.replace("_", "-"): spec.metadata
        for spec in dataclasses.fields(cls)
        if spec.metadata.get("nargs") == "?"
    }
    spelled: list[str] = []
    for i, argument in enumerate(arguments):
        if argument == "--":
            return spelled + list(arguments[i:])
        following = arguments[i + 1] if i + 1 < len(arguments) else None
        alone = argument in flags and following not in flags[argument]["choices"]
        spelled.append(f"{argument}={flags[argument]['const']}" if alone else argument)
    return spelled


def parse_options(cls: type, namespace: argparse.Namespace) -> Any:
    """The options dataclass from parsed arguments."""
    return cls(**{spec.name: getattr(namespace, spec.name) for spec in dataclasses.fields(cls)})


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    """Our messages to standard error; those of the libraries underneath only if asked for."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not _is_main_process():
        quiet, verbose = True, False
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # any value, even 0, disables
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    logging.getLogger("nin_text").setLevel(level)
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for name in ("transformers", "datasets", "huggingface_hub", "accelerate", "torch"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _is_main_process() -> bool:
    """False in all but one of the processes that torchrun starts: that one speaks for them."""
    return int(os.environ.get("RANK", "0")) == 0


def run(work: Callable[[], Results]) -> None:
    """Call `work` and print each dict that it returns or yields as one JSON line.

    Only these lines go to standard output; whatever else is printed goes to standard error. Of
    several processes (torchrun), the first one prints. Exit status: 0; 2 for a user's mistake, a
    full disk or too little memory (one sentence, no traceback); 130 after Ctrl-C and 143 after
    SIGTERM.
    """
    with _stopped_by_signals():
        _run(work)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let `stop` answer SIGTERM and Ctrl-C, where signals can be handled at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        for again in _waiting:  # for an import that was the last of the work
            again.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number: int, frame: types.FrameType | None) -> None:
    """Handle a signal: raise `Terminated` or KeyboardInterrupt, but never within an import.

    An extension module whose initialization is interrupted raises an ImportError, and may bring
    the interpreter down at its exit (matplotlib's does); so the signal comes again a little later.
    """
    if hasattr(signal, "pthread_kill") and _within_import(frame):
        thread = threading.main_thread().ident
        again = threading.Timer(IMPORT_SECONDS, signal.pthread_kill, (thread, number))
        again.daemon = True
        again.start()
        _waiting[:] = [again]
        return
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _within_import(frame: types.FrameType | None) -> bool:
    """True if an import that began after the work did is under way in a frame or its callers."""
    while frame is not None and frame.f_code is not _run.__code__:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _run(work: Callable[[], Results]) -> None:
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        results = work()
        for result in [results] if isinstance(results, dict) else results:
            if not _is_main_process():
                continue
            line = json.dumps(result, ensure_ascii=False)
            # Lone surrogates, which arguments in another encoding contain, cannot be printed.
            print(line.encode("utf-8", "replace").decode(), file=stdout, flush=True)
    except UserError as error:
        _fail(str(error))
    except Terminated:
        _say_nothing_of_bars()
        _fail("terminated", status=143)
    except KeyboardInterrupt:
        _say_nothing_of_bars()
        _fail("interrupted", status=130)
    except BrokenPipeError:
        # Whoever read our output has seen enough; closing it again at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        message = resource_message(error)
        if message is None:
            raise
        _fail(message)
    finally:
        sys.stdout = stdout


def resource_message(error: Exception) -> str | None:
    """One sentence if the machine lacks disk, permission or memory; None for anything else."""
    text = str(error)
    if any(sign in text for sign in DISK_FULL):
        return f"the disk is full ({in_one_line(error)}); make room and try again"
    if isinstance(error, OSError) and error.errno in FILE_ERRORS:
        return f"cannot write or read {error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return TOO_LITTLE_MEMORY
    if "DefaultCPUAllocator" in text:  # torch's word for the same on a CPU
        return TOO_LITTLE_MEMORY
    return None


def _say_nothing_of_bars() -> None:
    """A bar that a signal interrupted while tqdm made it fails when it is collected: no news."""
    before = sys.unraisablehook

    def report(failure: Any) -> None:
        if "tqdm" not in repr(failure.object):
            before(failure)

    sys.unraisablehook = report


def _fail(message: str, status: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)
