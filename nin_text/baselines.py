"""Linear models and fastText, as a comparison's systems (see `systems.py` for the interface)."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sparse
from safetensors.numpy import load_file, save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.svm import LinearSVC

from nin_text.data import Split, TextDataset
from nin_text.errors import UserError
from nin_text.evaluation import softmax
from nin_text.ngrams import fit_naive_bayes_regression
from nin_text.report import write_json
from nin_text.tokenization import clean

# A token, for every system alike: a word or a punctuation mark.
TOKEN = re.compile(r"\w+|[^\w\s]")
NEVER = -1e4  # a logit
SMOOTHING = 1.0  # of naive Bayes, as in its papers
LEAST_PROBABILITY = 1e-6  # what fastText gives to a class it does not name
Candidate = TypeVar("Candidate")


def count_tokens(texts: Sequence[str]) -> np.ndarray:
    """(n,) tokens of each text, counted by one rule for every system."""
    return np.array([max(1, len(TOKEN.findall(text))) for text in texts])


@dataclass
class Fit:
    """What fitting a system told.

    Attributes:
        settings: what was chosen, and how each candidate did on the validation split.
        validation: (n, K) probabilities of the validation texts by a model that was not fitted to
            them; None to ask the fitted system.
        test: (n, K) probabilities of the test texts, where they are known already.
        record: of a run that measured itself: its own seconds, threads and peak memory.
        warning: what readers of its figures must know.
    """

    settings: dict[str, Any]
    validation: np.ndarray | None = None
    test: np.ndarray | None = None
    record: dict[str, Any] | None = None
    warning: str | None = None


def choose(
    candidates: Sequence[Candidate],
    answer: Callable[[Candidate], np.ndarray],
    truth: Sequence[int],
) -> tuple[Candidate, np.ndarray, dict[str, float]]:
    """The candidate with the best validation accuracy, the first of equals.

    Args:
        candidates: settings to try.
        answer: (n, K) logits or probabilities of the validation texts with these settings; not
            finite if training diverged.
        truth: n class indices.

    Returns:
        The candidate, its answers, and the accuracy of each.

    Raises:
        UserError: if training diverged with each of them.
    """
    scores: dict[str, float] = {}
    best, best_score, best_answers = candidates[0], -1.0, np.empty((0, 0))
    for candidate in candidates:
        answers = answer(candidate)
        if not np.isfinite(answers).all():  # it diverged
            continue
        score = float((answers.argmax(axis=1) == np.asarray(truth)).mean())
        scores[str(candidate)] = round(score, 6)
        if score > best_score:
            best, best_score, best_answers = candidate, score, answers
    if not scores:
        raise UserError(f"training diverged with all of the settings {candidates}")
    return best, best_answers, scores


def joined(dataset: TextDataset) -> Split:
    """Training and validation split: what a system is fitted to once its settings are chosen."""
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    return Split(train.texts + validation.texts, train.labels + validation.labels)


def weights_of(classifier: Any, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight (V, K) and bias (K,) of a linear classifier of scikit-learn, which may lack classes.

    A class that it has never seen gets a logit far below all others.
    """
    coef, intercept = classifier.coef_, classifier.intercept_
    if len(coef) == 1:  # two classes share one vector
        coef = np.concatenate([-coef, coef]) / 2
        intercept = np.array([-intercept[0], intercept[0]]) / 2
    weight = np.zeros((coef.shape[1], classes), dtype=np.float32)
    bias = np.full(classes, NEVER, dtype=np.float32)
    weight[:, classifier.classes_] = coef.T
    bias[classifier.classes_] = intercept
    return weight, bias


# ---- linear models -----------------------------------------------------------------------------


class LinearNGrams:
    """A linear classifier of n-grams of words and punctuation marks, in lower case.

    "tfidf-svm": TF-IDF of 1- and 2-grams, linear support vector machine, one against the rest.
    "nb-logreg": presence of 1- to 3-grams weighted by naive Bayes log-count ratios, logistic
    regression (Wang & Manning, ACL 2012; Mesnil et al. 2014, arXiv 1412.5335).
    """

    kind = "linear"
    candidates = tuple(
        (least, c) for least in (1, 2) for c in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.svm = name == "tfidf-svm"
        what = (
            "TF-IDF of 1- and 2-grams (sublinear), linear support vector machine"
            if self.svm
            else "Presence of 1- to 3-grams weighted by naive Bayes log-count ratios, logistic "
            "regression"
        )
        self.description = (
            f"{what}. Words and punctuation marks in lower case. C, and whether n-grams of a "
            f"single text are left out, are chosen on the validation split; fitted again to "
            f"training and validation split. One thread."
        )

    def _vectorizer(self, **options: Any) -> CountVectorizer:
        options |= {"token_pattern": TOKEN.pattern, "dtype": np.float32}
        if self.svm:
            return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)
        return CountVectorizer(ngram_range=(1, 3), binary=True, **options)

    def fit(self, dataset: TextDataset, folder: Path) -> Fit:
        train, validation = dataset.splits["train"], dataset.splits["validation"]
        classes = len(dataset.label_names)
        matrices: dict[int, tuple[sparse.csr_matrix, sparse.csr_matrix]] = {}

        def answer(candidate: tuple[int, float]) -> np.ndarray:
            least, c = candidate
            if least not in matrices:
                matrices.clear()  # the largest things here
                vectorizer, x = self._vectorize(train.texts, least)
                matrices[least] = x, vectorizer.transform(map(clean, validation.texts))
            x, held_out = matrices[least]
            weight, bias = self._train(x, train.labels, c, classes)
            return held_out @ weight + bias

        (least, c), logits, scores = choose(self.candidates, answer, validation.labels)
        matrices.clear()
        both = joined(dataset)
        vectorizer, x = self._vectorize(both.texts, least)
        weight, bias = self._train(x, both.labels, c, classes)
        tensors = {"weight": weight, "bias": bias}
        if self.svm:
            tensors["idf"] = vectorizer.idf_.astype(np.float32)
        save_file(tensors, folder / "weights.safetensors")
        words = sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.__getitem__)
        write_json(folder / "vocabulary.json", words)
        chosen = {"C": c, "min_df": least, "validation_accuracy_by_min_df_and_C": scores}
        return Fit(chosen, softmax(logits))

    def _vectorize(
        self, texts: Sequence[str], least: int
    ) -> tuple[CountVectorizer, sparse.csr_matrix]:
        vectorizer = self._vectorizer(min_df=least)
        try:
            return vectorizer, vectorizer.fit_transform(map(clean, texts))
        except ValueError:  # no n-gram is in two texts, or there is none at all
            vectorizer = self._vectorizer()
        try:
            return vectorizer, vectorizer.fit_transform(map(clean, texts))
        except ValueError as error:
            raise UserError(f"{self.name} finds no word in the training texts") from error

    def _train(
        self, x: sparse.csr_matrix, labels: Sequence[int], c: float, classes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weight (V, K) and bias (K,)."""
        truth = np.asarray(labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # near enough
            if self.svm:
                return weights_of(LinearSVC(C=c, random_state=0).fit(x, truth), classes)
            return fit_naive_bayes_regression(x, truth, classes, c=c, smoothing=SMOOTHING)

    def load(self, folder: Path) -> None:
        tensors = load_file(folder / "weights.safetensors")
        self.weight, self.bias = tensors["weight"], tensors["bias"]
        words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        vocabulary = {word: i for i, word in enumerate(words)}
        self.vectorizer = self._vectorizer(vocabulary=vocabulary)
        if self.svm:
            self.vectorizer.idf_ = tensors["idf"]
        self.vectorizer.transform([""])  # checks the vocabulary, which takes a while, now

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        return softmax(self.vectorizer.transform(map(clean, texts)) @ self.weight + self.bias)

    def cost(self, texts: Sequence[str]) -> dict[str, float]:
        classes = self.weight.shape[1]
        outputs = 1 if classes == 2 else classes
        return {
            "parameters": len(self.weight) * outputs + outputs,
            "macs": float(self.vectorizer.transform(map(clean, texts)).nnz * outputs),
        }

    def files(self, folder: Path) -> list[Path]:
        return [folder / "weights.safetensors", folder / "vocabulary.json"]


# ---- fastText ----------------------------------------------------------------------------------


class FastText:
    """Facebook's fastText library (Joulin et al. 2016, arXiv 1607.01759)."""

    kind = "fasttext"
    description = (
        "The fastText library on lower-cased words and punctuation: word pairs, 10 hidden units "
        "as in its paper; learning rate and number of passes are chosen on the validation split; "
        "fitted again to training and validation split. Trained with the library's default of 12 "
        "threads, so that its results vary a little from run to run; it answers with one."
    )
    candidates = tuple((rate, epochs) for epochs in (5, 25) for rate in (0.1, 0.25, 0.5, 1.0))
    # With fewer than 11 threads, versions up to 0.9.3 leave most of the embeddings uninitialized
    # (DenseMatrix::uniform fills one tenth for each thread): losses are NaN now and then.
    settings = {"thread": 12, "wordNgrams": 2, "dim": 10, "minCount": 1, "bucket": 2_000_000}

    def __init__(self, seed: int) -> None:
        self.seed = seed
        try:
            import fasttext
        except ImportError as error:
            raise UserError(
                "fastText is not installed; pip install 'nin-text[compare]' or leave fasttext out"
            ) from error
        self.library = fasttext
        fasttext.FastText.eprint = lambda *args, **kwargs: None  # a warning at every load

    def fit(self, dataset: TextDataset, folder: Path) -> Fit:
        validation = dataset.splits["validation"]
        self.classes = len(dataset.label_names)
        write_json(folder / "fasttext.json", {"classes": self.classes})
        lines = folder / "train.txt"
        self._write(lines, dataset.splits["train"])

        def answer(candidate: tuple[float, int]) -> np.ndarray:
            try:
                self.model = self._train(lines, *candidate)
            except RuntimeError:  # "Encountered NaN": it diverged
                return np.full((len(validation), self.classes), np.nan)
            return self.probabilities(validation.texts)

        (rate, epochs), answers, scores = choose(self.candidates, answer, validation.labels)
        self._write(lines, joined(dataset))
        self._train(lines, rate, epochs).save_model(str(folder / "model.bin"))
        lines.unlink()
        chosen = {"lr": rate, "epoch": epochs, **self.settings}
        return Fit(chosen | {"validation_accuracy_by_lr_and_epoch": scores}, answers)

    def _train(self, path: Path, rate: float, epochs: int) -> Any:
        return self.library.train_supervised(
            str(path), lr=rate, epoch=epochs, seed=self.seed, verbose=0, **self.settings
        )

    def _write(self, path: Path, split: Split) -> None:
        lines = zip(split.labels, split.texts, strict=True)
        text = "".join(f"__label__{label} {self._line(text)}\n" for label, text in lines)
        path.write_text(text, encoding="utf-8")

    @staticmethod
    def _line(text: str) -> str:
        """Lower-cased tokens of a text on one line; none can be taken for a label."""
        return " ".join(TOKEN.findall(clean(text).lower())).replace("__label__", "label")

    def load(self, folder: Path) -> None:
        self.classes = json.loads((folder / "fasttext.json").read_text())["classes"]
        self.model = self.library.load_model(str(folder / "model.bin"))

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        answers = np.full((len(texts), self.classes), LEAST_PROBABILITY)
        for row, text in zip(answers, texts, strict=True):
            # The method underneath: the wrapper's own fails with NumPy 2.
            for probability, label in self.model.f.predict(
                self._line(text) + "\n", -1, 0.0, "strict"
            ):
                row[int(label.removeprefix("__label__"))] = max(probability, LEAST_PROBABILITY)
        return answers / answers.sum(axis=1, keepdims=True)

    def cost(self, texts: Sequence[str]) -> dict[str, float]:
        tokens = sum(len(TOKEN.findall(text)) for text in texts)
        dim, outputs = self.settings["dim"], self.classes
        rows = self.model.get_input_matrix().shape[0]
        return {
            "parameters": (rows + outputs) * dim,
            "macs": float(2 * tokens * dim + len(texts) * dim * outputs),
        }

    def files(self, folder: Path) -> list[Path]:
        return [folder / "model.bin"]
