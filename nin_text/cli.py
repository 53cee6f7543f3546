"""What the scripts share: one JSON line on standard output, one sentence for a user's mistake."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from nin_text.errors import UserError


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help shows defaults and examples that run."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    """Our messages to standard error; those of the libraries underneath only if asked for."""
    level = logging.ERROR if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("nin_text").setLevel(logging.DEBUG if verbose else level)
    if not verbose:
        warnings.simplefilter("ignore")
        for name in ("transformers", "datasets", "huggingface_hub", "accelerate", "torch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TQDM_DISABLE", "1" if quiet else "0")


def run(work: Callable[[], Any]) -> None:
    """Call `work`, print what it returns as one JSON line on standard output, and exit.

    Whatever anything else prints goes to standard error. Exit status: 0, 2 for a user's mistake
    or a full disk (one sentence, no traceback), 130 after Ctrl-C.
    """
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        result = work()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EACCES,
            errno.EROFS,
            errno.EDQUOT,
            errno.ENOTDIR,
        ):
            raise
        _fail(f"{error.strerror}: {error.filename or 'while writing'}")
    finally:
        sys.stdout = stdout
    if result is not None:
        print(json.dumps(result), flush=True)


def _fail(message: str, status: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)
