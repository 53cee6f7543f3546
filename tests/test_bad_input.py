"""Odd and bad input through readers, scripts and estimators: a right answer or one clear sentence.

Whatever is refused ends with status 2 and one sentence on standard error.
"""

from __future__ import annotations

import bz2
import csv
import decimal
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nin_text import NiNTextClassifier, bulk, bulk_parts, cli, models, readers
from nin_text.data import load_text_dataset
from nin_text.errors import UserError
from nin_text.evaluation import classification_metrics
from nin_text.explain_page import explain_html
from nin_text.inference import evaluate_text, predict_text
from nin_text.options import EvaluateOptions, PredictOptions, TrainOptions, check
from nin_text.report import model_card, plot_confusion
from nin_text.runs import train_text
from nin_text.tokenization import train_tokenizer

MODEL = str(Path(__file__).parent / "fixtures" / "v0.1.0")
N = 40


def table(
    text: str | Sequence[str] = "text {}",
    labels: Sequence[str] = ("no", "yes"),
    n: int = N,
    separator: str = ",",
) -> str:
    """A CSV file of n rows."""
    texts = [text] if isinstance(text, str) else text
    lines = [f"text{separator}label"]
    lines += [
        f"{texts[i % len(texts)].format(i)}{separator}{labels[i % len(labels)]}" for i in range(n)
    ]
    return "\n".join(lines) + "\n"


def quoted(labels: Sequence[str], n: int = N) -> bytes:
    file = io.StringIO()
    rows = [[f"text {i}", labels[i % len(labels)]] for i in range(n)]
    csv.writer(file).writerows([["text", "label"], *rows])
    return file.getvalue().encode()


def lines(texts: Sequence[Any] = ("text",), labels: Sequence[Any] = (0, 1), n: int = N) -> bytes:
    """JSON lines."""
    rows = [{"text": texts[i % len(texts)], "label": labels[i % len(labels)]} for i in range(n)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    given = {"text": [f"text {i}" for i in range(N)], "label": ["no", "yes"] * (N // 2), **columns}
    pq.write_table(pa.table({name: pa.array(values) for name, values in given.items()}), sink)
    return sink.getvalue().to_pybytes()


def wide(columns: int) -> bytes:
    head = ",".join(["text", "label", *(f"c{i}" for i in range(columns))])
    rows = (f"t{i},{'ab'[i % 2]}" + ",1" * columns for i in range(12))
    return "\n".join([head, *rows]).encode()


YES_NO = ["no", "yes"]
BOM, LATER = b"\xef\xbb\xbf", 70_000  # the first bytes alone are looked at for zeros
# Name of the file: its content, the class names or what is said when it is to train on, and the
# number of texts or what is said when it is to be classified.
FILES: dict[str, tuple[bytes, list[str] | str, int | str]] = {
    # encodings
    "utf-8 with mark.csv": (BOM + table().encode(), YES_NO, N),
    "two marks.csv": (BOM * 2 + table().encode(), "which column", "which column"),
    "utf-16 little.csv": (b"\xff\xfe" + table("ä {}").encode("utf-16-le"), YES_NO, N),
    "utf-16 big.csv": (b"\xfe\xff" + table("ä {}").encode("utf-16-be"), YES_NO, N),
    "utf-16 without mark.csv": (table().encode("utf-16-le"), "binary file", "binary file"),
    "utf-32.csv": (table("ä {}").encode("utf-32"), YES_NO, N),
    "latin-1.csv": (table("café {}").encode("latin-1"), "is not UTF-8 text", "is not UTF-8 text"),
    "windows.csv": (table("“{}”").encode("cp1252"), "is not UTF-8", "is not UTF-8"),
    "chinese.csv": (table("你好 {}").encode("gbk"), "is not UTF-8", "is not UTF-8"),
    "zeros.csv": (table("a\0b {}").encode(), "binary file", "binary file"),
    "late zero.csv": (table("x" * LATER + "a\0b {}", n=12).encode(), YES_NO, 12),
    "escaped zero.jsonl": (lines(["a\0b"]), ["0", "1"], N),
    "surrogates.jsonl": (lines(["a\ud800b"], ["\udc00", "x"]), ["?", "x"], N),
    "surrogate bytes.csv": (table().encode() + b"\xed\xa0\x80,no\n", "not UTF-8", "not UTF-8"),
    "right to left.csv": (table("\u202e שלום {}").encode(), YES_NO, N),
    "emoji.csv": (table("👨\u200d👩\u200d👧 {}").encode(), YES_NO, N),
    "zero width.csv": (table("\u200b\u2060{}").encode(), YES_NO, N),
    "separators.jsonl": (lines(["a\u2028b\x85c"]), ["0", "1"], N),
    # shapes of texts
    "blank.csv": (table(" ").encode(), "texts of the train split are empty", N),
    "no-break spaces.csv": (table("\xa0\u3000").encode(), "are empty or missing", N),
    "one character.csv": (table("x").encode(), YES_NO, N),
    "five megabytes.csv": (table(["x" * 5_000_000, "a"], n=12).encode(), YES_NO, 12),
    "endless field.csv.gz": (
        gzip.compress(b"text,label\n" + b"a" * (readers.MAX_CHARACTERS + 1)),
        "a line of more than",
        "a line of more than",
    ),
    "endless line.jsonl.gz": (
        gzip.compress(b'{"text": "' + b"a" * (readers.MAX_CHARACTERS + 1)),
        "a line of more than",
        "a line of more than",
    ),
    "numbers.parquet": (parquet(text=list(range(N))), "holds int values", N),
    "bytes.parquet": (parquet(text=[b"a"] * N), "holds bytes values", "holds bytes values"),
    "lists.parquet": (parquet(text=[["a"]] * N), "holds list values", "holds list values"),
    "mixed texts.jsonl": (lines(["a", 5, True, 2.5]), "holds int values", N),
    "objects.jsonl": (lines(["a", {"b": 1}]), "holds dict values", "holds dict values"),
    "missing texts.jsonl": (lines(["a", None]), "20 of 40 texts", N),
    "a text that is no number.jsonl": (lines(["a", math.nan]), "20 of 40 texts", N),
    # shapes of files
    "empty.csv": (b"", "is empty", "is empty"),
    "header alone.csv": (b"text,label\n", "holds no rows", "holds no rows"),
    "no header.csv": (b"good,1\nbad,0\n" * 20, "which column", "which column"),
    "empty header.csv": (b",\na,b\n", "several columns named ''", "several columns named ''"),
    "header twice.csv": (b"text,text\na,b\n", "columns named 'text'", "columns named 'text'"),
    "thousands of one name.csv": (b"x," * 50_000 + b"x\n", "named 'x'", "named 'x'"),
    "100,000 columns.csv": (wide(100_000), ["a", "b"], 12),
    "ragged.csv": (b"text,label\na,b\nc\n", "line 3, has 1 fields", "line 3, has 1 fields"),
    "semicolons.csv": (table(separator=";").encode(), "separated by ';'", "separated by ';'"),
    "tabs.csv": (table(separator="\t").encode(), "separated by '\\t'", "separated by '\\t'"),
    "commas.tsv": (table().encode(), "separated by ','", "separated by ','"),
    "old line ends.csv": (table().replace("\n", "\r").encode(), YES_NO, N),
    "windows line ends.csv": (table().replace("\n", "\r\n").encode(), YES_NO, N),
    "quotes within.csv": (table('a "b" {}').encode(), YES_NO, N),
    "quote before.csv": (table('"a" {}').encode(), "could not be read", "could not be read"),
    "quote that stays open.csv": (b'text,label\n"a,b\n', "could not be read", "could not be read"),
    "too few.csv": (table(n=6).encode(), "too few to train", 6),
    "objects without keys.jsonl": (b"{}\n{}\n", "holds no rows", "among none"),
    "array and more.json": (b'[{"text": "a"}] x', "could not be read", "could not be read"),
    "number.json": (b"3", "one JSON object on each line", "one JSON object on each line"),
    "depth without end.json": (b"[" * 100_000, "could not be read", "could not be read"),
    "cut short.jsonl": (b'{"text": "a"}\n{"te', "line 2, is not JSON", "line 2, is not JSON"),
    "a number of 10,000 digits.jsonl": (
        b'{"text": "a", "label": ' + b"9" * 10_000 + b"}",
        "could not be read",
        "could not be read",
    ),
    "keys twice.jsonl": (b'{"text":"a","text":"b","label":"no"}\n' * 20, "the same label (no)", 20),
    "not packed.csv.gz": (table().encode(), "could not be read", "could not be read"),
    "not packed.csv.xz": (table().encode(), "could not be read", "could not be read"),
    "not packed.csv.zst": (table().encode(), "could not be read", "could not be read"),
    "packed twice.csv.gz": (gzip.compress(gzip.compress(b"a")), "binary file", "binary file"),
    "cut short.csv.bz2": (bz2.compress(table().encode())[:-9], "could not", "could not"),
    "no parquet.parquet": (b"PAR1" + b"\0" * 50 + b"PAR1", "could not be read", "could not"),
    "spreadsheet.xlsx": (b"PK\3\4", "has an ending", "has an ending"),
    "program.csv": (b"\x7fELF\2\1\1\0" * 99, "binary file", "binary file"),
    # labels
    "labels all equal.csv": (table(labels=["no"]).encode(), "the same label (no)", N),
    "labels all different.csv": (
        table(labels=[str(i) for i in range(N)]).encode(),
        "classes with two examples",
        N,
    ),
    "5,000 classes.csv": (
        table(labels=[f"c{i:04}" for i in range(5000)], n=10_000).encode(),
        [f"c{i:04}" for i in range(5000)],
        10_000,
    ),
    "labels with commas.csv": (quoted(["a, b", "c\nd", '"']), ['"', "a, b", "c\nd"], N),
    "labels of mixed types.jsonl": (lines(labels=[1, "1", True, "x", 2.5]), ["1", "2.5", "x"], N),
    "labels in lists.jsonl": (lines(labels=[[1], [2]]), "single values, not list", N),
    "labels in objects.jsonl": (lines(labels=[{"a": 1}]), "single values, not dict", N),
    "labels that are bytes.parquet": (parquet(label=[b"a", b"b"] * 20), "not bytes values", N),
    "labels missing.csv": (table(labels=["", "yes"]).encode(), "20 of 40 labels", N),
    "labels NaN.csv": (table(labels=["NaN", "1"]).encode(), "20 of 40 labels", N),
    "labels NaN.jsonl": (lines(labels=[math.nan, 1]), "20 of 40 labels", N),
    "labels infinite.jsonl": (lines(labels=[math.inf, 1]), "20 of 40 labels", N),
    "labels infinite.parquet": (parquet(label=[-math.inf, 1.0] * 20), "20 of 40 labels", N),
    "large labels.parquet": (parquet(label=[2**60, 2**62] * 20), [str(2**60), str(2**62)], N),
    "decimal labels.parquet": (
        parquet(label=[decimal.Decimal(1), decimal.Decimal(2)] * 20),
        ["1", "2"],
        N,
    ),
}


def refused(work: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of work that is refused, as a script says it."""
    with pytest.raises(SystemExit) as caught:
        cli.run(work)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_understood_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, classes, texts = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)

    def load() -> dict[str, Any]:
        return {"names": load_text_dataset(str(path)).label_names}

    def stream() -> Iterable[dict[str, Any]]:
        return iter([{"rows": sum(1 for _ in readers.stream_texts(path))}])

    for work, expected in ((load, classes), (stream, texts)):
        if isinstance(expected, str):
            assert expected in refused(work, capsys)
        else:
            cli.run(work)
            (result,) = json.loads(capsys.readouterr().out).values()
            assert result == expected


# ---- texts -----------------------------------------------------------------------------------

ODD = {
    "nothing": "",
    "blank": " \t\r\n\x0b\u3000",
    "zero": "\0",
    "escape": "\x1b[2J\x1b]0;title\x07",
    "surrogate": "a\ud800b\udfff",
    "right to left": "\u202eabc\u2066",
    "emoji": "👩🏽\u200d🚀🏴󠁧󠁢󠁥󠁮󠁧󠁿" * 5,
    "zero width": "\u200b" * 50,
    "accents": "e" + "\u0301" * 5000,
    "ligature that grows": "\ufdfa" * 500,
    "every plane": "".join(chr(i) for i in range(0, 0x110000, 4999)),
    "no space": "x" * 300_000,
    "words": "good " * 20_000,
    "markup": "<script>alert(1)</script>&amp;</style>",
    "null in words": "NaN",
}


def test_every_odd_text_gets_the_answer_of_its_own(tmp_path: Path) -> None:
    """Alone, in a batch with the others, and from a file: one answer, which sums to one."""
    texts = list(ODD.values())
    together = list(predict_text(PredictOptions(model=MODEL, texts=texts)))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(rows)
    options = PredictOptions(model=MODEL, file=tmp_path / "a.jsonl", output=tmp_path / "b.jsonl")
    assert bulk.score_files(options)["rows"] == len(texts)
    written = (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()
    for text, answer, line in zip(texts, together, written, strict=True):
        (alone,) = predict_text(PredictOptions(model=MODEL, texts=[text]))
        of_file = json.loads(line)
        for other in (answer, of_file):
            assert other["label"] == alone["label"]
            assert list(other["probabilities"].values()) == pytest.approx(
                list(alone["probabilities"].values()), abs=2e-5
            )
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert all(0 <= p <= 1 for p in answer["probabilities"].values())


def test_odd_texts_are_explained_on_a_page_that_is_markup_alone() -> None:
    model, tokenizer = models.load(MODEL)
    short = [text for text in ODD.values() if len(text) < 1000]
    page = explain_html(model, tokenizer, short)
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "\0" not in page


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.characters(codec=None), max_size=200))
def test_any_text_at_all_gets_probabilities(text: str) -> None:
    (answer,) = predict_text(PredictOptions(model=MODEL, texts=[text]))
    assert answer["text"] == text
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.tuples(
            st.text(max_size=20) | st.none() | st.integers() | st.floats() | st.booleans(),
            st.text(max_size=8) | st.none() | st.integers() | st.floats() | st.booleans(),
        ),
        min_size=1,
        max_size=40,
    ),
    keys=st.tuples(st.sampled_from(["text", "x", ""]), st.sampled_from(["label", "y", "text"])),
)
def test_any_json_becomes_splits_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, Any]], keys: tuple[str, str]
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    try:
        dataset = load_text_dataset(str(path))
    except UserError as error:
        assert "\n" not in str(error).replace("\\n", "")
        return
    assert sum(map(len, dataset.splits.values())) == len(rows)
    assert len(set(dataset.label_names)) == len(dataset.label_names) >= 2
    for part in dataset.splits.values():
        assert all(text.strip() for text in part.texts)
        assert set(part.labels) <= set(range(len(dataset.label_names)))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    labels=st.lists(
        st.one_of(st.text(max_size=5), st.integers(-5, 5), st.booleans(), st.none(), st.floats()),
        min_size=0,
        max_size=6,
    ),
    texts=st.lists(st.one_of(st.text(max_size=9), st.none(), st.integers()), max_size=6),
)
@example(labels=["", 0], texts=["a"])
def test_any_labels_are_encoded_or_refused_by_the_classifier(labels: list, texts: list) -> None:
    """`fit` is stopped before it would train: what comes before is what reads labels and texts."""

    class StoppedError(Exception):
        pass

    class Untrained(NiNTextClassifier):
        def _build(self, *arguments: Any) -> Any:
            raise StoppedError

    y: Any = np.array(labels, dtype=object) if labels else []
    with pytest.raises((StoppedError, UserError)):
        Untrained().fit(texts, y)


# ---- numbers -------------------------------------------------------------------------------------

NUMBERS: dict[str, Sequence[Any]] = {
    "learning_rate": (math.nan, math.inf, -1.0, 0.0, 1e9),
    "pretrain_learning_rate": (math.nan, -math.inf),
    "weight_decay": (math.nan, math.inf, -0.1),
    "warmup": (math.nan, 1.0, -1.0),
    "dropout": (math.nan, 1.0),
    "word_dropout": (math.inf,),
    "label_smoothing": (math.nan, 1.0),
    "ema_decay": (1.0, math.nan),
    "epochs": (0, -1),
    "batch_size": (0, -(2**70)),
    "batch_tokens": (0,),
    "gradient_accumulation": (0,),
    "vocab_size": (1, 10**12, 2**70),
    "max_length": (-1, 2**70),
    "limit": (0, -5),
    "seed": (-1, 2**32),
    "ngrams": (-1, 100),
    "ngram_buckets": (0, 10**12),
    "patience": (-1,),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values]
)
def test_numbers_that_no_run_can_have_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be"):
        check(TrainOptions(**{name: value}))


def test_a_word_of_a_megabyte_does_not_hold_up_training_a_tokenizer() -> None:
    """Merges of its letters would take hours."""
    texts = ["good plot", "bad plot"] * 9
    for kind in ("wordpiece", "bpe", "word"):
        with_word = train_tokenizer([*texts, "good " + "xy" * 500_000 + "--" * 500_000], kind=kind)
        assert with_word.get_vocab() == train_tokenizer([*texts, "good"], kind=kind).get_vocab()


# ---- through everything --------------------------------------------------------------------------

NAMES = ["a, b", "c\nd", "<script>alert(1)</script>", "`x``|[l](javascript:1)", "\u202e", "../../x"]


def test_any_class_names_go_through_a_whole_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    data = tmp_path / "in" / "a.csv"
    data.write_bytes(quoted(NAMES, 20 * len(NAMES)))
    folder = tmp_path / "out" / "run"
    options = {"model": "nin-text-small", "epochs": 1, "pretrain_epochs": 0, "quiet": True}
    train_text(TrainOptions(str(data), **options, output_dir=folder))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["label_names"] == sorted(NAMES)
    assert set(metrics["test"]["per_class"]) == set(NAMES)
    model = models.load_classifier(str(folder))
    assert models.label_names(model) == sorted(NAMES)
    assert "<script>alert" not in (folder / "mistakes.html").read_text(encoding="utf-8")
    card = (folder / "README.md").read_text(encoding="utf-8")
    markup = re.sub(r"(`+)[^`].*?[^`]\1(?!`)", "", card)  # without what stands between backticks
    assert markup != card
    assert "<script>alert" not in markup
    assert "[l](javascript" not in markup
    result = evaluate_text(EvaluateOptions(model=str(folder), dataset=str(data)))
    assert result["n"] == 20 * len(NAMES)
    for suffix in bulk_parts.FORMATS:
        output = tmp_path / "out" / f"answers{suffix}"
        options = PredictOptions(model=str(folder), file=data, output=output, quiet=True)
        assert bulk.score_files(options)["rows"] == 20 * len(NAMES)
    with (tmp_path / "out" / "answers.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[3:] == [f"probability_{name}" for name in sorted(NAMES)]
    assert len(rows) == 20 * len(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "cache"}


def test_names_in_a_card_stay_on_their_line_and_are_no_markup(tmp_path: Path) -> None:
    logits = np.eye(3)[[0, 1, 2, 2]]
    names = ["`", "<b>\n# Title", "ok"]
    judged = classification_metrics(logits, [0, 1, 2, 0], names)
    metrics = {
        "test": judged,
        "validation": judged,
        "label_names": names,
        "notes": [],
        "ngram_table_entries": 0,
        "model": "m",
        "dataset": "<i>x</i>\n# y.csv",
        "architecture": "NiN",
        "parameters": 1,
        "data_source": "x",
        "train_examples": 1,
        "data_fingerprint": "f",
        "command": "python x",
        "train_seconds": 1.0,
        "seed": 0,
        "environment": {"processor": "p", "threads": 1},
        "precision": "fp32",
    }
    card = model_card(metrics).partition("\n---\n")[2]
    assert [line for line in card.splitlines() if line.startswith("# ")] == [
        r"# m on \<i\>x\</i\> \# y.csv"
    ]
    assert "`<b> # Title`" in card
    assert "`` ` ``" in card
    plot_confusion(judged["confusion_matrix"], names, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train_text", ["--dataset", "latin-1.csv"], "is not UTF-8 text"),
        ("export_onnx", ["--model", MODEL, "--dataset", "latin-1.csv"], "is not UTF-8 text"),
        ("train_text", ["--output-dir", "/proc/nothing/run", "--limit", "20"], "cannot write"),
    ],
)
def test_scripts_refuse_in_one_sentence(
    script: Script, tmp_path: Path, name: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "latin-1.csv").write_bytes(FILES["latin-1.csv"][0])
    assert message in script(name, *arguments).complaint
    assert {path.name for path in tmp_path.iterdir()} <= {"latin-1.csv", "cache"}
