"""Tokenizers: equal in every process, at home with any text, ordinary Hugging Face files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nin_text.errors import UserError
from nin_text.tokenization import (
    KINDS,
    MANY_TEXTS,
    cache_dir,
    cached_tokenizer,
    clean,
    encode,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [
    f"The {a} was {b}, and the {b}est {a} isn't {c}!<br /><br />Naïve café №{i}"
    for i, (a, b, c) in enumerate(
        zip(
            ["story", "plot", "acting", "music"] * 10,
            ["great", "dull", "grand"] * 14,
            ["over", "here"] * 20,
            strict=False,
        )
    )
]

TRAIN = """
import json, sys
from nin_text.tokenization import train_tokenizer
texts = json.load(open(sys.argv[1]))
for kind in sys.argv[2:]:
    print(train_tokenizer(texts, kind=kind, vocab_size=150).backend_tokenizer.to_str())
"""


def test_every_process_trains_the_same_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(TEXTS))
    first, second = (
        subprocess.run(
            [sys.executable, "-c", TRAIN, str(path), *KINDS],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second
    assert len(set(first.splitlines())) == len(KINDS)


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.mark.parametrize("kind", KINDS)
def test_known_words_come_back_in_lower_case_without_line_breaks(kind: str) -> None:
    tokenizer = train_tokenizer(TEXTS, kind=kind, vocab_size=400)
    ids = encode(tokenizer, ["The STORY was great,<br /><br/>and the plot isn't dull"])[0]
    words = "".join(tokenizer.convert_ids_to_tokens(ids.tolist())).replace("##", "")
    assert words == "thestorywasgreat,andtheplotisn'tdull"
    assert len(tokenizer) <= 400


def test_case_is_kept_if_asked_for() -> None:
    tokenizer = train_tokenizer(TEXTS, lowercase=False)
    assert "The" in tokenizer.get_vocab()
    assert "the" in tokenizer.get_vocab()


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(), max_size=60))
def test_any_string_has_at_least_one_token(wordpiece, text: str) -> None:
    ids = encode(wordpiece, [text])[0]
    assert ids.dtype == np.int32
    assert len(ids) > 0
    assert ids.min() >= 0
    assert ids.max() < len(wordpiece)
    assert wordpiece.pad_token_id not in ids


def test_lone_surrogates_become_the_replacement_character() -> None:
    assert clean("a\ud800b") == "a\ufffdb"
    assert clean("a😀") == "a😀"


def test_lone_surrogates_and_a_million_characters_are_no_trouble(wordpiece) -> None:
    surrogate, spaced, glued = encode(wordpiece, ["a\ud800b", "great " * 170_000, "x" * 1_000_000])
    assert len(surrogate) >= 1
    assert len(spaced) == 170_000
    assert len(glued) == 1  # a word of a million letters is one unknown word


def test_texts_are_cut_only_if_asked_for(wordpiece) -> None:
    texts = ["great plot " * 50]
    assert len(encode(wordpiece, texts)[0]) == 100
    assert len(encode(wordpiece, texts, 0)[0]) == 100
    assert len(encode(wordpiece, texts, 7)[0]) == 7


def test_training_on_texts_of_every_script_keeps_room_for_words() -> None:
    texts = [*TEXTS, "".join(map(chr, range(0x4E00, 0x8E00)))]
    vocabulary = train_tokenizer(texts, vocab_size=3000).get_vocab()
    assert "great" in vocabulary
    assert "story" in vocabulary


def test_a_saved_tokenizer_loads_without_this_package(tmp_path: Path, wordpiece) -> None:
    wordpiece.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS[:4])["input_ids"] == wordpiece(TEXTS[:4])["input_ids"]
    assert (again.pad_token, again.unk_token, again.mask_token) == ("[PAD]", "[UNK]", "[MASK]")
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".json"]


def test_the_cache_answers_for_equal_texts_and_options_alone() -> None:
    def entries() -> int:
        return len(list((cache_dir() / "tokenizers").iterdir()))

    first = cached_tokenizer(TEXTS, kind="wordpiece", vocab_size=200)
    assert cached_tokenizer(TEXTS, kind="wordpiece", vocab_size=200).get_vocab() == (
        first.get_vocab()
    )
    assert entries() == 1
    cached_tokenizer(TEXTS[1:], kind="wordpiece", vocab_size=200)
    cached_tokenizer(TEXTS, kind="wordpiece", vocab_size=201)
    assert entries() == 3


def test_a_damaged_cache_entry_is_made_again() -> None:
    first = cached_tokenizer(TEXTS, kind="word", vocab_size=200)
    (entry,) = (cache_dir() / "tokenizers").iterdir()
    (entry / "tokenizer.json").write_text("{ half a")
    assert cached_tokenizer(TEXTS, kind="word", vocab_size=200).get_vocab() == first.get_vocab()
    assert json.loads((entry / "tokenizer.json").read_text())


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NIN_TEXT_CACHE", str(tmp_path / "file"))
    assert len(cached_tokenizer(TEXTS, kind="word", vocab_size=200)) > 10


def test_an_unknown_kind_or_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wordpiece, bpe, word"):
        train_tokenizer(TEXTS, kind="sentencepiece")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("kind", ["wordpiece", "word", "bpe"])
def test_many_texts_get_the_ids_that_each_gets_alone(kind: str, limit: int | None) -> None:
    """Many are looked up word by word where the tokenizer allows it."""
    tokenizer = train_tokenizer(TEXTS, kind=kind, vocab_size=200)
    odd = ["", " ", "\ud800", "größte 电影", "great<br />plot", "[MASK] dull", "x" * 99]
    texts = (TEXTS * MANY_TEXTS)[:MANY_TEXTS] + odd
    together = encode(tokenizer, texts, limit)
    alone = [encode(tokenizer, [text], limit)[0] for text in texts]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert {row.dtype for row in together} == {np.dtype(np.int32)}
    assert all(row.base is None for row in together)  # one row does not keep all others
