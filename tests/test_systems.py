"""Systems of a comparison: what is loaded answers as what was fitted; names that mean nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5Model,
)

from nin_text import UserError, load_text_dataset, train_tokenizer
from nin_text.baselines import TOKEN, LinearNGrams, choose, count_tokens, weights_of
from nin_text.configuration import BaselineConfig
from nin_text.data import Split, TextDataset
from nin_text.networks import BaselineForSequenceClassification
from nin_text.options import CompareOptions
from nin_text.systems import create, network_cost

TEXTS = [
    "",
    "Witty , and not dull !",
    "dull",
    "\ud800 ünïcode \n two lines",
    "__label__0 plot " * 50,
]

needs_fasttext = pytest.mark.skipif(
    importlib.util.find_spec("fasttext") is None, reason="fasttext is not installed"
)


def compare_options(**changes: object) -> CompareOptions:
    return CompareOptions(**{"precision": "fp32", "device": "cpu", "quiet": True} | changes)


@pytest.fixture(scope="module")
def topics() -> TextDataset:
    return load_text_dataset("demo_topics", limit=400)


def tiny_bert(folder: Path, texts: list[str], *, classifier: bool = True) -> Path:
    """A random transformer with a tokenizer, saved as such are."""
    tokenizer = train_tokenizer(texts, vocab_size=300)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    (BertForSequenceClassification if classifier else BertModel)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "spec",
    [
        "tfidf-svm",
        "nb-logreg",
        pytest.param("fasttext", marks=needs_fasttext),
        "frozen",
        "architecture:distilbert-base",
    ],
)
def test_a_loaded_system_gives_probabilities_for_any_text_and_knows_its_cost(
    spec: str, topics: TextDataset, tmp_path: Path
) -> None:
    """Several classes; the loading object has never seen the data."""
    if spec == "frozen":
        folder = tiny_bert(tmp_path / "bert", topics.splits["train"].texts, classifier=False)
        spec = f"frozen:{folder}"
    (tmp_path / "files").mkdir()
    fit = create(spec, compare_options()).fit(topics, tmp_path / "files")
    system = create(spec, compare_options())
    system.load(tmp_path / "files")
    answers = system.probabilities(TEXTS)
    assert answers.shape == (len(TEXTS), len(topics.label_names))
    assert np.isfinite(answers).all()
    assert answers.sum(axis=1) == pytest.approx(1, abs=1e-5)
    alone = np.concatenate([system.probabilities([text]) for text in TEXTS])
    assert alone == pytest.approx(answers, abs=1e-5)
    cost = system.cost(TEXTS)
    assert cost["parameters"] > 0
    assert cost["macs"] > 0
    assert system.description
    assert all(file.is_file() for file in system.files(tmp_path / "files"))
    if system.kind == "architecture":
        return
    assert fit.validation is not None
    assert fit.validation.shape == (len(topics.splits["validation"]), len(topics.label_names))
    test = topics.splits["test"]
    accuracy = (system.probabilities(test.texts).argmax(axis=1) == test.labels).mean()
    assert accuracy > (0.3 if system.kind == "frozen" else 0.6)  # four classes, 400 examples


def test_of_an_encoder_with_a_decoder_the_encoder_is_frozen(
    topics: TextDataset, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(topics.splits["train"].texts, vocab_size=300)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    T5Model(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    (tmp_path / "files").mkdir()
    system = create(f"frozen:{tmp_path / 't5'}", compare_options())
    system.fit(topics, tmp_path / "files")
    system.load(tmp_path / "files")
    assert system.probabilities(TEXTS).shape == (len(TEXTS), len(topics.label_names))


def test_nothing_that_a_system_leaves_is_a_pickle(topics: TextDataset, tmp_path: Path) -> None:
    for name in ("tfidf-svm", "nb-logreg"):
        (tmp_path / name).mkdir()
        LinearNGrams(name).fit(topics, tmp_path / name)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_tfidf_svm_is_scikit_learns_pipeline(topics: TextDataset, tmp_path: Path) -> None:
    """Saved, loaded and asked, it answers as the library's own objects would."""
    train, validation = topics.splits["train"], topics.splits["validation"]
    fit = LinearNGrams("tfidf-svm").fit(topics, tmp_path)
    system = LinearNGrams("tfidf-svm")
    system.load(tmp_path)
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        token_pattern=TOKEN.pattern,
        min_df=fit.settings["min_df"],
        dtype=np.float32,
    )
    x = vectorizer.fit_transform(train.texts + validation.texts)
    svm = LinearSVC(C=fit.settings["C"], random_state=0).fit(x, train.labels + validation.labels)
    test = topics.splits["test"].texts
    expected = svm.decision_function(vectorizer.transform(test))
    logits = system.vectorizer.transform(test) @ system.weight + system.bias
    assert logits == pytest.approx(expected, abs=1e-4)
    assert len(set(map(tuple, logits.round(4)))) > 50  # texts are told apart


def test_settings_are_chosen_on_validation_and_not_on_test(
    topics: TextDataset, tmp_path: Path
) -> None:
    """Another test split changes nothing that is fitted."""
    fits = []
    for test in (topics.splits["test"], Split(["other"] * 4, [0, 1, 2, 3])):
        data = TextDataset("x", "x", topics.label_names, topics.splits | {"test": test})
        fits.append(LinearNGrams("nb-logreg").fit(data, tmp_path))
    assert fits[0].settings == fits[1].settings
    assert (fits[0].validation == fits[1].validation).all()


def test_choose_takes_the_first_of_the_best() -> None:
    answers = {1: np.eye(2)[[0, 0]], 2: np.eye(2)[[0, 1]], 3: np.eye(2)[[0, 1]]}
    best, chosen, scores = choose([1, 2, 3], answers.__getitem__, [0, 1])
    assert best == 2
    assert chosen is answers[2]
    assert scores == {"1": 0.5, "2": 1.0, "3": 1.0}


def test_settings_with_which_training_diverged_are_not_chosen() -> None:
    answers = {1: np.full((2, 2), np.nan), 2: np.eye(2)[[1, 0]]}
    best, _, scores = choose([1, 2], answers.__getitem__, [0, 1])
    assert (best, scores) == (2, {"2": 0.0})
    with pytest.raises(UserError, match="diverged"):
        choose([1], answers.__getitem__, [0, 1])


def test_a_class_never_seen_is_never_the_answer() -> None:
    """Training labels 0 and 2 of three classes: two columns are the classifier's, one is ours."""
    x = np.array([[1.0, 0.0], [0.0, 1.0]] * 4)
    weight, bias = weights_of(LinearSVC().fit(x, [0, 2] * 4), 3)
    assert (x @ weight + bias).argmax(axis=1).tolist() == [0, 2] * 4


@needs_fasttext
def test_fasttext_answers_as_its_own_library(topics: TextDataset, tmp_path: Path) -> None:
    import fasttext

    system = create("fasttext", compare_options())
    system.fit(topics, tmp_path)
    system.load(tmp_path)
    model = fasttext.load_model(str(tmp_path / "model.bin"))
    text = topics.splits["test"].texts[0]
    line = " ".join(TOKEN.findall(text.lower()))
    expected = {label: p for p, label in model.f.predict(line + "\n", -1, 0.0, "strict")}
    answers = system.probabilities([text])[0]
    assert answers == pytest.approx(
        [expected[f"__label__{i}"] for i in range(len(answers))], abs=1e-4
    )
    assert answers.max() > 0.5


@pytest.mark.parametrize("architecture", ["bilstm", "transformer"])
def test_operations_inside_fused_layers_are_counted_once(architecture: str) -> None:
    """Against a count by hand."""
    sizes = {"embedding_size": 8, "hidden_size": 6, "num_layers": 1, "num_heads": 2}
    config = BaselineConfig(architecture=architecture, vocab_size=10, num_labels=3, **sizes)
    model = BaselineForSequenceClassification(config).eval()
    rows = [np.arange(1, 5), np.arange(1, 3)]
    cost = network_cost(model, rows, 0)
    expected = 0
    for t in (4, 2):
        if architecture == "bilstm":
            expected += t * 2 * 4 * 6 * (8 + 6) + 12 * 3
        else:  # projections, attention, feed-forward layers
            expected += t * 4 * 8 * 8 + 2 * t * t * 8 + t * 2 * 8 * 6 + 8 * 3
    assert cost["macs"] == expected
    assert cost["parameters"] == sum(p.numel() for p in model.parameters())


def test_tokens_are_words_and_marks() -> None:
    assert count_tokens(["Not bad, really!", ""]).tolist() == [5, 1]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no-such-model", "tfidf-svm"),
        ("architecture:gpt-17", "bert-base"),
        ("frozen:no/such", "no model could be loaded from 'no/such'"),
        ("", "empty name"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(
    spec: str, words: str, topics: TextDataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        create(spec, compare_options()).fit(topics, tmp_path)


def test_absent_fasttext_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(UserError, match=r"nin-text\[compare\]"):
        create("fasttext", compare_options())
