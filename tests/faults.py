"""Break runs at seeded random moments, and see what is left and whether it can be gone on with.

  python -m tests.faults                     # every work, 20 moments each, every signal in turn
  python -m tests.faults --count 5 --seed 7 training export
  python -m tests.faults --disk              # disks that fill up and read-only ones; needs root

Each work is done once without a fault. Then, for each moment, a process that does it is sent
SIGKILL, SIGTERM or SIGINT (Ctrl-C), what it left is looked at, and the same command, with --resume
where there is one, is let come to its end. A fault is survived if

- the exit status is that of the signal, and no traceback was printed;
- whatever can be loaded is the whole thing: nothing half-written is taken for whole;
- what is there in the end is equal to what the undisturbed work left.

The processes are forked from this one, which has imported everything, so that a moment takes
seconds. The last line is JSON: faults injected and survived.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nin_text import bulk, bulk_parts, cli, demo_data, models
from nin_text.comparison import compare_text
from nin_text.errors import UserError
from nin_text.export import export_onnx, open_session, run
from nin_text.options import CompareOptions, ExportOptions, PredictOptions, TrainOptions
from nin_text.runs import train_text

STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
FULL_DISK = ("the disk is full", "could not be")  # said if one is
STRUCK_TWICE = 0.2  # share of the moments that are hit a second time while they are gone on with
QUICK: dict[str, Any] = {"model": "nin-text-small", "quiet": True, "precision": "fp32"}


@dataclass(frozen=True)
class Work:
    """Something that can be stopped.

    Attributes:
        do: does it in a folder, or goes on with what is there.
        left: what is whole in the folder, as a text that equal results share; None if nothing is.
    """

    do: Callable[[Path, bool], Any]
    left: Callable[[Path], str | None]


# ---- the works -----------------------------------------------------------------------------------


def works(source: Path) -> dict[str, Work]:
    """All of them, with the data and the model that they need in a folder."""
    rows = [
        {"text": text, "label": label}
        for text, label in zip(*demo_data.generate("demo_reviews")["train"], strict=True)
    ]
    _lines(source / "data" / "train.jsonl", rows[:60])
    _lines(source / "data" / "test.jsonl", rows[60:80])
    _lines(source / "data" / "unsupervised.jsonl", [{"text": row["text"]} for row in rows[80:120]])
    _lines(source / "texts.jsonl", rows[:400])
    data, trained = str(source / "data"), source / "trained"

    def training(**options: Any) -> Callable[[Path, bool], Any]:
        return lambda place, again: train_text(
            TrainOptions(data, **QUICK, **options, output_dir=place / "run", resume=again)
        )

    finished(training(epochs=1, pretrain_epochs=0, self_training_epochs=0), trained)

    def scoring(place: Path, again: bool) -> Any:
        bulk_parts.PART_ROWS = 20
        options = PredictOptions(
            model=str(trained / "run"),
            file=source / "texts.jsonl",
            output=place / "answers.csv",
            resume=again,
            quiet=True,
        )
        return bulk.score_files(options)

    def exporting(place: Path, again: bool) -> Any:
        model = str(trained / "run")
        texts = str(source / "texts.jsonl")
        return export_onnx(
            ExportOptions(dataset=texts, model=model, output_dir=place / "onnx", quiet=True)
        )

    def comparing(place: Path, again: bool) -> Any:
        options = CompareOptions(
            dataset="demo_reviews",
            models=["tfidf-svm", "nin-text-small"],
            limit=60,
            rounds=0,
            quiet=True,
            threads=1,
            output_dir=place / "comparison",
        )
        return compare_text(options)

    return {
        "training": Work(training(epochs=3, pretrain_epochs=1, self_training_epochs=1), _model),
        "pretraining": Work(training(epochs=1, pretrain_epochs=5), _model),
        "bulk": Work(scoring, lambda place: _digest(place / "answers.csv")),
        "export": Work(exporting, _exported),
        "comparison": Work(comparing, _compared),
    }


def _lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _digest(*paths: Path) -> str | None:
    if not all(path.is_file() for path in paths):
        return None
    return " ".join(hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths)


def _model(place: Path) -> str | None:
    try:
        models.load(str(place / "run"))
    except UserError:
        return None
    names = ("model.safetensors", "config.json", "tokenizer.json", "answers.safetensors")
    return _digest(*(place / "run" / name for name in names)) or "loadable, but not whole"


def _exported(place: Path) -> str | None:
    """ONNX files hold the order in which they were made: compared is what they answer."""
    folder = place / "onnx"
    if not (folder / "classifier.json").is_file():
        return None
    ids, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), dtype=np.int64)
    import torch

    answers = [
        run(open_session(folder / name), torch.from_numpy(ids), torch.from_numpy(mask))[1]
        for name in ("model.onnx", "model.int8.onnx")
    ]
    return f"{_digest(folder / 'tokenizer.json')} {np.round(answers, 4).tolist()}"


def _compared(place: Path) -> str | None:
    path = place / "comparison" / "comparison.json"
    if not path.is_file():
        return None
    systems = json.loads(path.read_text(encoding="utf-8"))["systems"]
    # What failed is said to have failed, and tried again when the comparison is resumed.
    if any(system.get("error") for system in systems):
        return None
    folder = path.parent / "systems"
    answers = [folder / system["name"] / "answers.safetensors" for system in systems]
    return f"{[system['test']['accuracy'] for system in systems]} {_digest(*answers)}"


# ---- processes -----------------------------------------------------------------------------------


def forked(work: Callable[[], Any], log: Path) -> tuple[int, int]:
    """Start `cli.run(work)` in a process of its own; its id, and a pipe that ends when it begins.

    Standard output and error go to `log`.
    """
    begun, begin = os.pipe()
    pid = os.fork()
    if pid:
        os.close(begin)
        return pid, begun
    status = 99
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, cli.stop)  # as within cli.run, to which there is no gap
        cli.set_up_logging(quiet=True, verbose=False)
        os.close(begin)
        cli.run(lambda: {"result": str(work())})
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except KeyboardInterrupt:  # after the end of the work
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """The exit status of a process, minus the signal if it was ended by one."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finished(do: Callable[[Path, bool], Any], place: Path, *, again: bool = False) -> float:
    """Do a work without a fault; the seconds that it took."""
    place.mkdir(parents=True, exist_ok=True)
    log = place.with_name(f"{place.name}.log")
    started = time.perf_counter()
    pid, begun = forked(lambda: do(place, again), log)
    os.close(begun)
    status = ended(pid)
    assert status == 0, (status, log.read_text(errors="replace")[-3000:])
    return time.perf_counter() - started


def looked_at(work: Work, place: Path) -> str | None:
    """`work.left`, in a process of its own: a thread of this one would not survive a fork."""
    answer = place.with_name(f"{place.name}.left")
    answer.unlink(missing_ok=True)

    def look() -> None:
        answer.write_text(json.dumps(work.left(place)))

    pid, begun = forked(look, place.with_name(f"{place.name}.log"))
    os.close(begun)
    status = ended(pid)
    assert status == 0, place.with_name(f"{place.name}.log").read_text(errors="replace")[-3000:]
    return json.loads(answer.read_text())  # type: ignore[no-any-return]


# ---- faults --------------------------------------------------------------------------------------


def strike(work: Work, place: Path, number: int, after: float, *, again: bool = False) -> int:
    """Do a work and send it a signal after some seconds; its exit status."""
    place.mkdir(parents=True, exist_ok=True)
    pid, begun = forked(lambda: work.do(place, again), place.with_name(f"{place.name}.log"))
    os.read(begun, 1)  # nothing comes: it ends when the process is ready
    os.close(begun)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return ended(pid)


def survives(
    work: Work, place: Path, expected: str | None, seconds: float, draw: random.Random, number: int
) -> str | None:
    """Strike a work once, or twice, and go on; None, or what is wrong."""
    log = place.with_name(f"{place.name}.log")
    for again in [False] + [True] * (draw.random() < STRUCK_TWICE):
        status = strike(work, place, number, draw.uniform(0, seconds), again=again)
        if status not in (0, STATUS[number]):
            return f"exit status {status}: {log.read_text(errors='replace')[-1500:]}"
        if "Traceback" in log.read_text(errors="replace"):
            return f"a traceback: {log.read_text(errors='replace')[-1500:]}"
        left = looked_at(work, place)
        if left not in (None, expected):
            return f"taken for whole: {left}, not {expected}"
    finished(work.do, place, again=True)
    left = looked_at(work, place)
    return None if left == expected else f"in the end: {left}, not {expected}"


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A file system of some bytes at a folder."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fills_up(work: Work, place: Path, expected: str | None, size: int) -> str | None:
    """Do a work on a disk that is too small, make room, and go on; None, or what is wrong."""
    log = place.with_name(f"{place.name}.log")
    with small_disk(place, size):
        pid, begun = forked(lambda: work.do(place, False), log)
        os.close(begun)
        status = ended(pid)
        text = log.read_text(errors="replace")
        if status not in (0, 2) or "Traceback" in text:
            return f"exit status {status}: {text[-1500:]}"
        # Python's own tracker of semaphores may have a word to say after the error.
        said = [line for line in text.splitlines() if line.startswith("error: ")]
        if status == 2 and not any(word in "".join(said) for word in FULL_DISK):
            return f"not said: {text[-1500:]}"
        left = looked_at(work, place)
        if left not in (None, expected):
            return f"taken for whole: {left}, not {expected}"
        subprocess.run(["mount", "-o", "remount,size=1g", place], check=True)
        finished(work.do, place, again=True)
        left = looked_at(work, place)
        return None if left == expected else f"in the end: {left}, not {expected}"


def room_needed(work: Work, place: Path) -> int:
    """The most bytes that a work ever has on its disk."""
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            disk = os.statvfs(place)
            most[0] = max(most[0], (disk.f_blocks - disk.f_bfree) * disk.f_frsize)

    with small_disk(place, 2**30):
        pid, begun = forked(lambda: work.do(place, False), place.with_name(f"{place.name}.log"))
        os.close(begun)
        thread = threading.Thread(target=watch)
        thread.start()
        status = ended(pid)
        stop.set()
        thread.join()
        assert status == 0
    return most[0]


def read_only(work: Work, place: Path) -> str | None:
    """Do a work where nothing can be written; None, or what is wrong."""
    log = place.with_name(f"{place.name}.log")
    with small_disk(place, 2**20):
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        pid, begun = forked(lambda: work.do(place, False), log)
        os.close(begun)
        status, text = ended(pid), log.read_text(errors="replace")
    said = "cannot write or read" in text and "Traceback" not in text
    return None if status == 2 and said else f"exit status {status}: {text[-1500:]}"


def campaign(
    names: Sequence[str], count: int, seed: int, *, disk: bool = False
) -> dict[str, dict[str, Any]]:
    """Inject `count` faults into each work; how many were survived, and what is wrong."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        os.environ["NIN_TEXT_CACHE"] = str(root / "cache")
        everything = works(root / "source")
        for name in names or list(everything):
            work, draw = everything[name], random.Random(f"{seed} {name}")
            seconds = finished(work.do, root / name / "whole")
            expected = looked_at(work, root / name / "whole")
            assert expected is not None
            need = room_needed(work, root / name / "room") if disk else 0
            wrong = []
            for i in range(count):
                place = root / name / str(i)
                if disk:
                    size = int(draw.uniform(0.01, 1) * need)
                    problem = fills_up(work, place, expected, max(size, 2**14))
                    fault = f"disk of {size:,} of {need:,} bytes"
                else:
                    number = list(STATUS)[i % len(STATUS)]
                    problem = survives(work, place, expected, seconds, draw, number)
                    fault = signal.Signals(number).name
                print(f"{name} {i + 1} of {count}, {fault}: {problem or 'survived'}", flush=True)
                if problem:
                    wrong.append(f"{fault}: {problem}")
                else:
                    shutil.rmtree(place)
            if disk and (problem := read_only(work, root / name / "read-only")):
                wrong.append(f"read-only: {problem}")
            injected = count + disk
            found[name] = {
                "injected": injected,
                "survived": injected - len(wrong),
                "seconds": round(seconds, 1),
                "wrong": wrong,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("works", nargs="*", help="which (default: all)")
    parser.add_argument("--count", type=int, default=20, help="faults of each (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--disk", action="store_true", help="disks that fill up in place of signals"
    )
    options = parser.parse_args()
    found = campaign(options.works, options.count, options.seed, disk=options.disk)
    print(json.dumps(found, ensure_ascii=False))
    raise SystemExit(any(result["wrong"] for result in found.values()))


if __name__ == "__main__":
    main()
