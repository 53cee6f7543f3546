"""The linear probe: scikit-learn's logistic regression, as the head of the classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nin_text import NiNTextConfig, NiNTextForSequenceClassification, probe, stacking
from nin_text.evaluation import predict_logits, softmax
from nin_text.learning import Learner

SIZE = 16


def vectors(classes: int, count: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Vectors that tell the class, in directions of very different scale."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    x = rng.normal(size=(count, SIZE)) + rng.normal(size=(classes, SIZE))[labels]
    return (x * np.logspace(-2, 2, SIZE) + 5).astype(np.float32), labels


def model_of(classes: int, **changes: object) -> NiNTextForSequenceClassification:
    torch.manual_seed(0)
    config = NiNTextConfig(
        vocab_size=50,
        embedding_size=SIZE,
        block_channels=[[SIZE, SIZE]],
        num_labels=classes,
        ngram_size=2,
        ngram_buckets=256,
        **changes,
    )
    return NiNTextForSequenceClassification(config)


def texts(classes: int, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Texts of random tokens, with more of their class's own."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, classes, count)
    own = [np.full(rng.integers(1, 4), 5 + label) for label in labels]
    return [np.append(rng.integers(10, 50, rng.integers(1, 20)), part) for part in own], labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("weighed", [False, True])
def test_it_is_logistic_regression_on_standardized_vectors(classes: int, weighed: bool) -> None:
    x, labels = vectors(classes)
    sample_weight = np.linspace(0.1, 3, len(x)) if weighed else None
    weight, bias = probe.fit_probe(x, labels, classes, sample_weight)
    # The features of the reference have a mean square of one each; those of the probe one in all.
    regression = LogisticRegression(C=probe.INVERSE_REGULARIZATION / SIZE, max_iter=10_000)
    reference = make_pipeline(StandardScaler(), regression)
    reference.fit(x, labels, logisticregression__sample_weight=sample_weight)
    expected = reference.predict_proba(x)
    assert (expected.argmax(axis=1) == labels).mean() > 0.9
    np.testing.assert_allclose(softmax(x @ weight.T + bias), expected, atol=2e-3)


def test_a_class_without_a_text_is_a_rare_one() -> None:
    x, labels = vectors(2)
    weight, bias = probe.fit_probe(x, 2 * labels, 4)
    probabilities = softmax(x @ weight.T + bias)
    assert (probabilities.argmax(axis=1) == 2 * labels).mean() > 0.9
    assert probabilities[:, [1, 3]].max() < 0.05
    weight, bias = probe.fit_probe(x, np.ones(len(x), dtype=int), 3)
    assert (softmax(x @ weight.T + bias)[:, 1] > 0.9).all()


def test_it_becomes_the_head_and_tells_texts_that_it_was_not_fitted_to() -> None:
    rows, labels = texts(3, 200)
    model = model_of(3)
    held_out = probe.fit_head(model, rows, labels)
    assert held_out is not None
    assert not model.ngrams.weight.any()  # so that the logits are those of the network alone
    logits = predict_logits(model, rows, pad_token_id=0)
    x = probe.vectors(model.nin, rows)
    weight, bias = probe.fit_probe(x, labels, 3)
    np.testing.assert_allclose(logits, x @ weight.T + bias, atol=1e-3)
    rest, held = stacking.folds(len(rows))[0]
    weight, bias = probe.fit_probe(x[rest], labels[rest], 3)
    np.testing.assert_allclose(held_out[held], x[held] @ weight.T + bias, atol=1e-3)
    assert (held_out.argmax(axis=1) == labels).mean() > 0.6  # of a network that is not trained
    random_labels = np.random.default_rng(2).permutation(labels)
    chance = probe.fit_head(model, rows, random_labels)
    assert (chance.argmax(axis=1) == random_labels).mean() < 0.5


def test_class_weights_count() -> None:
    rows, labels = texts(2, 100)
    rare = np.where(np.arange(100) % 5 == 0, labels, 0)
    plain, balanced = (
        probe.fit_head(model_of(2, class_weights=weights), rows, rare)
        for weights in (None, [1.0, 10.0])
    )
    assert (balanced.argmax(axis=1) == 1).sum() > (plain.argmax(axis=1) == 1).sum()


@pytest.mark.parametrize(
    ("count", "new_head"), [(100, True), (100, False), (stacking.FEW + 1, True)]
)
def test_few_labels_make_the_head_of_a_saved_encoder(
    count: int, new_head: bool, tmp_path: Path
) -> None:
    """Not one that is trained already, nor of many labels, which do as well without."""
    rows, labels = texts(2, count)
    model, expected = model_of(2), (1.0, 1.0)
    before = model.classifier.weight.detach().clone()
    learner = Learner(None, model, None, None, tmp_path, torch.device("cpu"), new_head)
    learner.probe_head(rows, labels, np.zeros((count, 2)))
    if count == 100 and new_head:
        x = probe.vectors(model.nin, rows)
        weight, _ = probe.fit_probe(x, labels, 2)
        np.testing.assert_allclose(model.classifier.weight.detach(), weight, atol=1e-4)
        assert learner.prior_scales != expected
    else:
        assert torch.equal(model.classifier.weight, before)
        assert learner.prior_scales == expected


def test_of_more_texts_than_a_few_none_is_held_out() -> None:
    rows, labels = texts(2, stacking.FEW + 1)
    model = model_of(2)
    assert probe.fit_head(model, rows, labels) is None
    assert model.classifier.weight.any()
