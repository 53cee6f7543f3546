"""Evidence names the tokens that decide: deleting these first costs the answer most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nin_text import data, deletion_test, faithfulness, models
from nin_text.explain import contrast, explain
from nin_text.faithfulness import METHODS, log_odds
from nin_text.tokenization import encode


@pytest.fixture(scope="module")
def classifier(trained: Path):
    return models.load(str(trained))


@pytest.fixture(scope="module")
def texts(classifier) -> list[str]:
    part, _, _ = data.load_split("demo_reviews", "test", models.label_names(classifier[0]))
    return part.texts[:150]


def test_evidence_is_ahead_of_saliency_and_chance(classifier, texts: list[str]) -> None:
    model, tokenizer = classifier
    result = deletion_test(model, encode(tokenizer, texts))
    print({name: round(result[name]["aopc"], 2) for name in METHODS})
    assert result["n"] == len(texts)
    # The premise: deleting any tokens at all costs the answer something.
    assert result["random"]["interval_95"][0] > 0
    for name in METHODS[1:]:
        assert result[name]["evidence_ahead_interval_95"][0] > 0, result[name]
        ahead = result["evidence"]["aopc"] - result[name]["aopc"]
        assert result[name]["evidence_ahead"] == pytest.approx(ahead)
    curve = result["evidence"]["curve"]
    assert len(curve) == 10
    assert curve[0] > result["random"]["curve"][0]


def test_scores_are_of_the_tokens_in_their_order(classifier) -> None:
    model, tokenizer = classifier
    text = "The plot was witty at first but dull in the end ."
    (row,) = encode(tokenizer, [text])
    scores = faithfulness._scores(model, row, 0)
    explanation = explain(model, tokenizer, text)
    assert np.allclose(scores["evidence"], contrast(explanation, 0), atol=1e-5)
    assert {name: len(values) for name, values in scores.items()} == dict.fromkeys(
        METHODS[:-1], len(row)
    )
    assert (scores["gradient_norm"] > 0).all()


def test_gradients_are_those_of_the_log_odds(classifier) -> None:
    """A nudge of every embedding by a share of itself moves the log-odds by the sum of products."""
    import torch

    model, tokenizer = classifier
    (row,) = encode(tokenizer, ["The acting was fine , we saw it on Friday ."])
    ids = torch.from_numpy(row.astype(np.int64))[None]
    step = 1e-3
    odds = []
    for factor in (1 + step, 1 - step):
        hook = model.nin.embeddings.register_forward_hook(lambda m, i, out, f=factor: out * f)
        with torch.no_grad():
            odds.append(log_odds(model(ids).logits.numpy(), np.array([1]))[0])
        hook.remove()
    expected = (odds[0] - odds[1]) / (2 * step)
    assert abs(expected) > 1e-3
    total = faithfulness._scores(model, row, 1)["gradient_x_input"].sum()
    assert total == pytest.approx(expected, rel=0.05, abs=0.02)


def test_a_test_repeats_and_short_texts_are_left_out(classifier) -> None:
    model, tokenizer = classifier
    rows = encode(tokenizer, ["dull", "", "dull plot", "The plot was witty ."])
    result = deletion_test(model, rows, most=3)
    assert result["n"] == 2
    assert result == deletion_test(model, rows, most=3)
    with pytest.raises(ValueError, match="no text has two tokens"):
        deletion_test(model, rows[:1])
    for most in (0, -1):
        with pytest.raises(ValueError, match="at least one token"):
            deletion_test(model, rows, most=most)


def test_log_odds_of_several_classes() -> None:
    logits = np.log(np.array([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1]]))
    assert log_odds(logits, np.array([0, 1])) == pytest.approx([0, np.log(4)])
