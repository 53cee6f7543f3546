"""N-gram evidence: counted once, never across texts, fitted and weighed as its sources say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nin_text import ngrams, stacking
from nin_text.blocks import Rows

BUCKETS = 4096


def branch_with_random_weights(size: int = 3, classes: int = 3) -> ngrams.NGramEvidence:
    branch = ngrams.NGramEvidence(size, BUCKETS, classes)
    generator = torch.Generator().manual_seed(0)
    branch.weight.normal_(generator=generator)
    branch.bias.normal_(generator=generator)
    return branch


def run(branch: ngrams.NGramEvidence, texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, K) logits without bias and (B, T, K) evidence of texts in one padded batch."""
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    layout = Rows.from_attention_mask(mask, gap=1)
    logits, evidence = branch(layout.pack(ids), layout, output_evidence=True)
    assert torch.equal(branch(layout.pack(ids), layout)[0], logits)
    return logits, layout.unpack(evidence)


def bucket(tokens: list[int]) -> int:
    """The documented hash, in plain integers."""
    key = 0
    for token in tokens:
        key = (key * ngrams.MULTIPLIER + token + 1) % ngrams.PRIME
    return key * ngrams.SCRAMBLE % ngrams.PRIME % BUCKETS


def distinct_buckets(text: list[int], size: int) -> set[int]:
    """The buckets of a text, the slow and obvious way."""
    return {bucket(text[i : i + n]) for n in range(1, size + 1) for i in range(len(text) - n + 1)}


TEXTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.integers(1, 4))
def test_logits_are_the_sum_of_distinct_ngrams(texts: list[list[int]], size: int) -> None:
    branch = branch_with_random_weights(size)
    logits, evidence = run(branch, texts)
    for i, text in enumerate(texts):
        expected = branch.weight[sorted(distinct_buckets(text, size))].sum(dim=0)
        torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(evidence[i].sum(dim=0), expected, atol=1e-4, rtol=1e-4)
        assert not evidence[i, len(text) :].any()


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.integers(1, 4))
def test_features_are_what_the_branch_counts(texts: list[list[int]], size: int) -> None:
    counts = ngrams.features([np.array(text) for text in texts], size, BUCKETS)
    assert set(counts.data.tolist()) == {1.0}
    for i, text in enumerate(texts):
        assert set(counts[[i]].indices.tolist()) == distinct_buckets(text, size)


def test_features_do_not_depend_on_where_chunks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    rows = [generator.integers(1, 50, length) for length in (3, 1, 7, 20, 2)]
    whole = ngrams.features(rows, 3, BUCKETS)
    monkeypatch.setattr(ngrams, "CHUNK_TOKENS", 4)
    assert (ngrams.features(rows, 3, BUCKETS) != whole).nnz == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 20), max_size=30), max_size=6),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_the_fast_way_finds_the_same_ngrams_wherever_its_parts_end(
    texts: list[list[int]], size: int, chunk: int, together: int
) -> None:
    expected = {
        i * BUCKETS + b for i, text in enumerate(texts) for b in distinct_buckets(text, size)
    }
    ids = np.array([token for text in texts for token in text], dtype=np.int32)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "CHUNK_TOKENS", chunk)
        patch.setattr(ngrams, "SORT_TOKENS", together)
        found = ngrams.distinct_ngrams(ids, lengths, size, BUCKETS)
    assert found.tolist() == sorted(expected)


def test_a_text_without_tokens_has_no_features() -> None:
    none = np.zeros(0, dtype=np.int32)
    assert ngrams.features([none, none], 3, BUCKETS).nnz == 0
    assert ngrams.features([none, np.array([5])], 3, BUCKETS).nnz == 1


def test_credit_goes_to_the_tokens_of_the_ngram() -> None:
    """A bigram's weight is halved between its two tokens, and again between two occurrences."""
    branch = ngrams.NGramEvidence(2, BUCKETS, 1)
    branch.weight[bucket([5, 6])] = 1.0
    _, evidence = run(branch, [[5, 6, 7, 5, 6], [7, 5, 6, 7, 7]])
    assert evidence[0, :, 0].tolist() == [0.25, 0.25, 0, 0.25, 0.25]
    assert evidence[1, :, 0].tolist() == [0, 0.5, 0.5, 0, 0]


def test_fit_finds_what_tells_classes_apart() -> None:
    """The order of two words decides the label, so only a bigram can tell."""
    generator = np.random.default_rng(0)
    rows, labels = [], []
    for _ in range(300):
        label = int(generator.integers(2))
        pair = [3, 4] if label else [4, 3]
        rows.append(np.array([*generator.integers(10, 30, 3), *pair]))
        labels.append(label)
    branch = ngrams.NGramEvidence(2, BUCKETS, 2)
    ngrams.fit(branch, rows, np.array(labels))
    logits = ngrams.predict(branch, rows)
    assert (logits.argmax(axis=1) == labels).all()
    assert branch.weight[bucket([3, 4]), 1] > 0.5 > -0.5 > branch.weight[bucket([4, 3]), 1]
    np.testing.assert_allclose(logits.sum(axis=1), 0, atol=1e-5)
    words = ngrams.NGramEvidence(1, BUCKETS, 2)
    ngrams.fit(words, rows, np.array(labels))
    assert (ngrams.predict(words, rows).argmax(axis=1) == labels).mean() < 0.8


def test_the_more_smoothing_the_less_is_made_of_a_rare_ngram_also_of_held_out_texts() -> None:
    rows = [np.array([5 + i % 2, 7 + i % 2] if i < 4 else [5 + i % 2]) for i in range(60)]
    labels = np.arange(60) % 2
    shares, held_out = [], []
    for smoothing in (0.1, 1.0, 20.0):
        branch = ngrams.NGramEvidence(1, BUCKETS, 2, smoothing)
        ngrams.fit(branch, rows, labels)
        shares.append(float(branch.weight[bucket([8]), 1] / branch.weight[bucket([6]), 1]))
        held_out.append(ngrams.out_of_fold_logits(branch, rows, labels))
    assert 1 > shares[0] > shares[1] > shares[2] > 0
    assert all(logits is not None for logits in held_out)
    assert not np.allclose(held_out[0], held_out[2], rtol=0.1)


def test_an_ngram_of_a_single_text_gets_no_weight_unless_all_are_so_rare() -> None:
    rows = [np.array([5, 8]), np.array([6, 8]), np.array([5, 9]), np.array([6, 7])]
    labels = np.array([0, 1, 0, 1])
    branch = ngrams.NGramEvidence(1, BUCKETS, 2)
    ngrams.fit(branch, rows, labels)
    assert branch.weight[bucket([5]), 0] > 0.1 < branch.weight[bucket([6]), 1]
    assert not branch.weight[[bucket([9]), bucket([7])]].any()
    ngrams.fit(branch, [np.array([5]), np.array([6])], labels[:2])
    assert branch.weight[bucket([5]), 0] > 0.1 < branch.weight[bucket([6]), 1]


def test_fit_takes_any_number_of_classes() -> None:
    """Also one that has no example."""
    rows = [np.array([label + 5, 20]) for label in (0, 1, 2) for _ in range(20)]
    labels = np.repeat([0, 1, 2], 20)
    branch = ngrams.NGramEvidence(2, BUCKETS, 4)
    ngrams.fit(branch, rows, labels)
    logits = ngrams.predict(branch, rows)
    assert (logits.argmax(axis=1) == labels).all()
    assert not branch.weight[:, 3].any()
    nothing = ngrams.predict(branch, [np.array([999])])[0]
    assert nothing.argmin() == 3  # a class that was never seen is the last to be guessed


@pytest.mark.parametrize("label", [0, 1])
def test_of_two_classes_the_only_one_seen_is_the_likelier(label: int) -> None:
    rows = [np.array([5 + i % 3]) for i in range(30)]
    branch = ngrams.NGramEvidence(1, BUCKETS, 2)
    ngrams.fit(branch, rows, np.full(30, label))
    logits = ngrams.predict(branch, rows)
    np.testing.assert_allclose(logits[:, label] - logits[:, 1 - label], np.log(31), rtol=1e-5)


def test_class_weights_shift_the_bias_towards_rare_classes() -> None:
    rows, labels = [np.array([7])] * 40, np.array([0] * 36 + [1] * 4)
    plain, weighted = ngrams.NGramEvidence(1, 64, 2), ngrams.NGramEvidence(1, 64, 2)
    ngrams.fit(plain, rows, labels)
    ngrams.fit(weighted, rows, labels, [40 / 72, 5.0])
    assert ngrams.predict(plain, rows)[0, 1] < -0.5
    assert abs(ngrams.predict(weighted, rows)[0, 1]) < 0.2


def test_predict_is_what_the_branch_adds() -> None:
    branch = branch_with_random_weights()
    texts = [[1, 2, 3, 2, 3], [4], [9, 9, 9]]
    logits, _ = run(branch, texts)
    rows = [np.array(text) for text in texts]
    np.testing.assert_allclose(
        ngrams.predict(branch, rows), (logits + branch.bias).numpy(), atol=1e-5
    )


def test_best_scales_undo_a_wrong_scale() -> None:
    """Labels drawn from softmax(2 a + b / 2): the factors come back, also if one part is noise."""
    generator = np.random.default_rng(0)
    a, b, noise = generator.normal(size=(3, 20_000, 3))
    truth = 2 * a + b / 2
    gumbel = -np.log(-np.log(generator.uniform(size=truth.shape)))
    labels = (truth + gumbel).argmax(axis=1)
    scales = stacking.best_scales([a, b, noise], labels)
    np.testing.assert_allclose(scales, [2, 0.5, 0], atol=0.05)


def test_best_scales_for_probabilities_in_place_of_labels() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 200, 3))
    truth = np.exp(2 * a + b / 2)
    truth /= truth.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(stacking.best_scales([a, b], truth, strength=0), [2, 0.5], atol=1e-3)


def test_best_scales_never_wipe_out_every_answer() -> None:
    """Where neither part knows anything, the sum still has an answer, and evidence for it."""
    for seed in range(50):
        generator = np.random.default_rng(seed)
        parts = list(3 * generator.normal(size=(2, 10, 2)))
        scales = stacking.best_scales(parts, generator.integers(0, 2, 10))
        assert min(scales) > 0


def test_best_scales_stay_finite_without_a_mistake() -> None:
    logits = np.array([[5.0, -5.0], [-5.0, 5.0]] * 10)
    scales = stacking.best_scales([logits, logits / 2], np.array([0, 1] * 10))
    assert all(0 <= scale < 3 and math.isfinite(scale) for scale in scales)


def test_best_scales_are_pulled_to_the_prior() -> None:
    """Labels drawn from softmax(2 a): ten texts do not outweigh a strong prior, many do."""
    generator = np.random.default_rng(0)
    a = generator.normal(size=(20_000, 3))
    gumbel = -np.log(-np.log(generator.uniform(size=a.shape)))
    labels = (2 * a + gumbel).argmax(axis=1)
    few = stacking.best_scales([a[:10]], labels[:10], prior=[0.3], strength=300)
    many = stacking.best_scales([a], labels, prior=[0.3], strength=300)
    np.testing.assert_allclose(few, 0.3, atol=0.05)
    np.testing.assert_allclose(many, 2, atol=0.3)


def test_cautious_scales_give_way_to_labels_but_not_to_chance() -> None:
    """Of fifty texts: a part that is right about each is used, one that knows nothing is not."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 50)
    truth = np.eye(2)[labels] * 2 - 1
    weak = truth / 4 + generator.normal(size=(50, 2))
    right = stacking.cautious_scales([2 * truth, weak], labels, [0, 1])
    np.testing.assert_allclose(right, stacking.best_scales([2 * truth, weak], labels, [0, 1]))
    assert right[0] > 1
    for _ in range(20):
        noise = generator.normal(size=(50, 2))
        assert stacking.cautious_scales([noise, weak], labels, [0, 1])[0] < 0.3


@pytest.mark.parametrize(
    ("told_by", "low", "high"),
    [(1.0, 1.0, math.inf), (0.0, 0.0, 0.25)],
    ids=["each label by a token", "labels at random"],
)
def test_held_out_logits_are_as_of_texts_outside(told_by: float, low: float, high: float) -> None:
    """Above 1 where n-grams are right about every text, near 0 where they learned mere chance."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 100)
    rows = [generator.integers(2, 200, 20) for _ in labels]
    for row, label in zip(rows, labels, strict=True):
        row[0] = label if generator.random() < told_by else 2
    branch = ngrams.NGramEvidence(2, BUCKETS, 2)
    ngrams.fit(branch, rows, labels)
    before = branch.weight.clone()
    logits = ngrams.out_of_fold_logits(branch, rows, labels)
    assert low <= stacking.best_scales([logits], labels)[0] <= high
    assert torch.equal(branch.weight, before)
    # The branch is sure of the texts it was fitted to, whether or not it knows anything.
    assert stacking.best_scales([ngrams.predict(branch, rows)], labels)[0] > 1


@pytest.mark.parametrize("texts", [2, stacking.FEW + 1])
def test_too_few_and_many_texts_are_not_held_out(texts: int) -> None:
    rows, labels = [np.array([label]) for label in (0, 1)], np.array([0, 1])
    branch = ngrams.NGramEvidence(1, BUCKETS, 2)
    rows = (rows * texts)[:texts]
    assert ngrams.out_of_fold_logits(branch, rows, np.tile(labels, texts)[:texts]) is None
    assert stacking.folds(texts) == []


@pytest.mark.parametrize("texts", [5, 23, stacking.FEW])
def test_folds_hold_out_each_text_once(texts: int) -> None:
    parts = stacking.folds(texts)
    assert len(parts) == 5
    assert sorted(np.concatenate([held for _, held in parts])) == list(range(texts))
    for rest, held in parts:
        assert sorted([*rest, *held]) == list(range(texts))


def test_a_class_of_one_text_and_weights_do_not_hinder_held_out_logits() -> None:
    rows = [np.array([label, label]) for label in (0, 1, 2, 0, 1, 0)]
    labels = np.array([0, 1, 2, 0, 1, 0])
    branch = ngrams.NGramEvidence(2, BUCKETS, 3)
    weight = np.arange(1.0, 7.0)
    plain = ngrams.out_of_fold_logits(branch, rows, labels)
    weighed = ngrams.out_of_fold_logits(branch, rows, labels, [1.0, 2.0, 3.0], weight)
    assert np.isfinite(plain).all()
    assert np.isfinite(weighed).all()
    assert np.abs(plain - weighed).max() > 0.01
