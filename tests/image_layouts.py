"""Files as the known sets of images are handed out in, written for the tests."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nin_text.image_data import KNOWN

CLASSES = KNOWN["cifar10"].labels or ()


def pictures(n: int, size: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def labels(n: int, classes: int = 10) -> list[int]:
    return [i % classes for i in range(n)]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def planes(images: np.ndarray) -> np.ndarray:
    """(n, 32, 32, 3) to (n, 3072), all of red, then green, then blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


# What each layout's files hold: 60 training and 20 test images, of 10 (or 20) classes in turn.
TRAIN, TEST = pictures(60, seed=1), pictures(20, seed=2)


def cifar10_binary(folder: Path) -> None:
    folder.mkdir(parents=True)
    parts = {f"data_batch_{i + 1}.bin": TRAIN[12 * i : 12 * i + 12] for i in range(5)}
    start = 0
    for name, images in [*parts.items(), ("test_batch.bin", TEST)]:
        truth = labels(20) if "test" in name else labels(60)[start : start + 12]
        start += 12
        records = np.concatenate([np.array(truth, np.uint8)[:, None], planes(images)], axis=1)
        (folder / name).write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")


def cifar10_pickles(folder: Path) -> None:
    folder.mkdir(parents=True)
    for i in range(5):
        batch = {b"data": planes(TRAIN[12 * i : 12 * i + 12]), b"labels": labels(60)[12 * i :][:12]}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch, protocol=2))
    test = {b"data": planes(TEST), b"labels": labels(20)}
    (folder / "test_batch").write_bytes(pickle.dumps(test, protocol=2))
    meta = {b"label_names": [name.encode() for name in CLASSES]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def archived(write: Callable[[Path], None], inner: str, archive: str) -> Callable[[Path], None]:
    def write_archive(folder: Path) -> None:
        write(folder / "aside" / inner)
        with tarfile.open(folder / archive, "w:gz") as file:
            file.add(folder / "aside" / inner, inner)
        for path in (folder / "aside" / inner).iterdir():
            path.unlink()
        (folder / "aside" / inner).rmdir()
        (folder / "aside").rmdir()

    return write_archive


def parquet(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, images in (("train-00000-of-00001", TRAIN), ("test-00000-of-00001", TEST)):
        cells = [{"bytes": png(image), "path": None} for image in images]
        table = pa.table({"img": cells, "label": labels(len(images))})
        pq.write_table(table, folder / f"{name}.parquet")


def class_folders(folder: Path) -> None:
    for split, images in (("train", TRAIN), ("test", TEST)):
        for i, (image, label) in enumerate(zip(images, labels(len(images)), strict=True)):
            path = folder / split / CLASSES[label] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))


CIFAR10 = {
    "binary": cifar10_binary,
    "binary in its folder": lambda folder: cifar10_binary(folder / "cifar-10-batches-bin"),
    "binary archive": archived(cifar10_binary, "cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
    "pickles": cifar10_pickles,
    "pickle archive": archived(cifar10_pickles, "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "Parquet": parquet,
    "class folders": class_folders,
}


def write_idx(folder: Path, images: np.ndarray, truth: list[int], name: str, zipped: bool) -> None:
    files = {
        f"{name}-images-idx3-ubyte": struct.pack(">4i", 2051, len(images), *images.shape[1:3])
        + images.tobytes(),
        f"{name}-labels-idx1-ubyte": struct.pack(">2i", 2049, len(truth)) + bytes(truth),
    }
    for file, data in files.items():
        if zipped:
            (folder / f"{file}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / file).write_bytes(data)
