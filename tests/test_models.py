"""Building and loading classifiers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_bert
from safetensors.numpy import load_file, save_file
from transformers import BertForSequenceClassification

from nin_text import (
    NiNTextConfig,
    NiNTextForSequenceClassification,
    NiNTextModel,
    models,
    ngrams,
)
from nin_text.errors import UserError
from nin_text.options import TrainOptions, trained_max_length, with_recipe
from nin_text.recipes import DEFAULT_RECIPE
from nin_text.runs import train_text
from nin_text.tokenization import train_tokenizer

TEXTS, LABELS = ["good film", "bad film", "good plot", "so so"] * 5, [0, 1, 0, 2] * 5
NAMES = ["good", "bad", "so-so"]


def build(**options):
    return models.build(with_recipe(TrainOptions(**options), len(TEXTS)), TEXTS, LABELS, NAMES)


def test_a_preset_is_built_for_the_data() -> None:
    model, tokenizer = build(model="nin-text-small", pooling="mean", dropout=0.25)
    assert models.label_names(model) == NAMES
    assert model.config.label2id["bad"] == 1
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.pooling == "mean"
    assert model.config.hidden_dropout == 0.25
    assert model.config.class_weights is None


def test_ngrams_are_fitted_with_the_smoothing_asked_for(tmp_path: Path) -> None:
    model, tokenizer = build(model="nin-text-small", ngram_smoothing=3.0)
    assert model.ngrams.smoothing == model.config.ngram_smoothing == 3
    models.save(model, tmp_path, "float32")
    tokenizer.save_pretrained(tmp_path)
    again, _ = build(model=str(tmp_path))  # everything but the encoder is new
    assert again.ngrams.smoothing == DEFAULT_RECIPE["ngram_smoothing"]
    assert again.ngrams.smoothing == NiNTextConfig().ngram_smoothing == ngrams.SMOOTHING


def test_balanced_class_weights_give_every_class_the_same_say() -> None:
    model, _ = build(model="nin-text-small", class_weights="balanced")
    weights = model.config.class_weights
    totals = [LABELS.count(i) * weights[i] for i in range(3)]
    assert totals == pytest.approx([20 / 3] * 3)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer that is small enough to train in a test, with two classes of its own."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = train_tokenizer(TEXTS, kind="word", vocab_size=100)
    tokenizer.model_max_length = 16
    BertForSequenceClassification(tiny_bert(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_transformer_from_outside_gets_the_classes_of_the_data(bert: Path) -> None:
    model, tokenizer = build(model=str(bert))
    assert type(model).__name__ == "BertForSequenceClassification"
    assert models.label_names(model) == NAMES
    assert model.classifier.out_features == 3
    assert tokenizer.model_max_length == 16


def test_options_that_a_transformer_would_ignore_are_refused(bert: Path) -> None:
    for option in ({"class_weights": "balanced"}, {"dropout": 0.5}, {"lowercase": False}):
        with pytest.raises(UserError, match="is for NiN presets"):
            build(model=str(bert), **option)


def test_texts_are_cut_to_the_positions_that_a_transformer_has(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "bert")
    path = tmp_path / "bert" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    _, tokenizer = build(model=str(tmp_path / "bert"))
    assert tokenizer.model_max_length == 16


def test_folders_that_are_no_models_are_refused(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        models.load(str(tmp_path))
    with pytest.raises(UserError, match="no model folder"):
        build(model=str(tmp_path))
    with pytest.raises(UserError, match="no model could be loaded"):
        models.load("nobody/nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="no model could be loaded"):
        models.load(str(tmp_path))
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    weights = (trained / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="no model could be loaded") as caught:
        models.load(str(damaged))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_read(tmp_path: Path, trained: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(trained, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UserError, match="no model could be loaded"):
        models.load(str(folder))


def test_the_length_of_training_is_remembered(tmp_path: Path, trained: Path) -> None:
    assert trained_max_length(str(trained)) == 0
    assert trained_max_length(str(tmp_path)) is None
    for damage in ("{", "[]", '{"options": {"max_length": "x"}}'):
        (tmp_path / "metrics.json").write_text(damage)
        assert trained_max_length(str(tmp_path)) is None


def test_a_saved_encoder_that_is_damaged_is_not_trained_on(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    weights = load_file(folder / "model.safetensors")
    weights["nin.blocks.0.norm.weight"][0] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"damaged: blocks\.0\.norm\.weight holds"):
        train_text(TrainOptions(model=str(folder), limit=60, output_dir=tmp_path / "next"))


def test_an_encoder_alone_is_no_classifier(tmp_path: Path) -> None:
    """Its classes would be told by random weights."""
    config = NiNTextConfig.from_preset("nin-text-small", vocab_size=20, num_labels=2)
    NiNTextModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no classifier"):
        models.load(str(tmp_path))


def test_a_weight_beyond_a_small_type_becomes_its_largest_number(tmp_path: Path) -> None:
    """And not infinite: a file with such a weight would be refused as damaged."""
    config = NiNTextConfig.from_preset("nin-text-small", vocab_size=20, num_labels=2)
    model = NiNTextForSequenceClassification(config)
    table = model.nin.embeddings.weight.data
    table[3] = torch.linspace(-0.5, 0.5, table.shape[1])
    table[4, 0], model.classifier.bias.data[1] = 1e6, -1e6
    models.save(model, tmp_path, "float8")
    models.round_weights(model, "float8")
    loaded = NiNTextForSequenceClassification.from_pretrained(tmp_path).state_dict()
    assert all(loaded[name].equal(value) for name, value in model.state_dict().items())
    assert loaded["nin.embeddings.weight"][4, 0] == 448  # of four bits of exponent, three more
    assert loaded["classifier.bias"][1] == -65504
    row = loaded["nin.embeddings.weight"][3]
    assert (row - torch.linspace(-0.5, 0.5, len(row))).abs().max() <= 0.5 / 16
