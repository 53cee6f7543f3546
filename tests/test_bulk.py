"""Files of any size are scored in parts: the same answers, whatever happens on the way."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Script

from nin_text import bulk, bulk_parts, cli
from nin_text.errors import UserError
from nin_text.inference import predict_text
from nin_text.options import PredictOptions

TEXTS = [
    f"The {noun} is {adverb}{word} ."
    for noun, adverb, word in itertools.product(
        ("plot", "cast", "film, they say,", 'so-called "art"', "ending\nof it"),
        ("", "not ", "hardly "),
        ("witty", "dull", "superb", "boring"),
    )
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "texts.csv", TEXTS)


def write(path: Path, texts: list[str]) -> Path:
    pd.DataFrame({"key": [f"k{i}" for i in range(len(texts))], "text": texts}).to_csv(
        path, index=False
    )
    return path


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_parts, "PART_ROWS", 7)


def score(model: Path, file: Path, output: Path, **options: Any) -> dict[str, Any]:
    return bulk.score_files(
        PredictOptions(model=str(model), file=file, output=output, device="cpu", **options)
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_parts")
def test_answers_are_those_of_standard_output_in_every_format(
    trained: Path, source: Path, tmp_path: Path
) -> None:
    expected = list(predict_text(PredictOptions(model=str(trained), file=source)))
    summary = score(trained, source, tmp_path / "a.jsonl", keep_text=True)
    assert summary["rows"] == len(TEXTS)
    written = lines(tmp_path / "a.jsonl")
    assert [line["row"] for line in written] == list(range(1, len(TEXTS) + 1))
    for line, other in zip(written, expected, strict=True):
        assert (line["text"], line["label"]) == (other["text"], other["label"])
        assert line["probability"] == pytest.approx(other["probability"], abs=2e-6)
        assert line["probability"] == line["probabilities"][line["label"]]
    score(trained, source, tmp_path / "a.csv", keep_text=True)
    score(trained, source, tmp_path / "a.parquet", keep_text=True)
    from_csv = pd.read_csv(tmp_path / "a.csv")
    parquet = pd.read_parquet(tmp_path / "a.parquet")
    names = ["row", "text", "label", "probability", "probability_negative", "probability_positive"]
    for frame in (from_csv, parquet):
        assert list(frame) == names
        assert frame["text"].tolist() == [line["text"] for line in written]
        assert frame["probability"].tolist() == [line["probability"] for line in written]
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.usefixtures("small_parts")
def test_rows_go_by_their_ids_and_files(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        '{"text": null, "n": 7}\n{"text": "The plot is witty .", "n": "x"}\n{"text": ""}\n'
    )
    pd.DataFrame({"text": TEXTS[:10], "n": range(10)}).to_parquet(tmp_path / "in" / "b.parquet")
    score(trained, tmp_path / "in", tmp_path / "in" / "out.jsonl", id_column="n")
    written = lines(tmp_path / "in" / "out.jsonl")
    assert [line["id"] for line in written] == [7, "x", None, *range(10)]
    assert [Path(line["file"]).name for line in written] == ["a.jsonl"] * 3 + ["b.parquet"] * 10
    missing, witty, empty = written[:3]
    assert witty["label"] == "positive"
    assert missing["probabilities"] == empty["probabilities"]
    # The answers, which are there now, are not among the texts.
    score(trained, tmp_path / "in", tmp_path / "in" / "out.jsonl", id_column="n", overwrite=True)
    assert lines(tmp_path / "in" / "out.jsonl") == written
    pattern = tmp_path / "in" / "*.parquet"
    score(trained, pattern, tmp_path / "out.parquet", id_column="n", limit=8)
    assert pd.read_parquet(tmp_path / "out.parquet")["id"].tolist() == list("01234567")


# ---- stopping and resuming -----------------------------------------------------------------------


class Killed(BaseException):
    """Ends the work between two steps, and nothing in the package handles it."""


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", bulk_parts.FORMATS)
def test_stopped_at_any_step_and_resumed_the_output_is_the_same(
    trained: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    score(trained, source, whole)
    steps = 0
    real = {name: getattr(Path, name) for name in ("replace", "write_bytes", "mkdir")}

    def dying(name: str) -> Any:
        def step(path: Path, *arguments: Any, **named: Any) -> Any:
            nonlocal steps
            steps -= 1
            if steps == 0:
                if name == "write_bytes":
                    real[name](path, arguments[0][: len(arguments[0]) // 2])
                raise Killed
            return real[name](path, *arguments, **named)

        return step

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(Path, name, dying(name))
        for patience in itertools.count(1):  # each start comes one step further than the one before
            steps = patience
            try:
                score(trained, source, output, resume=True)
                break
            except Killed:
                assert not output.exists() or output.read_bytes() == whole.read_bytes()
    assert patience > 4
    assert output.read_bytes() == whole.read_bytes()
    before = output.stat()
    assert score(trained, source, output, resume=True)["rows"] == len(TEXTS)
    assert output.stat().st_mtime_ns == before.st_mtime_ns  # nothing was left to do


SCRIPT = """
import os, signal, sys
from nin_text import bulk, bulk_parts, cli, report
from nin_text.options import PredictOptions
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
model, number = sys.argv[1], int(sys.argv[2])
bulk_parts.PART_ROWS, write, left = 7, report.write_bytes, 3
def dying(path, content):
    global left
    write(path, content)
    left -= path.suffix == ".csv"
    if left == 0:
        os.kill(os.getpid(), number)
report.write_bytes = dying
options = PredictOptions(model=model, file=Path("texts.csv"), output=Path("out.csv"), resume=True)
cli.set_up_logging(quiet=False, verbose=False)
cli.run(lambda: bulk.score_files(options))
"""


def test_signals_stop_the_work_and_resume_goes_on(
    trained: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, status in ((9, -9), (2, 130)):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(trained), str(number)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == status, run.stderr
        assert not (tmp_path / "out.csv").exists()
    assert "--resume goes on" in run.stderr
    assert len(list((tmp_path / "out.csv.parts").glob("*.csv"))) == 6
    monkeypatch.setattr(bulk_parts, "PART_ROWS", 7)
    monkeypatch.chdir(tmp_path)
    score(trained, Path("texts.csv"), Path("out.csv"), resume=True)
    score(trained, Path("texts.csv"), Path("whole.csv"))
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_is_said_and_leaves_no_half_part(
    trained: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, left = tmp_path / "out.jsonl", [4]  # the manifest, two parts and half of one
    real = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        left[0] -= 1
        if left[0] == 0:
            real(path, content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(Path, "write_bytes", full)
        score(trained, source, output)
    assert "the disk is full" in (cli.resource_message(caught.value) or "")
    assert len(list((tmp_path / "out.jsonl.parts").glob("*.jsonl"))) == 2
    score(trained, source, output, resume=True)
    score(trained, source, tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.usefixtures("small_parts")
def test_what_was_scored_before_the_damage_is_kept(trained: Path, tmp_path: Path) -> None:
    bad, output = tmp_path / "bad.csv", tmp_path / "out.csv"
    bad.write_text("text\n" + "The plot is dull .\n" * 16 + "a,b\n" + "good\n" * 9)
    message = r"line 18, has 2 fields .* \(after row 16\); the answers to 14 rows are kept in"
    with pytest.raises(UserError, match=message):
        score(trained, bad, output)
    kept = sorted((tmp_path / "out.csv.parts").glob("*.csv"))
    assert [len(pd.read_csv(path)) for path in kept] == [7, 7]
    assert not output.exists()


@pytest.mark.usefixtures("small_parts")
def test_resuming_into_something_else_is_refused(
    trained: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    score(trained, source, output, limit=10)
    content = output.read_bytes()
    other = tmp_path / "model"
    shutil.copytree(trained, other)
    assert score(other, source, output, limit=10, resume=True)["rows"] == 10  # it only moved
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good"}
    (other / "config.json").write_text(json.dumps(config))
    for name, options in {
        "limit": {"limit": 11},
        "keep text": {"limit": 10, "keep_text": True},
        "model": {"limit": 10, "model": other},
    }.items():
        model = options.pop("model", trained)
        with pytest.raises(UserError, match=f"begun with another {name}:.*--overwrite"):
            score(model, source, output, resume=True, **options)
    write(source, TEXTS[1:])
    with pytest.raises(UserError, match="begun with other inputs:"):
        score(trained, source, output, limit=10, resume=True)
    with pytest.raises(UserError, match="exists; replace it with --overwrite"):
        score(trained, source, output, limit=10)
    assert output.read_bytes() == content
    score(trained, source, output, limit=10, overwrite=True)
    assert output.read_bytes() != content


def test_a_column_that_any_file_lacks_is_told_before_anything_is_written(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name, column in (("a", "text"), ("b", "body"), ("c", "nope")):
        pd.DataFrame({column: TEXTS[:3]}).to_csv(tmp_path / "in" / f"{name}.csv", index=False)
    with pytest.raises(UserError, match="cannot tell which column"):
        score(trained, tmp_path / "in", tmp_path / "out.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


@pytest.mark.usefixtures("small_parts")
def test_what_precision_auto_meant_at_first_is_kept_to(
    trained: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, supported = tmp_path / "out.jsonl", "torch.cpu._is_avx512_bf16_supported"
    monkeypatch.setattr(supported, lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "join_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(trained, source, output, precision="auto")
    monkeypatch.setattr(supported, lambda: True)  # another machine
    with pytest.raises(UserError, match="begun with another precision"):
        score(trained, source, output, precision="auto", resume=True)
    assert score(trained, source, output, precision="fp32", resume=True)["rows"] == len(TEXTS)


@pytest.mark.usefixtures("small_parts")
def test_a_file_without_rows_is_passed_over_and_named(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    frame = pd.DataFrame({"text": TEXTS[:9]})
    for name, part in {"a": frame[:0], "b": frame, "c": frame[:0], "d": frame[:2]}.items():
        part.to_parquet(tmp_path / "in" / f"{name}.parquet")
    summary = score(trained, tmp_path / "in", tmp_path / "out.jsonl")
    assert summary["rows"] == 11
    named = [Path(line["file"]).name[0] for line in lines(tmp_path / "out.jsonl")]
    assert named == ["b"] * 9 + ["d"] * 2
    assert [name for name in "abcd" if f"{name}.parquet holds no rows" in caplog.text] == ["a", "c"]
    with pytest.raises(UserError, match=r"c\.parquet holds no rows"):
        score(trained, tmp_path / "in" / "[ac].parquet", tmp_path / "none.jsonl")
    assert not list(tmp_path.glob("none*"))


@pytest.mark.usefixtures("small_parts")
def test_a_pattern_that_reaches_the_parts_takes_them_for_no_texts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd.DataFrame({"text": TEXTS}).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    pattern, output = tmp_path / "**" / "*.jsonl", tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "join_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(trained, pattern, output)
    assert len(list((tmp_path / "out.jsonl.parts").glob("*.jsonl"))) == 9
    assert score(trained, pattern, output, resume=True)["rows"] == len(TEXTS)
    assert score(trained, pattern, output, overwrite=True)["rows"] == len(TEXTS)


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_ids_stay_what_they_are_and_line_ends_stay_in_their_cells(
    trained: Path, tmp_path: Path
) -> None:
    rows = [
        {"text": "good\rfilm", "n": 1.5},
        {"text": "a\r\nb", "n": "x\ry"},
        {"text": "c", "n": 2},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options: dict[str, Any] = {"id_column": "n", "keep_text": True}
    score(trained, source, tmp_path / "out.jsonl", **options)
    assert [line["id"] for line in lines(tmp_path / "out.jsonl")] == [1.5, "x\ry", 2]
    score(trained, source, tmp_path / "out.csv", **options)
    with (tmp_path / "out.csv").open(newline="") as file:
        header, *cells = csv.reader(file)
    assert header[:3] == ["id", "text", "label"]
    assert [row[:2] for row in cells] == [[str(row["n"]), row["text"]] for row in rows]
    assert (tmp_path / "out.csv").read_bytes().startswith(b"id,text,label,probability,")
    assert (tmp_path / "out.csv").read_bytes().count(b"\r\n") == 1  # that in a text


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no file": (["--output", "a.csv"], "takes the texts of --file"),
    "texts": (["--output", "a.csv", "--file", "texts.csv", "text"], "takes the texts of --file"),
    "ending": (["--output", "a.txt", "--file", "texts.csv"], r"ends in \.jsonl"),
    "column": (["--output", "a.csv", "--file", "texts.csv", "--id-column", "no"], "no column 'no'"),
    "empty": (["--output", "a.csv", "--file", "empty.csv"], "empty.csv is empty"),
    "missing": (["--output", "a.csv", "--file", "no.csv"], "there is no file no.csv"),
    "pattern": (["--output", "a.csv", "--file", "*.tsv"], "no file matches"),
    "stars": (["--output", "a.csv", "--file", "in/**.csv"], "is no pattern of files"),
    "cluster": (
        ["--output", "a.csv", "--file", "texts.csv", "--ray-address", "nowhere:1"],
        "--ray-address needs --engine ray",
    ),
    "page": (
        ["--output", "a.csv", "--file", "texts.csv", "--explain-file", "a.html"],
        "leave it out",
    ),
    "folder": (["--output", "texts.csv/a.csv", "--file", "texts.csv"], "cannot write or read"),
    "explain": (["--output", "a.csv", "--file", "texts.csv", "--explain"], "leave it out"),
    "no output": (["--file", "texts.csv", "--keep-text"], "--keep-text needs --output"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_refused_before_anything_is_written(
    trained: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(source.parent)
    Path("empty.csv").touch()
    arguments, message = MISTAKES[kind]
    monkeypatch.setattr(sys, "argv", ["predict_text.py", "--model", str(trained), *arguments])
    options = cli.parse(PredictOptions, None, "")

    def work() -> Any:
        if options.output is not None:
            return bulk.score_files(options)
        return predict_text(options)

    with pytest.raises(SystemExit) as caught:
        cli.run(work)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert {path.name for path in Path.cwd().iterdir()} == {"texts.csv", "empty.csv"}


# ---- Ray -----------------------------------------------------------------------------------------


def test_without_ray_the_extra_is_named(
    trained: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'nin-text\[ray\]'"):
        score(trained, source, tmp_path / "out.csv", engine="ray")


def test_ray_gives_the_rows_of_the_local_engine_and_keeps_them_when_a_file_is_bad(
    script: Script, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.data")
    for i in range(3):
        write(tmp_path / f"in{i}.csv", TEXTS[i * 20 : i * 20 + 20])
    (tmp_path / "in3.csv").write_text("key,text\nk0,The plot is dull .\nk1,a,b\n")
    command = ["predict_text", "--model", trained, "--file", "in?.csv", "--id-column", "key"]
    command += ["--output", "out.jsonl", "--device", "cpu", "--quiet"]
    memory = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "80000000"}
    complaint = script(*command, "--engine", "ray", **memory).complaint
    assert "in3.csv" in complaint and "has 3 fields" in complaint
    assert "60 rows are kept" in complaint
    kept = sorted((tmp_path / "out.jsonl.parts").glob("*.jsonl"))
    assert len(kept) == 3
    by_ray = [line for path in kept for line in lines(path)]
    (tmp_path / "in3.csv").unlink()
    monkeypatch.chdir(tmp_path)
    score(trained, Path("in?.csv"), Path("out.jsonl"), id_column="key", overwrite=True)
    for one, other in zip(by_ray, lines(tmp_path / "out.jsonl"), strict=True):
        assert [one[key] for key in ("file", "id", "label")] == [
            other[key] for key in ("file", "id", "label")
        ]
        assert one["probability"] == pytest.approx(other["probability"], abs=2e-6)
