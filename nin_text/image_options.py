"""Options and recipes of the image models; imports nothing heavy, as `options.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nin_text.errors import UserError
from nin_text.options import PRECISION_HELP, PRECISIONS, CommonOptions, option

IMAGE_PRESET_NAMES = (
    *("nin-cifar10", "nin-cifar100", "nin-svhn", "nin-mnist"),
    *("nin-imagenet", "nin-tutorial", "nin-modern"),
)

# What training does unless told otherwise. "paper" is the author's schedule of 200 + 30 + 30
# epochs: SGD of momentum 0.9, whose learning rate is divided by ten after each of the `lr_drops`
# (shares of all steps), and is a tenth for the 1x1 convolution to the class maps. With fewer
# --epochs it keeps its shape. Without drops the learning rate falls linearly.
IMAGE_RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "optimizer": "sgd",
        "epochs": 260,
        "learning_rate": 0.1,
        "classifier_rate": 0.1,
        "lr_drops": (200 / 260, 230 / 260),
        "weight_decay": 1e-4,
        "warmup": 0.0,
        "batch_size": 128,
        "ema_decay": 0.0,
        "label_smoothing": 0.0,
        "shift": 0,
        "flip": False,
        "erase": 0,
    },
    "modern": {
        "optimizer": "adamw",
        "epochs": 25,
        "learning_rate": 3e-3,
        "classifier_rate": 1.0,
        "lr_drops": (),
        "weight_decay": 0.05,
        "warmup": 0.1,
        "batch_size": 128,
        "ema_decay": 0.998,
        "label_smoothing": 0.1,
        "shift": 2,
        "flip": False,
        "erase": 0,
    },
}
# What a data set needs besides: digits must not be mirrored, and small sets take more passes.
IMAGE_DATASETS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 60, "shift": 1, "batch_size": 64, "ema_decay": 0.99},
    "fashion_mnist": {"flip": True, "erase": 8},
    "cifar10": {"flip": True, "shift": 4, "erase": 8},
    "cifar100": {"flip": True, "shift": 4, "erase": 8},
}


@dataclass
class ImageTrainOptions(CommonOptions):
    """How an image classifier is trained.

    What is None until `with_image_recipe` fills it in is left to the recipe (see IMAGE_RECIPES).
    """

    dataset: str = option(
        "built-in (digits), known name (mnist, fashion_mnist, cifar10, cifar100, svhn), folder "
        "with one subfolder of images for each class, or hub id",
        "digits",
    )
    data_dir: Path | None = option(
        "folder in which known names are looked for first; then $NIN_TEXT_DATA, data/, the hub"
    )
    limit: int | None = option("use at most this many examples of each split", metavar="N")
    image_size: int | None = option(
        "scale images to squares of this many pixels a side (default: their own size up to 64)"
    )
    model: str = option(f"preset ({', '.join(IMAGE_PRESET_NAMES)})", "nin-modern")
    recipe: str | None = option(
        "paper: the author's (SGD in steps, weight decay, no augmentation); modern: AdamW, "
        "averaged weights, label smoothing, augmentation (default: modern for nin-modern and "
        "nin-tutorial, else paper)",
        choices=tuple(IMAGE_RECIPES),
    )
    epochs: int = option("passes over the training split (default: the recipe's)")
    learning_rate: float = option("peak learning rate (default: the recipe's)")
    weight_decay: float = option("weight decay (default: the recipe's)")
    warmup: float = option("share of the steps in which it rises (default: the recipe's)")
    dropout: float | None = option("dropout after pooling (default: the preset's)")
    pointwise_layers: int | None = option(
        "1x1 convolutions in each block; 0 for plain convolutions (default: the preset's)"
    )
    head: str | None = option(
        "average (global average pooling) or fully_connected, which the paper compares it with "
        "(default: the preset's)",
        choices=("average", "fully_connected"),
    )
    head_dropout: float = option("dropout before a fully connected head", 0.0)
    label_smoothing: float = option(
        "mass of the target spread over all classes (default: the recipe's)"
    )
    shift: int = option(
        "move training images by up to this many pixels (default: the recipe's, by data set)"
    )
    flip: bool | None = option(
        "mirror training images at random (default: the recipe's, by data set)"
    )
    erase: int = option(
        "blot out a square with this side of each training image (default: the recipe's)"
    )
    batch_size: int = option("images in a batch (default: the recipe's)")
    gradient_accumulation: int = option("batches for each optimizer step", 1)
    ema_decay: float = option("decay of the averaged weights, 0 for none (default: the recipe's)")
    precision: str = option(PRECISION_HELP, "auto", choices=PRECISIONS)
    compile: bool = option("compile the network with torch.compile, for long runs on a GPU", False)
    explain: str | None = option(
        "html: also write class_maps.html, which shows for test images which region spoke for "
        "which class",
        choices=("html",),
    )
    seed: int = option("seed of the weights, the batches, dropout and augmentation", 0)
    output_dir: Path | None = option("run folder (default: runs/<dataset>-<model>-seed<seed>)")
    resume: bool = option("continue the run in the output folder from its last checkpoint", False)
    overwrite: bool = option("replace another run in the output folder", False)

    def arguments(self) -> dict[str, Any]:
        """Those of `load_image_dataset`."""
        names = ("data_dir", "image_size", "limit")
        return {name: getattr(self, name) for name in names}


@dataclass
class ImageBenchmarkOptions(CommonOptions):
    """How the speed of image networks is measured."""

    models: list[str] = option(
        f"networks ({', '.join(IMAGE_PRESET_NAMES)}); a residual network of as many parameters as "
        f"the largest is always beside them",
        ("nin-modern", "nin-cifar10"),
        nargs="+",
        metavar="NETWORK",
    )
    image_size: int = option("pixels a side", 32)
    batch_size: int = option("images in a batch", 128)
    rounds: int = option("rounds of timing; every network has its turn in each", 10)
    precision: str = option(PRECISION_HELP, "auto", choices=PRECISIONS)
    compile: bool = option("compile the networks with torch.compile", False)
    output_dir: Path | None = option("also write image_benchmark.json to this folder")


def with_image_recipe(options: ImageTrainOptions) -> ImageTrainOptions:
    """A copy in which every option left to the recipe is filled in.

    Raises:
        UserError: if there is no such preset, or an option would have no effect.
    """
    check_networks([options.model])
    if options.head_dropout and options.head != "fully_connected":
        raise UserError("--head-dropout needs --head fully_connected")
    modern = options.model in ("nin-modern", "nin-tutorial")
    name = options.recipe or ("modern" if modern else "paper")
    recipe = IMAGE_RECIPES[name] | {"recipe": name}
    if name == "modern":
        recipe |= IMAGE_DATASETS.get(options.dataset, {})
        if options.image_size:  # a square that leaves most of a small image
            recipe["erase"] = min(recipe["erase"], options.image_size // 3)
    missing = {
        name: value for name, value in recipe.items() if getattr(options, name, value) is None
    }
    return dataclasses.replace(options, **missing)


def check_networks(names: Sequence[str]) -> None:
    """Refuse names that no preset has.

    Raises:
        UserError: naming those that there are.
    """
    for name in names:
        if name not in IMAGE_PRESET_NAMES:
            known = ", ".join(IMAGE_PRESET_NAMES)
            raise UserError(f"there is no image network {name!r}; there are {known}")
