"""Use a saved classifier: evaluate it on labelled data, or classify new texts."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nin_text import readers
from nin_text.device import keep_freed_memory, pick_device, use_bf16
from nin_text.errors import UserError
from nin_text.evaluation import classification_metrics, predict_logits, softmax
from nin_text.hub import is_hub_id
from nin_text.options import (
    EvaluateOptions,
    PredictOptions,
    check,
    run_metrics,
    saved_nin,
    trained_max_length,
)
from nin_text.predictor import Predictor

if TYPE_CHECKING:  # imports transformers, which the answers of a saved NiN do without
    from nin_text.data import Split
    from nin_text.explain_page import Page

logger = logging.getLogger(__name__)

EXPLAIN_FILE = "explanation.html"
PORTION = 512  # texts that are answered at once

# ---- evaluating --------------------------------------------------------------------------------


def evaluate_text(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate a saved model on a split of a data set, on all of a file, or on its own test split.

    Returns:
        `classification_metrics` with what they were obtained from.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    from nin_text import report
    from nin_text.data import dataset_of_run, load_split
    from nin_text.sources import local_path

    predictor = PaddedPredictor(options)
    names = predictor.label_names
    own = run_metrics(options.model)
    dataset, all_rows = options.dataset, False
    if dataset is None:
        dataset, part, source, notes = _own_split(options, own, names)
    else:
        part, source, notes = load_split(dataset, options.split, names, **options.arguments())
        all_rows = local_path(dataset).is_file()
        learned = dataset_of_run(own)
        if all_rows and learned and local_path(learned).resolve() == local_path(dataset).resolve():
            notes.append("the model was trained on most of these rows; leave out --dataset")
            logger.warning("note: %s", notes[-1])
    rows = predictor.encode(part.texts, progress="encoding")
    started = time.perf_counter()
    logits = predictor.logits_of_rows(rows, progress="evaluating")
    result = {
        "dataset": dataset,
        "data_source": source,
        "split": "all rows" if all_rows else options.split,
        "notes": notes,
        "model": options.model,
        "precision": predictor.precision,
        "seconds": round(time.perf_counter() - started, 2),
        **classification_metrics(logits, part.labels, names),
        "peak_memory_mb": round(report.peak_memory_mb(), 1),
    }
    if options.output_dir is not None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        matrix = result["confusion_matrix"]
        report.plot_confusion(matrix, names, options.output_dir / "evaluation.png")
        report.write_json(
            options.output_dir / "evaluation.json",
            result
            | {
                "command": report.command(),
                "environment": report.environment(predictor.model.device),
            },
        )
    return result


def _own_split(
    options: EvaluateOptions, metrics: dict[str, Any], label_names: Sequence[str]
) -> tuple[str, Split, str, list[str]]:
    """A split of what a run was trained on: the data set, the split, where it was found, notes.

    Args:
        metrics: of the run.
        label_names: of its model.
    """
    from nin_text.data import load_data_of_run
    from nin_text.splits import subset

    try:
        dataset = load_data_of_run(metrics, data_dir=options.data_dir)
    except UserError as error:
        reason = f"{options.model} has no data of its own ({error})"
        raise UserError(f"{reason}; name others with --dataset") from error
    name, before = dataset.name, metrics.get("labelled_fingerprint")
    if dataset.label_names != list(label_names) or before not in (None, dataset.fingerprint()):
        raise UserError(
            f"{name} has changed since {options.model} was trained on it, so that its test split "
            f"is gone; name data with --dataset"
        )
    part = dataset.splits["test" if options.split == dataset.tested_on else options.split]
    if options.limit is not None:
        part = subset(part, options.limit)
    return name, part, dataset.source, dataset.notes


# ---- predicting --------------------------------------------------------------------------------


class PaddedPredictor:
    """Any sequence classifier of transformers, behind what a `Predictor` offers.

    Args:
        options: of the model.

    Raises:
        UserError: if the model cannot be loaded.
    """

    def __init__(self, options: EvaluateOptions | PredictOptions) -> None:
        from nin_text import models

        check(options)
        device = pick_device(options.device)
        keep_freed_memory()
        folder = models.local(options.model)
        self.model, self.tokenizer = models.load(folder)
        self.model.to(device)  # type: ignore[arg-type]
        self.label_names = models.label_names(self.model)
        self.precision = "bf16" if use_bf16(options.precision, device) else "fp32"
        self.batch_tokens = options.batch_tokens
        self.max_length = options.max_length
        if self.max_length is None:
            self.max_length = trained_max_length(folder)

    def encode(self, texts: Sequence[str], progress: str | None = None) -> Sequence[np.ndarray]:
        """The token ids of each text, cut to `max_length`; a progress bar if it has a title."""
        from nin_text.tokenization import encode

        return encode(self.tokenizer, texts, self.max_length, progress=progress)

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """(n, K) float32 logits, whose softmax `predict_proba` gives."""
        return self.logits_of_rows(self.encode(texts))

    def logits_of_rows(self, rows: Sequence[np.ndarray], progress: str | None = None) -> np.ndarray:
        """(n, K) float32 logits of encoded texts; batches are of texts of similar length."""
        if not len(rows):
            return np.zeros((0, len(self.label_names)), dtype=np.float32)
        return predict_logits(
            self.model,
            rows,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            batch_tokens=self.batch_tokens,
            autocast=torch.bfloat16 if self.precision == "bf16" else None,
            progress=progress,
        )

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """(n, K) float32 class probabilities."""
        return softmax(self.logits(texts)).astype(np.float32)

    def fingerprint(self) -> str:
        """A hash of weights, configuration and tokenizer, wherever they lie."""
        config = self.model.config.to_dict()
        for name in ("_name_or_path", "transformers_version", "dtype"):
            config.pop(name, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab())
        digest.update(vocabulary.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def load_predictor(options: PredictOptions) -> Predictor | PaddedPredictor:
    """What answers: packed for a saved NiN, padded for any other classifier.

    Raises:
        UserError: if the model cannot be loaded.
    """
    check(options)
    folder = options.model
    if is_hub_id(folder):  # which may be of either kind
        from nin_text.models import local

        folder = local(folder)
    if not saved_nin(folder):
        return PaddedPredictor(options)
    return Predictor(
        folder,
        device=options.device,
        precision=options.precision,
        max_length=options.max_length,
    )


def predict_text(
    options: PredictOptions, lines: Iterable[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Classify texts as they come.

    Args:
        options: the model, and the texts or the file to read.
        lines: texts if the options have none, each with or without a line end; they are taken in
            small portions, so that they may come from a pipe.

    Yields:
        For each text, in order: text, label, probability, probabilities by class name, and with
        `explain` the evidence of each token for the label. With `explain="html"` a page is written
        at the end, or when the iterator is closed.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    path = _page_path(options)
    predictor: Predictor | PaddedPredictor
    explainer = None
    if options.explain:  # by the model that also answers
        predictor = PaddedPredictor(options)
        explainer = _Explainer(predictor, options.model, path)
    else:
        predictor = load_predictor(options)
    texts: Iterable[str]
    if options.texts or options.file is not None:
        texts = _read_texts(options)
    else:
        texts = (line.rstrip("\r\n") for line in lines or ())
    if options.limit is not None:
        texts = itertools.islice(texts, options.limit)
    try:
        for portion in _portions(texts):
            for text, probabilities in zip(portion, predictor.predict_proba(portion), strict=True):
                result = _result(text, probabilities, predictor.label_names)
                if explainer is not None:
                    result["evidence"] = explainer.explain(text, int(probabilities.argmax()))
                yield result
    finally:  # also if the reader of our answers has seen enough
        if explainer is not None:
            explainer.close()


def _result(text: str, probabilities: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    answer = int(probabilities.argmax())
    rounded = [round(float(p), 6) for p in probabilities]
    return {
        "text": text,
        "label": names[answer],
        "probability": rounded[answer],
        "probabilities": dict(zip(names, rounded, strict=True)),
    }


class _Explainer:
    """Shows the evidence of each token: on standard error, or on a page that `close` writes.

    Raises:
        UserError: if the model is no NiN.
    """

    def __init__(self, predictor: PaddedPredictor, model: str, path: Path | None) -> None:
        from nin_text.explain_page import Page
        from nin_text.text import NiNTextForSequenceClassification

        if not isinstance(predictor.model, NiNTextForSequenceClassification):
            raise UserError("--explain needs a NiN model: only its answers are a sum over tokens")
        self.model: NiNTextForSequenceClassification = predictor.model
        self.predictor, self.path = predictor, path
        self.page: Page | None = None
        if path is not None:
            about = f"Answers of {model}."
            self.page = Page(predictor.label_names, "Explanations", about)

    def explain(self, text: str, answer: int) -> list[list[Any]]:
        """The tokens of a text, each with its evidence for the answer."""
        from nin_text.explain import contrast, explain, printable, to_terminal

        predictor = self.predictor
        explanation = explain(self.model, predictor.tokenizer, text, predictor.max_length)
        if self.page is not None:
            self.page.add(explanation)
        else:
            colored = to_terminal(explanation, answer)
            name = predictor.label_names[answer]
            print(f"{printable(name)}: {colored}", file=sys.stderr, flush=True)
        scores = contrast(explanation, answer)
        return [
            [explanation.text[start:end], round(float(score), 5)]
            for (start, end), score in zip(explanation.spans, scores, strict=True)
        ]

    def close(self) -> None:
        """Write the page, if there is one with anything on it."""
        from nin_text import report

        page = self.page
        if page is None or not page.texts:
            return
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(self.path, page.html())
        shown = f"{len(page.sections):,} of " * (page.texts > len(page.sections))
        logger.info("%s explains %s%s texts", self.path, shown, f"{page.texts:,}")


def _page_path(options: PredictOptions) -> Path | None:
    """Where the page is to be written, if one is asked for."""
    if options.explain != "html":
        if options.explain_file is not None:
            raise UserError("--explain-file names the page of --explain html; give both")
        return None
    path = options.explain_file or Path(EXPLAIN_FILE)
    if path.is_dir():
        raise UserError(f"{path} is a folder; --explain-file must name a file")
    return path


def _read_texts(options: PredictOptions) -> Iterable[str]:
    if options.file is None:
        return options.texts
    if options.texts:
        raise UserError("give texts or --file, not both (a pattern must be quoted)")
    paths = readers.find_files(options.file)
    return (
        text for path in paths for _, text, _ in readers.stream_texts(path, options.text_column)
    )


def _portions(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of growing length up to `PORTION`: the first answer comes at once, the rest fast."""
    iterator, length = iter(texts), 1
    while portion := list(itertools.islice(iterator, length)):
        yield portion
        length = min(2 * length, PORTION)
