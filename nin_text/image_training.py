"""Training of the image models: the same trainer, on images that stay where the model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from nin_text.image import NiNImageForImageClassification
from nin_text.image_data import ImageSplit
from nin_text.image_options import IMAGE_RECIPES, ImageTrainOptions
from nin_text.training import ClassifierTrainer, training_arguments

MOMENTUM = 0.9
PIXELS_AT_A_TIME = 2**19


class ImageTensors(Dataset):
    """All images of a split in the memory of one device; a batch is taken in one piece.

    Attributes:
        images: (n, H, W, C) uint8, on the device.
        labels: (n,) int64, in the host's memory.
    """

    def __init__(self, split: ImageSplit, device: torch.device) -> None:
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = np.asarray(split.labels, dtype=np.int64)
        self.targets = torch.from_numpy(self.labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        where = torch.tensor(indices, device=self.images.device)
        return {
            "pixel_values": to_pixel_values(self.images[where]),
            "labels": self.targets[where],
        }

    @property
    def lengths(self) -> np.ndarray:
        """Every image counts the same."""
        return np.ones(len(self), dtype=np.int64)


def images_at_a_time(images: Tensor) -> int:
    """How many (n, H, W, C) images to compute in one piece: 512 of 32 pixels a side, 10 of 224."""
    return max(1, PIXELS_AT_A_TIME // (images.shape[1] * images.shape[2]))


def to_pixel_values(images: Tensor) -> Tensor:
    """(B, H, W, C) uint8 to (B, C, H, W) float32 between 0 and 1, channels last in memory."""
    return (images.float() / 255).movedim(-1, 1)


def predict_image_logits(
    model: PreTrainedModel,
    images: Tensor,
    *,
    autocast: torch.dtype | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Logits of each image, in the order given.

    Args:
        model: any image classifier of transformers.
        images: (n, H, W, C) uint8, on any device.
        autocast: dtype of the matrix products (torch.bfloat16), or None for float32.
        progress: title of a progress bar, or None for no bar.

    Returns:
        (n, K) float32.
    """
    was_training = model.training
    model.eval()
    logits = []
    bar = tqdm(
        images.split(images_at_a_time(images)),
        desc=progress,
        disable=None if progress else True,
        unit="batches",
        leave=False,
    )
    with torch.inference_mode(), torch.autocast(model.device.type, autocast, autocast is not None):
        for batch in bar:
            output = model(pixel_values=to_pixel_values(batch.to(model.device)))
            logits.append(output.logits.float().cpu().numpy())
    model.train(was_training)
    return np.concatenate(logits)


class ImageTrainer(ClassifierTrainer):
    """A `ClassifierTrainer` for images, with the paper's optimizer and schedule.

    Args:
        options: with the recipe filled in.
    """

    model: NiNImageForImageClassification
    train_dataset: ImageTensors
    eval_dataset: ImageTensors

    def __init__(self, *, options: ImageTrainOptions, **kwargs: Any) -> None:
        self.recipe = IMAGE_RECIPES[options.recipe or ""]
        super().__init__(
            collate=dict,  # a batch is whole already
            batch_tokens=options.batch_size,
            ema_decay=options.ema_decay,
            title="training",
            loaders=0,  # the images lie on the device
            **kwargs,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW as the Trainer makes it, or SGD with a slower last layer."""
        if self.recipe["optimizer"] == "adamw" or self.optimizer is not None:
            return super().create_optimizer(model)
        last = list(self.model.classifier.parameters())
        others = [p for p in self.model.parameters() if all(p is not q for q in last)]
        rate = self.args.learning_rate
        groups = [
            {"params": others, "lr": rate},
            {"params": last, "lr": rate * self.recipe["classifier_rate"]},
        ]
        self.optimizer = torch.optim.SGD(
            groups, momentum=MOMENTUM, weight_decay=self.args.weight_decay
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """A learning rate that rises and falls in steps, or as the Trainer has it."""
        drops = [share * num_training_steps for share in self.recipe["lr_drops"]]
        rise = self.args.get_warmup_steps(num_training_steps)
        if not drops or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1, (step + 1) / (rise + 1)) * 0.1 ** sum(step >= d for d in drops),
        )
        return self.lr_scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Each process has seen other batches: of the statistics of batch normalization, which no
        # gradient keeps equal, all take the mean.
        for model in dict.fromkeys((self.model, self.best_model)):  # in the same order everywhere
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, "mean"))
        return super().evaluate(*args, **kwargs)

    def logits(self, dataset: ImageTensors, progress: str | None = None) -> np.ndarray:
        """(n, K) logits of `best_model`."""
        return predict_image_logits(
            self.best_model,
            dataset.images,
            autocast=torch.bfloat16 if self.args.bf16 else None,
            progress=progress,
        )


def image_trainer(
    model: NiNImageForImageClassification,
    options: ImageTrainOptions,
    folder: Path,
    train: ImageTensors,
    validation: ImageTensors,
    *,
    bf16: bool,
    device: torch.device,
) -> ImageTrainer:
    """The trainer of an image classifier.

    Args:
        model: is trained in place.
        options: with the recipe filled in.
        folder: for checkpoints.
        train, validation: what to learn from, and what to judge by.
        bf16: whether to multiply in bfloat16.
        device: where to compute.
    """
    return ImageTrainer(
        options=options,
        model=model,
        args=training_arguments(
            folder,
            epochs=options.epochs,
            batch_size=options.batch_size,
            gradient_accumulation=options.gradient_accumulation,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            warmup=options.warmup,
            seed=options.seed,
            bf16=bf16,
            device=device,
            find_unused_parameters=False,
            compile=options.compile,
        ),
        train_dataset=train,
        eval_dataset=validation,
    )
