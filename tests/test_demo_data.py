"""The built-in corpora: word order decides, and test phrasings are new."""

from __future__ import annotations

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from nin_text import demo_data

NAMES = sorted(demo_data.LABELS)


@pytest.mark.parametrize("name", NAMES)
def test_a_bag_of_words_stays_under_80_percent(name: str, capsys: pytest.CaptureFixture) -> None:
    splits = demo_data.generate(name)
    model = make_pipeline(
        CountVectorizer(token_pattern=r"\S+"), LogisticRegression(max_iter=2000)
    ).fit(*splits["train"])
    accuracy = model.score(*splits["test"])
    with capsys.disabled():
        print(f"\n{name}: unigram logistic regression, test accuracy {accuracy:.3f}")
    assert accuracy < 0.80
    # The premise: words do tell something, so the bar is not met by mere noise.
    assert model.score(*splits["train"]) > 1.1 / len(demo_data.LABELS[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_corpus_is_the_same_every_time_and_another_for_another_seed(name: str) -> None:
    assert demo_data.generate(name) == demo_data.generate(name)
    assert demo_data.generate(name, seed=1) != demo_data.generate(name)


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_text_and_hold_every_class(name: str) -> None:
    splits = demo_data.generate(name)
    texts = [text for part, _ in splits.values() for text in part]
    assert len(set(texts)) == len(texts) == sum(demo_data.SIZES.values())
    for part, (_, labels) in splits.items():
        share = [labels.count(i) / len(labels) for i in range(len(demo_data.LABELS[name]))]
        assert min(share) > 0.8 / len(share), part


def test_no_phrasing_is_in_both_train_and_test() -> None:
    for construction in demo_data.REVIEWS:
        assert not set(construction.train) & set(construction.test)
    assert not set(demo_data.TOPIC_FRAMES["train"]) & set(demo_data.TOPIC_FRAMES["test"])


@pytest.mark.parametrize("name", NAMES)
def test_every_word_of_the_test_split_was_seen_in_training(name: str) -> None:
    splits = demo_data.generate(name)
    words = {part: set(" ".join(texts).lower().split()) for part, (texts, _) in splits.items()}
    assert words["test"] <= words["train"]
