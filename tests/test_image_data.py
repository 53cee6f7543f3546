"""Image data: every layout in which sets are handed out, on files made here."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_layouts import (
    CIFAR10,
    CLASSES,
    TEST,
    TRAIN,
    cifar10_binary,
    class_folders,
    labels,
    pictures,
    png,
)
from PIL import Image

from nin_text import UserError, load_image_dataset
from nin_text.image_data import ImageDataset, decode


def in_order(data: ImageDataset) -> None:
    """Every image that was written is there once, with its label."""
    names = list(data.label_names)
    assert sorted(names) == sorted(CLASSES)
    assert (len(data.splits["train"]), len(data.splits["validation"])) == (54, 6)
    seen = {}
    for split in ("train", "validation"):
        part = data.splits[split]
        for image, label in zip(part.images, part.labels, strict=True):
            seen[image.tobytes()] = names[label]
    expected = zip(TRAIN, labels(60), strict=True)
    assert seen == {image.tobytes(): CLASSES[label] for image, label in expected}
    test = data.splits["test"]
    found = {x.tobytes(): names[y] for x, y in zip(test.images, test.labels, strict=True)}
    expected = zip(TEST, labels(20), strict=True)
    assert found == {image.tobytes(): CLASSES[label] for image, label in expected}


@pytest.mark.parametrize("layout", CIFAR10)
def test_cifar_10_is_read_in_every_layout(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar10"
    CIFAR10[layout](folder)
    in_order(load_image_dataset("cifar10", data_dir=tmp_path))


def test_cifar_10_is_read_from_the_hubs_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the hub: what `datasets.load_dataset` gives for uoft-cs/cifar10."""
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )

    def part(images: np.ndarray) -> datasets.Dataset:
        cells = [{"bytes": png(image), "path": None} for image in images]
        return datasets.Dataset.from_dict(
            {"img": cells, "label": labels(len(images))}, features=features
        )

    asked = []

    def load_dataset(hub_id: str, configuration: str | None = None) -> datasets.DatasetDict:
        asked.append(hub_id)
        return datasets.DatasetDict(train=part(TRAIN), test=part(TEST))

    monkeypatch.setattr("nin_text.hub._hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NIN_TEXT_DATA", raising=False)
    in_order(load_image_dataset("cifar10"))
    assert asked == ["uoft-cs/cifar10"]


def test_a_folder_of_photographs_of_all_sizes(tmp_path: Path) -> None:
    """One grey among them, no test split, other files beside them."""
    rng = np.random.default_rng(0)
    for i in range(40):
        shape = (int(rng.integers(20, 90)), int(rng.integers(20, 90)), 3)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.{('png', 'JPG')[i // 2 % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels if i else pixels[..., 0]).save(path)
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("not an image")
    data = load_image_dataset(str(tmp_path / "photos"))
    assert data.label_names == ["cat", "dog"]
    assert data.splits["train"].images.shape[1:] == (64, 64, 3)
    assert {split: len(part) for split, part in data.splits.items()} == {
        "train": 32,
        "validation": 4,
        "test": 4,
    }
    small = load_image_dataset(str(tmp_path / "photos"), image_size=16)
    assert small.splits["test"].images.shape[1:] == (16, 16, 3)
    assert small.fingerprint() != data.fingerprint()


def test_the_built_in_digits() -> None:
    data = load_image_dataset("digits")
    assert {split: len(part) for split, part in data.splits.items()} == {
        "train": 1294,
        "validation": 144,
        "test": 359,
    }
    images = data.splits["train"].images
    assert images.shape[1:] == (8, 8, 1)
    assert (images.min(), images.max()) == (0, 255)
    assert load_image_dataset("digits").fingerprint() == data.fingerprint()
    assert len(load_image_dataset("digits", limit=50).splits["train"]) == 50


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_images_of_every_mode_are_read_as_the_pipeline_reads_them() -> None:
    from transformers.image_utils import load_image

    colours = Image.fromarray(pictures(1, 24)[0])
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by 90 degrees
    files = {
        "grey": encoded(colours.convert("L")),
        "grey, transparent": encoded(colours.convert("LA")),
        "black and white": encoded(colours.convert("1")),
        "palette": encoded(colours.convert("P")),
        "transparent": encoded(colours.convert("RGBA")),
        "for print": encoded(colours.convert("CMYK"), "JPEG"),
        "animated": encoded(
            colours, "GIF", save_all=True, append_images=[Image.new("RGB", (24, 24))]
        ),
        "turned": encoded(colours, "JPEG", exif=turned),
    }
    for name, data in files.items():
        pixels = decode(data, name, None)
        assert pixels.shape == (24, 24, 1 if name[0] in "gb" else 3), name
        expected = np.asarray(load_image(base64.b64encode(data).decode()).convert("RGB"))
        assert np.array_equal(np.broadcast_to(pixels, expected.shape), expected), name


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_images_that_a_pipeline_would_clip_are_refused(mode: str) -> None:
    values = np.arange(400).reshape(20, 20) * 100
    pixels = values.astype(np.uint16 if mode == "I;16" else np.float32)
    with pytest.raises(UserError, match="more than 8 bits"):
        decode(encoded(Image.fromarray(pixels), "TIFF"), "x", None)


@pytest.mark.parametrize(
    ("shape", "size", "result"),
    [
        *(((1, 1), None, 1), ((64, 64), None, 64), ((65, 65), None, 64), ((3, 900), None, 64)),
        *(((900, 700), 32, 32), ((1, 1), 32, 32)),
    ],
)
def test_photographs_are_scaled_while_they_are_read(
    shape: tuple[int, int], size: int | None, result: int
) -> None:
    """As they are, those of a folder would not fit into memory."""
    pixels = np.zeros((*shape, 3), np.uint8)
    assert decode(encoded(Image.fromarray(pixels)), "x", size).shape == (result, result, 3)


def test_odd_class_folders(tmp_path: Path) -> None:
    """A class called train, one without images, nested and hidden folders, links."""
    for i, image in enumerate(TRAIN):
        name = ("bus", "train", "<b>Straße", "10")[i % 4]
        path = tmp_path / "data" / name / ("deep/er" if i % 4 == 0 else ".") / f"{i}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image[: 20 + i % 5]))
    for name in ("empty", ".ipynb_checkpoints", "elsewhere"):
        (tmp_path / "data" / name).mkdir()
    (tmp_path / "data" / ".ipynb_checkpoints" / "0.png").write_bytes(png(TRAIN[0]))
    (tmp_path / "data" / "bus" / "._0.png").write_bytes(b"of another system")
    thumbnails = tmp_path / "data" / "train" / ".thumbnails" / "small"
    thumbnails.mkdir(parents=True)
    (thumbnails / "0.png").write_bytes(png(TRAIN[0]))
    (tmp_path / "data" / "10" / "list.txt").write_text("of images")
    (tmp_path / "data" / "backup.tar.gz").write_bytes(b"no archive, and none of our business")
    (tmp_path / "data" / "elsewhere").rmdir()
    (tmp_path / "data" / "elsewhere").symlink_to(tmp_path / "data" / "bus")
    data = load_image_dataset(str(tmp_path / "data"))
    assert data.label_names == ["10", "<b>Straße", "bus", "elsewhere", "train"]
    assert sum(map(len, data.splits.values())) == 75
    assert f"{tmp_path / 'data' / 'empty'} holds no images: there is no such class" in data.notes
    assert f"{tmp_path / 'data' / '10'}: other files are left out: 1 (.txt)" in data.notes
    assert data.splits["test"].images.shape[1:] == (64, 64, 3)


def test_a_folder_of_folders_of_one_class_or_too_few_images_is_refused(tmp_path: Path) -> None:
    for classes, each, message in ((1, 20, "same label"), (2, 2, "4 examples are too few")):
        for i in range(classes * each):
            path = tmp_path / str(classes) / f"class {i % classes}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(TRAIN[i]))
        with pytest.raises(UserError, match=message):
            load_image_dataset(str(tmp_path / str(classes)))


CELLS = [{"bytes": png(image), "path": None} for image in TRAIN]


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (["dog", "cat"] * 30, ["cat", "dog"]),
        ([7, 40, 7.0] * 20, ["7", "40"]),
        (["2", "10"] * 30, ["2", "10"]),
    ],
)
def test_labels_of_a_table_may_be_names_and_numbers_with_gaps(
    column: list[Any], names: list[str], tmp_path: Path
) -> None:
    bytes_alone = [cell["bytes"] for cell in CELLS]
    table = pa.table({"id": range(60), "image": bytes_alone, "label": column, "note": [None] * 60})
    pq.write_table(table, tmp_path / "train.parquet")
    data = load_image_dataset(str(tmp_path))
    assert data.label_names == names
    named = {
        image.tobytes(): data.label_names[label]
        for part in data.splits.values()
        for image, label in zip(part.images, part.labels, strict=True)
    }
    expected = [str(value).removesuffix(".0") for value in column]
    assert named == {i.tobytes(): name for i, name in zip(TRAIN, expected, strict=True)}


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_cell_that_is_missing_is_named(column: str, tmp_path: Path) -> None:
    values = {"image": list(CELLS), "label": labels(60)}
    values[column][3] = None
    pq.write_table(pa.table(values), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"row 4"):
        load_image_dataset(str(tmp_path))


def test_a_saved_data_set_is_read_with_the_names_of_its_classes(tmp_path: Path) -> None:
    """Also where a class is named by another's number, and where there is but one split."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["1", "0", "cat"])}
    saved = datasets.Dataset.from_dict(
        {"image": CELLS, "label": labels(60, 3)}, features=datasets.Features(features)
    )
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        data = load_image_dataset(str(tmp_path / name))
        assert data.label_names == ["1", "0", "cat"]
        for part in data.splits.values():
            for image, label in zip(part.images, part.labels, strict=True):
                assert any(np.array_equal(image, TRAIN[i]) for i in range(label, 60, 3))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"ARROW1 and no more")
    with pytest.raises(UserError, match="not a readable saved data set"):
        load_image_dataset(str(tmp_path / "one"))


def test_a_part_of_a_known_set_is_said_to_be_one(tmp_path: Path) -> None:
    cifar10_binary(tmp_path / "cifar10")
    data = load_image_dataset("cifar10", data_dir=tmp_path)
    assert data.notes[0] == "partial training set: 60 of the 50,000 images of cifar10"


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_sets_are_whole(name: str, real_data: Path) -> None:
    data = load_image_dataset(name)
    sizes = {split: len(part) for split, part in data.splits.items()}
    assert sizes == {"train": 55_000, "test": 10_000, "validation": 5_000}
    assert len(set(data.splits["test"].labels)) == 10


def test_an_image_of_more_pixels_than_anyone_has_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 90 million
    with pytest.raises(UserError, match="decompression bomb"):
        decode(encoded(Image.new("1", (50, 50))), "x", None)


def test_splits_may_be_written_with_capitals(tmp_path: Path) -> None:
    for i, image in enumerate(TRAIN):
        split = ("Train", "Train", "TEST", "Val")[i % 4]
        path = tmp_path / split / ("cats" if i % 3 else "dogs") / f"{i}.jfif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(path, "JPEG")
    data = load_image_dataset(str(tmp_path))
    assert data.label_names == ["cats", "dogs"]
    counts = {split: len(part) for split, part in data.splits.items()}
    assert counts["train"] == 2 * counts["test"] == 2 * counts["validation"] == len(TRAIN) // 2


def test_a_class_that_is_called_as_a_missing_label_is_refused(tmp_path: Path) -> None:
    for name in ("nan", "pita"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(png(TRAIN[i]))
    with pytest.raises(UserError, match=r"a class folder in .* is called nan"):
        load_image_dataset(str(tmp_path))


def test_what_cannot_be_found_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set 'digit'"):
        load_image_dataset("digit")
    with pytest.raises(UserError, match="no data set 'photos/'"):
        load_image_dataset("photos/")
    with pytest.raises(UserError, match="--dataset is empty"):
        load_image_dataset("")
    (tmp_path / "aside.tar").touch()
    with pytest.raises(UserError, match="is a file; give the folder"):
        load_image_dataset(str(tmp_path / "aside.tar"))
    (tmp_path / "aside.tar").unlink()
    with pytest.raises(UserError, match="one subfolder of images"):
        load_image_dataset(str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        load_image_dataset(str(tmp_path))
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="no column named image or img"):
        load_image_dataset(str(tmp_path))


def test_labels_that_no_class_has_and_a_single_class_are_refused(tmp_path: Path) -> None:
    for truth, message in (([12] * 60, "not among the classes"), ([3] * 60, "the same label")):
        folder = tmp_path / f"data{truth[0]}" / "cifar10"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"image": CELLS, "label": truth}), folder / "train.parquet")
        with pytest.raises(UserError, match=message):
            load_image_dataset("cifar10", data_dir=folder.parent)


def test_test_images_of_a_class_that_training_lacks_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "data")
    (tmp_path / "data" / "test" / "unicorn").mkdir()
    (tmp_path / "data" / "test" / "unicorn" / "1.png").write_bytes(png(TRAIN[0]))
    with pytest.raises(UserError, match="unicorn"):
        load_image_dataset(str(tmp_path / "data"))
