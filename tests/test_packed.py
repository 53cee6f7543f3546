"""Packed classifiers: equal to the model's forward pass, whatever the lengths and the slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import VARIANTS, make_model, pad, random_texts

from nin_text import NiNTextForSequenceClassification, ngrams, products
from nin_text.packed import BlocksEncoder, FoldedBlock, PackedClassifier

# One block, in every form that can be folded into tables.
RESIDUAL: dict[str, Any] = {
    "block_channels": [[24, 32, 24]],
    "kernel_sizes": [[3]],
    "embedding_size": 24,
    "residual": True,
    "norm": True,
}
FOLDED: dict[str, dict[str, Any]] = {
    "nin-text-small": {},
    "nin-text-base": {},
    "plain": {"block_channels": [[24, 16]], "kernel_sizes": [[5]], "embedding_size": 24},
    "dilated": {
        "block_channels": [[24]],
        "kernel_sizes": [[3]],
        "dilations": [3],
        "embedding_size": 24,
        "residual": True,
        "hidden_act": "silu",
    },
    "residual": RESIDUAL,
    "residual without norm": RESIDUAL | {"norm": False},
}


def folded_model(name: str, **overrides: Any) -> NiNTextForSequenceClassification:
    preset = name if name in VARIANTS and not FOLDED[name] else "inception"
    model = make_model(preset, **{"dilations": [1], **FOLDED[name], **overrides})
    with torch.no_grad():  # norms and biases as training leaves them: not ones and zeros
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def fold(
    model: NiNTextForSequenceClassification, dtype: torch.dtype = torch.float32
) -> PackedClassifier:
    config, weights = model.config.to_dict(), model.state_dict()
    assert FoldedBlock.supports(config)
    return PackedClassifier(FoldedBlock(config, model.nin.state_dict(), dtype), weights, config)


def blocks(
    model: NiNTextForSequenceClassification, dtype: torch.dtype | None = None
) -> PackedClassifier:
    return PackedClassifier(
        BlocksEncoder(model.nin, dtype), model.state_dict(), model.config.to_dict()
    )


def logits_of(classifier: PackedClassifier, texts: list[torch.Tensor]) -> torch.Tensor:
    ids = torch.cat(texts).numpy().astype(np.int32)
    return torch.from_numpy(classifier.logits(ids, np.array([len(text) for text in texts])))


def expected_of(
    model: NiNTextForSequenceClassification, texts: list[torch.Tensor], **options: Any
) -> torch.Tensor:
    with torch.inference_mode():
        return model(**pad(texts, **options)).logits


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    """Within `bound` of the largest logit."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, atol=bound * scale, rtol=0)


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    LENGTHS,
    st.sampled_from(sorted(FOLDED)),
    st.sampled_from(["mean", "attention"]),
    st.sampled_from([0, 1, 3]),
    st.integers(1, 50),
    st.booleans(),
)
def test_a_folded_block_equals_the_model(
    lengths: list[int], name: str, pooling: str, ngrams: int, rows: int, left: bool
) -> None:
    model = folded_model(name, pooling=pooling, ngram_size=ngrams, ngram_buckets=64)
    texts = random_texts(lengths)
    classifier = fold(model)
    classifier.slice_rows = rows  # texts lie in several slices, slices hold several texts
    assert_equal(logits_of(classifier, texts), expected_of(model, texts, left=left, extra=3))


@settings(max_examples=60, deadline=None)
@given(
    LENGTHS,
    st.sampled_from(sorted(VARIANTS)),
    st.sampled_from(["mean", "attention"]),
    st.integers(4, 50),
    st.booleans(),
)
def test_any_blocks_equal_the_model(
    lengths: list[int], name: str, pooling: str, rows: int, left: bool
) -> None:
    model = make_model(name, pooling=pooling)
    texts = random_texts(lengths)
    classifier = blocks(model)
    classifier.slice_rows = rows
    assert_equal(logits_of(classifier, texts), expected_of(model, texts, left=left, extra=3))


@pytest.mark.parametrize("name", sorted(FOLDED))
@pytest.mark.parametrize("path", [fold, "fold, products not fused", blocks])
def test_bfloat16_is_near_float32(path: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2 % of the largest logit, where the definition under autocast is as well."""
    if isinstance(path, str):
        monkeypatch.setattr(products, "FUSED", None)
        path = fold
    model = folded_model(name)
    texts = random_texts([1, 30, 200, 7])
    expected = expected_of(model, texts)
    assert expected.abs().max() > 0.5
    assert_equal(logits_of(path(model, torch.bfloat16), texts), expected, 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(expected_of(model, texts), expected, 0.02)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("name", ["nin-text-small", "pooled and dilated"])
def test_a_long_text_in_slices_equals_the_text_as_a_whole(name: str, pooling: str) -> None:
    model = make_model(name, pooling=pooling, ngram_size=2, ngram_buckets=512)
    texts = random_texts([30_000, 3, 12_345])
    expected = torch.cat([expected_of(model, [text]) for text in texts])
    classifier = fold(model) if name == "nin-text-small" else blocks(model)
    for rows in (1000, 4096, 10**6):
        classifier.slice_rows = rows
        assert_equal(logits_of(classifier, texts), expected)


def test_ngrams_across_parts_are_seen_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("nin-text-small", ngram_size=3, ngram_buckets=512)
    texts = [text % 5 for text in random_texts([50, 1, 30])]
    expected = expected_of(model, texts)
    monkeypatch.setattr(ngrams, "CHUNK_TOKENS", 7)
    assert_equal(logits_of(fold(model), texts), expected)


def test_scores_far_apart_do_not_overflow() -> None:
    model = make_model("nin-text-small")
    with torch.no_grad():
        model.nin.attention.weight.mul_(100)
    texts = random_texts([40, 1, 9])
    classifier = fold(model)
    classifier.slice_rows = 8
    actual = logits_of(classifier, texts)
    assert actual.isfinite().all()
    assert_equal(actual, expected_of(model, texts), 1e-4)
