"""Pretraining: parts do not see their targets, what counts is chosen by evidence, it helps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nin_text import NiNTextConfig, NiNTextModel, ngrams
from nin_text.pretraining import (
    COMMON,
    FREQUENT,
    UNKNOWN,
    LongEnoughTexts,
    TwoViewModel,
    choose_targets,
    cut_in_two,
)

BUCKETS, VOCABULARY = 1024, 12


def fitted_branch(size: int = 2) -> ngrams.NGramEvidence:
    """Token 3 speaks for class 1, token 4 against it, and the rest says nothing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    rows = [np.append(rng.integers(5, VOCABULARY, 6), 4 - label) for label in labels]
    branch = ngrams.NGramEvidence(size, BUCKETS, 2)
    ngrams.fit(branch, rows, labels)
    return branch


def texts(count: int = 50) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, VOCABULARY, rng.integers(1, 20)) for _ in range(count)]


def bucket_of(token: int) -> int:
    ids = torch.tensor([token])
    return int(ngrams.ngram_buckets(ids, torch.tensor([True]), 1, BUCKETS)[0, 0])


def test_telling_ngrams_weigh_most() -> None:
    targets = choose_targets(fitted_branch(1), texts())
    numbers = {token: targets.index[bucket_of(token)] for token in range(1, VOCABULARY)}
    ranked = sorted((n for n in numbers.values() if n >= 0), key=lambda n: -targets.weight[n])
    assert set(ranked[:2]) == {numbers[3], numbers[4]}
    assert sorted(targets.index[targets.index >= 0]) == list(range(len(targets)))


def test_ngrams_that_say_nothing_or_never_occur_are_no_targets() -> None:
    branch = ngrams.NGramEvidence(2, BUCKETS, 2)
    assert len(choose_targets(branch, texts())) == 0
    branch.weight[bucket_of(3), 1] = 1.0
    assert len(choose_targets(branch, texts())) == 1
    assert len(choose_targets(branch, [np.array([5, 6, 7])])) == 0


def test_words_that_no_label_speaks_of_are_worth_predicting_if_some_texts_have_them() -> None:
    """Words of as many as `COMMON` texts, not of fewer and not of nearly all."""
    branch = ngrams.NGramEvidence(2, BUCKETS, 2)
    branch.weight[bucket_of(3), 1] = 0.5
    common, rare, everywhere = range(20, 30), 30, 31
    rows = [np.array([everywhere, word]) for word in [*common] * COMMON + [rare] * (COMMON - 1)]
    targets = choose_targets(branch, [*rows, np.array([3, everywhere])])
    chosen = {bucket for bucket in range(BUCKETS) if targets.index[bucket] >= 0}
    assert chosen == {bucket_of(word) for word in (3, *common)}  # pairs are no words
    weight = {word: targets.weight[targets.index[bucket_of(word)]] for word in (3, *common)}
    assert weight[3] == pytest.approx(0.5 * np.sqrt(FREQUENT / (2 / (len(rows) + 2))))
    assert weight[20] == pytest.approx(
        UNKNOWN * 0.5 * np.sqrt(FREQUENT / ((COMMON + 1) / (len(rows) + 2)))
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 11), min_size=2, max_size=15), min_size=1, max_size=5))
def test_each_part_predicts_what_lies_wholly_in_the_other(given_texts: list[list[int]]) -> None:
    targets = choose_targets(fitted_branch(), texts())
    batch = cut_in_two([np.array(text) for text in given_texts], targets, pad_token_id=0)
    parts = [
        ids[mask.bool()].numpy()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    for i, text in enumerate(given_texts):
        before, after = parts[2 * i], parts[2 * i + 1]
        assert [*before, *after] == text
        assert min(len(before), len(after)) >= max(1, math.floor(len(text) / 4))
    for number, part in enumerate(parts):
        other = parts[number ^ 1]
        (held,) = [ngrams.features([other], 2, BUCKETS).indices]
        expected = {int(n) for n in targets.index[held] if n >= 0}
        found = batch["target"][batch["part"] == number].tolist()
        assert len(found) == len(set(found))
        assert set(found) == expected
        assert part.size


def test_texts_of_one_token_are_left_out() -> None:
    assert len(LongEnoughTexts([np.array([3]), np.array([3, 4])])) == 1


def test_at_first_each_target_is_as_likely_as_it_is_frequent() -> None:
    targets = choose_targets(fitted_branch(), texts())
    model = TwoViewModel(NiNTextModel(NiNTextConfig(vocab_size=VOCABULARY)), targets)
    expected = targets.share.astype(np.float64) * targets.weight
    exact = torch.from_numpy(np.log(expected / expected.sum())).float()
    assert torch.equal(model.predict.bias, exact)  # to the bit, however many threads there are


def test_the_loss_is_a_weighted_mean_for_each_part() -> None:
    targets = choose_targets(fitted_branch(), texts())
    torch.manual_seed(0)
    model = TwoViewModel(NiNTextModel(NiNTextConfig(vocab_size=VOCABULARY)), targets).eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    part, target = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    loss = model(ids, torch.ones_like(ids), part, target)["loss"]
    log_p = model.predict(model.norm(model.encoder(ids).pooler_output)).log_softmax(1)
    w = torch.from_numpy(targets.weight)
    first = (log_p[0, 0] * w[0] + log_p[0, 1] * w[1]) / (w[0] + w[1])
    assert loss.item() == pytest.approx(-(first + log_p[1, 2]).item() / 3, rel=1e-4)


def test_a_batch_without_targets_has_no_loss_and_no_nan() -> None:
    targets = choose_targets(fitted_branch(), texts())
    model = TwoViewModel(NiNTextModel(NiNTextConfig(vocab_size=VOCABULARY)), targets)
    ids, none = torch.tensor([[1, 2]]), torch.zeros(0, dtype=torch.int64)
    loss = model(ids, torch.ones_like(ids), none, none)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_is_in_both_parts_is_learned() -> None:
    """Texts of two kinds: from one part of a text the n-grams of the other can be told."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, 300)
    rows = [rng.integers(1, 6, 12) + 5 * kind for kind in kinds]
    branch = ngrams.NGramEvidence(1, BUCKETS, 2)
    ngrams.fit(branch, rows, kinds)
    targets = choose_targets(branch, rows)
    torch.manual_seed(0)
    model = TwoViewModel(NiNTextModel(NiNTextConfig(vocab_size=VOCABULARY)), targets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        batch = cut_in_two([rows[i] for i in rng.integers(0, 300, 32)], targets, pad_token_id=0)
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # Five of ten tokens remain possible: log 10 falls to log 5.
    assert losses[0] > math.log(8)
    assert np.mean(losses[-5:]) == pytest.approx(math.log(5), abs=0.1)


def test_hidden_tokens_are_predicted_beside_the_targets() -> None:
    """The loss is that of both, of texts in which the hidden tokens are padding."""
    targets = choose_targets(fitted_branch(), texts())
    torch.manual_seed(0)
    encoder = NiNTextModel(NiNTextConfig.from_preset("nin-text-large", vocab_size=VOCABULARY))
    model = TwoViewModel(encoder, targets, masked_lm=True).train()
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    mask = (ids > 0).long()
    part, target = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    hidden = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]]).bool()
    seen, places = ids.masked_fill(hidden, 0), hidden.flatten().nonzero()[:, 0]
    loss = model(seen, mask, part, target, places, ids[hidden])["loss"]
    output = encoder(seen, mask)
    log_p = model.predict(model.norm(output.pooler_output)).log_softmax(1)
    w = torch.from_numpy(targets.weight)
    first = (log_p[0, 0] * w[0] + log_p[0, 1] * w[1]) / (w[0] + w[1])
    x = model.transform(output.last_hidden_state[hidden])
    answers = encoder.embeddings.weight.clone()
    answers[0] = 0
    token_log_p = (x @ answers.t() + model.token_bias).log_softmax(1)
    tokens = token_log_p[torch.arange(len(x)), ids[hidden]].mean()
    assert loss.item() == pytest.approx(-(first + log_p[1, 2]).item() / 2 - tokens.item(), rel=1e-4)


def test_hidden_tokens_take_the_place_of_dropout() -> None:
    targets = choose_targets(fitted_branch(), texts())
    encoder = NiNTextModel(NiNTextConfig.from_preset("nin-text-base", vocab_size=VOCABULARY))
    assert TwoViewModel(encoder, targets).train().encoder.training
    model = TwoViewModel(encoder, targets, masked_lm=True).train()
    assert model.training and not any(part.training for part in model.encoder.modules())


def test_a_batch_in_which_nothing_is_hidden_has_no_nan() -> None:
    targets = choose_targets(fitted_branch(), texts())
    model = TwoViewModel(NiNTextModel(NiNTextConfig(vocab_size=VOCABULARY)), targets, True)
    batch = cut_in_two([np.array([1, 2])], targets, pad_token_id=0, mlm_probability=1e-9)
    assert len(batch["masked_positions"]) == len(batch["masked_ids"]) == 0
    none = torch.zeros(0, dtype=torch.int64)
    loss = model(**batch | {"part": none, "target": none})["loss"]
    loss.backward()
    assert loss.item() == 0


def test_the_share_of_tokens_that_is_asked_for_is_hidden_and_told_apart() -> None:
    targets = choose_targets(fitted_branch(), texts())
    rows = [np.random.default_rng(i).integers(1, 12, 50 + i) for i in range(40)]
    torch.manual_seed(0)
    plain = cut_in_two(rows, targets, pad_token_id=0)
    torch.manual_seed(0)
    batch = cut_in_two(rows, targets, pad_token_id=0, mlm_probability=0.3)
    ids, hidden = batch["input_ids"].clone(), batch["masked_positions"]
    assert batch["attention_mask"].equal(plain["attention_mask"])
    assert batch["attention_mask"].flatten()[hidden].all()
    assert not ids.flatten()[hidden].any()
    assert len(hidden) == pytest.approx(0.3 * plain["attention_mask"].sum().item(), rel=0.15)
    ids.view(-1)[hidden] = batch["masked_ids"]
    assert ids.equal(plain["input_ids"])  # and what it predicts is of all tokens:
    assert batch["part"].equal(plain["part"]) and batch["target"].equal(plain["target"])


def test_what_neighbours_tell_of_a_token_is_learned() -> None:
    """In texts that count up to eleven and begin again, a hidden number can be told."""
    rng = np.random.default_rng(0)
    rows = [(np.arange(16) + rng.integers(11)) % 11 + 1 for _ in range(200)]
    targets = choose_targets(fitted_branch(), texts())
    torch.manual_seed(0)
    config = NiNTextConfig.from_preset("nin-text-small", vocab_size=VOCABULARY)
    model = TwoViewModel(NiNTextModel(config), targets, masked_lm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        some = [rows[i] for i in rng.integers(0, 200, 32)]
        batch = cut_in_two(some, targets, pad_token_id=0, mlm_probability=0.15)
        none = torch.zeros(0, dtype=torch.int64)
        loss = model(**batch | {"part": none, "target": none})["loss"]  # of the hidden alone
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # At random 2.4; where both neighbours are hidden, too, nothing tells.
    assert losses[0] > 2
    assert np.mean(losses[-5:]) < 0.6
    assert not model.encoder.embeddings.weight[0].any(), "a hidden token is a vector of zeros"
