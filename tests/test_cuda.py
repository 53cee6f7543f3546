"""The same answers on a GPU as on a CPU, and runs that train there from beginning to end."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_image
import torch
from conftest import Script
from safetensors.numpy import load_file
from test_blocks import random_batch
from test_cuda_graphs import gradients, needs_compiler
from test_distributed import torchrun
from test_export import make_folder
from test_packed import assert_equal, blocks, expected_of, fold, folded_model, logits_of
from test_predictor import REVIEWS, defined_logits
from test_speed import SMALL
from test_text import STILL, make_model, pad, random_texts

from nin_text import (
    ImageTrainOptions,
    NiNImageForImageClassification,
    NiNTextClassifier,
    NiNTextForSequenceClassification,
    Predictor,
    cuda_graphs,
    load,
    load_image_dataset,
    load_text_dataset,
    speed,
    train_image,
)
from nin_text.blocks import MLPConv, Rows
from nin_text.evaluation import predict_logits, softmax
from nin_text.explain import explain
from nin_text.faithfulness import METHODS, deletion_test
from nin_text.image_options import ImageBenchmarkOptions
from nin_text.image_speed import benchmark_images
from nin_text.image_training import predict_image_logits
from nin_text.options import BenchmarkOptions, TrainOptions
from nin_text.run_folder import ANSWERS_FILE
from nin_text.runs import train_text
from nin_text.training import RunTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEVICE = "cuda"
QUICK: dict[str, Any] = {
    "model": "nin-text-small",
    "limit": 200,
    "epochs": 2,
    "quiet": True,
    "device": DEVICE,
}
QUICK_IMAGES: dict[str, Any] = {"limit": 320, "epochs": 2, "batch_size": 32, "quiet": True}
NGRAMS = {"ngram_size": 3, "ngram_buckets": 512}
LETTERS = ["", " ", "a b c", "zzz", "d", "a b h c " * 300, "e f g h " * 7, "h g"]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32: of cuDNN they are in TF32 otherwise, which has 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def moved(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def assert_same(actual: Any, expected: Any, bound: float = 1e-4) -> None:
    """As `test_packed.assert_equal`, wherever the two lie."""
    assert_equal(torch.as_tensor(actual).cpu(), torch.as_tensor(expected).cpu(), bound)


# ---- layers and models -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_sizes": (5,), "dilation": 2, "norm": "layer", "residual": True},
        {"kernel_sizes": (1, 3), "activation": "silu"},
    ],
)
@pytest.mark.usefixtures("exact")
def test_rows_give_what_padded_texts_give(options: dict[str, Any]) -> None:
    """Values and gradients."""
    torch.manual_seed(0)
    block = MLPConv(24, [32, 24], **options).to(DEVICE)
    x, mask = (tensor.to(DEVICE) for tensor in random_batch([7, 1, 12, 60], 24))
    layout = Rows.from_attention_mask(mask, gap=4)
    rows = torch.randn(len(layout.mask), 24, device=DEVICE)  # garbage between texts
    rows[layout.index[mask]] = x[mask]
    results = []
    for found in (
        layout.unpack(block(rows, layout.mask)),
        block(x, mask[..., None]).masked_fill(~mask[..., None], 0),
    ):
        block.zero_grad()
        found.square().sum().backward()
        results.append((found, [parameter.grad for parameter in block.parameters()]))
    (unpacked, gradients), (padded, others) = results
    assert_same(unpacked.detach(), padded.detach())
    for gradient, other in zip(gradients, others, strict=True):
        assert_same(gradient, other)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "name", ["nin-text-small", "nin-text-base", "nin-text-paper", "pooled and dilated"]
)
def test_logits_and_evidence_are_those_of_the_cpu(name: str, left: bool) -> None:
    model = make_model(name, **NGRAMS)
    batch = pad(random_texts([12, 1, 0, 5, 300]), left=left, extra=2)
    other = copy.deepcopy(model).to(DEVICE)
    with torch.inference_mode():
        expected = model(**batch, output_evidence=True)
        found = other(**moved(batch), output_evidence=True)
        assert_same(other(**moved(batch)).logits, found.logits)
    assert found.logits.device.type == torch.device(DEVICE).type
    assert_same(found.logits, expected.logits)
    assert_same(found.evidence, expected.evidence)
    assert_same(found.evidence.sum(dim=1), found.logits)


@pytest.mark.parametrize("labels", [[0, 2, 1], [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.1, 0.8, 0.1]]])
@pytest.mark.parametrize("name", ["nin-text-base", "pooled and dilated"])
def test_gradients_are_those_of_the_cpu(name: str, labels: Any) -> None:
    model = make_model(name, **STILL, class_weights=[1.0, 2.0, 0.5]).train()
    other = copy.deepcopy(model).to(DEVICE)
    batch = pad(random_texts([12, 1, 40])) | {"labels": torch.tensor(labels)}
    for network, inputs in ((model, batch), (other, moved(batch))):
        network(**inputs).loss.backward()
    for (key, parameter), mine in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None and mine.grad is not None, key
        assert_same(mine.grad, parameter.grad)


def test_training_in_bfloat16_has_finite_gradients_with_dropout() -> None:
    model = make_model("nin-text-base", **NGRAMS).train().to(DEVICE)
    batch = moved(pad(random_texts([12, 0, 40])) | {"labels": torch.tensor([0, 2, 1])})
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# ---- graphs ------------------------------------------------------------------------------------

COMPILED = pytest.param(True, marks=needs_compiler)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("most", "compiled"), [(16, False), (1, False), pytest.param(16, True, marks=needs_compiler)]
)
@pytest.mark.parametrize("name", ["nin-text-large", "nin-text-paper", "pooled and dilated"])
@pytest.mark.usefixtures("exact")
def test_graphs_have_the_values_and_gradients_of_single_kernels(
    name: str,
    most: int,
    compiled: bool,
    autocast: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For batches of several sizes in turn, with a layout made ahead and without."""
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", most)
    model = make_model(name, **STILL).to(DEVICE).train()
    batches = []
    for lengths in ([12, 1, 40], [300, 2, 7], [12, 1, 41]):
        batch = pad(random_texts(lengths)) | {"labels": torch.tensor([0, 2, 1])}
        layout: Any = model.nin.layout_of(batch["attention_mask"])
        batches += [moved(batch), moved(batch | {"layout": layout})]
    expected = [gradients(model, batch, autocast) for batch in batches]
    with cuda_graphs.block_graphs(model, graphs=True, compiled=compiled):
        for _ in range(2):
            for batch, wanted in zip(batches, expected, strict=True):
                found = gradients(model, batch, autocast)
                assert len(found) == len(wanted) > 10
                for mine, other in zip(found, wanted, strict=True):
                    assert_same(mine, other, 1e-4 if autocast is None else 0.1)
        assert isinstance(model.nin.graphs, cuda_graphs.BlockGraphs)
        sizes = {len(model.nin.layout_of(b["attention_mask"]).mask) for b in batches}
        assert len(model.nin.graphs.captured) == min(most, len(sizes))
        model.eval()
        with torch.inference_mode():
            assert model(**batches[0]).logits.isfinite().all()
    assert model.nin.graphs is None


@pytest.mark.parametrize("compiled", [False, COMPILED])
def test_every_launch_of_a_graph_draws_its_own_dropout(compiled: bool) -> None:
    model = make_model("nin-text-large", hidden_dropout=0.5).to(DEVICE).train()
    batch = moved(pad(random_texts([12, 1, 40])) | {"labels": torch.tensor([0, 2, 1])})
    with cuda_graphs.block_graphs(model, graphs=True, compiled=compiled):
        losses = {float(gradients(model, batch, torch.bfloat16)[0]) for _ in range(5)}
    assert len(losses) == 5


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("compiled", [False, COMPILED])
def test_a_run_trains_with_graphs_where_it_may(
    accumulation: int, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(1), replay(graph))
    )
    options = QUICK | {"model": "nin-text-large", "epochs": 8, "pretrain_epochs": 3}
    summary = train_text(
        TrainOptions(
            output_dir=tmp_path,
            gradient_accumulation=accumulation,
            compile=compiled,
            **options,
        )
    )
    assert summary["test_accuracy"] > 0.7
    assert bool(replayed) == (accumulation == 1)


# ---- prediction --------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("rows", [8, 100, None])
@pytest.mark.parametrize("name", ["nin-text-small", "nin-text-base", "dilated", "plain"])
def test_a_folded_block_equals_the_model(name: str, rows: int | None, pooling: str) -> None:
    model = folded_model(name, pooling=pooling, **NGRAMS)
    texts = random_texts([40, 1, 9, 300, 2])
    expected = expected_of(model, texts)
    classifier = fold(model.to(DEVICE))
    classifier.slice_rows = rows or classifier.slice_rows  # texts lie in several slices
    assert_same(logits_of(classifier, texts), expected)
    assert_same(logits_of(fold(model, torch.bfloat16), texts), expected, 0.02)


@pytest.mark.parametrize("rows", [8, 100, None])
@pytest.mark.parametrize("name", ["nin-text-paper", "pooled and dilated", "n-grams"])
def test_any_blocks_equal_the_model(name: str, rows: int | None) -> None:
    model = make_model(name)
    texts = random_texts([40, 1, 9, 300, 2])
    expected = expected_of(model, texts)
    classifier = blocks(model.to(DEVICE))
    classifier.slice_rows = rows or classifier.slice_rows
    assert_same(logits_of(classifier, texts), expected)
    assert_same(logits_of(blocks(model, torch.bfloat16), texts), expected, 0.05)


def test_a_text_longer_than_a_slice_equals_the_text_as_a_whole() -> None:
    model = make_model("nin-text-small", **NGRAMS)
    texts = random_texts([300_000, 3])
    expected = torch.cat([expected_of(model, [text]) for text in texts])
    assert_same(logits_of(fold(model.to(DEVICE)), texts), expected)


@pytest.mark.parametrize("name", ["nin-text-small", "nin-text-paper"])
def test_a_predictor_answers_as_the_model_does(name: str, tmp_path: Path) -> None:
    """One of a block that is folded, one of several; alone, together, and no text at all."""
    folder = make_folder(tmp_path / "model", name, **NGRAMS)
    predictor = Predictor(folder, device=DEVICE, precision="fp32")
    assert predictor.classifier.device.type == torch.device(DEVICE).type
    expected = defined_logits(str(folder), LETTERS)
    assert_same(predictor.logits(LETTERS), expected)
    assert_same(np.concatenate([predictor.logits([text]) for text in LETTERS]), expected)
    assert predictor.predict_proba([]).shape == (0, 3)
    names = predictor.label_names
    assert predictor.predict(LETTERS) == [names[i] for i in expected.argmax(axis=1)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["imdb-sentiment", "ag-news-topics"])
def test_a_ready_made_model_answers_as_on_the_cpu(name: str, precision: str) -> None:
    """With jobs enough for several threads, which share the device."""
    texts = ["", "Dull, dull. " * 3000, *REVIEWS, *REVIEWS[::-1]] * 2
    expected = softmax(defined_logits(name, texts[: len(texts) // 2]))
    predictor = Predictor(name, device=DEVICE, precision=precision)
    assert len(list(predictor.jobs(texts))) > 1
    bound = 1e-4 if precision == "fp32" else 0.02
    with ThreadPoolExecutor(4) as pool:
        for answers in pool.map(predictor.predict_proba, [texts] * 4):
            assert answers.dtype == np.float32
            np.testing.assert_allclose(answers, np.tile(expected, (2, 1)), atol=bound)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_padded_batches_give_the_logits_of_the_cpu(autocast: torch.dtype | None) -> None:
    model = make_model("nin-text-base", **NGRAMS)
    rows = [text.numpy() for text in random_texts([40, 1, 9, 300, 2] * 5)]
    expected = predict_logits(model, rows, pad_token_id=0)
    found = predict_logits(
        model.to(DEVICE), rows, pad_token_id=0, batch_tokens=512, autocast=autocast
    )
    assert_same(found, expected, 1e-4 if autocast is None else 0.02)


def test_explanations_are_those_of_the_cpu() -> None:
    model, tokenizer = load("imdb-sentiment")
    assert isinstance(model, NiNTextForSequenceClassification)
    rows = [text.numpy() for text in random_texts([30, 2, 12])]
    expected, falls = explain(model, tokenizer, REVIEWS[0]), deletion_test(model, rows)
    model.to(DEVICE)
    found = explain(model, tokenizer, REVIEWS[0])
    assert_same(found.evidence, expected.evidence)
    assert_same(found.logits, expected.logits)
    again = deletion_test(model, rows)
    for method in METHODS:
        assert again[method]["aopc"] == pytest.approx(falls[method]["aopc"], abs=1e-2)


# ---- training of texts -------------------------------------------------------------------------


def assert_the_folder_is_whole(folder: Path, dataset: Any, bound: float) -> dict[str, Any]:
    """The saved model gives the recorded answers on the CPU; the metrics of the run."""
    predictor = Predictor(folder, device="cpu", precision="fp32")
    answers = predictor.predict_proba(dataset.splits["test"].texts)
    np.testing.assert_allclose(answers, load_file(folder / ANSWERS_FILE)["test"], atol=bound)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["environment"]["device"].startswith(DEVICE)
    return metrics


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_leaves_a_model_that_answers_the_same_on_the_cpu(
    precision: str, tmp_path: Path
) -> None:
    options = {**QUICK, "precision": precision, "output_dir": tmp_path / "run"}
    train_text(TrainOptions(**options))
    dataset = load_text_dataset("demo_reviews", limit=QUICK["limit"])
    bound = 1e-3 if precision == "fp32" else 0.02
    metrics = assert_the_folder_is_whole(tmp_path / "run", dataset, bound)
    assert metrics["precision"] == precision
    assert {"pretraining", "training"} <= set(metrics["stage_seconds"])
    assert metrics["test"]["accuracy"] > 0.6
    assert (tmp_path / "run" / "mistakes.html").is_file()


def test_a_network_of_the_literature_trains(tmp_path: Path) -> None:
    options = {**QUICK, "model": "bilstm", "epochs": 1, "output_dir": tmp_path / "run"}
    train_text(TrainOptions(**options))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert np.isfinite(metrics["test"]["log_loss"])


def test_a_stopped_run_resumes_to_about_the_answers_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About: a GPU adds up in another order each time."""
    save, saved = RunTrainer._save_checkpoint, []

    def save_and_stop(self: RunTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        saved.append(self)
        if len(saved) == 5:  # after four passes of pretraining
            raise KeyboardInterrupt

    options = {**QUICK, "precision": "fp32"}
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "_save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_text(TrainOptions(**options, output_dir=tmp_path / "stopped"))
    assert list((tmp_path / "stopped" / "checkpoints" / "training").glob("checkpoint-*"))
    train_text(TrainOptions(**options, output_dir=tmp_path / "stopped", resume=True))
    train_text(TrainOptions(**options, output_dir=tmp_path / "whole"))
    whole, resumed = (
        load_file(tmp_path / name / ANSWERS_FILE)["test"] for name in ("whole", "stopped")
    )
    np.testing.assert_allclose(resumed, whole, atol=0.05)


def test_a_run_learns_from_few_labels_and_many_texts(tmp_path: Path) -> None:
    options = {**QUICK, "labelled": 60, "self_training_epochs": 1, "output_dir": tmp_path / "run"}
    train_text(TrainOptions(**options))
    dataset = load_text_dataset("demo_reviews", limit=QUICK["limit"])
    metrics = assert_the_folder_is_whole(tmp_path / "run", dataset, 0.02)
    stages = {"pretraining", "probe 1", "pretraining-again", "probe 2", "self-training"}
    assert set(metrics["stage_seconds"]) == stages


def test_an_estimator_fits_predicts_and_is_saved(tmp_path: Path) -> None:
    dataset = load_text_dataset("demo_topics", limit=120)
    names = np.array(dataset.label_names)
    train, test = dataset.splits["train"], dataset.splits["test"]
    settings = {"model": "nin-text-small", "epochs": 2, "random_state": 0, "device": DEVICE}
    model = NiNTextClassifier(**settings).fit(train.texts, names[train.labels])
    assert model.model_.device.type == torch.device(DEVICE).type
    found = model.predict_proba(test.texts)
    model.save(tmp_path / "model")
    saved = NiNTextClassifier.load(tmp_path / "model").set_params(device="cpu")
    np.testing.assert_allclose(saved.predict_proba(test.texts), found, atol=1e-4)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(again.predict_proba(test.texts), found, atol=1e-5)
    model.partial_fit(train.texts, names[train.labels])
    assert np.isfinite(model.predict_proba(test.texts)).all()
    # Several classes of a text at once.
    many = np.eye(len(names), dtype=int)[train.labels]
    several = NiNTextClassifier(**settings).fit(train.texts, many)
    assert several.predict(test.texts[:5]).shape == (5, len(names))


# ---- images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nin-modern", "nin-tutorial", "nin-cifar10", "fully connected"])
@pytest.mark.usefixtures("exact")
def test_logits_of_images_are_those_of_the_cpu(name: str) -> None:
    model = test_image.make_model(name).eval()
    pixels = test_image.images(model, n=5)
    has_maps = model.head is None
    other = copy.deepcopy(model).to(DEVICE)
    with torch.inference_mode():
        expected = model(pixels, output_class_maps=has_maps)
        found = other(pixels.to(DEVICE), output_class_maps=has_maps)
    assert_same(found.logits, expected.logits)
    if has_maps:
        assert_same(found.class_maps, expected.class_maps)


def assert_images_are_answered_alike(folder: Path, bound: float) -> None:
    """By the saved model on the CPU, and by the one that was trained."""
    test = load_image_dataset("digits", limit=QUICK_IMAGES["limit"]).splits["test"]
    model = NiNImageForImageClassification.from_pretrained(folder)
    answers = softmax(predict_image_logits(model, torch.from_numpy(test.images)))
    np.testing.assert_allclose(answers, load_file(folder / ANSWERS_FILE)["test"], atol=bound)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_run_leaves_a_model_that_answers_the_same_on_the_cpu(
    precision: str, tmp_path: Path
) -> None:
    options = {**QUICK_IMAGES, "precision": precision, "explain": "html", "device": DEVICE}
    train_image(ImageTrainOptions(**options, output_dir=tmp_path / "run"))
    assert_images_are_answered_alike(tmp_path / "run", 0.03)
    assert (tmp_path / "run" / "class_maps.html").is_file()


@needs_compiler
def test_a_compiled_image_network_trains(tmp_path: Path, script: Script) -> None:
    """In a process of its own: what it says of the precision holds for all of a process."""
    options = ("--model", "nin-tutorial", "--limit", 320, "--epochs", 1, "--batch-size", 32)
    more = ("--precision", "bf16", "--device", DEVICE, "--compile", "--output-dir", "run")
    assert script("train_image", *options, *more).result["model"] == "nin-tutorial"
    assert_images_are_answered_alike(tmp_path / "run", 0.03)


# ---- several processes, and how fast it is -----------------------------------------------------


def test_texts_train_under_torchrun(tmp_path: Path) -> None:
    options = ("--model", "nin-text-small", "--limit", 200, "--epochs", 1, "--device", DEVICE)
    finished = torchrun(tmp_path, *options, "--output-dir", "run", processes=1)
    assert finished.returncode == 0, finished.stderr
    dataset = load_text_dataset("demo_reviews", limit=200)
    assert_the_folder_is_whole(tmp_path / "run", dataset, 0.02)


def test_images_train_under_torchrun(tmp_path: Path) -> None:
    """With batch normalization, whose statistics the processes exchange."""
    options = ("--limit", 320, "--epochs", 1, "--batch-size", 32, "--device", DEVICE)
    more = ("--output-dir", "run")
    finished = torchrun(tmp_path, *options, *more, script="train_image", processes=1)
    assert finished.returncode == 0, finished.stderr
    assert_images_are_answered_alike(tmp_path / "run", 0.03)


def test_a_small_benchmark_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(speed, name, value)
    options = BenchmarkOptions(
        model=["imdb-sentiment"],
        quick=True,
        limit=100,
        threads=2,
        output_dir=tmp_path,
        device=DEVICE,
    )
    speed.benchmark(options)
    result = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert result["environment"]["device"] == DEVICE
    assert all(min(entry["seconds"]) > 0 for entry in result["entries"].values())


def test_a_small_benchmark_of_images() -> None:
    options = ImageBenchmarkOptions(
        models=["nin-tutorial"], image_size=8, batch_size=4, rounds=2, device=DEVICE
    )
    assert all(row["images_per_second"] > 0 for row in benchmark_images(options)["rows"])
