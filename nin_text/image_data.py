"""From `--dataset` to images, labels and splits: built-in, known names, files, folders, hub ids."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nin_text.errors import UserError, in_one_line
from nin_text.hub import is_hub_id, load_from_hub
from nin_text.image_files import Files, Found, Splits, files_of, read_known_format
from nin_text.readers import SPLIT_NAMES, pick_splits
from nin_text.sources import load_from_disk, local_path, places_of
from nin_text.splits import announce, finish_splits, label_indices, label_names_of, stratified

logger = logging.getLogger(__name__)

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pnm"),
)
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
LARGEST_OWN_SIZE = DEFAULT_SIZE = 64  # pixels
DIGITS_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Known:
    """A well-known data set.

    Attributes:
        hub_id: its id on the hub.
        labels: class names by index; None to take those that the data set brings.
        train_images: size of the whole training set, to say so when a copy holds a part of it.
        configuration: which of the hub's configurations.
    """

    hub_id: str
    labels: tuple[str, ...] | None
    train_images: int
    configuration: str | None = None


KNOWN = {
    "mnist": Known("ylecun/mnist", tuple("0123456789"), 60_000),
    "fashion_mnist": Known(
        "zalando-datasets/fashion_mnist",
        (
            *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
            *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
        ),
        60_000,
    ),
    "cifar10": Known(
        "uoft-cs/cifar10",
        tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
        50_000,
    ),
    "cifar100": Known("uoft-cs/cifar100", None, 50_000),
    "svhn": Known("ufldl-stanford/svhn", tuple("0123456789"), 73_257, "cropped_digits"),
}
BUILT_IN = "digits"


@dataclass
class ImageSplit:
    """Images and their label indices.

    Attributes:
        images: (n, H, W, C) uint8.
        labels: n class indices.
    """

    images: np.ndarray
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> ImageSplit:
        return ImageSplit(self.images[list(indices)], [self.labels[i] for i in indices])


@dataclass
class ImageDataset:
    """A labelled image data set; the attributes are those of `data.TextDataset`."""

    name: str
    source: str
    label_names: list[str]
    splits: dict[str, ImageSplit]
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """A hash of every image and label of every split, in order."""
        digest = hashlib.sha256()
        for split in sorted(self.splits):
            part = self.splits[split]
            digest.update(f"{split}\0{part.images.shape}\0{part.labels}\0".encode())
            digest.update(np.ascontiguousarray(part.images).data)
        return digest.hexdigest()[:16]


def load_image_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    image_size: int | None = None,
    limit: int | None = None,
) -> ImageDataset:
    """Find and read a data set, bring its images to one size, and make the splits that it lacks.

    Args:
        name: "digits" (1,797 images of 8x8 pixels that scikit-learn brings), a known name, a folder
            or a hub id.
        data_dir: the first folder in which known names are looked for; then $NIN_TEXT_DATA, data/.
        image_size: height and width to scale to. None for their own if all are equally large
            squares of at most 64 pixels, else 64; images that are no squares are stretched.
        limit: keep this many examples of each split, drawn with a fixed seed.

    Raises:
        UserError: whatever is wrong with the data, in one sentence.
    """
    source, found = _find(name, data_dir, image_size)
    if "train" not in found.splits:
        raise UserError(f"{source} has no training images (a file or folder named train)")
    notes = list(found.notes)
    if (there := len(found.splits["train"][1])) < found.train_images:
        notes.append(
            f"partial training set: {there:,} of the {found.train_images:,} images of {name}"
        )
    names = list(found.label_names or [])
    names = names or label_names_of([], {split: part[1] for split, part in found.splits.items()})
    splits = {}
    size = image_size or _own_size(found)
    grey = all(image.shape[-1] == 1 for images, _ in found.splits.values() for image in images)
    for split, (images, labels) in found.splits.items():
        if len(images) != len(labels):
            raise UserError(f"{source} has {len(images)} images and {len(labels)} labels ({split})")
        indices = label_indices(labels, names, split)
        splits[split] = ImageSplit(_of_one_size(images, size, grey, split), indices)
    splits = finish_splits(splits, names, notes, limit)
    announce(name, source, names, splits, notes)
    return ImageDataset(name, source, names, splits, notes)


def _find(name: str, data_dir: Path | None, size: int | None) -> tuple[str, Found]:
    """Where a data set was found, in words, and what was found there.

    Args:
        size: see `decode`.
    """
    if name == BUILT_IN:
        return "scikit-learn", _read_digits()
    if name in KNOWN:
        known = KNOWN[name]
        places = places_of(name, data_dir)
        source = f"hub:{known.hub_id}"
        for place in places:
            if place.is_dir():
                source, found = str(place), read_folder(place, size)
                break
        else:
            looked_in = [str(place) for place in places]
            found = _from_hub(known.hub_id, looked_in, known.configuration, size)
        found.label_names = found.label_names or known.labels
        found.train_images = known.train_images
        return source, found
    path = local_path(name)
    if path.is_dir():
        return str(path), read_folder(path, size)
    if path.exists():
        raise UserError(f"{name} is a file; give the folder that holds it")
    if not is_hub_id(name):
        raise UserError(
            f"there is no data set {name!r}: it is not a folder, not a hub id (owner/name), and "
            f"not one of {', '.join([BUILT_IN, *KNOWN])}"
        )
    return f"hub:{name}", _from_hub(name, [], None, size)


def _read_digits() -> Found:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]  # (n, 8, 8, 1)
    everything = ImageSplit(images, data.target.tolist())
    test, train = stratified(everything.labels, round(DIGITS_TEST_SHARE * len(everything)))
    parts = {"train": everything.take(train), "test": everything.take(test)}
    return Found({split: (part.images, part.labels) for split, part in parts.items()}, "0123456789")


# ---- sizes -------------------------------------------------------------------------------------


def _own_size(found: Found) -> int:
    shapes = {image.shape[:2] for images, _ in found.splits.values() for image in images}
    height, width = next(iter(shapes), (0, 1))
    own = len(shapes) == 1 and height == width <= LARGEST_OWN_SIZE
    return height if own else DEFAULT_SIZE


def _of_one_size(
    images: np.ndarray | list[np.ndarray], size: int, grey: bool, split: str
) -> np.ndarray:
    """(n, size, size, C) uint8, with one channel or three."""
    channels = 1 if grey else 3
    if isinstance(images, np.ndarray) and images.shape[1:] == (size, size, channels):
        return images
    scaled = np.empty((len(images), size, size, channels), dtype=np.uint8)
    bar = tqdm(images, desc=f"scaling {split}", unit="images", leave=False, disable=None)
    for i, image in enumerate(bar):
        if image.shape[:2] != (size, size):
            from PIL import Image

            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            image = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
            image = image[..., None] if image.ndim == 2 else image
        scaled[i] = image  # a single channel is repeated
    return scaled


def decode(data: bytes | Path, name: str, size: int | None) -> np.ndarray:
    """(H, W, C) uint8 of an encoded image: one channel if it is grey, else RGB.

    It is read as `pipeline("image-classification")` reads it: upright, transparency left out, of
    an animation the first image.

    Args:
        data: the bytes of the file, or its path.
        name: for messages.
        size: height and width to scale to. None to do so only with what certainly will be, since a
            folder of photographs as they are does not fit into memory: to DEFAULT_SIZE, what is no
            square of at most LARGEST_OWN_SIZE pixels a side.

    Raises:
        UserError: if it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as picture:
            if picture.mode[0] in "IF":  # which the pipeline would clip at 255
                raise ValueError("it is grey with more than 8 bits a pixel; save it with 8")
            grey = picture.mode in ("1", "L", "LA")
            upright = ImageOps.exif_transpose(picture).convert("L" if grey else "RGB")
        width, height = upright.size
        small = width == height <= LARGEST_OWN_SIZE
        wanted = size or (width if small else DEFAULT_SIZE)
        if upright.size != (wanted, wanted):
            upright = upright.resize((wanted, wanted), Image.Resampling.BILINEAR)
        pixels = np.asarray(upright)
    except Exception as error:  # of many types, one for each format
        reason = in_one_line(error, 160)
        raise UserError(f"{name} is no readable image ({reason}); remove or replace it") from error
    return pixels[..., None] if grey else pixels


# ---- folders -----------------------------------------------------------------------------------


def read_folder(folder: Path, size: int | None = None) -> Found:
    """Read a folder in any of the layouts that `data/README.md` lists.

    Args:
        folder: where the files are.
        size: see `decode`.

    Raises:
        UserError: if there is none of them, or a file is damaged.
    """
    try:
        files = files_of(folder)
        if (found := read_known_format(files)) is not None:
            return found
        saved = load_from_disk(folder) or _read_parquet(files)
        if saved is not None:
            return _from_datasets(saved, str(folder), size)
        return _read_class_folders(folder, size)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file provokes
        reason = in_one_line(error, 160)
        raise UserError(f"the images in {folder} cannot be read ({reason})") from error


def _read_parquet(files: Files) -> Any:
    """Tables as the hub keeps them, as a dict of `datasets.Dataset`; None if there are none."""
    found: dict[str, Any] = {}
    for split in ("train", "validation", "test"):
        names = [
            name
            for name in sorted(files)
            if name.endswith(".parquet") and name.startswith(SPLIT_NAMES[split])
        ]
        if names:
            import datasets
            import pyarrow as pa
            import pyarrow.parquet as pq

            tables = [pq.read_table(pa.BufferReader(files[name]())) for name in names]
            found[split] = datasets.Dataset(pa.concat_tables(tables))
    return found or None


def _read_class_folders(folder: Path, size: int | None) -> Found:
    """train/<class>/**/*.png and test/<class>/**/*.png, or <class>/**/*.png alone."""
    by_name = {path.name.lower(): path for path in reversed(_subfolders(folder))}
    of_splits = pick_splits(  # not the class of trains
        lambda name: name in by_name and bool(_subfolders(by_name[name]))
    )
    parts = {split: by_name[name] for split, name in of_splits.items()}
    splits: Splits = {}
    notes: list[str] = []
    for split, part in (parts or {"train": folder}).items():
        paths = [
            (path, classes.name)
            for classes in _subfolders(part)
            for path in _images_of(classes, notes)
        ]
        bar = tqdm(paths, desc=f"reading {split}", unit="images", leave=False, disable=None)
        images = [decode(path, str(path), size) for path, _ in bar]
        splits[split] = (images, [name for _, name in paths])
    if "train" in splits and not splits["train"][1]:
        raise UserError(
            f"{parts.get('train', folder)} holds no images: give a folder with one subfolder of "
            f"images ({', '.join(SUFFIXES[:3])}, ...) for each class, or see data/README.md"
        )
    if "nan" in {label.strip().lower() for _, labels in splits.values() for label in labels}:
        raise UserError(f"a class folder in {folder} is called nan, as a missing label; rename it")
    names = label_names_of([], {split: labels for split, (_, labels) in splits.items()})
    return Found(splits, names, notes=notes)


def _images_of(classes: Path, notes: list[str]) -> list[Path]:
    """The images in a class folder and the folders within; a note says what is left out."""
    files = [
        path
        for path in sorted(classes.rglob("*"))
        if path.is_file() and not any(p[0] == "." for p in path.relative_to(classes).parts)
    ]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if len(images) < len(files):
        others = sorted({path.suffix.lower() or path.name for path in files} - {*SUFFIXES})
        count = len(files) - len(images)
        notes.append(f"{classes}: other files are left out: {count} ({', '.join(others[:5])})")
    if not images:
        notes.append(f"{classes} holds no images: there is no such class")
    return images


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


# ---- the hub -----------------------------------------------------------------------------------


def _from_hub(hub_id: str, places: list[str], configuration: str | None, size: int | None) -> Found:
    advice = (
        f"looked in {', '.join(places)}; put the files of the data set there (data/README.md lists "
        f"the layouts), or name the folder above it with --data-dir or NIN_TEXT_DATA"
        if places
        else "give the path of a local copy"
    )
    return _from_datasets(load_from_hub(hub_id, advice, configuration), f"hub:{hub_id}", size)


def _from_datasets(loaded: Any, source: str, size: int | None) -> Found:
    """A `datasets.Dataset`, or several by the names of their splits, with a column of images.

    Images are encoded: bytes, or a struct of bytes and path.
    """
    import datasets

    parts = loaded if isinstance(loaded, dict) else {"train": loaded}
    splits: Splits = {}
    label_names: Sequence[str] | None = None
    for split, name in pick_splits(parts.__contains__).items():
        part = parts[name]
        image = _column(part.column_names, IMAGE_COLUMNS, source)
        label = _column(part.column_names, LABEL_COLUMNS, source)
        feature = part.features[label]
        labels = list(part[label])
        if isinstance(feature, datasets.ClassLabel):
            label_names = list(feature.names)
            # By name, since a class may be named by a number.
            named = dict(enumerate(label_names))
            labels = [named.get(value, value) for value in labels]
        part = part.cast_column(image, datasets.Image(decode=False))
        bar = tqdm(part[image], desc=f"reading {split}", unit="images", leave=False, disable=None)
        images = []
        for i, cell in enumerate(bar):
            where = f"row {i + 1} of the {split} split of {source}"
            if cell is None or (cell["bytes"] is None and not cell["path"]):
                raise UserError(f"{where} has no image; leave it out")
            data = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"])
            images.append(decode(data, where, size))
        splits[split] = (images, labels)
    return Found(splits, label_names)


def _column(names: Sequence[str], wanted: Sequence[str], place: str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise UserError(f"{place} has no column named {' or '.join(wanted)}, only {', '.join(names)}")
