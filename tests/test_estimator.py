"""scikit-learn contracts: scikit-learn's own checks run a single one on text estimators."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Script
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nin_text import NiNTextClassifier, NiNTextVectorizer, Predictor, load_text_dataset
from nin_text.errors import UserError

QUICK = {"model": "nin-text-small", "epochs": 6, "random_state": 0, "n_jobs": 1}


@pytest.fixture(scope="module")
def data() -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """200 texts to learn from and 100 to judge by, with names as labels."""
    dataset = load_text_dataset("demo_topics", limit=200)
    names = np.array(dataset.label_names)
    train, test = dataset.splits["train"], dataset.splits["test"].take(range(100))
    return train.texts, names[train.labels], test.texts, names[test.labels]


@pytest.fixture(scope="module")
def fitted(data) -> NiNTextClassifier:
    return NiNTextClassifier(**QUICK).fit(data[0], data[1])


def test_it_learns_and_its_answers_belong_together(data, fitted: NiNTextClassifier) -> None:
    _, _, texts, truth = data
    probabilities, scores = fitted.predict_proba(texts), fitted.decision_function(texts)
    assert fitted.score(texts, truth) > 0.45  # of four classes, all named in every text
    assert fitted.classes_.tolist() == sorted(set(truth))
    assert probabilities.sum(axis=1) == pytest.approx(1)
    answers = fitted.predict(texts)
    assert (answers == fitted.classes_[probabilities.argmax(axis=1)]).all()
    assert (answers == fitted.classes_[scores.argmax(axis=1)]).all()
    # Which texts are asked about together, and in which order, changes nothing.
    alone = fitted.predict_proba(texts[:1])
    assert alone == pytest.approx(probabilities[:1], abs=1e-5)
    assert fitted.predict_proba(texts[::-1])[::-1] == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize("labels", [[7, -3], [True, False], ["no", "yes"]])
def test_two_classes_of_any_kind(labels: list) -> None:
    dataset = load_text_dataset("demo_reviews", limit=60)
    texts = dataset.splits["train"].texts
    y = [labels[i] for i in dataset.splits["train"].labels]
    classifier = NiNTextClassifier(**QUICK | {"epochs": 1}).fit(texts, y)
    assert classifier.classes_.tolist() == sorted(labels)
    scores = classifier.decision_function(texts)
    assert scores.shape == (len(texts),)
    answers = classifier.predict(texts)
    assert (answers == classifier.classes_[(scores > 0).astype(int)]).all()
    assert answers.dtype == np.array(labels).dtype


def test_the_same_seed_gives_the_same_answers_and_nothing_else_changes(data, fitted) -> None:
    texts, y, test, _ = data
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    threads = torch.get_num_threads()
    copy, copied_y = list(texts), y.copy()
    again = clone(fitted)
    parameters = again.get_params()
    again.fit(texts, y)
    assert again.get_params() == parameters
    assert again.predict_proba(test) == pytest.approx(fitted.predict_proba(test), abs=1e-6)
    assert texts == copy
    assert (y == copied_y).all()
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.get_num_threads() == threads
    other = clone(fitted).set_params(random_state=1).fit(texts, y)
    assert np.abs(other.predict_proba(test) - fitted.predict_proba(test)).max() > 1e-4


def test_a_weight_of_zero_is_absence(data) -> None:
    texts, y, test, _ = data
    weight = np.ones(len(texts))
    weight[::3] = 0
    kept = np.flatnonzero(weight)
    weighted = NiNTextClassifier(**QUICK).fit(texts, y, sample_weight=weight)
    without = NiNTextClassifier(**QUICK).fit(
        [texts[i] for i in kept], y[kept], sample_weight=np.ones(len(kept))
    )
    assert weighted.predict_proba(test) == pytest.approx(without.predict_proba(test), abs=1e-6)


def test_only_proportions_of_weights_matter(data) -> None:
    texts, y, test, _ = data
    one, seven = (
        NiNTextClassifier(**QUICK, ngrams=0).fit(texts, y, sample_weight=np.full(len(texts), w))
        for w in (1.0, 7.0)
    )
    assert one.predict_proba(test) == pytest.approx(seven.predict_proba(test), abs=1e-5)


def test_weights_move_the_answers(data) -> None:
    texts, y, test, _ = data
    rare = sorted(set(y))[0]
    plain, heavy = (
        NiNTextClassifier(**QUICK, class_weight=weight).fit(texts, y)
        for weight in (None, {rare: 50.0})
    )
    assert (heavy.predict(test) == rare).sum() > (plain.predict(test) == rare).sum()
    by_sample = NiNTextClassifier(**QUICK).fit(texts, y, np.where(y == rare, 50.0, 1.0))
    assert by_sample.predict_proba(test) == pytest.approx(heavy.predict_proba(test), abs=1e-6)
    NiNTextClassifier(**QUICK | {"epochs": 1}, class_weight="balanced").fit(texts, y)


def test_several_labels_for_a_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (300, 3))
    words = np.array(["apple", "boat", "cloud"])
    texts = [" ".join(["thing", *words[row == 1], "item"]) for row in y]
    settings = QUICK | {"epochs": 25, "early_stopping": False, "batch_size": 8}
    classifier = NiNTextClassifier(**settings).fit(texts, y)
    answers = classifier.predict(texts)
    assert answers.shape == y.shape
    assert classifier.score(texts, y) > 0.95
    probabilities = classifier.predict_proba(texts)
    assert ((probabilities > 0.5) == (answers == 1)).all()
    classifier.save(tmp_path / "saved")
    loaded = NiNTextClassifier.load(tmp_path / "saved")
    assert loaded.predict_proba(texts) == pytest.approx(probabilities, abs=1e-6)
    with pytest.raises(UserError, match="is 'balanced' or None"):
        classifier.set_params(class_weight={0: 2.0}).fit(texts, y)


def test_weights_of_texts_with_several_labels() -> None:
    """The same text says yes and no of both classes: weights decide which counts."""
    texts, y = ["a thing"] * 40, np.array([[1, 0]] * 10 + [[0, 1]] * 30)
    settings = QUICK | {"epochs": 20, "early_stopping": False, "dropout": 0.0}

    def probabilities(weight: np.ndarray | None, **changes: str) -> np.ndarray:
        classifier = NiNTextClassifier(**settings, **changes).fit(texts, y, sample_weight=weight)
        return classifier.predict_proba(["a thing"])[0]

    first = np.where(y[:, 0] == 1, 9.0, 1.0)  # 90 to 30
    assert probabilities(None) == pytest.approx([0.25, 0.75], abs=0.1)
    assert probabilities(first) == pytest.approx([0.75, 0.25], abs=0.1)
    assert probabilities(None, class_weight="balanced") == pytest.approx([0.5, 0.5], abs=0.1)
    assert probabilities(np.ones(40)) == pytest.approx(probabilities(None), abs=0.01)
    stream = NiNTextClassifier(**settings)
    for _ in range(20):
        stream.partial_fit(texts, y, classes=[0, 1], sample_weight=first)
    assert stream.predict(["a thing"]).tolist() == [[1, 0]]


def test_partial_fit_learns_from_one_portion_after_the_other(data) -> None:
    texts, y, test, truth = data
    classifier = NiNTextClassifier(**QUICK, learning_rate=3e-3)
    for _ in range(8):
        for i in range(0, len(texts), 50):
            portion = slice(i, i + 50)
            classifier.partial_fit(texts[portion], y[portion], classes=sorted(set(y)))
    assert classifier.score(test, truth) > 0.7
    with pytest.raises(UserError, match="not among the classes"):
        classifier.partial_fit(["a text"], ["another label"])


def test_a_learning_rate_that_is_set_between_portions_counts() -> None:
    texts, y = ["good film", "bad film"], ["b", "a"]
    classifier = NiNTextClassifier(**QUICK).partial_fit(texts, y, classes=["a", "b"])
    before = {name: p.clone() for name, p in classifier.model_.named_parameters()}
    classifier.set_params(learning_rate=1e-12, weight_decay=0.0).partial_fit(texts, y)
    for name, parameter in classifier.model_.named_parameters():
        assert torch.allclose(parameter, before[name], atol=1e-7), name


def test_a_portion_without_weight_changes_nothing() -> None:
    classifier = NiNTextClassifier(**QUICK)
    with pytest.raises(UserError, match="weight of zero"):
        classifier.partial_fit(["good"], ["b"], classes=["a", "b"], sample_weight=[0])
    classifier.partial_fit(["good film", "bad film"], ["b", "a"], classes=["b", "a", "b"])
    before = classifier.predict_proba(["good film"])
    assert before.shape == (1, 2) and np.isfinite(before).all()
    classifier.partial_fit(["good film"], ["a"], sample_weight=[0])
    np.testing.assert_array_equal(classifier.predict_proba(["good film"]), before)
    classifier.class_weight = {"a": 0.0, "b": 1.0}  # one class is enough for a portion
    classifier.partial_fit(["good film", "bad film"], ["b", "a"])
    assert (classifier.predict_proba(["good film"]) != before).all()


def test_labels_of_another_kind_are_refused_later() -> None:
    one, several = NiNTextClassifier(**QUICK), NiNTextClassifier(**QUICK)
    texts, matrix = ["good film", "bad film"], np.array([[0, 1], [1, 0]])
    one.partial_fit(texts, [0, 1], classes=[0, 1])
    several.partial_fit(texts, matrix, classes=[0, 1])
    for classifier, y in ((one, matrix), (several, [0, 1])):
        with pytest.raises(UserError, match="of one kind in all calls"):
            classifier.partial_fit(texts, y)
    with pytest.raises(UserError, match="has 3 columns for 2 classes"):
        several.partial_fit(texts, np.eye(3, dtype=int)[:2])


def test_partial_fit_needs_all_classes_first() -> None:
    with pytest.raises(UserError, match="needs classes"):
        NiNTextClassifier().partial_fit(["a", "b"], [0, 1])


def test_warm_start_goes_on(data) -> None:
    texts, y, _, _ = data
    classifier = NiNTextClassifier(**QUICK | {"epochs": 1}, warm_start=True).fit(texts, y)
    before = classifier.predict_proba(texts)
    tokenizer = classifier.tokenizer_
    classifier.fit(texts, y)
    assert classifier.tokenizer_ is tokenizer
    # A fresh start from the same seed would have led to where the first fit led.
    assert np.abs(classifier.predict_proba(texts) - before).max() > 1e-3


def test_a_warm_start_with_labels_of_another_kind_begins_anew(data) -> None:
    texts, y, _, _ = data
    numbers = np.unique(y, return_inverse=True)[1]
    matrix = np.eye(numbers.max() + 1, dtype=int)[numbers]  # of the same classes
    classifier = NiNTextClassifier(**QUICK | {"epochs": 1}, warm_start=True)
    for labels in (numbers, matrix, numbers):
        answers = classifier.fit(texts, labels).predict(texts)
        assert answers.shape == np.shape(labels)


def test_without_early_stopping_every_pass_is_made(data) -> None:
    texts, y, _, _ = data
    settings = QUICK | {"epochs": 4, "learning_rate": 1e-9, "n_iter_no_change": 1}
    assert NiNTextClassifier(**settings).fit(texts, y).n_iter_ < 4
    assert NiNTextClassifier(**settings, early_stopping=False).fit(texts, y).n_iter_ == 4


def test_unlabelled_texts_are_learned_from() -> None:
    """Two words tell the class of labelled texts; unlabelled texts show what goes with them."""
    draw = random.Random(0)

    def text(*words: str) -> str:
        return " ".join([*draw.choices("one two three four five six".split(), k=4), *words])

    known, companions, labels = ("bad", "good"), ("stale", "fresh"), [0, 1] * 30
    labelled = [text(known[y], draw.choice(companions)) for y in labels]
    pool = [text(known[y], companions[y]) for y in [0, 1] * 200]
    others = [text("seven", companions[y]) for y in labels]
    model = NiNTextClassifier(**QUICK)
    assert model.fit(labelled, labels).score(others, labels) < 0.7
    helped = model.fit(labelled, labels, unlabelled=pool)
    assert helped.score(others, labels) > 0.9
    assert helped.n_iter_ == 2
    again = clone(model).fit(labelled, labels, unlabelled=np.array(pool, dtype=object))
    np.testing.assert_array_equal(again.predict_proba(others), helped.predict_proba(others))
    with pytest.raises(UserError, match="unlabelled texts cannot go with weights"):
        model.fit(labelled, labels, np.ones(60), unlabelled=pool)


def test_unlabelled_texts_come_later(data) -> None:
    """To a network that has none of what they would be read with, or was made for other labels."""
    texts, labels, *_ = data
    model = NiNTextClassifier(**QUICK | {"epochs": 1, "warm_start": True})
    model.partial_fit(texts[:40], labels[:40], classes=sorted(set(labels)))
    model.fit(texts[:40], labels[:40], unlabelled=texts[40:])
    assert model.model_.ngrams is None
    model.fit(texts[:40], [0, 1] * 20, unlabelled=texts[40:])
    assert model.model_.ngrams is not None
    assert model.fit(texts[:40], [0, 1] * 20, unlabelled=[]).n_iter_ == 1


def test_unlabelled_texts_do_without_ngrams(data) -> None:
    texts, labels, *_ = data
    model = NiNTextClassifier(**QUICK | {"ngrams": 0, "epochs": 1})
    model.fit(texts[:40], labels[:40], unlabelled=texts[40:])
    assert model.model_.ngrams is None
    assert model.n_iter_ == 2


def test_the_tools_of_scikit_learn_take_it(data) -> None:
    texts, y, test, _ = data
    quick = NiNTextClassifier(**QUICK | {"epochs": 2})
    scores = cross_val_score(quick, texts, y, cv=2)
    assert scores.shape == (2,)
    search = GridSearchCV(quick, {"ngrams": [0, 2]}, cv=2).fit(
        texts, y, sample_weight=np.ones(len(texts))
    )
    assert search.best_params_["ngrams"] in (0, 2)
    assert set(search.predict(test)) <= set(y)
    calibrated = CalibratedClassifierCV(quick, cv=2).fit(np.array(texts, dtype=object), y)
    assert calibrated.predict_proba(np.array(test, dtype=object)).shape == (len(test), len(set(y)))


@pytest.mark.parametrize("kind", ["list", "array", "series", "frame", "column", "string dtype"])
def test_texts_may_come_in_any_container(data, fitted, kind: str) -> None:
    texts = data[2][:5]
    container = {
        "list": texts,
        "array": np.array(texts),
        "series": pd.Series(texts, index=range(5, 10)),
        "frame": pd.DataFrame({"text": texts}),
        "column": np.array(texts, dtype=object)[:, None],
        "string dtype": pd.Series(texts, dtype="string"),
    }[kind]
    assert (fitted.predict(container) == fitted.predict(texts)).all()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "not a single text"),
        ([], "no texts"),
        ([1, 2], "of type int"),
        (["a", None], "number 1 is missing"),
        (["a", float("nan")], "number 1 is missing"),
        (np.zeros((2, 3)), "one column"),
        (5, "list of texts"),
        ([b"bytes", "a"], "of type bytes"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(fitted, texts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted.predict(texts)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["x", "x", "x"], "all labels are"),
        ([0, 1], "3 texts and 2 labels"),
        ([0.5, 1.5, 2.5], "continuous"),
        (None, "a label for each"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(y, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NiNTextClassifier(**QUICK).fit(["a", "b", "c"], y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model": "bert-base-uncased"}, "model must be one of"),
        ({"model": None}, "model must be one of"),
        ({"model": "imdb-sentiment", "tokenizer": "word"}, "imdb-sentiment has a tokenizer"),
        ({"model": "imdb-sentiment", "vocab_size": 900}, "leave out tokenizer and vocab_size"),
        ({"epochs": 0}, "^epochs must be at least 1"),
        ({"epochs": 1.5}, "^epochs must be a whole number, not 1.5"),
        ({"epochs": None}, "^epochs must be a whole number, not None"),
        ({"epochs": True}, "^epochs must be a whole number, not True"),
        ({"epochs": "3"}, "^epochs must be a whole number, not '3'"),
        ({"learning_rate": "fast"}, "^learning_rate must be a number"),
        ({"validation_fraction": "a"}, "^validation_fraction must be a number"),
        ({"class_weight": {0: -1, 1: 1}}, "^class_weight must hold numbers"),
        ({"class_weight": {0: float("nan"), 1: 1}}, "^class_weight must hold numbers"),
        ({"n_jobs": "x"}, "n_jobs must be a number of threads"),
        ({"n_iter_no_change": 0}, "^n_iter_no_change must be at least 1"),
        ({"weight_decay": -1}, "^weight_decay must be between"),
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"dropout": -1}, "dropout"),
        ({"n_jobs": 0}, "n_jobs"),
    ],
)
def test_parameters_that_cannot_be_are_refused(parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NiNTextClassifier(**parameters).fit(["a", "b"], [0, 1])


PRAISE = "moving and witty", "a superb cast", "wonderfully acted", "I loved it", "a fine plot"
BLAME = "dull and silly", "an awful cast", "terribly acted", "I hated it", "a poor plot"
UNHEARD = "a masterpiece", "brilliant , funny , touching", "a waste of time", "boring and stupid"


@pytest.mark.parametrize("as_path", [False, True])
def test_it_goes_on_from_a_saved_encoder(as_path: bool, tmp_path: Path) -> None:
    """What it learned of other words is kept: none of those asked about is among the labelled."""
    name = "imdb-sentiment"
    classifier = NiNTextClassifier(name, epochs=2, random_state=0, n_jobs=1, warm_start=True)
    if as_path:
        NiNTextClassifier.load(name).save(tmp_path / "saved")
        classifier.set_params(model=tmp_path / "saved")
    classifier = clone(classifier).fit([*PRAISE, *BLAME], ["good"] * 5 + ["bad"] * 5)
    assert classifier.predict(UNHEARD).tolist() == ["good", "good", "bad", "bad"]
    assert len(classifier.tokenizer_) == len(NiNTextClassifier.load(name).tokenizer_)
    sure = classifier.predict_proba(UNHEARD).max(axis=1)
    classifier.fit([*PRAISE, *BLAME], ["good"] * 5 + ["bad"] * 5)  # again, from its own weights
    assert classifier.predict_proba(UNHEARD).max(axis=1) == pytest.approx(sure, abs=0.25)
    classifier.save(tmp_path / "again")
    loaded = NiNTextClassifier.load(tmp_path / "again")
    assert loaded.predict_proba(UNHEARD) == pytest.approx(classifier.predict_proba(UNHEARD))


def test_partial_fit_and_several_labels_go_on_from_a_saved_encoder() -> None:
    stream = NiNTextClassifier("imdb-sentiment", random_state=0, n_jobs=1)
    for _ in range(3):
        stream.partial_fit([*PRAISE, *BLAME], [1] * 5 + [0] * 5, classes=[0, 1])
    assert stream.predict(UNHEARD).tolist() == [1, 1, 0, 0]
    matrix = np.array([[1, 0]] * 5 + [[0, 1]] * 5)
    many = NiNTextClassifier("imdb-sentiment", random_state=0, epochs=3, n_jobs=1)
    assert many.fit([*PRAISE, *BLAME], matrix).predict_proba(UNHEARD).shape == (4, 2)


def test_one_class_a_table_of_texts_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two labels or more"):
        NiNTextClassifier(**QUICK).partial_fit(["a", "b"], [1, 1], classes=[1])
    loaded = NiNTextClassifier.load("imdb-sentiment")
    with pytest.raises(ValueError, match="not dict"):
        loaded.predict({"a": "b"})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        loaded.save(tmp_path / "file")
    with pytest.raises(ValueError, match="n_jobs"):
        NiNTextVectorizer(n_jobs=0).fit(["a"]).transform(["a"])


def test_what_is_not_fitted_says_so() -> None:
    for method in ("predict", "predict_proba", "decision_function"):
        with pytest.raises(NotFittedError):
            getattr(NiNTextClassifier(), method)(["a"])
    with pytest.raises(NotFittedError):
        NiNTextVectorizer().transform(["a"])


def test_a_handful_of_texts_is_enough() -> None:
    classifier = NiNTextClassifier(**QUICK).fit(["good", "bad", "fine", "poor"], [1, 0, 1, 0])
    assert classifier.predict(["good", ""]).shape == (2,)


def test_it_can_be_pickled_and_saved(data, fitted, tmp_path: Path, script: Script) -> None:
    texts = data[2]
    probabilities = fitted.predict_proba(texts)
    again = pickle.loads(pickle.dumps(fitted))
    assert again.predict_proba(texts) == pytest.approx(probabilities, abs=1e-6)
    folder = tmp_path / "saved"
    fitted.save(folder)
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pkl")) + list(folder.glob("*.pt"))
    loaded = NiNTextClassifier.load(folder)
    assert loaded.predict_proba(texts) == pytest.approx(probabilities, abs=1e-6)
    assert loaded.get_params() == fitted.get_params()
    assert loaded.classes_.dtype == fitted.classes_.dtype
    # It is a model folder as any other.
    result = script("predict_text", "--model", folder, texts[0]).result
    assert result["label"] == fitted.predict(texts[:1])[0]


def test_integer_labels_and_class_weights_survive_a_file(tmp_path: Path) -> None:
    # A search over NumPy's ranges sets its numbers.
    numpy_numbers = {"epochs": np.int64(1), "class_weight": {3: np.float32(2), 5: 1.0}}
    classifier = NiNTextClassifier(**QUICK | numpy_numbers)
    classifier.fit(["good", "bad"] * 20, [3, 5] * 20).save(tmp_path / "saved")
    loaded = NiNTextClassifier.load(tmp_path / "saved")
    assert loaded.classes_.tolist() == [3, 5]
    assert loaded.class_weight == {3: 2.0, 5: 1.0}


def test_a_saved_classifier_is_read_as_long_everywhere(tmp_path: Path) -> None:
    texts = ["good bad bad bad", "bad good good good"] * 20
    classifier = NiNTextClassifier(**QUICK | {"epochs": 1}, max_length=1)
    classifier.fit(texts, [1, 0] * 20).save(tmp_path)
    expected = classifier.predict_proba(texts[:2])
    answers = Predictor(tmp_path, precision="fp32").predict_proba(texts[:2])
    np.testing.assert_allclose(answers, expected, atol=1e-5)


def test_a_damaged_file_is_refused(fitted, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    path = tmp_path / "estimator.json"
    record = json.loads(path.read_text())
    for damage in ("{", json.dumps([1]), json.dumps(record | {"classes": ["one"]})):
        path.write_text(damage)
        with pytest.raises(UserError, match="save the classifier again"):
            NiNTextClassifier.load(tmp_path)


def test_a_run_folder_or_a_ready_made_model_is_a_classifier(trained: Path) -> None:
    classifier = NiNTextClassifier.load(trained)
    assert classifier.classes_.tolist() == ["negative", "positive"]
    assert classifier.predict(["The plot is dull ."]).tolist() == ["negative"]
    ready = NiNTextClassifier.load("imdb-sentiment")
    assert ready.predict(["What a waste of a fine cast."]).tolist() == ["negative"]


def test_classes_of_a_loaded_model_are_sorted_and_mean_the_same(script: Script) -> None:
    texts = ["The striker scored twice in the final.", "Shares fell after the bank warned."]
    topics = NiNTextClassifier.load("ag-news-topics")
    assert topics.classes_.tolist() == ["Business", "Sci/Tech", "Sports", "World"]
    probabilities = topics.predict_proba(texts)
    lines = script("predict_text", "--model", "ag-news-topics", *texts).lines
    for row, line in zip(probabilities, lines, strict=True):
        named = dict(zip(topics.classes_, row, strict=True))
        assert named == pytest.approx(line["probabilities"], abs=1e-5)


def test_a_fit_that_fails_leaves_the_last_one(
    data, fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, y, test, _ = data
    classifier = pickle.loads(pickle.dumps(fitted)).set_params(warm_start=True)
    before = classifier.predict_proba(test)

    def fail(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("nin_text.training.TextTrainer.train", fail)
    with pytest.raises(KeyboardInterrupt):
        classifier.fit(texts, y)
    assert (classifier.predict_proba(test) == before).all()


def test_the_vectorizer_is_a_step_of_a_pipeline(data) -> None:
    texts, y, test, truth = data
    vectorizer = NiNTextVectorizer("ag-news-topics", n_jobs=1)
    vectors = vectorizer.fit_transform(texts)
    assert vectors.shape == (len(texts), 128)
    assert vectors.dtype == np.float32
    pipeline = make_pipeline(clone(vectorizer), StandardScaler(), LogisticRegression(max_iter=500))
    assert pipeline.fit(texts, y).score(test, truth) > 0.5  # of four classes, by words of AG News
    frame = clone(vectorizer).set_output(transform="pandas").fit_transform(pd.Series(texts[:3]))
    assert frame.columns[0] == "nintextvectorizer0"
    assert frame.to_numpy() == pytest.approx(vectors[:3], abs=1e-5)


def test_the_vectorizer_joins_other_columns(data) -> None:
    texts, y, _, _ = data
    table = pd.DataFrame({"text": texts, "length": [len(text) for text in texts]})
    columns = ColumnTransformer(
        [
            ("text", NiNTextVectorizer("ag-news-topics", n_jobs=1), "text"),
            ("number", StandardScaler(), ["length"]),
        ]
    )
    pipeline = make_pipeline(columns, LogisticRegression(max_iter=500)).fit(table, y)
    assert pipeline.score(table, y) > 0.8
    assert len(columns.fit(table).get_feature_names_out()) == 129


def test_the_vectorizer_trains_its_encoder_on_labels(data) -> None:
    texts, y, test, _ = data
    vectorizer = NiNTextVectorizer(classifier=NiNTextClassifier(**QUICK))
    assert vectorizer.fit(texts, y).transform(test).shape == (len(test), 128)
    with pytest.raises(UserError, match="needs labels"):
        vectorizer.fit(texts)
