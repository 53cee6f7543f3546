"""The scikit-learn estimator at its edges: rare labels, weights of zero, leftovers, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nin_text import NiNTextClassifier, NiNTextVectorizer, load_text_dataset
from nin_text.errors import UserError
from nin_text.tokenization import encode

QUICK = {"model": "nin-text-small", "epochs": 1, "random_state": 0, "n_jobs": 1}
TEXTS, LABELS = ["good film", "bad film", "a fine plot"], ["b", "a", "b"]


@pytest.fixture(scope="module")
def data() -> tuple[list[str], np.ndarray]:
    dataset = load_text_dataset("demo_topics", limit=60)
    train = dataset.splits["train"]
    return train.texts, np.array(dataset.label_names)[train.labels]


def test_many_rare_labels_are_learned_with_early_stopping() -> None:
    """Where "no" to every label is nearly always right, and so no measure of progress."""
    rng = np.random.default_rng(0)
    which = rng.integers(0, 60, 1200)
    texts = [f"some text about topic{i} and more words{rng.integers(50)}" for i in which]
    matrix = np.eye(60, dtype=int)[which]
    model = NiNTextClassifier("nin-text-small", epochs=30, random_state=0, n_jobs=1)
    model.fit(texts, matrix)
    assert (model.predict_proba(texts[:200]).argmax(axis=1) == which[:200]).mean() > 0.8


def test_classes_of_a_matrix_are_those_of_its_columns() -> None:
    with pytest.raises(UserError, match="sorted"):
        NiNTextClassifier(**QUICK).partial_fit(
            ["a text", "another"], np.eye(2, dtype=int), classes=["sport", "arts"]
        )


def test_balance_is_that_of_the_texts_with_weight(data) -> None:
    texts, labels = data
    texts, labels = [*texts[:40], *texts[:20]], np.concatenate([labels[:40], labels[:20]])
    weight = np.array([1.0] * 40 + [0.0] * 20)
    balanced = QUICK | {"class_weight": "balanced"}
    absent = NiNTextClassifier(**balanced).fit(texts[:40], labels[:40], np.ones(40))
    without = NiNTextClassifier(**balanced).fit(texts, labels, weight)
    np.testing.assert_array_equal(absent.predict_proba(texts[:5]), without.predict_proba(texts[:5]))


def test_a_portion_may_lack_a_class_that_has_a_weight() -> None:
    model = NiNTextClassifier(**QUICK, class_weight={"b": 2.0})
    model.partial_fit(["good film", "bad film"], ["b", "a"], classes=["a", "b"])
    model.partial_fit(["bad film"], ["a"])
    assert model.n_iter_ == 2
    with pytest.raises(ValueError, match="not in class_weight"):
        NiNTextClassifier(**QUICK, class_weight={"c": 2.0}).fit(TEXTS, LABELS)


def test_saving_over_a_run_leaves_nothing_of_it(tmp_path: Path) -> None:
    fitted = NiNTextClassifier(**QUICK).fit(TEXTS, LABELS)
    for name in ("metrics.json", "answers.safetensors", "README.md", "notes.txt"):
        (tmp_path / name).write_text("{}")
    fitted.save(tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"notes.txt", "estimator.json", "model.safetensors"} <= kept
    assert not {"metrics.json", "answers.safetensors", "README.md"} & kept


def test_fits_in_threads_take_turns(data) -> None:
    texts, labels = data

    def answers() -> np.ndarray:
        model = NiNTextClassifier(**QUICK).fit(texts, labels)
        return model.predict_proba(texts[:5])

    expected = answers()
    with ThreadPoolExecutor(3) as pool:
        for found in [pool.submit(answers) for _ in range(3)]:
            np.testing.assert_array_equal(found.result(), expected)


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA], ids=str)
def test_missing_labels_and_texts_are_refused(missing: object) -> None:
    with pytest.raises(UserError, match="some are missing"):
        NiNTextClassifier(**QUICK).fit(TEXTS, ["b", "a", missing])
    with pytest.raises(UserError, match="number 2 is missing"):
        NiNTextClassifier(**QUICK).fit([*TEXTS[:2], missing], LABELS)


def test_dates_are_no_labels() -> None:
    dates = np.array(["2026-01-01", "2026-01-02", "2026-01-01"], dtype="datetime64[D]")
    with pytest.raises(UserError, match="dates"):
        NiNTextClassifier(**QUICK).fit(TEXTS, dates)


def test_unlabelled_texts_may_come_from_a_generator() -> None:
    model = NiNTextClassifier(**QUICK).fit(TEXTS, LABELS, unlabelled=(text for text in TEXTS))
    assert set(model.predict(TEXTS)) <= {"a", "b"}


def test_a_vectorizer_leaves_its_encoder_as_it_is() -> None:
    """Two calls at a time would else meet with its dropout."""
    vectorizer = NiNTextVectorizer("imdb-sentiment", n_jobs=1).fit(TEXTS)
    expected = vectorizer.transform(TEXTS)
    assert not vectorizer.encoder_.training
    with ThreadPoolExecutor(3) as pool:
        for found in [pool.submit(vectorizer.transform, TEXTS) for _ in range(12)]:
            np.testing.assert_array_equal(found.result(), expected)


def test_partial_fit_cuts_texts_as_answers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = NiNTextClassifier(**QUICK).fit(TEXTS, LABELS), []

    def recorded(tokenizer: object, texts: list[str], max_length: int) -> list[np.ndarray]:
        lengths.append(max_length)
        return encode(tokenizer, texts, max_length)

    monkeypatch.setattr("nin_text.estimator.encode", recorded)
    model.max_length_ = 2  # as that of a loaded run
    model.partial_fit(TEXTS, LABELS).predict(TEXTS)
    assert lengths == [2, 2]
