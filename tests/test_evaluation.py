"""Metrics agree with scikit-learn and with numbers worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from nin_text import NiNTextConfig, NiNTextForSequenceClassification
from nin_text.evaluation import (
    _macro_f1,
    batches_by_length,
    bootstrap_interval,
    calibration_error,
    classification_metrics,
    most_confident_mistakes,
    pad,
    predict_logits,
    softmax,
)


def test_metrics_by_hand() -> None:
    logits = np.log([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    result = classification_metrics(logits, [0, 1, 1, 1], ["no", "yes"])
    assert result["n"] == 4
    assert result["accuracy"] == 0.75
    assert result["confusion_matrix"] == [[1, 0], [1, 2]]
    assert result["per_class"]["no"] == {
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "support": 1,
    }
    assert result["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert result["roc_auc"] == 1.0
    assert result["log_loss"] == pytest.approx(-np.log([0.9, 0.4, 0.7, 0.8]).mean())
    low, high = result["accuracy_interval_95"]
    assert low < 0.75 < high
    json.dumps(result)


def test_metrics_of_many_classes_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, logits = rng.integers(0, 5, 300), rng.normal(size=(300, 5))
    logits[np.arange(300), truth] += 1
    result = classification_metrics(logits, truth.tolist(), list("abcde"))
    assert result["macro_f1"] == pytest.approx(
        sk.f1_score(truth, logits.argmax(1), average="macro")
    )
    assert result["roc_auc"] == pytest.approx(
        sk.roc_auc_score(truth, softmax(logits), multi_class="ovr")
    )


def test_a_class_that_does_not_occur_leaves_the_roc_open() -> None:
    result = classification_metrics(np.eye(3), [0, 1, 1], ["a", "b", "c"])
    assert result["roc_auc"] is None
    assert result["per_class"]["c"]["support"] == 0


def test_each_score_lies_within_its_interval_where_a_class_does_not_occur() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    logits = np.eye(3)[np.where(rng.random(300) < 0.9, labels, 1 - labels)]
    result = classification_metrics(logits, labels, ["a", "b", "c"])
    for score in ("accuracy", "macro_f1"):
        low, high = result[f"{score}_interval_95"]
        assert low < result[score] < high, score
    expected = sk.f1_score(labels, logits.argmax(axis=1), average="macro")
    assert result["macro_f1"] == pytest.approx(expected) and expected > 0.85


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_the_fast_macro_f1_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = map(np.array, zip(*pairs, strict=True))
    expected = sk.f1_score(truth, predicted, average="macro", zero_division=0)
    assert _macro_f1(truth, predicted, 4) == pytest.approx(expected)


def test_calibration_error_by_hand() -> None:
    # Four answers at 0.8, of which half are right; one at 1.0, which is.
    probabilities = np.array([[0.8, 0.2]] * 4 + [[0.0, 1.0]])
    assert calibration_error(probabilities, np.array([0, 0, 1, 1, 1])) == pytest.approx(0.3 * 0.8)


def test_a_bootstrap_interval_has_the_width_of_the_binomial() -> None:
    correct = np.arange(1000) % 10 < 9
    low, high = bootstrap_interval(lambda i: correct[i].mean(), 1000)
    assert (high - low) / 2 == pytest.approx(1.96 * (0.9 * 0.1 / 1000) ** 0.5, rel=0.1)
    assert bootstrap_interval(lambda i: correct[i].mean(), 1000) == [low, high]


def test_softmax_stands_large_logits() -> None:
    assert softmax(np.array([[1000.0, 0.0]])).tolist() == [[1.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    tokens=st.integers(1, 120),
)
def test_batches_hold_every_text_once_within_bounds(lengths, tokens) -> None:
    batches = batches_by_length(lengths, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= tokens


def test_padding() -> None:
    ids, mask = pad([np.array([5, 6, 7], dtype=np.int32), np.array([8], dtype=np.int32)], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_logits_come_back_in_the_order_given_whatever_the_batches() -> None:
    torch.manual_seed(0)
    config = NiNTextConfig.from_preset("nin-text-small", vocab_size=30, num_labels=4)
    model = NiNTextForSequenceClassification(config).train()
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 30, n, dtype=np.int32) for n in (3, 40, 1, 7, 22, 5)]
    small, large = (
        predict_logits(model, rows, pad_token_id=0, batch_tokens=n) for n in (10, 10_000)
    )
    assert small.dtype == np.float32
    assert np.allclose(small, large, atol=1e-5)
    assert model.training
    model.eval()
    alone = model(torch.tensor(rows[1][None]).long()).logits.detach().numpy()
    assert np.allclose(small[1], alone[0], atol=1e-5)
    with pytest.raises(ValueError, match="no texts"):
        predict_logits(model, [], pad_token_id=0)


def test_mistakes_are_the_most_confident_first() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    assert most_confident_mistakes(probabilities, [1, 1, 1, 0]).tolist() == [0, 3, 2]
    assert most_confident_mistakes(probabilities, [0, 1, 0, 1]).tolist() == []
