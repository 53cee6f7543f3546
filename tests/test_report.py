"""Plots, model card and JSON files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from nin_text import report

PNG = b"\x89PNG\r\n\x1a\n"


def test_json_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    report.write_json(path, {"a": "ü", "b": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü", "b": [1, None]}
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == "ü"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("classes", [2, 13, 40])
def test_a_confusion_matrix_is_drawn_for_any_number_of_classes(
    tmp_path: Path, classes: int
) -> None:
    names = [f"a class with a name that is rather long, $x_{i}^$" for i in range(classes)]
    matrix = np.eye(classes, dtype=int).tolist()
    report.plot_confusion(matrix, names, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_curves_are_drawn_even_when_there_is_hardly_anything_to_draw(tmp_path: Path) -> None:
    history = [
        {"epoch": 0.5, "loss": 0.7, "step": 1},
        {"epoch": 1.0, "eval_loss": 0.6, "eval_accuracy": 0.7, "step": 2},
    ]
    for i, part in enumerate((history, history[1:])):
        report.plot_curves(part, tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(PNG)


def test_peak_memory_is_in_megabytes_and_grows() -> None:
    before = report.peak_memory_mb()
    assert 50 < before < 20_000
    block = np.ones(int(before * 2**20 / 8) + 30 * 2**17)  # more than ever was held
    assert report.peak_memory_mb() > before
    del block


def test_the_environment_names_what_a_figure_depends_on() -> None:
    environment = report.environment(torch.device("cpu"))
    assert torch.__version__.startswith(environment["versions"]["torch"])  # which may lack +cu128
    assert environment["threads"] == torch.get_num_threads()
    json.dumps(environment)


def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/x.py", "--dataset", "my file.csv"])
    monkeypatch.setenv("NIN_TEXT_DATA", "/some where")
    assert report.command() == (
        "NIN_TEXT_DATA='/some where' python scripts/x.py --dataset 'my file.csv'"
    )
    monkeypatch.delenv("NIN_TEXT_DATA")
    assert report.command() == "python scripts/x.py --dataset 'my file.csv'"


def test_a_model_card_states_the_figures_of_the_run(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert f"{metrics['test']['accuracy']:.4f}" in card
    assert f"`{metrics['data_fingerprint']}`" in card
    assert not re.search(r"\bNone\b|\bnan\b", card)


def test_a_model_card_has_what_the_hub_reads(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    data = ModelCard.load(trained / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert data.license and "nin-text" in data.tags and data.datasets == ["demo_reviews"]
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values["accuracy"] == pytest.approx(metrics["test"]["accuracy"], abs=1e-6)
    assert values["f1"] == pytest.approx(metrics["test"]["macro_f1"], abs=1e-6)
    assert data.eval_results[0].dataset_split == "test"


def test_a_model_card_names_the_configuration_and_the_split(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["tested_on"] == "test"
    glue = {"dataset": "nyu-mll/glue", "data_source": "hub:nyu-mll/glue, sst2"}
    glue["options"] = metrics["options"] | {"dataset_config": "sst2"}
    card = ModelCard(report.model_card(metrics | glue | {"tested_on": "validation"}))
    assert card.data.datasets == ["nyu-mll/glue"]
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_config) == ("nyu-mll/glue", "sst2")
    assert result.dataset_split == "validation"


def test_a_model_card_names_the_data_set_of_the_hub_and_no_local_folder(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    card = report.model_card(
        metrics
        | {
            "dataset": "imdb",
            "data_source": "/home/me/data/imdb",
            "command": "NIN_TEXT_DATA='/home/me/my data' python /home/me/scripts/train_text.py "
            "--dataset imdb --output-dir=/home/me/run --data-dir ~/data --model ../secret/x",
            "label_names": ["a: b", "- #"],
        }
    )
    assert ModelCard(card).data.datasets == ["stanfordnlp/imdb"]
    assert "imdb (local files), " in card
    assert not re.search(r"home|~|secret|\.\.", card)
    assert (
        "`python train_text.py --dataset imdb --output-dir=run --data-dir data --model x`"
    ) in card
    mine = {"dataset": "/home/me/reviews: mine.csv", "model": "/home/m"}
    data = ModelCard(report.model_card(metrics | mine)).data
    assert data.datasets == ["reviews_mine.csv"]
    assert data.model_name == "m on reviews: mine.csv"
    known = report.model_card(
        metrics | {"dataset": "ag_news", "data_source": "hub:fancyzhx/ag_news"}
    )
    assert ModelCard(known).data.model_name == f"{metrics['model']} on ag_news"
    assert r"on ag\_news" in known.split("---")[2]


def test_a_model_card_owns_up_to_the_most_frequent_mistake(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    test = metrics["test"] | {"confusion_matrix": [[90, 10], [3, 97]]}
    card = report.model_card(metrics | {"test": test})
    assert "Of 200 test texts 13 were classified wrongly" in card
    assert "`negative` was taken for `positive` (10 of 100)" in card
    test["confusion_matrix"] = [[100, 0], [0, 100]]
    assert "All 200 test texts were classified rightly" in report.model_card(
        metrics | {"test": test}
    )
