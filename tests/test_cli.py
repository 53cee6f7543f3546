"""What the scripts share: JSON to standard output, mistakes in one sentence."""

from __future__ import annotations

import errno
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from nin_text import cli
from nin_text.errors import UserError
from nin_text.options import EvaluateOptions


def failing(error: BaseException):
    def work() -> dict:
        raise error

    return work


def test_results_go_to_standard_output_and_everything_else_to_standard_error(
    capsys: pytest.CaptureFixture,
) -> None:
    def work() -> Iterator[dict]:
        print("chatter")
        yield {"a": "ü"}
        yield {"b": 1.5}

    cli.run(work)
    captured = capsys.readouterr()
    assert captured.out == '{"a": "ü"}\n{"b": 1.5}\n'
    assert captured.err == "chatter\n"
    assert sys.stdout is not sys.stderr


def test_a_mistake_in_the_options_is_told_before_the_work_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate_text.py", "--model", "m", "--max-length", "-1"])
    begun: list[EvaluateOptions] = []
    with pytest.raises(SystemExit) as caught:
        cli.main(EvaluateOptions, None, "", lambda options: begun.append(options) or {})
    assert caught.value.code == 2
    assert "--max-length must be between 0 and" in capsys.readouterr().err
    assert not begun
    monkeypatch.setattr(sys, "argv", ["evaluate_text.py", "--model", "m"])
    cli.main(EvaluateOptions, None, "", lambda options: {"model": options.model})
    assert capsys.readouterr().out == '{"model": "m"}\n'


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("there is no file x"), "there is no file x"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"),
            "the disk is full",
        ),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os 28)"),
            "the disk is full",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "cannot write or read /x"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), "cannot write or read /x"),
        (
            FileExistsError(errno.EEXIST, "File exists", "/x"),
            "cannot write or read /x: File exists",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), "File name too long"),
        (MemoryError(), "too little memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate"),
            "too little memory",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    error: Exception, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(failing(error))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_what_was_printed_before_a_mistake_stays(capsys: pytest.CaptureFixture) -> None:
    def work() -> Iterator[dict]:
        yield {"a": 1}
        raise UserError("line 2 is damaged")

    with pytest.raises(SystemExit):
        cli.run(work)
    assert capsys.readouterr().out == '{"a": 1}\n'


def test_what_cannot_be_encoded_is_replaced(capsys: pytest.CaptureFixture) -> None:
    cli.run(lambda: {"text": "caf\udce9"})
    assert capsys.readouterr().out == '{"text": "caf?"}\n'


def test_ctrl_c_has_its_own_status() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(failing(KeyboardInterrupt()))
    assert caught.value.code == 130


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_end_of_an_import(
    number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extension module whose initialization is interrupted fails, or crashes at exit."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "slow_extension", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    (tmp_path / "slow_extension.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(0.2)\nwhole = True\n"
    )
    stopped_in_time = True

    def work() -> dict:
        nonlocal stopped_in_time
        import slow_extension  # noqa: F401

        time.sleep(10)
        stopped_in_time = False
        return {}

    try:
        with pytest.raises(SystemExit) as caught:
            cli.run(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.code == status
    assert stopped_in_time
    assert sys.modules["slow_extension"].whole


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As of a job in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        cli.run(lambda: {"handler": str(signal.getsignal(signal.SIGINT))})
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        cli.run(lambda: {"nothing": signal.raise_signal(signal.SIGINT)})
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_bar_that_was_interrupted_while_it_was_made_is_no_news(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda failure: reported.append(failure.object))
    with pytest.raises(SystemExit):
        cli.run(failing(KeyboardInterrupt()))
    for thing in (tqdm.__del__, print):
        sys.unraisablehook(SimpleNamespace(object=thing))
    assert reported == [print]


def test_a_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(failing(ZeroDivisionError()))
