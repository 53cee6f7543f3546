"""The files in which MNIST, CIFAR and SVHN are handed out, plain, packed or in an archive.

They come from elsewhere: nothing that a file says is believed before it is seen, neither how much
there is to come nor what is to be done with it.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from nin_text.errors import UserError, in_one_line

# Unpacked; the largest file that is read from an archive has 180 MB. What claims more is an attack.
MAX_UNPACKED = 2**31
CHUNK_BYTES = 2**24

# The files of a data set: name, without folders and .gz, to what reads it.
Files = dict[str, Callable[[], bytes]]
# Images, of one size (n, H, W, C) or of many (H, W, C) each, and their labels: indices or names.
Splits = dict[str, tuple[np.ndarray | list[np.ndarray], list[Any]]]


@dataclass
class Found:
    """What a reader finds: splits of uint8 images, and class names by index if it brings them."""

    splits: Splits
    label_names: Sequence[str] | None = None
    train_images: int = 0  # of the whole data set, of which this may be a part
    notes: list[str] = field(default_factory=list)  # see `ImageDataset`


def files_of(folder: Path) -> Files:
    """The files in a folder, and in CIFAR's own folders and archives within it.

    Archives are read in place: nothing is extracted, so a name in one cannot point anywhere.
    """
    return dict(_files(folder))


def read_known_format(files: Files) -> Found | None:
    """What the files of a known data set hold, as they are handed out; None if they are others.

    Raises:
        UserError: if a file is missing or cut short, or asks for what no data needs.
        Exception: whatever else a damaged file provokes.
    """
    for read in (_read_idx, _read_cifar_binary, _read_cifar_pickles, _read_mat):
        if (found := read(files)) is not None:
            return found
    return None


def _files(folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for path in sorted([*folder.iterdir(), *folder.glob("cifar-*/*")]):
        if path.name.endswith((".tar.gz", ".tgz", ".tar")):
            if path.name.startswith("cifar-"):
                yield from _members(path)
        elif path.is_file():
            name = path.name.removesuffix(".gz")
            yield name, (partial(_gunzip, path) if name != path.name else path.read_bytes)


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    def read(member: tarfile.TarInfo) -> bytes:
        with tarfile.open(archive) as file:
            content = file.extractfile(member)
            return b"" if content is None else _bounded(content, f"{member.name} in {archive}")

    try:
        with tarfile.open(archive) as file:
            members = [member for member in file.getmembers() if member.isfile()]
            assert file.fileobj is not None
            while file.fileobj.read(CHUNK_BYTES):
                pass  # at its end is the checksum
    except Exception as error:  # of tarfile, or of what unpacks it
        reason = in_one_line(error)
        raise UserError(f"{archive} is damaged ({reason}); download it again") from error
    for member in members:
        yield Path(member.name).name, partial(read, member)


def _gunzip(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return _bounded(file, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from error


def _bounded(file: IO[bytes] | gzip.GzipFile, name: str) -> bytes:
    """All of a file that is unpacked while it is read, which may be larger than it looks."""
    chunks: list[bytes] = []
    while chunk := file.read(CHUNK_BYTES):
        chunks.append(chunk)
        if len(chunks) * CHUNK_BYTES > MAX_UNPACKED:
            raise UserError(f"{name} unpacks to more than {MAX_UNPACKED >> 30} GB; is it damaged?")
    return b"".join(chunks)


def _read_idx(files: Files) -> Found | None:
    """MNIST's own format (LeCun et al. 1998): a header of big-endian sizes, then the bytes."""
    names = {"train": "train", "test": "t10k"}
    if f"{names['train']}-images-idx3-ubyte" not in files:
        return None
    splits: Splits = {}
    for split, name in names.items():
        if f"{name}-images-idx3-ubyte" in files:
            images = _idx(files, f"{name}-images-idx3-ubyte", 3)
            labels = _idx(files, f"{name}-labels-idx1-ubyte", 1)
            splits[split] = (images[..., None], labels.tolist())
    return Found(splits)


def _idx(files: Files, name: str, dims: int) -> np.ndarray:
    if name not in files:
        raise UserError(f"the file {name} is missing beside the others")
    data = files[name]()
    shape = tuple(int(size) for size in np.frombuffer(data[4 : 4 + 4 * dims], ">u4"))
    values = np.frombuffer(data, np.uint8, offset=min(len(data), 4 + 4 * dims))
    if data[:4] != bytes((0, 0, 8, dims)) or len(shape) != dims or values.size != math.prod(shape):
        raise UserError(f"{name} is damaged or cut short; download it again")
    return values.reshape(shape).copy()  # which may be written to, as torch wants it


def _read_cifar_binary(files: Files) -> Found | None:
    """The "binary version": records of one label byte (CIFAR-100: coarse, fine) and 3,072 bytes."""
    ten = {
        "train": [name for name in sorted(files) if name.startswith("data_batch_")],
        "test": ["test_batch.bin"],
    }
    ten["train"] = [name for name in ten["train"] if name.endswith(".bin")]
    hundred = {"train": ["train.bin"], "test": ["test.bin"]}
    for parts, label_bytes in ((ten, 1), (hundred, 2)):
        if not parts["train"] or parts["train"][0] not in files:
            continue
        splits: Splits = {}
        for split, names in parts.items():
            data = b"".join(files[name]() for name in names if name in files)
            if not data:
                continue
            if len(data) % (label_bytes + 3072):
                raise UserError(f"{names[0]} is cut short; download it again")
            records = np.frombuffer(data, np.uint8).reshape(-1, label_bytes + 3072)
            labels = records[:, label_bytes - 1].tolist()
            splits[split] = (_planes(records[:, label_bytes:]), labels)
        names_file = "batches.meta.txt" if label_bytes == 1 else "fine_label_names.txt"
        label_names = files[names_file]().decode().split() if names_file in files else None
        return Found(splits, label_names)
    return None


def _planes(values: np.ndarray) -> np.ndarray:
    """(n, 3072) red, green and blue planes to (n, 32, 32, 3)."""
    return np.ascontiguousarray(values.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UserError(f"a batch file asks for the encoding {encoding!r}, which none needs")
    return text.encode(encoding)


def _empty_array(*_: Any) -> np.ndarray:
    """An array that has still to get its shape, type and values."""
    return np.ndarray(0, np.uint8)


def _integers(code: str | bytes, *_: Any) -> np.dtype:
    code = code.decode() if isinstance(code, bytes) else code
    if not re.fullmatch("[iu][1248]", code):
        raise UserError(f"a batch file holds an array of type {code!r}, not of integers")
    return np.dtype(code)


class _ArrayUnpickler(pickle._Unpickler):
    """Reads pickles of dicts, lists, strings and arrays of integers, and refuses everything else.

    CIFAR's "Python version" is pickled. A pickle may name any function and have it called with
    anything; here it can name what an array is made of, and gets functions that do only that.
    It is the unpickler written in Python, since the one in C makes room for as many objects as the
    file says that there are.
    """

    ALLOWED: Mapping[tuple[str, str], Any] = {
        ("_codecs", "encode"): _encode,
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy", "ndarray"): "ndarray",  # an argument of _reconstruct
        ("numpy", "dtype"): _integers,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise UserError(f"a batch file asks for {module}.{name}, which no image file needs")
        return self.ALLOWED[module, name]


def _read_cifar_pickles(files: Files) -> Found | None:
    """The "Python version": pickled dicts of planes and labels."""
    ten = {
        "train": [f"data_batch_{i}" for i in range(1, 6) if f"data_batch_{i}" in files],
        "test": ["test_batch"],
    }
    hundred = {"train": ["train"], "test": ["test"]}
    for parts, key, meta, names_key in (
        (ten, b"labels", "batches.meta", b"label_names"),
        (hundred, b"fine_labels", "meta", b"fine_label_names"),
    ):
        if not parts["train"] or parts["train"][0] not in files:
            continue
        splits: Splits = {}
        for split, names in parts.items():
            batches = [_unpickle(files, name) for name in names if name in files]
            if batches:
                values = np.concatenate([batch[b"data"] for batch in batches])
                labels = [int(label) for batch in batches for label in batch[key]]
                splits[split] = (_planes(values.astype(np.uint8)), labels)
        label_names = None
        if meta in files:
            label_names = [name.decode() for name in _unpickle(files, meta)[names_key]]
        return Found(splits, label_names)
    return None


def _unpickle(files: Files, name: str) -> Any:
    return _ArrayUnpickler(io.BytesIO(files[name]()), encoding="bytes").load()


def _read_mat(files: Files) -> Found | None:
    """SVHN's cropped digits: X of (32, 32, 3, n), and y, which says 10 for the digit 0."""
    if "train_32x32.mat" not in files:
        return None
    from scipy.io import loadmat

    splits: Splits = {}
    for split in ("train", "test"):
        if f"{split}_32x32.mat" in files:
            data = loadmat(io.BytesIO(files[f"{split}_32x32.mat"]()))
            images = np.ascontiguousarray(data["X"].transpose(3, 0, 1, 2))
            splits[split] = (images, (data["y"].ravel().astype(int) % 10).tolist())
    return Found(splits)
