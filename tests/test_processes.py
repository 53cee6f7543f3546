"""Processes of their own: new interpreters whose memory and death are theirs alone."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nin_text import UserError, processes, report
from nin_text.options import CompareOptions


def test_a_childs_memory_is_its_own() -> None:
    ballast = np.ones(2**28, dtype=np.uint8)  # 256 MiB that the child does not have
    assert report.peak_memory_mb() > 256
    child = processes.call(peak, CompareOptions(quiet=True))
    assert child < report.peak_memory_mb() - 200
    del ballast


def test_it_can_be_started_from_any_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(processes.call, peak, CompareOptions(quiet=True)).result() > 0


def peak(options: CompareOptions) -> float:
    return report.peak_memory_mb()


def test_a_process_that_dies_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="process died"):
        processes.call(die, CompareOptions(quiet=True))


def die(options: CompareOptions) -> None:
    os._exit(9)
