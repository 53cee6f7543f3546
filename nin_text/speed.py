"""How near to the machine's limit we are: what `scripts/benchmark.py` measures.

Everything that is compared is timed in the same process in interleaved rounds, so that whatever
else the machine does hits all alike; figures are medians over rounds, ratios medians of the ratios
of each round. The limit is the machine's own: the rate of a plain matrix product, and that of the
tokenizer, measured in the same rounds.

Letters in shapes: n texts, N tokens, K classes.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from nin_text import report
from nin_text.data import TextDataset, load_text_dataset
from nin_text.options import PRESET_NAMES, QUICK_LIMIT, QUICK_ROUNDS, BenchmarkOptions, check
from nin_text.packed import FoldedBlock, PackedClassifier
from nin_text.predictor import MODEL_FILES, Predictor
from nin_text.processes import available_cores, environment_of_threads
from nin_text.run_folder import dataset_slug
from nin_text.speed_report import FASTTEXT, INT8, MINILM, SVM, headline, to_markdown
from nin_text.speed_systems import (
    Answer,
    fasttext,
    minilm,
    minilm_int8,
    padded,
    random_model,
    random_weights,
    recipe_of,
    svm,
    training_step,
)

logger = logging.getLogger(__name__)

LEAST_SECONDS = 0.3  # a fast system repeats its texts until a measurement lasts this long
SAMPLE, SLOW_SAMPLE = 4096, 64  # texts; transformers get every so many-th of them
QUICK_SAMPLE, QUICK_SLOW_SAMPLE = 1000, 16
PRODUCT = 2048  # rows and columns of the matrices whose product is the peak
GPU_TIMES = 4  # as many on a GPU, which is done with a smaller product sooner than it is started
REVIEW_TOKENS = 230  # of a text whose latency is measured
SINGLES, SLOW_SINGLES = 40, 4  # texts answered one by one in each round
LENGTHS = (100, 1_000, 10_000, 100_000, 1_000_000)
CLASSES = (2, 10, 100, 1_000, 10_000)
VOCABULARIES = (1_000, 10_000, 100_000)
CORPORA = (100, 1_000, 10_000, 100_000)
LONG_TEXT = 5_000_000  # characters of the text whose memory is measured
MEMORY_PROBES = 3  # processes whose memory is looked at; the largest counts
GROWTH_TOKENS = 1_000_000  # that each size is measured with, at least

# Run in processes of their own: what the first answer and the memory of a process are.
_COLD = """
import sys, time
started = time.perf_counter()
import torch
imported = time.perf_counter()
from nin_text import Predictor
Predictor(sys.argv[1], device=sys.argv[2]).predict([sys.argv[3]])
print(imported - started, time.perf_counter() - started)
"""
_MEMORY = """
import json, sys
from pathlib import Path
import torch
from nin_text import Predictor
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
libraries = peak()
predictor = Predictor(sys.argv[1], device=sys.argv[2])
predictor.predict(json.loads(Path(sys.argv[3]).read_text()))
print(libraries, peak())
"""


@dataclass
class Entry:
    """Something whose speed is measured.

    Attributes:
        run: does all of it once.
        documents, tokens: that one run goes through; of a matrix product, its operations.
        single: answers one text; None if its latency is not measured.
        slow: answers but a few texts one by one in each round.
    """

    run: Callable[[], Any]
    documents: int
    tokens: int
    single: Callable[[str], Any] | None = None
    slow: bool = False


def answering(answer: Answer, texts: Sequence[str], tokens: int, *, slow: bool = False) -> Entry:
    """A system that answers these texts at once, and one by one."""
    return Entry(partial(answer, texts), len(texts), tokens, lambda text: answer([text]), slow)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        torch.cuda.synchronize()


def _logits(classifier: PackedClassifier, job: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return classifier.logits(*job)


def with_defaults(options: BenchmarkOptions) -> BenchmarkOptions:
    """A copy in which --quick has set what it stands for."""
    if not options.quick:
        return options
    return replace(options, limit=options.limit or QUICK_LIMIT, rounds=QUICK_ROUNDS)


def benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Measure, and leave benchmark.json and benchmark.md in the output folder.

    Args:
        options: see `BenchmarkOptions`.

    Returns:
        The folder and the ratios that matter most.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    check(options)
    options = with_defaults(options)
    dataset = load_text_dataset(options.dataset, **options.arguments())
    folder = options.output_dir or Path("benchmarks") / dataset_slug(options)
    folder.mkdir(parents=True, exist_ok=True)
    threads = options.threads or available_cores()
    before = torch.get_num_threads()
    with environment_of_threads(threads), TemporaryDirectory() as scratch:
        torch.set_num_threads(threads)
        try:
            result = _Benchmark(options, dataset, Path(scratch)).measure()
        finally:
            torch.set_num_threads(before)
    report.write_json(folder / "benchmark.json", result)
    report.write_text(folder / "benchmark.md", to_markdown(result))
    logger.info("%s", to_markdown(result))
    return {"output_dir": str(folder), **headline(result)}


class _Benchmark:
    """One run of everything; `measure` is what there is to call."""

    def __init__(self, options: BenchmarkOptions, dataset: TextDataset, scratch: Path) -> None:
        self.options, self.dataset, self.scratch = options, dataset, scratch
        self.quick = options.quick
        self.texts = evenly(dataset.splits["test"].texts, QUICK_SAMPLE if self.quick else SAMPLE)
        self.few = evenly(self.texts, QUICK_SLOW_SAMPLE if self.quick else SLOW_SAMPLE)
        self.folders = {
            name: random_model(name, dataset, scratch / report.slug(name)) for name in options.model
        }
        self.predictors = {
            name: Predictor(folder, device=options.device) for name, folder in self.folders.items()
        }
        self.any_predictor = next(iter(self.predictors.values()))

    def measure(self) -> dict[str, Any]:
        self.notes: list[str] = []
        fits: dict[str, float] = {}
        entries = self._peaks()
        for name in self.predictors:
            entries |= self._stages(name)
        entries |= self._others(fits)
        logger.info("timing %d entries in %d rounds", len(entries), self.options.rounds)
        reviews = self._reviews()
        rounds = [
            time_round(entries, reviews)
            for _ in tqdm(range(self.options.rounds), desc="rounds", disable=None, leave=False)
        ]
        return {
            "command": report.command(),
            "environment": report.environment(self.any_predictor.device),
            "dataset": self.dataset.name,
            "data_source": self.dataset.source,
            "rounds": self.options.rounds,
            "texts": len(self.texts),
            "slow_texts": len(self.few),
            "models": {name: self._about(name) for name in self.predictors},
            "entries": {
                name: {
                    "documents": entry.documents,
                    "tokens": entry.tokens,
                    "seconds": [each[name]["seconds"] for each in rounds],
                    "latencies": [s for each in rounds for s in each[name]["latencies"]],
                }
                for name, entry in entries.items()
            },
            "fit_seconds": fits,
            "growth": self._growth(),
            "cold": {name: self._cold(name) for name in self.predictors},
            "memory": {name: self._memory(name) for name in self.predictors},
            "notes": self.notes,
        }

    def _peaks(self) -> dict[str, Entry]:
        """Plain matrix products, whose "tokens" are operations."""
        device = self.any_predictor.device
        size = PRODUCT * (1 if device.type == "cpu" else GPU_TIMES)
        entries = {}
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            run = partial(_product, a, b, torch.empty_like(a))
            entries[f"matrix product, {name}"] = Entry(run, 0, 2 * size**3)
        return entries

    def _stages(self, name: str) -> dict[str, Entry]:
        """A model end to end, in float32, as it is defined, by stage, and in training."""
        predictor, texts, folder = self.predictors[name], self.texts, self.folders[name]
        tokenizer, classifier = predictor.tokenizer, predictor.classifier
        jobs = list(predictor.jobs(texts))
        encoded = [tokenizer.encode(job) for job in jobs]
        count, tokens = len(texts), int(sum(lengths.sum() for _, lengths in encoded))
        entries = {name: answering(predictor.predict_proba, texts, tokens)}
        if predictor.precision == "bf16":
            exact = Predictor(folder, device=self.options.device, precision="fp32")
            entries[f"{name}, float32"] = answering(exact.predict_proba, texts, tokens)
        entries[f"{name}, padded batches"] = Entry(
            partial(padded(folder, predictor), texts), count, tokens
        )
        entries[f"{name}: its tokenizer"] = Entry(
            partial(tokenizer.tokenizer.encode_batch_fast, texts), count, tokens
        )
        entries[f"{name}: tokenize"] = Entry(
            partial(predictor.map, tokenizer.encode, jobs),
            count,
            tokens,
            lambda text: tokenizer.encode([text]),
        )
        network = copy.copy(classifier)
        network.ngram_size = 0
        for stage, part in (("network", network), ("network and n-grams", classifier)):
            entries[f"{name}: {stage}"] = Entry(
                partial(predictor.map, partial(_logits, part), encoded), count, tokens
            )
        step = training_step(predictor, self.dataset, recipe_of(name, self.dataset))
        return entries | {f"{name}: training": Entry(*step)}

    def _others(self, fits: dict[str, float]) -> dict[str, Entry]:
        """The systems that we are compared with; seconds of fitting are put into `fits`."""
        tokenizer = self.any_predictor.tokenizer
        tokens, few = (int(tokenizer.encode(t)[1].sum()) for t in (self.texts, self.few))
        entries = {}
        for name, make in ((FASTTEXT, fasttext), (SVM, svm)):
            answer, seconds = make(self.dataset, self.scratch)
            if answer is None:
                self.notes.append(f"{name} is left out: it is not installed.")
                continue
            fits[name] = seconds
            entries[name] = answering(answer, self.texts, tokens)
        transformer, note = minilm(self.dataset)
        self.notes.append(note)
        entries[MINILM] = answering(transformer, self.few, few, slow=True)
        int8 = None if self.quick else minilm_int8(transformer, self.scratch)
        if int8 is not None:
            entries[INT8] = answering(int8, self.few, few, slow=True)
        elif not self.quick:
            self.notes.append(f"{INT8} is left out: onnxruntime is not installed.")
        # Only now: it has been exported, which is done on the CPU.
        transformer.model.to(self.any_predictor.device)
        return entries

    def _reviews(self) -> list[str]:
        """Texts of about `REVIEW_TOKENS` tokens."""
        tokenizer = self.any_predictor.tokenizer
        lengths = tokenizer.encode(self.texts)[1]
        nearest = np.argsort(np.abs(lengths - REVIEW_TOKENS), kind="stable")[:SINGLES]
        return [self.texts[i] for i in nearest]

    def _about(self, name: str) -> dict[str, Any]:
        """Operations of a token, and bytes on disk."""
        predictor, folder = self.predictors[name], self.folders[name]
        defined, done = operations(folder, predictor.classifier)
        return {
            "precision": predictor.precision,
            "operations_per_token_defined": defined,
            "operations_per_token_done": done,
            "bytes": sum((folder / file).stat().st_size for file in MODEL_FILES),
            "random_weights": name in PRESET_NAMES,
        }

    def _growth(self) -> dict[str, list[dict[str, float]]]:
        """Rates of the first model as one thing grows; each the best of three."""
        predictor = self.any_predictor
        unit = " ".join(self.texts)
        tokens_of = predictor.tokenizer.encode
        scale = 10 if self.quick else 1
        per_character = int(tokens_of([unit])[1][0]) / len(unit)
        growth: dict[str, list[dict[str, float]]] = {key: [] for key in ("length", "corpus")}
        for length in LENGTHS[: 4 if self.quick else 5]:
            characters = int(length / per_character)
            long = unit * (characters // len(unit) + 1)
            documents = [long[:characters]] * max(1, GROWTH_TOKENS // scale // length)
            seconds = best_of_three(partial(predictor.logits, documents))
            rate = int(tokens_of(documents)[1].sum()) / seconds
            growth["length"].append({"tokens": length, "tokens_per_second": rate})
        for size in CORPORA[: 3 if self.quick else 4]:
            corpus = (self.texts * (size // len(self.texts) + 1))[:size]
            seconds = best_of_three(partial(predictor.logits, corpus))
            growth["corpus"].append({"documents": size, "documents_per_second": size / seconds})
        for key, values in (("classes", CLASSES), ("vocab_size", VOCABULARIES)):
            growth[key] = [
                self._grown(key, value) for value in values[: -1 if self.quick else None]
            ]
        return growth

    def _grown(self, key: str, value: int) -> dict[str, float]:
        """Tokens per second of the small preset's network and n-grams with one size changed."""
        sizes = {"classes": 2, "vocab_size": 30_000} | {key: value}
        predictor = self.any_predictor
        classifier = random_classifier(predictor, **sizes)
        rng = np.random.default_rng(0)
        lengths = predictor.tokenizer.encode(self.texts)[1]
        jobs = []
        for part in np.array_split(lengths, max(1, lengths.sum() // 30_000)):
            # Word frequencies fall off as one over the rank, or nearly so (Zipf's law).
            ranks = rng.random(part.sum()) * np.log(sizes["vocab_size"])
            jobs.append((np.minimum(np.exp(ranks), sizes["vocab_size"] - 1).astype(np.int32), part))
        seconds = best_of_three(partial(predictor.map, partial(_logits, classifier), jobs))
        return {key: value, "tokens_per_second": int(lengths.sum()) / seconds}

    def _cold(self, name: str) -> list[list[float]]:
        """Seconds to import torch, and to the first answer, of fresh processes."""
        return [
            _child(_COLD, str(self.folders[name]), self.options.device, self.texts[0])
            for _ in range(1 if self.quick else 5)
        ]

    def _memory(self, name: str) -> dict[str, float]:
        """Peak memory in MiB of a process: once torch is imported, and once it has answered.

        The highest of several processes: what the allocator keeps differs between them.
        """
        peaks: dict[str, float] = {}
        unit = " ".join(self.texts)
        long = unit * (LONG_TEXT // len(unit) + 1)
        documents = {"the sample": self.texts, "a text of 5 MB": [long[:LONG_TEXT]]}
        if self.quick:
            del documents["a text of 5 MB"]
        for what, texts in documents.items():
            file = self.scratch / "texts.json"
            file.write_text(json.dumps(texts), encoding="utf-8")
            children = [
                _child(_MEMORY, str(self.folders[name]), self.options.device, str(file))
                for _ in range(1 if self.quick else MEMORY_PROBES)
            ]
            peaks["libraries"], peaks[what] = map(max, zip(*children, strict=True))
        return peaks


def _child(program: str, *arguments: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return [float(value) for value in done.stdout.split()]


def evenly(texts: Sequence[str], size: int) -> list[str]:
    """Up to `size` of the texts, of every length alike, in random order.

    A few texts then take as long, on average, as many of them.
    """
    by_length = sorted(texts, key=len)
    places = np.linspace(0, len(texts) - 1, min(size, len(texts))).round().astype(int)
    return [by_length[i] for i in np.random.default_rng(0).permutation(places)]


def time_round(entries: dict[str, Entry], reviews: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One turn of every entry: seconds of one run, and of each single text."""
    timed = {}
    for name, entry in entries.items():
        seconds: list[float] = []
        while sum(seconds) < LEAST_SECONDS:
            started = time.perf_counter()
            entry.run()
            seconds.append(time.perf_counter() - started)
        # The first is slowed down by what the entry before has left in the caches.
        steady = seconds[1:] or seconds
        latencies = []
        for review in reviews[: SLOW_SINGLES if entry.slow else SINGLES]:
            if entry.single is None:
                break
            started = time.perf_counter()
            entry.single(review)
            latencies.append(time.perf_counter() - started)
        timed[name] = {"seconds": sum(steady) / len(steady), "latencies": latencies}
    return timed


def best_of_three(run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def operations(folder: Path, classifier: PackedClassifier) -> tuple[int, int]:
    """Floating-point operations of the matrix products for a token: as defined, and as done.

    A folded convolution is defined as products and done as a sum of table rows.
    """
    with safe_open(folder / "model.safetensors", "np") as file:
        names = [name for name in file.keys() if name.startswith("nin.blocks.")]  # noqa: SIM118
        shapes = [file.get_slice(name).get_shape() for name in names]
    defined = sum(2 * math.prod(shape) for shape in shapes if len(shape) > 1)
    encoder = classifier.encoder
    if not isinstance(encoder, FoldedBlock):
        return defined, defined
    return defined, sum(2 * weight.numel() for weight, _ in encoder.linears)


def random_classifier(predictor: Predictor, classes: int, vocab_size: int) -> PackedClassifier:
    """The small preset with random weights, of any size, in the precision of a predictor."""
    config, weights = random_weights("nin-text-small", classes, vocab_size)
    dtype = torch.bfloat16 if predictor.precision == "bf16" else torch.float32
    weights = {name: value.to(predictor.device) for name, value in weights.items()}
    return PackedClassifier.folded(config, weights, dtype)
