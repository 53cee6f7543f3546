"""Image runs: what they leave, that they learn, resume and repeat, and the paper's recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Script
from safetensors.numpy import load_file
from transformers import pipeline

from nin_text import ImageTrainOptions, UserError, load_image_dataset, train_image
from nin_text.configuration import IMAGE_PRESETS
from nin_text.image_data import ImageSplit
from nin_text.image_options import IMAGE_PRESET_NAMES, IMAGE_RECIPES, with_image_recipe
from nin_text.image_page import MAX_IMAGES, class_maps_html
from nin_text.image_runs import build_image_model
from nin_text.image_training import (
    ImageTensors,
    ImageTrainer,
    image_trainer,
    images_at_a_time,
    to_pixel_values,
)
from nin_text.inference import predict_text
from nin_text.options import PredictOptions
from nin_text.training import RunTrainer

QUICK: dict[str, Any] = {"limit": 300, "epochs": 4, "batch_size": 32, "quiet": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the built-in digits, which the tests share."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    train_image(ImageTrainOptions(**QUICK, explain="html", output_dir=folder))
    return folder


def test_the_script_trains_on_digits_and_leaves_everything_about_it(
    script: Script, tmp_path: Path
) -> None:
    finished = script("train_image", "--epochs", 8, "--explain", "html")
    result = finished.result
    assert result["dataset"] == "digits" and result["model"] == "nin-modern"
    assert result["test_accuracy"] > 0.85
    folder = tmp_path / result["output_dir"]
    left = {path.name for path in folder.iterdir()}
    assert left == {
        *("README.md", "answers.safetensors", "class_maps.html", "config.json", "confusion.png"),
        *("curves.png", "metrics.json", "mistakes.html", "model.safetensors", "options.json"),
        "preprocessor_config.json",
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test"]["n"] == 359
    assert load_file(folder / "answers.safetensors")["test"].shape == (359, 10)
    again = script("train_image", "--epochs", 8, "--explain", "html", "--resume")
    assert again.result == result
    assert "nothing is left to do" in again.err


def test_the_saved_model_gives_the_recorded_answers_in_a_pipeline(run: Path) -> None:
    from PIL import Image

    test = load_image_dataset("digits", limit=300).splits["test"]
    recorded = load_file(run / "answers.safetensors")["test"]
    classify = pipeline("image-classification", model=str(run))
    images = [Image.fromarray(image[..., 0]) for image in test.images[:20]]
    for answers, expected in zip(classify(images, top_k=10), recorded, strict=False):
        scores = {answer["label"]: answer["score"] for answer in answers}
        found = [scores[str(digit)] for digit in range(10)]
        assert np.allclose(found, expected, atol=0.02)  # the run multiplied in bfloat16


def test_class_maps_asked_for_later_are_made_from_what_was_saved(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    page = (folder / "class_maps.html").read_text()
    (folder / "class_maps.html").unlink()
    train_image(ImageTrainOptions(**QUICK, output_dir=folder, resume=True))
    assert not (folder / "class_maps.html").exists()
    train_image(ImageTrainOptions(**QUICK, output_dir=folder, resume=True, explain="html"))
    again = (folder / "class_maps.html").read_text()
    assert len(again) == pytest.approx(len(page), rel=0.01) and "Class maps of test images" in again
    (folder / "class_maps.html").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # pickle is not read
    with pytest.raises(UserError, match="no model could be loaded"):
        train_image(ImageTrainOptions(**QUICK, output_dir=folder, resume=True, explain="html"))


def test_dropout_that_would_act_nowhere_is_refused(tmp_path: Path) -> None:
    options = {**QUICK, "model": "nin-tutorial", "dropout": 0.9}
    with pytest.raises(UserError, match=r"--dropout acts where maps are pooled.*nin-tutorial"):
        train_image(ImageTrainOptions(**options, output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_small_images_do_not_admit(tmp_path: Path) -> None:
    options = with_image_recipe(ImageTrainOptions(dataset="fashion_mnist", image_size=9))
    assert options.erase == 3
    assert with_image_recipe(ImageTrainOptions(dataset="fashion_mnist")).erase == 8
    small = {**QUICK, "image_size": 4, "output_dir": tmp_path / "run"}
    with pytest.raises(UserError, match="--batch-size 1 leaves batch normalization a single"):
        train_image(ImageTrainOptions(**{**small, "batch_size": 1}))
    with pytest.raises(UserError, match=r"cannot be built: erase must be in \[0, 4\), not 9$"):
        train_image(ImageTrainOptions(**small, erase=9))


def test_a_script_for_texts_says_that_it_is_a_network_for_images(run: Path) -> None:
    with pytest.raises(UserError, match=r"classifies images; use it by .*image-classification"):
        next(predict_text(PredictOptions(model=str(run), texts=["a text"])))


def test_the_card_speaks_of_images(run: Path) -> None:
    card = (run / "README.md").read_text()
    assert "An image classifier with 795,018 parameters" in card
    assert 'pipeline("image-classification"' in card
    assert " text" not in card.partition("## Training")[0]


def test_a_stopped_run_resumes_to_the_weights_of_an_uninterrupted_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Augmentation, averaged weights and statistics of batch normalization included."""
    save, saved = RunTrainer._save_checkpoint, []

    def save_and_stop(self: RunTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        saved.append(self)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "_save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_image(ImageTrainOptions(**QUICK, output_dir=tmp_path))
    checkpoint = next((tmp_path / "checkpoints" / "training").glob("checkpoint-*"))
    for name in ("model.safetensors", "averaged.safetensors", "optimizer.pt", "trainer_state.json"):
        whole_file = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole_file[: len(whole_file) // 2])
        with pytest.raises(UserError, match=r"checkpoint.* is damaged"):
            train_image(ImageTrainOptions(**QUICK, output_dir=tmp_path, resume=True))
        (checkpoint / name).write_bytes(whole_file)
    train_image(ImageTrainOptions(**QUICK, output_dir=tmp_path, resume=True))
    whole, resumed = (load_file(place / "model.safetensors") for place in (run, tmp_path))
    for name, weight in whole.items():
        np.testing.assert_array_equal(weight, resumed[name], err_msg=name)


# ---- recipes -----------------------------------------------------------------------------------


def trainer_of(folder: Path, **options: Any) -> ImageTrainer:
    filled = with_image_recipe(ImageTrainOptions(**{**QUICK, **options}))
    dataset = load_image_dataset("digits", limit=128)
    tensors = {name: ImageTensors(x, torch.device("cpu")) for name, x in dataset.splits.items()}
    return image_trainer(
        build_image_model(filled, dataset),
        filled,
        folder,
        tensors["train"],
        tensors["validation"],
        bf16=False,
        device=torch.device("cpu"),
    )


def test_the_papers_recipe_drops_the_rate_twice_and_slows_the_last_layer(tmp_path: Path) -> None:
    options = {"model": "nin-mnist", "epochs": 26, "batch_size": 128}  # one step an epoch
    trainer = trainer_of(tmp_path, **options)
    rates: list[tuple[float, float]] = []

    trainer.create_optimizer_and_scheduler(26)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    assert isinstance(optimizer, torch.optim.SGD) and scheduler is not None
    assert optimizer.defaults["momentum"] == 0.9
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)
    last = optimizer.param_groups[1]["params"]
    assert [tuple(p.shape) for p in last] == [(10, 96), (10,)]
    for _ in range(26):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))  # type: ignore[arg-type]
        optimizer.step()
        scheduler.step()
    expected = [0.1] * 20 + [0.01] * 3 + [0.001] * 3
    assert [rate for rate, _ in rates] == pytest.approx(expected)
    assert [rate for _, rate in rates] == pytest.approx([rate / 10 for rate in expected])


def test_the_papers_recipe_warms_up_if_it_is_told_to(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model="nin-mnist", batch_size=128, warmup=0.15)
    trainer.create_optimizer_and_scheduler(20)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    assert optimizer is not None and scheduler is not None
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [0.025, 0.05, 0.075] + [0.1] * 13 + [0.01] * 2 + [0.001] * 2
    assert rates == pytest.approx(expected)


def test_first_weights_are_the_authors() -> None:
    options = with_image_recipe(ImageTrainOptions(model="nin-mnist"))
    model = build_image_model(options, load_image_dataset("digits"))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any()
        else:
            assert weight.std().item() == pytest.approx(0.05, rel=0.15), name


def test_the_modern_recipe_keeps_no_class_from_learning() -> None:
    """Its class maps may be negative, and its first weights are larger."""
    options = with_image_recipe(ImageTrainOptions(model="nin-mnist", recipe="modern"))
    dataset = load_image_dataset("digits", limit=64)
    model = build_image_model(options, dataset).eval()
    pixels = to_pixel_values(torch.from_numpy(dataset.splits["train"].images))
    assert (model(pixels).logits.std(dim=0) > 0.05).all()
    paper = with_image_recipe(ImageTrainOptions(model="nin-mnist"))
    assert (build_image_model(paper, dataset)(pixels).logits >= 0).all()


def test_every_preset_has_a_recipe_and_options_override_it() -> None:
    assert set(IMAGE_PRESET_NAMES) == set(IMAGE_PRESETS)
    for name in IMAGE_PRESET_NAMES:
        options = with_image_recipe(ImageTrainOptions(model=name, dataset="fashion_mnist"))
        assert options.recipe in IMAGE_RECIPES and options.epochs and options.learning_rate
    changed = with_image_recipe(
        ImageTrainOptions(dataset="fashion_mnist", flip=False, shift=0, epochs=3)
    )
    assert (changed.flip, changed.shift, changed.epochs) == (False, 0, 3)
    unchanged = with_image_recipe(ImageTrainOptions(dataset="fashion_mnist"))
    assert unchanged.flip is True and unchanged.shift == 2
    assert with_image_recipe(ImageTrainOptions(dataset="mnist")).flip is False


# ---- pages -------------------------------------------------------------------------------------


def test_a_page_shows_maps_of_the_answer_and_the_truth_and_escapes_names() -> None:
    dataset = load_image_dataset("digits", limit=40)
    dataset.label_names[3] = "<script>alert(3)</script>"
    model = build_image_model(with_image_recipe(ImageTrainOptions()), dataset)
    page = class_maps_html(model, dataset.splits["test"], "Digits & <b>")
    assert page.count("<section") == len(dataset.splits["test"])
    assert page.count("<figure>") == 3 * len(dataset.splits["test"])
    assert "<script" not in page and "Digits &amp; &lt;b&gt;" in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_page_is_bounded_and_an_empty_one_says_so() -> None:
    dataset = load_image_dataset("digits")
    model = build_image_model(with_image_recipe(ImageTrainOptions()), dataset)
    train = dataset.splits["train"]
    page = class_maps_html(model, train, "Digits")
    assert page.count("<section") == MAX_IMAGES
    assert f"the first {MAX_IMAGES} of {len(train):,} images" in page
    assert "nothing to show" in class_maps_html(model, train.take([]), "Digits")


def test_images_are_computed_in_pieces_that_fit_into_memory() -> None:
    shapes = ((9, 32, 32, 3), (9, 224, 224, 3), (9, 1024, 1024, 1))
    with torch.device("meta"):
        assert [images_at_a_time(torch.empty(shape)) for shape in shapes] == [512, 10, 1]


def test_class_maps_point_at_what_tells_the_classes_apart() -> None:
    """A filled or a hollow square lies somewhere in noise: the maps differ most where it lies."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (200, 16, 16, 1), dtype=np.uint8)
    labels = [i % 2 for i in range(200)]
    places = rng.integers(0, 12, (200, 2))
    for image, label, (y, x) in zip(images, labels, places, strict=True):
        image[y : y + 5, x : x + 5] = 250
        if label:
            image[y + 1 : y + 4, x + 1 : x + 4] = 0
    dataset = load_image_dataset("digits", limit=40)
    dataset.label_names = ["filled", "hollow"]
    dataset.splits = {"train": ImageSplit(images, labels)}
    options = with_image_recipe(ImageTrainOptions(model="nin-tutorial"))
    model = build_image_model(options, dataset).train()
    pixels = to_pixel_values(torch.from_numpy(images))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = model(pixels, labels=torch.tensor(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        output = model.eval()(pixels, output_class_maps=True)
    assert (output.logits.argmax(1) == torch.tensor(labels)).float().mean() > 0.95
    difference = output.class_maps[..., 1] - output.class_maps[..., 0]  # (B, 16, 16)
    difference = (difference - difference.flatten(1).median(1).values[:, None, None]).abs()
    inside = []
    for map_, (y, x) in zip(difference, places, strict=True):
        peak = int(map_.argmax())
        inside.append(y - 2 <= peak // 16 < y + 7 and x - 2 <= peak % 16 < x + 7)
    assert np.mean(inside) > 0.95


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nin-cifar"], "there is no image network 'nin-cifar'"),
        (["--dataset", "digitz"], "there is no data set 'digitz'"),
        (["--shift", "9"], "shift must be in [0, 8), not 9"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--head-dropout", "0.5"], "--head-dropout needs --head fully_connected"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], message: str, script: Script) -> None:
    assert message in script("train_image", *arguments).complaint
