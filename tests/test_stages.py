"""What is learned from texts without labels where there are few with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_probe import model_of

from nin_text import ngrams, probe, stacking, stages
from nin_text.evaluation import predict_logits, softmax
from nin_text.text import NiNTextForSequenceClassification
from nin_text.training import EncodedTexts

CLASSES = 3


def texts(count: int, seed: int, companions: bool = False) -> EncodedTexts:
    """Each has a token of its class, 5 to 7; some also have one of 10 to 12 that goes with it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    rows = [
        np.concatenate([rng.integers(20, 50, 6), [5 + label], [10 + label] * companions])
        for label in labels
    ]
    return EncodedTexts(rows, labels)


@pytest.fixture
def model() -> NiNTextForSequenceClassification:
    return model_of(CLASSES)


@pytest.fixture
def train() -> EncodedTexts:
    return texts(60, seed=0)


def test_answers_of_the_probe_are_those_of_both_parts_by_held_out_texts(
    model: NiNTextForSequenceClassification, train: EncodedTexts, tmp_path: Path
) -> None:
    out_of_fold = stages.fit_ngrams(model, train, texts(10, seed=1))
    assert out_of_fold is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unlabelled = texts(40, seed=2)
    path = tmp_path / "answers.safetensors"
    pseudo_labelled, seconds = stages.pseudo_label_by_probe(
        model, train, unlabelled, out_of_fold, path
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (pseudo_labelled.probabilities.argmax(axis=1) == unlabelled.labels).mean() > 0.9
    # The same by hand.
    probed = probe.fit_head(model, train.rows, train.labels)
    scales = stacking.best_scales([probed, out_of_fold], train.labels)
    model.rescale(*scales)
    expected = softmax(predict_logits(model, unlabelled.rows, pad_token_id=0))
    np.testing.assert_allclose(pseudo_labelled.probabilities, expected, atol=1e-5)
    # A second time they are read.
    again, known = stages.pseudo_label_by_probe(
        model, train, unlabelled, np.zeros_like(out_of_fold), path
    )
    np.testing.assert_array_equal(again.probabilities, pseudo_labelled.probabilities)
    assert known == seconds > 0


def test_ngrams_fitted_to_answers_know_what_no_label_spoke_of(
    model: NiNTextForSequenceClassification, train: EncodedTexts
) -> None:
    unlabelled = texts(400, seed=3, companions=True)
    right = 0.1 + 0.7 * np.eye(CLASSES, dtype=np.float32)[unlabelled.labels]
    companions = [np.array([20, 10 + label]) for label in range(CLASSES)]
    stages.fit_ngrams(model, train, texts(10, seed=1))
    branch = stages.branch_of(model)
    assert np.ptp(ngrams.predict(branch, companions)[0]) < 1
    pseudo_labelled = stages.PseudoLabelled(unlabelled.rows, right)
    scale = stages.fit_ngrams_to_pseudo_labels(model, train, pseudo_labelled)
    logits = ngrams.predict(branch, companions)
    assert (logits.argmax(axis=1) == np.arange(CLASSES)).all()
    # As sure as the answers are: the class has 0.8 there, a branch that is always right has more.
    assert 0 < scale < 1
    sure = softmax(ngrams.predict(branch, unlabelled.rows)).max(axis=1)
    assert sure.mean() == pytest.approx(0.8, abs=0.05)


def test_answers_count_by_how_sure_they_are(
    model: NiNTextForSequenceClassification, train: EncodedTexts
) -> None:
    """Nobody knows which class tokens 10 and 11 go with: half of the answers say so, half not."""
    rows = [np.array([10, 30]), np.array([11, 31])] * 100
    answers = np.full((200, CLASSES), 1 / CLASSES, dtype=np.float32)
    answers[::2] = [0.9, 0.05, 0.05]  # of token 10
    answers[1::2] = [0.34, 0.33, 0.33]  # of token 11
    stages.fit_ngrams_to_pseudo_labels(model, train, stages.PseudoLabelled(rows, answers))
    ten, eleven = ngrams.predict(stages.branch_of(model), [np.array([10]), np.array([11])])
    assert ten.argmax() == 0
    assert np.ptp(ten) > 2 * np.ptp(eleven)
