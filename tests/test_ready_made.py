"""The models that are part of the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, Script
from huggingface_hub import ModelCard

from nin_text import export
from nin_text.options import READY_MADE, ExportOptions, model_folder

OBVIOUS = {
    "imdb-sentiment": {
        "What a waste of a fine cast.": "negative",
        "A wonderful film, I loved every minute of it.": "positive",
    },
    "ag-news-topics": {
        "The striker scored twice in the final.": "Sports",
        "Shares fell after the bank warned of losses.": "Business",
        "The new browser fixes a security hole in Windows.": "Sci/Tech",
        "Rebels and government troops clashed near the border.": "World",
    },
}


@pytest.mark.parametrize("name", READY_MADE)
def test_a_ready_made_model_is_small_whole_and_has_a_card(name: str) -> None:
    folder = Path(model_folder(name))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5_000_000
    metrics = json.loads((folder / "metrics.json").read_text())
    card = ModelCard.load(folder / "README.md")
    accuracy = card.data.eval_results[0].metric_value
    assert accuracy == pytest.approx(metrics["test"]["accuracy"], abs=1e-6)
    assert "`python scripts/train_text.py --dataset" in card.text


@pytest.mark.parametrize("name", READY_MADE)
def test_it_answers_by_name(script: Script, name: str) -> None:
    finished = script("predict_text", "--model", name, *OBVIOUS[name])
    assert {line["text"]: line["label"] for line in finished.lines} == OBVIOUS[name]


@pytest.mark.parametrize("name", READY_MADE)
def test_it_is_exported_in_int8(
    name: str, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "VALIDATION_TEXTS", 1000)
    options = ExportOptions(model=name, output_dir=tmp_path / "exported")
    figures = export.export_onnx(options)["int8"]
    assert figures["checked"] == "accuracy"
    assert figures["texts"] == 1000
    assert figures["lost"] <= 0.003
    assert (tmp_path / "exported" / "model.int8.onnx").stat().st_size < 5_000_000


def test_the_first_is_the_default_of_predict_text(script: Script) -> None:
    result = script("predict_text", "What a waste of a fine cast.").result
    assert result["label"] == "negative"


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imdb-sentiment").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_folder("imdb-sentiment") == "imdb-sentiment"
    assert Path(model_folder("ag-news-topics")).parent == ROOT / "nin_text" / "ready_made"


def test_it_can_be_trained_on_for_other_labels(script: Script) -> None:
    options = ("--dataset", "demo_topics", "--limit", 200, "--epochs", 1)
    result = script("train_text", "--model", "ag-news-topics", *options).result
    assert result["test_accuracy"] > 0.5


@pytest.mark.real_data
def test_it_is_as_accurate_as_its_card_says(real_data: Path, script: Script) -> None:
    """AG News, whose test split is scored in seconds; the precision is that of the card."""
    result = script("evaluate_text", "--model", "ag-news-topics", "--dataset", "ag_news").result
    metrics = json.loads((Path(model_folder("ag-news-topics")) / "metrics.json").read_text())
    assert result["n"] == metrics["test"]["n"]
    assert result["accuracy"] == pytest.approx(metrics["test"]["accuracy"], abs=0.001)
