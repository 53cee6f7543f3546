"""The formats of known sets of images, and files that are damaged or hostile."""

from __future__ import annotations

import codecs
import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_layouts import (
    CIFAR10,
    TEST,
    TRAIN,
    cifar10_pickles,
    labels,
    pictures,
    planes,
    write_idx,
)
from scipy.io import savemat

from nin_text import UserError, image_files, load_image_dataset


@pytest.mark.parametrize("layout", ["binary", "pickles"])
def test_cifar_100_has_its_fine_labels(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar100"
    folder.mkdir()
    fine = {"train": labels(60, 20), "test": labels(20, 20)}
    for split, images in (("train", TRAIN), ("test", TEST)):
        coarse = [0] * len(images)
        if layout == "binary":
            heads = np.array([coarse, fine[split]], np.uint8).T
            records = np.concatenate([heads, planes(images)], axis=1)
            (folder / f"{split}.bin").write_bytes(records.tobytes())
        else:
            batch = {b"data": planes(images), b"fine_labels": fine[split], b"coarse_labels": coarse}
            (folder / split).write_bytes(pickle.dumps(batch, protocol=2))
    data = load_image_dataset("cifar100", data_dir=tmp_path)
    assert data.splits["test"].labels == fine["test"]
    assert len(data.label_names) == 20
    assert np.array_equal(data.splits["test"].images, TEST)


@pytest.mark.parametrize("zipped", [True, False])
def test_mnists_own_format_is_read(zipped: bool, tmp_path: Path) -> None:
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    train, test = pictures(40, 28, 1), pictures(20, 28, 1, seed=3)
    write_idx(folder, train, labels(40), "train", zipped)
    write_idx(folder, test, labels(20), "t10k", zipped)
    data = load_image_dataset("fashion_mnist", data_dir=tmp_path)
    assert np.array_equal(data.splits["test"].images, test)
    assert data.splits["test"].labels == labels(20)
    assert data.label_names[9] == "ankle boot"


def test_svhns_matrices_are_read_and_their_ten_is_a_zero(tmp_path: Path) -> None:
    folder = tmp_path / "svhn"
    folder.mkdir()
    for split, images in (("train", TRAIN), ("test", TEST)):
        y = np.array([[label or 10] for label in labels(len(images))], np.uint8)
        savemat(folder / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": y})
    data = load_image_dataset("svhn", data_dir=tmp_path)
    assert data.splits["test"].labels == labels(20)
    assert np.array_equal(data.splits["test"].images, TEST)


# ---- damaged and hostile files -----------------------------------------------------------------


class Hostile:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    folder, mark = tmp_path / "cifar10", tmp_path / "mark"
    cifar10_pickles(folder)
    (folder / "data_batch_3").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(UserError, match="which no image file needs"):
        load_image_dataset("cifar10", data_dir=tmp_path)
    assert not mark.exists()
    pickle.loads((folder / "data_batch_3").read_bytes())
    assert mark.exists()  # an ordinary unpickler would have run it


class Reduced:
    """A pickle that calls a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call


def test_pickles_that_hold_more_than_arrays_of_integers_are_refused(tmp_path: Path) -> None:
    rows = planes(TRAIN[:12])
    cifar10_pickles(tmp_path / "cifar10")
    path = tmp_path / "cifar10" / "data_batch_3"
    for data, message in (
        (np.array([Hostile(tmp_path)], dtype=object), "an array of type 'O8'"),
        (rows.astype(np.float32), "an array of type 'f4'"),
        (Reduced(codecs.encode, ("x", "zlib")), "the encoding 'zlib'"),
        (Reduced(np.ndarray, ((2**40,),)), "cannot be read"),
        (Reduced(np.zeros, ((2**40,),)), "which no image file needs"),
    ):
        path.write_bytes(pickle.dumps({b"data": data, b"labels": labels(12)}, protocol=2))
        with pytest.raises(UserError, match=message):
            load_image_dataset("cifar10", data_dir=tmp_path)
    # "The next object is the 2,147,483,647th": the unpickler in C makes room for all of them.
    path.write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    with pytest.raises(UserError, match="cannot be read"):
        load_image_dataset("cifar10", data_dir=tmp_path)
    batch = {b"data": rows, b"labels": np.array(labels(12))}  # no list, but integers
    path.write_bytes(pickle.dumps(batch, protocol=2))
    assert len(load_image_dataset("cifar10", data_dir=tmp_path).splits["train"]) == 54


def test_files_that_claim_or_unpack_to_more_than_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "MAX_UNPACKED", 2**16)
    monkeypatch.setattr(image_files, "CHUNK_BYTES", 2**12)
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_idx(folder, pictures(40, 28, 1), labels(40), "train", False)
    # 2**64 bytes, which 64 bits count as none.
    header = struct.pack(">4I", 2051, 2**31, 2**31, 4)
    (folder / "train-images-idx3-ubyte").write_bytes(header)
    with pytest.raises(UserError, match="damaged or cut short"):
        load_image_dataset("mnist", data_dir=tmp_path)
    (folder / "train-images-idx3-ubyte").unlink()
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(header + bytes(2**20)))
    with pytest.raises(UserError, match="unpacks to more"):
        load_image_dataset("mnist", data_dir=tmp_path)
    packed.write_bytes(packed.read_bytes()[:60] + b"nonsense" + packed.read_bytes()[68:])
    with pytest.raises(UserError, match="damaged"):
        load_image_dataset("mnist", data_dir=tmp_path)


def test_archives_that_are_damaged_within_or_unpack_to_too_much_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CIFAR10["binary archive"](tmp_path / "cifar10")
    archive = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:9000] + b"nonsense" * 100 + whole[9800:])
    with pytest.raises(UserError, match=r"tar\.gz is damaged"):
        load_image_dataset("cifar10", data_dir=tmp_path)
    archive.write_bytes(whole)
    monkeypatch.setattr(image_files, "MAX_UNPACKED", 2**12)
    monkeypatch.setattr(image_files, "CHUNK_BYTES", 2**12)
    with pytest.raises(UserError, match="unpacks to more"):
        load_image_dataset("cifar10", data_dir=tmp_path)


def cut(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("binary", "data_batch_2.bin"),
        ("pickles", "data_batch_2"),
        ("binary archive", "cifar-10-binary.tar.gz"),
        ("Parquet", "train-00000-of-00001.parquet"),
        ("class folders", "train/cat/00003.png"),
    ],
)
def test_a_truncated_file_is_said_to_be_one(layout: str, file: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar10"
    CIFAR10[layout](folder)
    cut(folder / file)
    with pytest.raises(UserError) as caught:
        load_image_dataset("cifar10", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_idx_file_is_said_to_be_one(zipped: bool, tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_idx(folder, pictures(40, 28, 1), labels(40), "train", zipped)
    cut(folder / f"train-images-idx3-ubyte{'.gz' * zipped}")
    with pytest.raises(UserError, match="damaged"):
        load_image_dataset("mnist", data_dir=tmp_path)
    cut(folder / f"train-images-idx3-ubyte{'.gz' * zipped}", 0)
    with pytest.raises(UserError, match="damaged"):
        load_image_dataset("mnist", data_dir=tmp_path)
