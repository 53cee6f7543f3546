"""Raw texts in, labels and probabilities out, as fast as this machine can.

A model of one block is read without transformers, whose import takes longer than everything else
here (`packed_files.py`); any other is loaded as everywhere (`models.load`). Texts are
tokenized by looking up words (`word_table.py`) and go through the network without padding, its
convolution folded into tables (`packed.py`). The answers are those of
`NiNTextForSequenceClassification`: equal within rounding in float32, and in bfloat16 within what
that type can tell.

Letters in shapes: n texts, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Barrier, Lock, local
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from nin_text.device import pick_device, return_freed_memory, use_bf16
from nin_text.errors import UserError, in_one_line
from nin_text.evaluation import softmax
from nin_text.hub import is_hub_id
from nin_text.options import (
    CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    model_folder,
    trained_max_length,
)
from nin_text.packed import BlocksEncoder, FoldedBlock, PackedClassifier
from nin_text.packed_files import read_packed
from nin_text.word_table import WordTable, clean, cut_and_fill, ids_end_to_end

if TYPE_CHECKING:
    from nin_text.text import NiNTextForSequenceClassification

# Characters of a job, which one thread works on. Every thread gets as many jobs of the same size,
# so that none works on while others have nothing left; of small calls as many as are worth it.
LEAST_JOB, MOST_JOB = 2**14, 2**18
LONG_TEXT = 2**17  # characters of a text that is asked for alone and worked on by all threads
GPU_THREADS = 4  # that tokenize for a GPU: two left it waiting, and sixteen were hardly faster
UNLIMITED = 10**9  # tokens
_of_thread = local()
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
MOST_TABLE_BYTES = 2**28  # of a folded convolution; a larger one is computed


class Predictor:
    """A saved NiN classifier that answers fast.

    Safe to be called from several threads. Each call is spread over the processor's cores if it
    brings enough text.

    Args:
        model: ready-made model, folder of a training run, or hub id of a NiN.
        device: "cpu", "cuda", or "auto" for the best there is. "mps" means the CPU.
        precision: of matrix products and tables: "fp32", "bf16", or "auto" for bf16 where the
            processor multiplies it natively.
        max_length: cut texts to this many tokens, 0 for none; that of training if None.

    Attributes:
        label_names: K class names; columns of the probabilities.
        precision: "fp32" or "bf16".
        threads: how many jobs are worked on at once.
        tokenizer, classifier: the two stages of a job.

    Raises:
        UserError: if there is no such model, or if it is no NiN with one class for each text.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        precision: str = "auto",
        max_length: int | None = None,
    ) -> None:
        self.folder = folder = _folder(str(model))
        loaded = None
        read = read_packed(folder)
        if read is None:
            loaded = _load(folder)
            read = loaded.config.to_dict(), loaded.state_dict()
        config, weights = read
        names = {int(i): str(name) for i, name in config["id2label"].items()}
        self.label_names = [names[i] for i in sorted(names)]
        self.device = pick_device(device)
        if self.device.type == "mps":  # which lacks segment_reduce; a CPU is fast enough for NiN
            self.device = torch.device("cpu")
        bf16 = use_bf16(precision, self.device)
        self.precision = "bf16" if bf16 else "fp32"
        if max_length is None:
            max_length = trained_max_length(str(folder))
        self.max_length = max_length
        self.tokenizer = PackedTokenizer(folder, max_length)
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.classifier = _pack(config, weights, dtype, self.device, folder, loaded)
        del loaded, read, weights
        return_freed_memory()  # several times what the tables made of the weights take
        self.threads = torch.get_num_threads() if self.device.type == "cpu" else GPU_THREADS
        self._pool: ThreadPoolExecutor | None = None
        self._pool_process = 0  # that its threads are of
        self._lock = Lock()

    def predict(self, texts: Iterable[str]) -> list[str]:
        """The most probable class of each text."""
        return [self.label_names[i] for i in self.logits(texts).argmax(axis=1)]

    def predict_proba(self, texts: Iterable[str]) -> np.ndarray:
        """(n, K) float32 class probabilities."""
        return softmax(self.logits(texts)).astype(np.float32)

    def logits(self, texts: Iterable[str]) -> np.ndarray:
        """(n, K) float32 logits, whose softmax `predict_proba` gives."""
        if isinstance(texts, (str, Mapping)) or hasattr(texts, "columns"):  # those of a table
            raise TypeError(f"texts must be a list of strings, not one {type(texts).__name__}")
        texts = texts if isinstance(texts, Sequence) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise TypeError(f"texts must be strings, but number {i} is of type {kind}")
        if len(texts) == 1:
            return self._answer(texts, self.map if len(texts[0]) > LONG_TEXT else map)
        answers = self.map(partial(self._answer, map_fn=map), self.jobs(texts))
        return np.concatenate([np.zeros((0, len(self.label_names)), np.float32), *answers])

    def fingerprint(self) -> str:
        """A hash of weights, configuration and tokenizer, wherever they lie."""
        digest = hashlib.sha256()
        for name in MODEL_FILES:
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()[:16]

    def map(self, work: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
        """What `work` makes of each job: several at once on a core each, a single one on all.

        Jobs of a job are done by its own thread: all others may be waiting for theirs.
        """
        jobs = list(jobs)
        if len(jobs) > 1 and self.threads > 1 and not hasattr(_of_thread, "is_worker"):
            return list(self._threads().map(work, jobs))
        return [work(job) for job in jobs]

    def jobs(self, texts: Sequence[str]) -> Iterator[Sequence[str]]:
        """Consecutive texts of about as many characters as one core should work on."""
        lengths = np.array([len(text) for text in texts] or [0])
        total = int(lengths.sum())
        count = self.threads * math.ceil(total / (self.threads * MOST_JOB))
        size = math.ceil(total / max(1, min(count, total // LEAST_JOB)))
        job = (lengths.cumsum() - 1) // max(1, size)
        bounds = [0, *(np.flatnonzero(job[1:] != job[:-1]) + 1).tolist(), len(texts)]
        return (texts[start:end] for start, end in pairwise(bounds) if start < end)

    def _answer(self, texts: Sequence[str], map_fn: Callable[..., Iterable[Any]]) -> np.ndarray:
        return self.classifier.logits(*self.tokenizer.encode(texts, map_fn), map_fn)

    def _threads(self) -> ThreadPoolExecutor:
        """Threads that each compute on one core, started when first needed."""
        with self._lock:
            if self._pool is None or self._pool_process != os.getpid():  # threads are not forked
                started = Barrier(self.threads + 1)

                def use_one_core() -> None:
                    _of_thread.is_worker = True
                    torch.set_num_threads(1)
                    torch.get_num_threads()  # a thread takes its number when it is first asked
                    started.wait()

                # The number also becomes that of all threads that have not used torch yet. This
                # is undone as soon as every thread here has taken its own.
                before = torch.get_num_threads()
                self._pool = ThreadPoolExecutor(self.threads, "nin-text", use_one_core)
                self._pool_process = os.getpid()
                for _ in range(self.threads):
                    self._pool.submit(int)
                started.wait()
                torch.set_num_threads(before)
            return self._pool


class PackedTokenizer:
    """The tokenizer of a saved model: texts to ids end to end.

    Args:
        folder: holds tokenizer.json and tokenizer_config.json.
        max_length: cut texts to this many tokens; None or 0 keeps what the tokenizer allows.
    """

    def __init__(self, folder: Path, max_length: int | None) -> None:
        try:
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
            settings = json.loads((folder / TOKENIZER_CONFIG_FILE).read_text(encoding="utf-8"))
        except Exception as error:
            raise UserError(f"no tokenizer could be loaded from {folder} ({error})") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        limit = min(max_length or UNLIMITED, settings.get("model_max_length") or UNLIMITED)
        self.limit = int(limit) if limit < UNLIMITED else None
        unknown = settings.get("unk_token")
        unknown = unknown["content"] if isinstance(unknown, dict) else unknown
        self.empty = (tokenizer.token_to_id(unknown) if unknown else None) or 0
        self.words = WordTable(tokenizer) if WordTable.supports(tokenizer) else None
        if self.words is None and self.limit is not None:
            tokenizer.enable_truncation(self.limit)
        self.tokenizer = tokenizer

    def encode(
        self, texts: Sequence[str], map_fn: Callable[..., Iterable[Any]] = map
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids end to end (N,) and how many each text has (n,); a text without any gets [UNK].

        `map_fn` is as in `WordTable.encode`.
        """
        if self.words is not None:
            return cut_and_fill(*self.words.encode(texts, map_fn), self.limit, self.empty)
        cleaned = [clean(text) for text in texts]
        return cut_and_fill(*ids_end_to_end(self.tokenizer, cleaned), None, self.empty)


# ---- reading what was saved ----------------------------------------------------------------------


def _folder(name: str) -> Path:
    """The folder of a model, downloaded if it is on the hub.

    Raises:
        UserError: if there is none.
    """
    folder = Path(model_folder(name))
    if folder.is_dir():
        return folder
    if not is_hub_id(name):
        raise UserError(f"there is no model {name!r}; give a ready-made model or a run folder")
    from nin_text.model_files import local_folder  # imports transformers, which takes seconds

    try:
        return Path(local_folder(name))
    except Exception as error:
        raise UserError(f"no model could be loaded from {name!r} ({in_one_line(error)})") from error


def _load(folder: Path) -> NiNTextForSequenceClassification:
    """A model that cannot be read without transformers, or is damaged.

    Raises:
        UserError: if it is no NiN that answers with one class for each text, or damaged.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no model folder: it has no readable config.json")
    try:
        kind = str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        kind = "nin_text"  # `models.load` says what is wrong
    if kind != "nin_text":
        raise UserError(
            f"{folder} holds a model of type {kind[:50]}; only NiN models can be packed"
        )
    from nin_text.models import load  # imports transformers, which takes seconds

    model: Any = load(str(folder))[0]
    return model


def _pack(
    config: dict[str, Any],
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    model: NiNTextForSequenceClassification | None,
) -> PackedClassifier:
    """The network of a saved model; folded if it can be, else on the model's own blocks."""
    weights = {
        name: (value.float() if value.is_floating_point() else value).to(device)
        for name, value in weights.items()
    }
    table_bytes = (
        sum(config["kernel_sizes"][0])
        * config["vocab_size"]
        * config["block_channels"][0][0]
        * dtype.itemsize
    )
    if FoldedBlock.supports(config) and table_bytes <= MOST_TABLE_BYTES:
        return PackedClassifier.folded(config, weights, dtype)
    if model is None:  # its tables would be too large
        model = _load(folder)
    nin = model.nin.to(device)  # type: ignore[arg-type]
    encoder = BlocksEncoder(nin, None if dtype == torch.float32 else dtype)
    return PackedClassifier(encoder, weights, config)
