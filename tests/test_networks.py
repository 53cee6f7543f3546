"""The baselines: padding is invisible, they can learn, and go through the same commands as NiN."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Script
from test_text import VOCABULARY, pad, random_texts
from transformers import AutoModelForSequenceClassification

from nin_text import models
from nin_text.configuration import NETWORKS, BaselineConfig
from nin_text.errors import UserError
from nin_text.inference import evaluate_text, predict_text
from nin_text.networks import ENCODERS, BaselineForSequenceClassification
from nin_text.options import EvaluateOptions, PredictOptions, TrainOptions, with_recipe

# What a text must not be changed by is tested on networks that are fast.
SMALL = {"embedding_size": 24, "hidden_size": 20, "num_heads": 4, "max_positions": 30}


def make_model(name: str, **overrides: Any) -> BaselineForSequenceClassification:
    torch.manual_seed(0)
    options = {**NETWORKS[name], **SMALL, "vocab_size": VOCABULARY, "num_labels": 3, **overrides}
    return BaselineForSequenceClassification(BaselineConfig(**options)).eval()


def test_every_encoder_has_a_network() -> None:
    assert {preset["architecture"] for preset in NETWORKS.values()} == set(ENCODERS)


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_is_invisible(name: str) -> None:
    """Of texts shorter than every filter, and longer than the transformer's positions, too."""
    model = make_model(name)
    with torch.no_grad():  # at which padding would show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    texts = random_texts([12, 1, 5, 33, 2])
    for autograd in (False, True):  # torch computes the transformer in another way without
        with torch.set_grad_enabled(autograd):
            alone = torch.cat([model(text[None]).logits for text in texts])
            assert (alone.std(dim=0) > 1e-3).all()
            for left in (False, True):
                for extra in (0, 7):
                    batch = pad(texts, left=left, extra=extra)
                    batch["input_ids"][batch["attention_mask"] == 0] = 7  # which is a token as well
                    assert torch.allclose(alone, model(**batch).logits, atol=1e-5), (left, extra)


def test_the_transformer_cuts_texts_to_its_positions() -> None:
    model, (text,) = make_model("transformer"), random_texts([40])
    assert torch.allclose(model(text[None]).logits, model(text[None, :30]).logits, atol=1e-6)
    assert not torch.allclose(model(text[None]).logits, model(text[None, :29]).logits, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_text_without_tokens_has_finite_gradients(name: str) -> None:
    model = make_model(name).train()
    output = model(**pad(random_texts([0, 4]), left=True), labels=torch.tensor([0, 1]))
    assert torch.isfinite(output.logits).all()
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = make_model(name).train()
    model(**pad(random_texts([30] * 8)), labels=torch.arange(8) % 3).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_learn_32_random_texts_by_heart(name: str) -> None:
    model = make_model(name, dropout=0.0)
    batch, labels = pad(random_texts([20] * 32, seed=5)), torch.arange(32) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    assert (model(**batch).logits.argmax(dim=1) == labels).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_weights_keep_the_signal(name: str) -> None:
    """At full size: texts do not look alike, and no class is all but certain from the start."""
    torch.manual_seed(0)
    model = BaselineForSequenceClassification(BaselineConfig(**NETWORKS[name], num_labels=3)).eval()
    assert model.embeddings.weight[0].count_nonzero() == 0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (32, 20), generator=generator)
    with torch.no_grad():
        spread = model(ids).logits.std(dim=0)
    assert 0.003 < spread.min() < spread.max() < 3


@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_of_parts_divided_by_the_whole_sums_to_the_loss_of_the_whole(name: str) -> None:
    model = make_model(name)
    texts, labels = random_texts([4, 9, 2, 7, 5]), torch.tensor([0, 2, 1, 1, 0])
    whole = model(**pad(texts), labels=labels)
    assert torch.allclose(whole.loss, torch.nn.functional.cross_entropy(whole.logits, labels))
    parts = [
        model(**pad(texts[a:b]), labels=labels[a:b], num_items_in_batch=5).loss
        for a, b in ((0, 1), (1, 5))
    ]
    assert torch.allclose(sum(parts), whole.loss, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_model_is_the_same_under_another_seed(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    ids = torch.stack(random_texts([9, 9]))
    model.save_pretrained(tmp_path)
    torch.manual_seed(999)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(again) is BaselineForSequenceClassification
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"architecture": "rnn"}, "no architecture named 'rnn'; there are bilstm, conv-fc"),
        ({"kernel_sizes": []}, "at least one"),
        ({"hidden_size": 0}, "positive"),
        ({"architecture": "transformer", "num_heads": 7}, "7 heads cannot share"),
        ({"dropout": 1.0}, "dropout"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_configuration_that_no_network_can_have_is_refused(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        BaselineConfig(**wrong)


# ---- building and training ---------------------------------------------------------------------

TEXTS, LABELS = ["A good film", "a bad film", "a good plot", "a so so plot"] * 5, [0, 1, 0, 2] * 5
NAMES = ["good", "bad", "so-so"]


def build(**options: Any) -> tuple:
    return models.build(with_recipe(TrainOptions(**options), len(TEXTS)), TEXTS, LABELS, NAMES)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_built_for_the_data(name: str) -> None:
    model, tokenizer = build(model=name)
    assert model.config.architecture == NETWORKS[name]["architecture"]
    assert models.label_names(model) == NAMES
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.tokenize("A Good plot") == ["a", "good", "plot"]


def test_a_network_has_the_tokenizer_that_is_asked_for() -> None:
    options = {"tokenizer": "wordpiece", "vocab_size": 100, "lowercase": False}
    model, tokenizer = build(model="kim-cnn", **options)
    assert tokenizer.tokenize("Ap") == ["A", "##p"]
    assert model.config.vocab_size == len(tokenizer) <= 100


@pytest.mark.parametrize(
    "option",
    [
        *({"pooling": "mean"}, {"word_dropout": 0.1}, {"dropout": 0.5}, {"ngrams": 2}),
        *({"class_weights": "balanced"}, {"label_smoothing": 0.1}, {"pretrain_epochs": 1}),
        *({"pretrain_learning_rate": 1e-3}, {"self_training_epochs": 1}),
    ],
)
def test_options_that_a_network_would_ignore_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is for NiN presets"):
        build(model="dpcnn", **option)


PIPELINE = """
import json, sys, nin_text
from transformers import pipeline
classify = pipeline("text-classification", model=sys.argv[1])
print(json.dumps(classify(sys.argv[2])[0]))
"""


def test_a_network_goes_through_the_same_commands(script: Script, tmp_path: Path) -> None:
    arguments = ("--model", "kim-cnn", "--limit", "200", "--epochs", "1")
    summary = script("train_text", "--dataset", "demo_reviews", *arguments).result
    assert summary["output_dir"] == "runs/demo_reviews-kim-cnn-seed0"
    folder = str(tmp_path / summary["output_dir"])
    metrics = json.loads((Path(folder) / "metrics.json").read_text())
    assert metrics["architecture"] == "BaselineForSequenceClassification"
    assert list(metrics["stage_seconds"]) == ["training"]
    again = evaluate_text(EvaluateOptions(model=folder, limit=200, batch_tokens=4096))
    assert again["accuracy"] == summary["test_accuracy"]
    text = "The plot is witty ."
    (answer,) = predict_text(PredictOptions(model=folder, texts=[text]))
    assert set(answer["probabilities"]) == {"negative", "positive"}
    with pytest.raises(UserError, match="--explain needs a NiN model"):
        list(predict_text(PredictOptions(model=folder, texts=[text], explain="text")))
    # A process that has imported nothing of ours but the package.
    fresh = subprocess.run(
        [sys.executable, "-c", PIPELINE, folder, text], capture_output=True, text=True, check=True
    )
    outside = json.loads(fresh.stdout.splitlines()[-1])
    assert outside["label"] == answer["label"]
    assert outside["score"] == pytest.approx(answer["probability"], abs=1e-4)
