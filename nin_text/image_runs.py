"""Train an image classifier from options to a finished run folder."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import ViTImageProcessorPil, set_seed

from nin_text import report, run_folder
from nin_text.configuration import IMAGE_PRESETS, NiNImageConfig, with_pointwise_layers
from nin_text.device import keep_freed_memory, pick_device, use_bf16
from nin_text.errors import UserError, in_one_line
from nin_text.evaluation import most_confident_mistakes
from nin_text.image import NiNImageForImageClassification, map_size
from nin_text.image_data import ImageDataset, load_image_dataset
from nin_text.image_options import ImageTrainOptions, with_image_recipe
from nin_text.image_page import MAX_MISTAKES, class_maps_html
from nin_text.image_training import ImageTensors, image_trainer
from nin_text.options import check

logger = logging.getLogger(__name__)


def train_image(options: ImageTrainOptions, dataset: ImageDataset | None = None) -> dict[str, Any]:
    """Train an image classifier and leave everything about it in a run folder.

    Args:
        options: see `ImageTrainOptions`; what is None is filled in by the recipe.
        dataset: the data, if it has been read already.

    Returns:
        The summary that `scripts/train_image.py` prints; the folder's metrics.json has the rest.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    started = time.perf_counter()
    check(options)
    options = with_image_recipe(options)
    if dataset is None:
        dataset = load_image_dataset(options.dataset, **options.arguments())
    device = pick_device(options.device)
    folder = run_folder.folder_of(options)
    record = run_folder.essentials(options, dataset.fingerprint())
    run_folder.check_free(folder, record, options)
    names = dataset.label_names
    if options.resume and (finished := run_folder.finished_run(folder, record, names)):
        if options.explain and not (folder / report.CLASS_MAPS_FILE).is_file():
            page = _class_maps(options, dataset, _saved_model(folder))
            report.write_text(folder / report.CLASS_MAPS_FILE, page)
        return finished
    keep_freed_memory()
    set_seed(options.seed)
    model = build_image_model(options, dataset)
    # Of several processes (torchrun), one prepares the folder, while the others wait.
    processes = PartialState(cpu=device.type == "cpu")
    if processes.is_main_process:
        run_folder.open_run_folder(folder, record, resume=options.resume)
    processes.wait_for_everyone()
    tensors = {split: ImageTensors(part, device) for split, part in dataset.splits.items()}
    logger.info(
        "%s: %s parameters, images of %d pixels a side, on %s",
        options.model,
        f"{sum(p.numel() for p in model.parameters()):,}",
        model.config.image_size,
        device,
    )
    trainer = image_trainer(
        model,
        options,
        folder / run_folder.CHECKPOINTS / "training",
        tensors["train"],
        tensors["validation"],
        bf16=use_bf16(options.precision, device),
        device=device,
    )
    with run_folder.saying_where(folder):
        trainer.train_or_resume()
    metrics = run_folder.facts(options, dataset, record, trainer, trainer.seconds)
    answers = {}
    for split in ("validation", "test"):
        metrics[split], answers[split] = run_folder.score(trainer, split, tensors[split], dataset)
    metrics["peak_memory_mb"] = round(report.peak_memory_mb(), 1)
    metrics["total_seconds"] = round(time.perf_counter() - started, 2)
    if trainer.is_world_process_zero():
        best = trainer.best_model
        pages = _pages(options, dataset, best, answers)

        def save(place: Path) -> None:
            best.save_pretrained(place)
            side = best.config.image_size
            # The model normalizes by itself; what libraries read is scaled to its size.
            ViTImageProcessorPil(
                size={"height": side, "width": side}, do_normalize=False
            ).save_pretrained(place)

        run_folder.leave(folder, metrics, answers, save, pages)
    return run_folder.summary(metrics, folder)


def build_image_model(
    options: ImageTrainOptions, dataset: ImageDataset
) -> NiNImageForImageClassification:
    """A fresh classifier for a data set, its input normalization fitted to the training images.

    Args:
        options: with the recipe filled in.
        dataset: gives the size of the images and the classes.

    Raises:
        UserError: if the options do not fit the images.
    """
    images = dataset.splits["train"].images
    names = dataset.label_names
    overrides = {
        "image_size": images.shape[1],
        "num_channels": images.shape[3],
        "hidden_dropout": options.dropout,
        "head": options.head,
        "head_dropout": options.head_dropout,
        "label_smoothing": options.label_smoothing,
        "shift": options.shift,
        "flip": options.flip,
        "erase": options.erase,
    }
    changes = {name: value for name, value in overrides.items() if value is not None}
    if options.recipe == "modern":
        # With the author's first weights AdamW soon leaves some class maps zero everywhere, and
        # rectified ones then never learn again.
        changes |= {"initializer_std": None, "rectified_logits": False}
    if options.pointwise_layers is not None:
        blocks = IMAGE_PRESETS[options.model]["block_channels"]
        changes["block_channels"] = with_pointwise_layers(blocks, options.pointwise_layers)
    try:
        config = NiNImageConfig.from_preset(
            options.model,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            **changes,
        )
    except Exception as error:  # of huggingface_hub's validation, whose cause is ours
        reason = in_one_line(error.__cause__ or error)
        raise UserError(f"{options.model} cannot be built: {reason}") from error
    if options.dropout and set(config.pool) == {"none"}:
        raise UserError(f"--dropout acts where maps are pooled, which {options.model} does nowhere")
    model = NiNImageForImageClassification(config)
    if map_size(config) == 1:
        if config.norm == "batch" and options.batch_size == 1:
            raise UserError(
                "--batch-size 1 leaves batch normalization a single value to learn from, where "
                "images are as small as these; give 2 or more"
            )
        logger.warning("the class maps are a single pixel: these images are small for the network")
    model.normalization.fit(torch.from_numpy(images))
    return model


def _pages(
    options: ImageTrainOptions,
    dataset: ImageDataset,
    model: Any,
    answers: dict[str, np.ndarray],
) -> dict[str, str]:
    """Pages of class maps: the most confident mistakes, and test images if they are asked for."""
    validation = dataset.splits["validation"]
    wrong = most_confident_mistakes(answers["validation"], validation.labels)[:MAX_MISTAKES]
    title = f"Most confident mistakes on the validation split of {options.dataset}"
    pages = {report.MISTAKES_FILE: class_maps_html(model, validation.take(wrong.tolist()), title)}
    if options.explain:
        pages[report.CLASS_MAPS_FILE] = _class_maps(options, dataset, model)
    return pages


def _saved_model(folder: Path) -> NiNImageForImageClassification:
    try:
        return NiNImageForImageClassification.from_pretrained(folder, use_safetensors=True)
    except Exception as error:
        reason = in_one_line(error)
        raise UserError(
            f"no model could be loaded from {folder} ({reason}); train it anew without --resume"
        ) from error


def _class_maps(options: ImageTrainOptions, dataset: ImageDataset, model: Any) -> str:
    title = f"Class maps of test images of {options.dataset}"
    return class_maps_html(model, dataset.splits["test"], title)
