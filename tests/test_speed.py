"""The benchmark: what it counts and reports, and one small run of everything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nin_text import models, speed, speed_report
from nin_text.configuration import NiNTextConfig
from nin_text.data import load_text_dataset
from nin_text.options import BenchmarkOptions
from nin_text.predictor import Predictor
from nin_text.speed_systems import random_model, recipe_of, training_step

SMALL: dict[str, Any] = {
    "QUICK_SAMPLE": 40,
    "QUICK_SLOW_SAMPLE": 2,
    "PRODUCT": 64,
    "LEAST_SECONDS": 1e-9,
    "LENGTHS": (10, 100, 1000, 10_000, 0),
    "CORPORA": (1, 10, 100, 0),
    "CLASSES": (2, 100, 0),
    "VOCABULARIES": (1000, 2000, 0),
    "GROWTH_TOKENS": 1000,
}


def test_operations_are_those_of_the_products() -> None:
    predictor = Predictor("imdb-sentiment", device="cpu")
    defined, done = speed.operations(predictor.folder, predictor.classifier)
    pointwise = 2 * (128 * 256 + 256 * 128)
    assert done == pointwise
    assert defined == pointwise + 2 * 3 * 128 * 128


def test_a_random_preset_is_what_training_begins_with(tmp_path: Path) -> None:
    dataset = load_text_dataset("demo_topics", limit=200)
    folder = random_model("nin-text-base", dataset, tmp_path)
    predictor = Predictor(folder, device="cpu")
    assert predictor.predict_proba(["a"]).shape == (1, len(dataset.label_names))
    assert predictor.classifier.ngram_size == 3
    _, done = speed.operations(folder, predictor.classifier)
    assert done == 2 * (192 * 384 + 384 * 192)
    train, recipe = dataset.splits["train"], recipe_of("nin-text-base", dataset)
    model, tokenizer = models.build(recipe, train.texts, train.labels, dataset.label_names)
    config = NiNTextConfig.from_pretrained(folder)
    assert config.vocab_size == len(tokenizer)
    assert config.ngram_buckets == model.config.ngram_buckets
    step, texts, tokens = training_step(predictor, dataset, recipe)
    step()
    assert texts == recipe.batch_size
    assert tokens == predictor.tokenizer.encode(train.texts[:texts])[1].sum()
    few = training_step(predictor, dataset, replace(recipe, batch_tokens=tokens // 2))
    assert 0 < few[2] <= tokens // 2


def test_a_few_texts_are_as_long_as_many() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 1000).astype(int) + 1
    texts = ["x" * length for length in lengths]
    few = speed.evenly(texts, 50)
    assert len(few) == 50
    assert set(few) <= set(texts)
    assert np.mean([len(text) for text in few]) == pytest.approx(lengths.mean(), rel=0.2)
    assert sorted(speed.evenly(texts, 5000)) == sorted(texts)


def test_the_first_of_several_runs_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.2, 0.2, 0.25, 0.25, 0.35, 1.0, 1.9])  # three short runs, a long one
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    entry = speed.Entry(lambda: None, documents=1, tokens=1)
    timed = speed.time_round({"short": entry, "long": entry}, [])
    assert timed["short"]["seconds"] == pytest.approx((0.05 + 0.1) / 2)
    assert timed["long"]["seconds"] == pytest.approx(0.9)


def result_of(**seconds: list[float]) -> dict[str, Any]:
    return {
        "entries": {
            name: {"documents": 10, "tokens": 100, "seconds": values, "latencies": []}
            for name, values in seconds.items()
        }
    }


def test_ratios_are_medians_of_the_ratios_of_each_round() -> None:
    """A round in which the machine was busy slows down both, and changes no ratio."""
    result = result_of(a=[1.0, 10.0, 1.0], b=[2.0, 20.0, 2.0])
    assert speed_report.ratio(result, "a", "b") == pytest.approx(2.0)
    assert speed_report.ratio(result, "a", "missing") is None


def test_the_share_of_the_peak_counts_operations() -> None:
    result = result_of(**{"matrix product, bf16": [1.0], "m: network": [2.0], "m: training": [4.0]})
    result["models"] = {
        "m": {
            "precision": "bf16",
            "operations_per_token_defined": 1.2,
            "operations_per_token_done": 0.6,
        }
    }
    assert speed_report.share_of_peak(result, "m", "network", "defined") == pytest.approx(0.6)
    assert speed_report.share_of_peak(result, "m", "network", "done") == pytest.approx(0.3)
    assert speed_report.share_of_peak(result, "m", "training", "defined") == pytest.approx(0.9)


def test_a_small_benchmark_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(speed, name, value)
    options = BenchmarkOptions(
        model=["imdb-sentiment"], quick=True, limit=100, threads=1, output_dir=tmp_path
    )
    before = torch.get_num_threads()
    summary = speed.benchmark(options)
    assert torch.get_num_threads() == before
    result = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert len(result["growth"]["length"]) == 4
    for entry in result["entries"].values():
        assert len(entry["seconds"]) == 2
        assert min(entry["seconds"]) > 0
    found = summary["imdb-sentiment"]
    assert found["bytes"] < 5e6
    assert found["of_minilm_float32"] > 1
    assert found["of_minilm_int8"] is None
    assert 0 < found["share_of_peak_done"] < found["share_of_peak"]
    page = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    for name in result["entries"]:
        assert f"| {name}" in page
    assert "MiniLM-L6" in page
    assert "None" not in page
    assert "nan" not in page
