"""The encoder in sentence-transformers, with that library's own modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nin_text import NiNTextModel
from nin_text.tokenization import load_tokenizer

TEXTS = ["The plot is dull .", "The cast was witty and the plot was not bland .", "x"]


@pytest.fixture(scope="module")
def encoder(trained: Path) -> SentenceTransformer:
    return SentenceTransformer(str(trained), device="cpu")


def test_vectors_are_the_mean_of_the_hidden_states(trained: Path, encoder) -> None:
    vectors = encoder.encode(TEXTS)
    model, tokenizer = NiNTextModel.from_pretrained(trained).eval(), load_tokenizer(str(trained))
    assert vectors.shape == (3, model.config.hidden_size)
    assert encoder.get_sentence_embedding_dimension() == model.config.hidden_size
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state  # (1, T, C)
        assert vector == pytest.approx(hidden[0].mean(dim=0).numpy(), abs=1e-5)


def test_batches_do_not_change_vectors(encoder) -> None:
    together = encoder.encode(TEXTS)
    alone = np.stack([encoder.encode(text) for text in TEXTS])
    assert alone == pytest.approx(together, abs=1e-5)


def test_texts_of_any_length_have_finite_vectors(encoder) -> None:
    vectors = encoder.encode(["", "witty " * 10_000])
    assert np.isfinite(vectors).all()
    assert np.abs(vectors[1]).max() > 0


def test_saved_and_loaded_in_a_fresh_process_it_gives_equal_vectors(
    encoder, tmp_path: Path
) -> None:
    encoder.save(str(tmp_path / "saved"))
    code = (
        "import sys, numpy, nin_text\n"
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu')\n"
        "numpy.save(sys.argv[2], model.encode(sys.argv[3:]))"
    )
    target = tmp_path / "vectors.npy"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved"), str(target), *TEXTS],
        check=True,
        capture_output=True,
    )
    assert np.load(target) == pytest.approx(encoder.encode(TEXTS), abs=1e-6)


def test_gradients_reach_the_encoder(trained: Path) -> None:
    model = SentenceTransformer(str(trained), device="cpu").train()
    features = model.preprocess(TEXTS)
    model(features)["sentence_embedding"].square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert any("embeddings" in name and g is not None and g.any() for name, g in gradients.items())
