"""The word table gives the ids of the tokenizer, exactly, whatever the text."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from nin_text import train_tokenizer, word_table
from nin_text.demo_data import generate
from nin_text.tokenization import clean
from nin_text.word_table import WordTable

REVIEWS = generate("demo_reviews")["test"][0][:300]
# What the table must tell apart, in every mixture.
PIECES = [
    *("a", "film", "unbelievable", "don't", "...", "!?", "snake_case", "x" * 15, "y" * 16),
    *("z" * 130, "7", "A", "FILM", "\x00", "\x00\x00", "\x1c", "\x7f"),
    *(" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x85", "\xa0", "\u2003", "\u3000"),
    *("<br>", "<br />", "<br", "/>", "<BR>", "<br\xa0/>", "<br\x1c/>", "<br\u2003>"),
    *("[UNK]", "[PAD]", "[MASK]", "[unk]", "[", "]"),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "ﬁ",
        "İ",
        "ß",
        "Σ",
        "ΑΣ",
        "中文字",
        "한국어",
        "ไทย",
        "😀",
        "\u200d",
    ),
    *("\ufffd", "\ud800", "½", "①", "\u00a8", "a\u0300b"),
]


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "word", "cased"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    kind = "wordpiece" if request.param == "cased" else request.param
    texts = REVIEWS + [piece for piece in PIECES if piece.isprintable()] * 3
    trained = train_tokenizer(texts, kind=kind, vocab_size=400, lowercase=request.param != "cased")
    return trained.backend_tokenizer


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(clean(text)).ids for text in texts]


def rows_of(table: WordTable, texts: list[str]) -> list[list[int]]:
    ids, lengths = table.encode(texts)
    return [row.tolist() for row in np.split(ids, lengths.cumsum())[:-1]]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
            st.text(max_size=30),
            st.sampled_from(REVIEWS),
        ),
        max_size=6,
    )
)
@example([])
@example(["", " ", "<br", "/>"])
@example(["[U<br>NK]", "[UNK]é[MASK]x"])
def test_ids_are_those_of_the_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> None:
    table = WordTable(tokenizer)
    expected = ids_of(tokenizer, texts)
    assert rows_of(table, texts) == expected
    assert rows_of(table, texts) == expected  # now that it knows all words


def test_long_texts_and_many_words_change_nothing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text is cut into chunks, and the table grows and is emptied."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdeé.<"), size=rng.integers(1, 12))) for _ in range(3000)]
    texts = [" ".join(words), "<br />".join(words), "".join(words[:300]), "", *words[:20]]
    expected = ids_of(tokenizer, texts)
    monkeypatch.setattr(word_table, "CHUNK_BYTES", 500)
    monkeypatch.setattr(word_table, "SLOTS", 16)
    assert rows_of(WordTable(tokenizer), texts) == expected
    monkeypatch.setattr(word_table, "MAX_WORDS", 100)
    table = WordTable(tokenizer)
    assert rows_of(table, texts) == expected
    assert len(table.first) < 1000


def test_text_without_spaces_does_not_fill_the_memory(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one new long word after another: the tokenizer gets it, or the table is emptied."""
    rng = np.random.default_rng(0)
    long_words = ["".join(map(chr, rng.integers(0x4E00, 0x9FFF, 400))) for _ in range(200)]
    monkeypatch.setattr(word_table, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(word_table, "MAX_BYTES", 20_000)
    table = WordTable(tokenizer)
    assert rows_of(table, long_words) == ids_of(tokenizer, long_words)
    assert not table.odd
    known = 0
    for word in long_words:
        text = f"{word} good {'é ' * 60} film"
        assert rows_of(table, [text]) == ids_of(tokenizer, [text])
        assert table.odd_bytes == sum(map(len, table.odd))
        assert table.odd_bytes + table.pieces.nbytes <= 20_000
        known = max(known, len(table.odd))
    assert known > 2


def test_threads_share_a_table(tokenizer: Tokenizer) -> None:
    expected = ids_of(tokenizer, REVIEWS)
    table, answers = WordTable(tokenizer), {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: rows_of(table, REVIEWS)}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[i] for i in range(8)] == [expected] * 8


def test_other_tokenizers_are_refused(tokenizer: Tokenizer) -> None:
    assert WordTable.supports(tokenizer)
    for change in (
        lambda other: setattr(other, "normalizer", normalizers.Lowercase()),
        lambda other: setattr(other, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda other: other.enable_truncation(5),
        lambda other: other.add_tokens(["New York"]),
    ):
        other = Tokenizer.from_str(tokenizer.to_str())
        assert WordTable.supports(other)
        change(other)
        assert not WordTable.supports(other)
