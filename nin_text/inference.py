"""Use a saved classifier: evaluate it on labelled data, or classify new texts."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nin_text import models, readers, report
from nin_text.data import load_split
from nin_text.device import keep_freed_memory, pick_device, use_bf16
from nin_text.errors import UserError
from nin_text.evaluation import classification_metrics, predict_logits, softmax
from nin_text.explain import contrast, explain, to_terminal
from nin_text.explain_page import Page
from nin_text.options import EvaluateOptions, PredictOptions, check, trained_max_length
from nin_text.text import NiNTextForSequenceClassification
from nin_text.tokenization import encode

logger = logging.getLogger(__name__)

EXPLAIN_FILE = "explanation.html"

# ---- evaluating --------------------------------------------------------------------------------


def load_model(
    options: EvaluateOptions | PredictOptions,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str], torch.dtype | None]:
    """Model on its device, tokenizer, class names by index, and the autocast dtype."""
    check(options)
    device = pick_device(options.device)
    keep_freed_memory()
    model, tokenizer = models.load(options.model)
    if options.max_length is None:
        options.max_length = trained_max_length(options.model)
    bf16 = use_bf16(options.precision, device)
    model.to(device)  # type: ignore[arg-type]
    return model, tokenizer, models.label_names(model), torch.bfloat16 if bf16 else None


def evaluate_text(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate a saved model on a split of a data set or on all of a file.

    Returns:
        `classification_metrics` with what they were obtained from.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    model, tokenizer, names, autocast = load_model(options)
    part, source, notes = load_split(
        options.dataset,
        options.split,
        names,
        **options.arguments(),
    )
    rows = encode(tokenizer, part.texts, options.max_length, progress="encoding")
    started = time.perf_counter()
    logits = predict_logits(
        model,
        rows,
        pad_token_id=tokenizer.pad_token_id or 0,
        batch_tokens=options.batch_tokens,
        autocast=autocast,
        progress="evaluating",
    )
    result = {
        "dataset": options.dataset,
        "data_source": source,
        "split": "all rows" if Path(options.dataset).is_file() else options.split,
        "notes": notes,
        "model": options.model,
        "precision": "fp32" if autocast is None else "bf16",
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
            result | {"command": report.command(), "environment": report.environment(model.device)},
        )
    return result


# ---- predicting --------------------------------------------------------------------------------


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
    model, tokenizer, names, autocast = load_model(options)
    if options.explain and not isinstance(model, NiNTextForSequenceClassification):
        raise UserError("--explain needs a NiN model: only its answers are a sum over tokens")
    texts: Iterable[str]
    if options.texts or options.file is not None:
        texts = _read_texts(options)
    else:
        texts = (line.rstrip("\r\n") for line in lines or ())
    if options.limit is not None:
        texts = itertools.islice(texts, options.limit)
    page = None if path is None else Page(names, "Explanations", f"Answers of {options.model}.")
    try:
        yield from _answers(options, model, tokenizer, names, autocast, texts, page)
    finally:  # also if the reader of our answers has seen enough
        if page is not None and page.texts:
            assert path is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(path, page.html())
            shown = f"{len(page.sections):,} of " * (page.texts > len(page.sections))
            logger.info("%s explains %s%s texts", path, shown, f"{page.texts:,}")


def _answers(
    options: PredictOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    autocast: torch.dtype | None,
    texts: Iterable[str],
    page: Page | None,
) -> Iterator[dict[str, Any]]:
    for portion in _portions(texts):
        logits = predict_logits(
            model,
            encode(tokenizer, portion, options.max_length),
            pad_token_id=tokenizer.pad_token_id or 0,
            batch_tokens=options.batch_tokens,
            autocast=autocast,
        )
        for text, probabilities in zip(portion, softmax(logits), strict=True):
            answer = int(probabilities.argmax())
            result = {
                "text": text,
                "label": names[answer],
                "probability": round(float(probabilities[answer]), 6),
                "probabilities": {
                    name: round(float(p), 6) for name, p in zip(names, probabilities, strict=True)
                },
            }
            if isinstance(model, NiNTextForSequenceClassification) and options.explain:
                result["evidence"] = _explain(model, tokenizer, text, answer, names, options, page)
            yield result


def _explain(
    model: NiNTextForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    answer: int,
    names: list[str],
    options: PredictOptions,
    page: Page | None,
) -> list[list[Any]]:
    explanation = explain(model, tokenizer, text, options.max_length)
    if page is not None:
        page.add(explanation)
    else:
        colored = to_terminal(explanation, answer)
        print(f"{names[answer]}: {colored}", file=sys.stderr, flush=True)
    scores = contrast(explanation, answer)
    return [
        [explanation.text[start:end], round(float(score), 5)]
        for (start, end), score in zip(explanation.spans, scores, strict=True)
    ]


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


def _portions(texts: Iterable[str], size: int = 512) -> Iterator[list[str]]:
    """Lists of growing length up to `size`: the first answer comes at once, the rest fast."""
    iterator, length = iter(texts), 1
    while portion := list(itertools.islice(iterator, length)):
        yield portion
        length = min(2 * length, size)
