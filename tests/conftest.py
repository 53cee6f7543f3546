"""Fixtures shared by the tests: nothing here, or in any test, writes outside tmp_path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import as_script
import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIN_TEXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = os.environ.get("NIN_TEXT_DATA")
    if not folder:
        pytest.skip("NIN_TEXT_DATA is not set: the folder that holds the real data sets")
    # Scripts run in another working directory.
    monkeypatch.setenv("NIN_TEXT_DATA", str(Path(folder).resolve()))
    return Path(folder).resolve()


def tiny_bert(vocab_size: int) -> Any:
    """The configuration of a transformer of 16 positions that trains within a test."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )


@pytest.fixture
def ready_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of the package start with everything imported, as scripts of these tests do."""
    monkeypatch.setattr("nin_text.processes.CONTEXT", as_script.Children)


class Finished:
    """A script that has come to its end."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Standard output, which is JSON on every line and nothing else."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def result(self) -> dict[str, Any]:
        """The one line of a script that succeeded."""
        assert self.status == 0, self.err
        (line,) = self.lines
        return line

    @property
    def complaint(self) -> str:
        """The one sentence of a script that was refused."""
        assert self.status == 2, (self.status, self.err)
        assert "Traceback" not in self.err
        assert self.out == ""
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("error: "), self.err
        return last.removeprefix("error: ")


Script = Callable[..., Finished]


def in_new_interpreter(
    command: Sequence[object], folder: Path, stdin: str | None = None, **environment: str
) -> Finished:
    """Run an interpreter of its own with a script and its arguments, or other arguments."""
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, **environment},
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=as_script.TIMEOUT,
        check=False,
    )
    return Finished(process.returncode, process.stdout, process.stderr)


@pytest.fixture
def script(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Script:
    """Run scripts/<name>.py with arguments in tmp_path, as a user would."""
    streams = tuple(tmp_path_factory.mktemp("streams") / name for name in ("in", "out", "err"))

    def run(
        name: str, *arguments: object, stdin: str | None = None, **environment: str
    ) -> Finished:
        path, words = ROOT / "scripts" / f"{name}.py", list(map(str, arguments))
        if environment:  # which a new interpreter reads before all else
            return in_new_interpreter([path, *words], tmp_path, stdin, **environment)
        streams[0].write_text(stdin or "", encoding="utf-8")
        status = as_script.run(path, words, tmp_path, os.environ, streams)
        return Finished(status, *(stream.read_text(encoding="utf-8") for stream in streams[1:]))

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the default training, which every test shares, in whatever process."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    place = place / "trained"
    folder = place / "run"
    with FileLock(f"{place}.lock"):
        if not (folder / "metrics.json").exists():
            _train(place, folder)
    return folder


def _train(place: Path, folder: Path) -> None:
    place.mkdir(exist_ok=True)
    with (place / "stdout").open("w") as stdout:
        subprocess.run(
            [
                *(sys.executable, ROOT / "scripts" / "train_text.py"),
                *("--output-dir", folder, "--quiet"),
            ],
            cwd=place,
            env={**os.environ, "NIN_TEXT_CACHE": str(place / "cache")},
            check=True,
            stdout=stdout,
        )
