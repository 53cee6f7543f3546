"""Evidence is mapped back to the characters of the text, and shown harmlessly."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from nin_text import NiNTextClassifier, deletion_test, explain_html, models
from nin_text.errors import UserError
from nin_text.explain import Explanation, contrast, explain, to_terminal
from nin_text.tokenization import encode

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def classifier(trained: Path):
    return models.load(str(trained))


def test_the_evidence_of_the_tokens_sums_to_the_logits(classifier) -> None:
    text = "We saw it on Friday . The plot was dull but the music was witty ."
    explanation = explain(*classifier, text)
    assert explanation.evidence.shape == (len(explanation.spans), 2)
    assert np.allclose(explanation.evidence.sum(axis=0), explanation.logits, atol=1e-4)
    assert "".join(text[a:b] for a, b in explanation.spans) == text.replace(" ", "")


def test_word_order_shows_in_the_evidence(classifier) -> None:
    """The same words, other order, another answer: what a bag of words cannot do."""
    good = explain(*classifier, "The plot is not dull , the plot is witty .")
    bad = explain(*classifier, "The plot is not witty , the plot is dull .")
    assert (int(good.logits.argmax()), int(bad.logits.argmax())) == (1, 0)


@pytest.mark.parametrize("text", ["", " ", "\ud800", "😀" * 50, "<br /><br />", "word " * 5000])
def test_any_text_can_be_explained(classifier, text: str) -> None:
    explanation = explain(*classifier, text)
    assert np.allclose(explanation.evidence.sum(axis=0), explanation.logits, atol=1e-3)
    to_terminal(explanation, 0)


def test_the_text_that_is_explained_is_the_text_that_is_classified(classifier) -> None:
    model, tokenizer = classifier
    before, tokenizer.model_max_length = tokenizer.model_max_length, 3
    try:
        assert len(explain(model, tokenizer, "The plot was dull .").spans) == 3
        assert len(explain(model, tokenizer, "The plot was dull .", max_length=2).spans) == 2
    finally:
        tokenizer.model_max_length = before


def test_contrast_is_blind_to_what_all_classes_share() -> None:
    evidence = np.array([[1.0, 3.0], [5.0, 5.0]])
    explanation = Explanation("a b", [(0, 1), (2, 3)], evidence, evidence.sum(axis=0))
    assert contrast(explanation, 1).tolist() == [1.0, 0.0]


def test_colours_leave_the_text_as_it_is() -> None:
    evidence = np.array([[0.0, 2.0], [1.0, 0.0]])
    explanation = Explanation("good, bad!", [(0, 4), (6, 9)], evidence, evidence.sum(axis=0))
    shown = to_terminal(explanation, 1)
    assert ANSI.sub("", shown) == "good, bad!"
    green, red = re.findall(r"48;2;(\d+);(\d+);(\d+)m", shown)
    assert int(green[1]) == 255 > int(green[0])
    assert int(red[0]) == 255 > int(red[1])


def test_the_model_is_left_in_the_mode_it_was_in(classifier) -> None:
    model, tokenizer = classifier
    try:
        explain(model.train(), tokenizer, "good film")
        assert model.training and model.nin.training
        deletion_test(model, encode(tokenizer, ["good film", "bad film"]), most=1)
        assert model.training
    finally:
        model.eval()


def test_several_labels_are_not_explained_as_one_answer() -> None:
    texts = [f"{word} thing {i}" for i in range(20) for word in ("good", "bad")]
    labels = np.array([[1, i % 2] for i in range(40)])
    several = NiNTextClassifier("nin-text-small", epochs=1, random_state=0).fit(texts, labels)
    model, tokenizer = several.model_, several.tokenizer_
    assert explain(model, tokenizer, texts[0]).evidence.shape[1] == 2
    with pytest.raises(UserError, match="several labels, each by itself"):
        explain_html(model, tokenizer, texts[:1])
    with pytest.raises(UserError, match="several labels, each by itself"):
        deletion_test(model, encode(tokenizer, texts[:2]))


def test_control_characters_of_a_text_cannot_reach_the_terminal() -> None:
    text = "a\x1b[2Jb\x07\x9b31m"
    evidence = np.ones((1, 2))
    shown = to_terminal(Explanation(text, [(0, len(text))], evidence, evidence.sum(axis=0)), 0)
    assert "\x1b" not in ANSI.sub("", shown)
    assert "\x07" not in shown
    assert "\x9b" not in shown
