"""ONNX files of a NiN text classifier, checked against PyTorch before they are written.

The model computes on texts laid end to end, with operations that have no counterpart in ONNX.
`PaddedClassifier` is the same computation, over the same weights, on padded batches. What is
written is a folder that needs neither torch nor this package: see `scripts/classify_onnx.py`.

Letters in shapes: B texts, T tokens, C channels, K classes, S n-gram sizes.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from nin_text import models, report
from nin_text.blocks import pooling_weights
from nin_text.configuration import MULTI_LABEL
from nin_text.data import Split, load_data_of_run, load_split
from nin_text.errors import UserError
from nin_text.evaluation import batches_by_length, pad
from nin_text.ngrams import NGramEvidence, ngram_buckets
from nin_text.options import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    ExportOptions,
    check,
    run_metrics,
    trained_max_length,
)
from nin_text.splits import SPLIT_SEED
from nin_text.text import NiNTextForSequenceClassification
from nin_text.tokenization import encode, truncation

logger = logging.getLogger(__name__)

NGRAM_TABLE = "model.ngrams.weight"  # in an exported file
MODEL_FILE, INT8_FILE = "model.onnx", "model.int8.onnx"
ABOUT_FILE = "classifier.json"

OUTPUTS = ("probabilities", "logits")

FLOAT32_BOUND = 1e-5  # see `difference`
INT8_BOUND = 0.003  # 0.3 points of accuracy
PROBE_LENGTHS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 129, 256, 400)
VALIDATION_TEXTS = 5000  # most texts on which int8 is checked
COMPARED_TEXTS = 256  # of these, texts on which float32 is compared with PyTorch
RANDOM_TEXTS, RANDOM_TOKENS = 1000, 128  # what int8 is checked on where there are no data
BATCH_TOKENS = 8192


# ---- the model on padded batches ---------------------------------------------------------------


class PaddedClassifier(nn.Module):
    """A classifier on padded tensors alone: what can be exported. Its weights are the model's."""

    def __init__(self, model: NiNTextForSequenceClassification) -> None:
        super().__init__()
        self.model = model
        self.multi_label = model.config.problem_type == MULTI_LABEL

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and logits, (B, K) each, of (B, T) ids padded on either side.

        A text without tokens has logits of zero, as in the model.
        """
        ids, mask = align(input_ids, attention_mask)  # (B, T + 1) each
        x, weights = self.encode(ids, mask)  # (B, T + 1, C), (B, T + 1)
        pooled = (weights[:, None] @ x)[:, 0]  # (B, C)
        total = weights.sum(dim=1, keepdim=True)  # (B, 1), zero for a text without tokens
        classifier, ngrams = self.model.classifier, self.model.ngrams
        logits = pooled @ classifier.weight.t() + total * classifier.bias  # (B, K)
        if ngrams is not None:
            logits = logits + ngram_evidence(ngrams, ids, mask) + total * ngrams.bias
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1), logits

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The vector of each token, (B, T, C), and its weight in the pooled text, (B, T)."""
        nin = self.model.nin
        x, rows = nin.embeddings(ids), mask[..., None]  # (B, T, E), (B, T, 1)
        for block, pool in zip(nin.blocks, nin.config.pool, strict=True):
            x = block(x, rows)
            if pool:
                x, rows = max_pool(x, rows)  # (B, T / 2, C), (B, T / 2, 1)
        x = nin.final_norm(x) * rows
        if nin.stride > 1:  # each token gets the row that stands for it
            x = x[:, torch.arange(ids.shape[1], device=x.device) // nin.stride]
        scores = None if nin.attention is None else nin.attention(x)[..., 0]  # (B, T)
        return x, pooling_weights(mask, scores)


def align(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the tokens of each text to the left, wherever its padding is.

    Pooling windows start at the first token, and n-grams do not cross padding.

    Returns:
        (B, T + 1) ids, zeros after the text, and (B, T + 1) bool, true where there is a token: one
        column more, as onnxruntime computes nothing of texts that all have none.
    """
    inside = attention_mask > 0
    length = input_ids.shape[1] + 1
    # Padding goes to yet another column, which is cut off.
    place = torch.where(inside, inside.long().cumsum(dim=1) - 1, length)
    room = torch.zeros_like(F.pad(input_ids, (0, 2)))  # (B, T + 2)
    ids = room.scatter(1, place, input_ids)[:, :-1]
    positions = torch.arange(length, device=ids.device)
    return ids, positions[None] < inside.long().sum(dim=1, keepdim=True)


def max_pool(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`max_pool_rows` of (B, T, C) with a mask (B, T, 1): a text of L tokens keeps ceil(L / 2).

    Not `F.max_pool1d`, whose export would fix T.
    """
    x = F.pad(x.masked_fill(~rows, -torch.inf), (0, 0, 1, 1), value=-torch.inf)  # (B, T + 2, C)
    pooled = torch.maximum(torch.maximum(x[:, :-2:2], x[:, 1:-1:2]), x[:, 2::2])
    rows = rows[:, ::2]
    return pooled.masked_fill(~rows, 0), rows


def ngram_evidence(branch: NGramEvidence, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, K): what `NGramEvidence` adds to the logits, without its bias.

    Args:
        branch: the weights.
        ids: (B, T), texts on the left.
        mask: (B, T) bool, true where there is a token.
    """
    found = ngram_buckets(ids, mask, branch.size, branch.buckets)  # (S, B, T)
    # Each distinct bucket of a text counts once: in sorted order, the first of each run.
    buckets = torch.cat(found.unbind(), dim=1).sort(dim=1).values  # (B, S T), -1: there is none
    first = buckets != F.pad(buckets[:, :-1], (1, 0), value=-1)
    weights = F.embedding(buckets.clamp(min=0), branch.weight)  # (B, S T, K)
    return (first[:, None].to(weights.dtype) @ weights)[:, 0]


def write_onnx(model: nn.Module, path: Path, outputs: Sequence[str]) -> None:
    """A model of input_ids and attention_mask as an ONNX file; batch size and length are free."""
    ids = torch.zeros((3, 11), dtype=torch.int64)  # any sizes above one would do
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with _errors_only("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            (ids, torch.ones_like(ids)),
            dynamo=True,
            dynamic_shapes=(free, free),
            input_names=["input_ids", "attention_mask"],
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    program.save(path)


def quantize(source: Path, target: Path) -> None:
    """Tables (embeddings, n-grams) and matrices of an ONNX file in eight bits.

    In int8, but for the table of n-grams: most of its weights are so much smaller than the largest
    that even steps would make zeros of them. These are in float8.

    Convolutions stay float32: the integer ones of onnxruntime are three times as slow, and their
    weights are few.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = onnx.load(source, load_external_data=False).graph.node
    ngrams = [node.name for node in nodes if NGRAM_TABLE in node.input]
    with _errors_only(None):  # it advises a shape inference that changes nothing here
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["Gather", "MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=ngrams,
        )
    if ngrams:
        model = onnx.load(target)
        _ngrams_in_float8(model.graph)
        onnx.save(model, target)


def _ngrams_in_float8(graph: Any) -> None:
    """Make the n-gram table of an ONNX graph one of bytes, each the place of a value of float8.

    onnxruntime looks up bytes and floats on every processor, numbers of type float8 not. A table
    that was saved in float8 loses nothing.
    """
    from onnx import TensorProto, helper, numpy_helper

    (table,) = (tensor for tensor in graph.initializer if tensor.name == NGRAM_TABLE)
    (lookup,) = (node for node in graph.node if NGRAM_TABLE in node.input)
    weights = torch.from_numpy(numpy_helper.to_array(table).copy())  # (buckets, K)
    largest = max(float(weights.abs().max()), torch.finfo(torch.float32).tiny)
    # A power of two: values of float8 stay such.
    scale = 2.0 ** math.ceil(math.log2(largest / torch.finfo(torch.float8_e4m3fn).max))
    codes = (weights / scale).to(torch.float8_e4m3fn).view(torch.uint8)  # (buckets, K)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = every.float().nan_to_num() * scale  # (256,)
    graph.initializer.remove(table)
    for name, array in (("ngram_codes", codes), ("ngram_values", values)):
        graph.initializer.append(numpy_helper.from_array(array.numpy(), name))
    nodes = (
        helper.make_node("Gather", ["ngram_codes", lookup.input[1]], ["codes_of_texts"]),
        helper.make_node("Cast", ["codes_of_texts"], ["places_of_texts"], to=TensorProto.INT32),
        helper.make_node("Gather", ["ngram_values", "places_of_texts"], lookup.output),
    )
    place = list(graph.node).index(lookup)
    graph.node.remove(lookup)
    for node in reversed(nodes):
        graph.node.insert(place, node)


@contextmanager
def _errors_only(name: str | None) -> Iterator[None]:
    """Silence the warnings that a logger, or the root logger, passes on."""
    source = logging.getLogger(name)
    level = source.level
    source.setLevel(logging.ERROR)
    try:
        yield
    finally:
        source.setLevel(level)


def open_session(path: Path) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


# ---- checks ------------------------------------------------------------------------------------


def probes(
    vocab_size: int, pad_token_id: int, rows: Sequence[np.ndarray] = ()
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (input_ids, attention_mask) on which ONNX must equal PyTorch.

    Random tokens of the whole vocabulary, and of a few words that recur: single texts and ragged
    batches, padded on the right and on the left, with texts that have no token; then `rows`.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    for words in (vocab_size, min(vocab_size, 8)):
        texts = [rng.integers(0, words, length) for length in PROBE_LENGTHS]
        for part in (texts[1:2], texts[-1:], texts[4:9], texts):
            yield pad(part, pad_token_id)
        ids, mask = pad(texts, pad_token_id)
        yield ids[:1], mask[:1]  # a text without tokens alone
        yield ids.flip(1), mask.flip(1)  # padding on the left
    for batch in batches_by_length([len(row) for row in rows], BATCH_TOKENS):
        yield pad([rows[i] for i in batch], pad_token_id)


def difference(
    model: NiNTextForSequenceClassification,
    session: Any,
    batches: Iterator[tuple[Tensor, Tensor]],
) -> dict[str, float]:
    """How far ONNX is from PyTorch.

    Returns:
        The largest difference of a `probability` and of a `logit`, both divided by the largest
        logit of the batch, or by one where all are smaller: float32 rounds large logits, which
        are sums over thousands of n-grams, by as much more.
    """
    probability = logit = 0.0
    with torch.inference_mode():
        for ids, mask in batches:
            expected = model(input_ids=ids, attention_mask=mask).logits  # (B, K)
            multi_label = model.config.problem_type == MULTI_LABEL
            answers = expected.sigmoid() if multi_label else expected.softmax(dim=1)
            got_answers, got = map(torch.from_numpy, run(session, ids, mask))
            scale = max(1.0, float(expected.abs().max()))
            # max() of Python drops a NaN that comes second.
            probability = float(
                np.maximum(probability, (got_answers - answers).abs().max() / scale)
            )
            logit = float(np.maximum(logit, (got - expected).abs().max() / scale))
    return {"probability": probability, "logit": logit}


def run(session: Any, ids: Tensor, mask: Tensor) -> list[np.ndarray]:
    """Probabilities and logits, (B, K) each."""
    return session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})


def predict(session: Any, rows: Sequence[np.ndarray], pad_token_id: int) -> np.ndarray:
    """(n, K) probabilities of texts, in the order given."""
    batches = batches_by_length([len(row) for row in rows], BATCH_TOKENS)
    parts = [
        run(session, *pad([rows[i] for i in batch], pad_token_id))[0]
        for batch in tqdm(batches, desc="checking int8", disable=None, leave=False)
    ]
    order = np.concatenate([np.array(batch) for batch in batches])
    return np.concatenate(parts)[np.argsort(order)]


def compare_int8(
    float32: np.ndarray, int8: np.ndarray, labels: Sequence[int] | None, multi_label: bool = False
) -> dict[str, Any]:
    """What int8 loses, as a share of texts.

    Args:
        float32, int8: (n, K) probabilities.
        labels: class indices of the texts; None if only the answers can be compared. Lost is
            then the share of answers that differ, which what accuracy loses cannot exceed.
        multi_label: whether each class is an answer of its own.
    """
    before, after = ((p >= 0.5) if multi_label else p.argmax(axis=1) for p in (float32, int8))
    if labels is None:
        agreement = float((before == after).mean())
        return {"checked": "agreement", "agreement": agreement, "lost": 1 - agreement}
    exact, rounded = float((before == labels).mean()), float((after == labels).mean())
    return {
        "checked": "accuracy",
        "accuracy_float32": exact,
        "accuracy_int8": rounded,
        "lost": exact - rounded,
    }


# ---- from a run folder to an exported folder ---------------------------------------------------


def export_onnx(options: ExportOptions) -> dict[str, Any]:
    """Write a folder with which onnxruntime and tokenizers alone classify texts.

    It holds model.onnx, tokenizer.json, classifier.json (labels by index, ids, the figures of the
    checks) and, with `int8`, model.int8.onnx. The figures are in the ONNX files' metadata, too.

    Returns:
        The summary that `scripts/export_onnx.py` prints.

    Raises:
        UserError: whatever the user can mend; if float32 differs from PyTorch, and then nothing
            is written; if int8 is not accurate enough, and then all but model.int8.onnx is.
    """
    _check_installed()
    check(options)
    run = models.local(options.model)
    model, tokenizer = _load(run)
    folder = options.output_dir
    if folder is None:
        if not Path(options.model).is_dir():
            raise UserError(f"{options.model} is no local folder; say where to with --output-dir")
        folder = Path(options.model) / "onnx"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder} is a file; name a folder")
    if (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} holds a model, which is kept; name another --output-dir")
    max_length = truncation(tokenizer, trained_max_length(run)).get("max_length")
    sample = _validation_sample(options, model, run)
    rows, labels, source = _encoded(sample, tokenizer, max_length, model.config.vocab_size)
    about: dict[str, Any] = {
        "labels": models.label_names(model),
        "multi_label": model.config.problem_type == MULTI_LABEL,
        "pad_token_id": model.config.pad_token_id or 0,
        "empty_token_id": tokenizer.unk_token_id or 0,
        "max_length": max_length,
    }
    place = folder.resolve()
    aside = place.with_name(f".{place.name}.saving")  # beside it: a refusal leaves no folder
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        logger.info("exporting %s", options.model)
        write_onnx(PaddedClassifier(model), aside / MODEL_FILE, OUTPUTS)
        session = open_session(aside / MODEL_FILE)
        real = rows[:COMPARED_TEXTS] if sample else []
        batches = probes(model.config.vocab_size, about["pad_token_id"], real)
        about["float32"] = _checked_float32(difference(model, session, batches))
        if options.int8:
            quantize(aside / MODEL_FILE, aside / INT8_FILE)
            sessions = session, open_session(aside / INT8_FILE)
            float32, int8 = (predict(s, rows, about["pad_token_id"]) for s in sessions)
            figures = compare_int8(float32, int8, labels, about["multi_label"])
            about["int8"] = {"texts": len(rows), "source": source, "bound": INT8_BOUND, **figures}
        complaint = _complaint(about.get("int8"), folder, about["multi_label"])
        if complaint:
            (aside / INT8_FILE).unlink()
        _describe(aside, about)
        _save_tokenizer(tokenizer, aside / TOKENIZER_FILE)
        sizes = {path.name: path.stat().st_size for path in aside.glob("*.onnx")}
        _move(aside, folder, about)
    except (UserError, OSError):
        raise
    except Exception as error:
        _say_if_full(aside, error)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if complaint:
        raise UserError(complaint)
    logger.info("the exported model is in %s", folder)
    summary = {"model": options.model, "output_dir": str(folder), "bytes": sizes}
    return summary | {name: about[name] for name in ("float32", "int8") if name in about}


def _say_if_full(folder: Path, error: Exception) -> None:
    """Where a disk is full onnxruntime leaves files cut short, and fails when it reads them.

    Raises:
        OSError: if there is less room left than the folder takes already.
    """
    taken = sum(path.stat().st_size for path in folder.iterdir())
    if shutil.disk_usage(folder).free < taken:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def _check_installed() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; pip install 'nin-text[onnx]'")


def _load(folder: str) -> tuple[NiNTextForSequenceClassification, PreTrainedTokenizerBase]:
    """A NiN classifier in float32, single- or multi-label, and its tokenizer."""
    model, tokenizer = models.load(folder, multi_label=True)
    if not isinstance(model, NiNTextForSequenceClassification):
        raise UserError(
            f"{folder} is a model of type {model.config.model_type}; this exports NiN text models "
            f"alone, optimum (pip install optimum-onnx) exports those of transformers"
        )
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {folder} has no tokenizer.json; train with another one")
    return model.float(), tokenizer


def _validation_sample(
    options: ExportOptions, model: NiNTextForSequenceClassification, run: str
) -> tuple[Split, str] | None:
    """Labelled texts for the check of int8, and where they are from; None if there are none."""
    names = models.label_names(model)
    multi_label = model.config.problem_type == MULTI_LABEL
    if options.dataset is not None:
        if multi_label:
            raise UserError(
                f"{options.model} is a multi-label model and a data set has one label for each "
                f"text; leave out --dataset"
            )
        part, source, _ = load_split(options.dataset, "validation", names, **options.arguments())
    elif multi_label or not options.int8:
        return None
    else:
        try:
            data = load_data_of_run(run_metrics(run), **options.arguments())
        except UserError as error:
            logger.warning("note: the validation texts of the run are not to be had (%s)", error)
            return None
        if data.label_names != names:
            logger.warning("note: %s has other classes than the model", data.name)
            return None
        part, source = data.splits["validation"], data.source
    order = np.random.default_rng(SPLIT_SEED).permutation(len(part))[:VALIDATION_TEXTS]
    return part.take(order.tolist()), source


def _encoded(
    sample: tuple[Split, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    vocab_size: int,
) -> tuple[list[np.ndarray], list[int] | None, str]:
    """Token ids, labels, and what the texts are; random tokens without labels if need be."""
    if sample is not None:
        part, source = sample
        return encode(tokenizer, part.texts, max_length), part.labels, f"validation texts: {source}"
    rng = np.random.default_rng(SPLIT_SEED)
    lengths = rng.integers(1, RANDOM_TOKENS + 1, RANDOM_TEXTS)
    return [rng.integers(0, vocab_size, n) for n in lengths], None, "random tokens"


def _checked_float32(found: dict[str, float]) -> dict[str, float]:
    worst = max(found.values(), key=lambda value: (value != value, value))  # NaN is worst
    if not worst <= FLOAT32_BOUND:
        raise UserError(
            f"ONNX differs from PyTorch by {worst:.1e} of the largest logit, where "
            f"{FLOAT32_BOUND:.0e} is allowed; nothing was written, try another version of "
            f"onnxruntime"
        )
    logger.info("float32: differs from PyTorch by %.1e of the largest logit or less", worst)
    return found | {"bound": FLOAT32_BOUND}


def _complaint(figures: dict[str, Any] | None, folder: Path, multi_label: bool) -> str | None:
    """Why there is no int8 model, in one sentence; None if it may be written."""
    if figures is None:
        return None
    what = f"{figures['texts']:,} texts ({figures['source']})"
    advice = "use model.onnx"
    if figures["checked"] == "accuracy":
        accuracies = f"{figures['accuracy_int8']:.4f}, float32 {figures['accuracy_float32']:.4f}"
        verdict = f"has accuracy {accuracies} on {what}"
    else:
        verdict = f"agrees with float32 in {100 * figures['agreement']:.2f} % of answers to {what}"
        if not multi_label:  # no data set has labels for such a model
            advice = "give labelled texts with --dataset to check its accuracy instead"
    logger.info("int8: %s", verdict)
    if figures["lost"] <= INT8_BOUND:
        return None
    return (
        f"the int8 model {verdict}; {100 * INT8_BOUND:.1f} points are allowed, so it was not "
        f"written (all else is in {folder}): {advice}, or --no-int8 to leave it out"
    )


def _describe(aside: Path, about: dict[str, Any]) -> None:
    """State in each ONNX file what it was checked for and what its outputs mean."""
    import onnx

    for path, figures in ((aside / MODEL_FILE, "float32"), (aside / INT8_FILE, "int8")):
        if path.is_file():
            proto = onnx.load(path)
            plain = {key: about[key] for key in about if key not in ("float32", "int8")}
            values = plain | {"parity": about[figures]}
            onnx.helper.set_model_props(
                proto,
                {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()},
            )
            onnx.save(proto, path)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """tokenizer.json as it is, without the cut and the padding of the last call."""
    backend = cast(Any, tokenizer).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(path))


def _move(aside: Path, folder: Path, about: dict[str, Any]) -> None:
    """Put the files in place; classifier.json, written last, says that they belong together."""
    folder.mkdir(exist_ok=True)
    for name in (ABOUT_FILE, INT8_FILE):  # an int8 model of before would be another model's
        (folder / name).unlink(missing_ok=True)
    report.move_files(aside, folder, last=MODEL_FILE)
    report.write_json(folder / ABOUT_FILE, about)
