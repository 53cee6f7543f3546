"""Files and folders become tables, or one sentence says why not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pytest

from nin_text import readers
from nin_text.errors import UserError

TABLE = {
    "text": ['plain, with "quotes"', "two\nlines", "Ünïcode 🎬"],
    "label": ["good", "bad", "good"],
}


def write(path: Path, table: dict[str, list[Any]] = TABLE) -> Path:
    frame = pd.DataFrame(table)
    match readers.suffix_of(path):
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        case ".json":
            frame.to_json(path, orient="records")
        case ".parquet":
            frame.to_parquet(path)
    return path


@pytest.mark.parametrize(
    "name", ["a.csv", "a.CSV", "a.csv.gz", "a.tsv", "a.jsonl", "a.jsonl.bz2", "a.json", "a.parquet"]
)
def test_every_format_gives_the_same_table(tmp_path: Path, name: str) -> None:
    assert readers.read_file(write(tmp_path / name)) == TABLE


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_understood(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nnaïve,1\n", encoding=encoding)
    assert readers.read_file(path) == {"text": ["naïve"], "label": ["1"]}


def test_missing_keys_of_json_lines_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n{"text": "b"}\n')
    assert readers.read_file(path) == {"text": ["a", "b"], "label": [1, None]}


def test_line_separators_inside_a_json_text_do_not_end_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
    assert readers.read_file(path) == {"text": ["a\u2028b\x85c"]}


BAD = {
    "missing.csv": (None, "there is no file"),
    "empty.csv": (b"", "is empty"),
    "header.csv": (b"text,label\n", "holds no rows"),
    "ragged.csv": (b"text,label\na,b\nc,d,e\n", r"line 3, has 3 fields where the header has 2"),
    "twice.csv": (b"text,text\na,b\n", "several columns named 'text'"),
    "quote.csv": (b'text,label\n"a,b\n', "could not be read as CSV"),
    "binary.csv": (b"\x7fELF\0\0\1\2" * 9, "is a binary file"),
    "binary.parquet": (b"\x7fELF\0\0\1\2" * 9, "could not be read as PARQUET"),
    "broken.csv.gz": (b"no gzip", "could not be read"),
    "latin.csv": ("text,label\ncafé,1\n".encode("latin-1"), "is not UTF-8 text"),
    "line.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2, is not JSON"),
    "list.jsonl": (b"[1, 2]\n", "one JSON object on each line"),
    "pickle.pkl": (b"\x80\x04.", "has an ending that is not one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        readers.read_file(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"text,label\n" + b"a,b\n" * 1000)
    (tmp_path / "a.csv.gz").write_bytes(whole[:-20])
    with pytest.raises(UserError, match="could not be read"):
        readers.read_file(tmp_path / "a.csv.gz")


def test_class_folders_give_their_names_as_labels(tmp_path: Path) -> None:
    for name, texts in {"neg": ["bad"], "pos": ["good", "fine"], "unsup": ["?"]}.items():
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i}.txt").write_text(text)
    assert readers.read_class_folders(tmp_path) == {
        "text": ["bad", "good", "fine"],
        "label": ["neg", "pos", "pos"],
    }
    with pytest.raises(UserError, match=r"no \.txt files"):
        readers.read_class_folders(tmp_path / "neg")


def test_the_most_telling_file_of_a_split_comes_first(tmp_path: Path) -> None:
    for name in ("train_sentences", "train_phrases", "dev", "test", "unsupervised", "other"):
        write(tmp_path / f"{name}.parquet")
    found = readers.split_files(tmp_path)
    assert {split: [path.stem for path in paths] for split, paths in found.items()} == {
        "train": ["train_phrases", "train_sentences"],
        "validation": ["dev"],
        "test": ["test"],
        "unsupervised": ["unsupervised"],
    }


def test_columns_are_guessed_by_name_and_overridable() -> None:
    table = {"id": [1], "Review": ["a"], "Sentiment": [1]}
    assert readers.pick_column(table, None, readers.TEXT_COLUMNS, "--text-column") == "Review"
    assert readers.pick_column(table, None, readers.LABEL_COLUMNS, "--label-column") == "Sentiment"
    assert readers.pick_column(table, "id", readers.TEXT_COLUMNS, "--text-column") == "id"
    with pytest.raises(UserError, match="no column 'body'; the columns are 'id', 'Review'"):
        readers.pick_column(table, "body", readers.TEXT_COLUMNS, "--text-column")
    with pytest.raises(UserError, match="name it with --text-column"):
        readers.pick_column({"a": [1]}, None, readers.TEXT_COLUMNS, "--text-column")


def streamed(path: Path, **columns: str) -> list[tuple[str, Any]]:
    return [(text, key) for _, text, key in readers.stream_texts(path, **columns)]


@pytest.mark.parametrize(
    "name",
    [
        *("a.csv", "a.csv.gz", "a.tsv", "a.tsv.xz", "a.csv.zst", "a.jsonl", "a.jsonl.bz2"),
        *("a.json", "a.parquet"),
    ],
)
def test_every_format_streams_the_texts_of_its_table(tmp_path: Path, name: str) -> None:
    if name.endswith(".zst"):
        write(tmp_path / "a.csv")
        with pyarrow.CompressedOutputStream(str(tmp_path / name), "zstd") as stream:
            stream.write((tmp_path / "a.csv").read_bytes())
    else:
        write(tmp_path / name)
    rows = list(readers.stream_texts(tmp_path / name, id_column="label"))
    assert [row[1:] for row in rows] == list(zip(TABLE["text"], TABLE["label"], strict=True))
    shares = [share for share, *_ in rows]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1


def test_missing_texts_of_a_stream_are_empty(tmp_path: Path) -> None:
    pd.DataFrame({"text": [None, "a"]}).to_parquet(tmp_path / "a.parquet")
    assert streamed(tmp_path / "a.parquet") == [("", None), ("a", None)]
    (tmp_path / "a.jsonl").write_text('{"text": NaN}\n{"n": 1}\n{"text": 5, "n": 2}\n')
    assert streamed(tmp_path / "a.jsonl", id_column="n") == [("", None), ("", 1), ("5", 2)]


def test_rows_longer_than_any_buffer_are_streamed_whole(tmp_path: Path) -> None:
    texts = ["x, y\n" * 300_000, "short", "é" * 65_535 + "\u2028" + "z" * 70_000]
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        write(tmp_path / name, {"text": texts})
        assert [text for text, _ in streamed(tmp_path / name)] == texts


@pytest.mark.parametrize("name", [name for name in BAD if name != "pickle.pkl"])
def test_a_stream_says_the_same_of_a_bad_file(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(readers.stream_texts(tmp_path / name))


def test_an_undecodable_byte_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    start = b"\xef\xbb\xbftext\n" + "naïve\n".encode() * 40_000
    (tmp_path / "a.csv").write_bytes(start + b"caf\xe9\n" + b"more\n" * 40_000)
    with pytest.raises(UserError, match=rf"not UTF-8 text \(byte {len(start) + 3}\)"):
        streamed(tmp_path / "a.csv")


def test_rows_before_the_damage_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\n" + "good,1\n" * 500 + "bad\n")
    stream = readers.stream_texts(tmp_path / "a.csv")
    assert len([next(stream) for _ in range(500)]) == 500
    with pytest.raises(UserError, match="line 502, has 1 fields"):
        next(stream)


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 1000)
    (tmp_path / "a.csv").write_text('text\n"never' + "x\n" * 2000)
    with pytest.raises(UserError, match="field larger than field limit"):
        streamed(tmp_path / "a.csv")


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\r\n  \nthree")
    assert [text for text, _ in streamed(path)] == ["one", "two", "three"]
    path.write_text("a\x85b\u2028c\x0cd\ne\n", encoding="utf-8")  # two lines
    assert [text for text, _ in streamed(path)] == ["a\x85b\u2028c\x0cd", "e"]
    assert streamed(path, text_column="body") == streamed(path)
    path.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        streamed(path)
