"""The jobs behind the scripts: train, evaluate, predict."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nin_text import data, models, readers, report
from nin_text.errors import UserError
from nin_text.evaluation import classification_metrics, predict_logits, softmax
from nin_text.explain import contrast, explain, to_terminal
from nin_text.options import (
    EvaluateOptions,
    PredictOptions,
    TrainOptions,
    check,
    with_recipe,
)
from nin_text.text import NiNTextForSequenceClassification, NiNTextPreTrainedModel
from nin_text.tokenization import encode
from nin_text.training import (
    EncodedTexts,
    TextTrainer,
    keep_freed_memory,
    last_checkpoint,
    pick_device,
    training_arguments,
    use_bf16,
)

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
OPTIONS_FILE = "options.json"
# Options that do not change what is trained: a resumed run may differ in them.
INCIDENTAL = {"data_dir", "device", "output_dir", "quiet", "resume", "verbose"}
SUMMARY = (
    "dataset model seed parameters validation_accuracy test_accuracy test_macro_f1 train_seconds "
    "peak_memory_mb output_dir"
).split()


# ---- training ----------------------------------------------------------------------------------


def train_text(options: TrainOptions) -> dict[str, Any]:
    """Train a text classifier and leave everything about it in a run folder.

    Returns:
        The summary that `scripts/train_text.py` prints; the folder's metrics.json has the rest.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    started = time.perf_counter()
    options = with_recipe(options)
    check(options)
    device = pick_device(options.device)
    folder = options.output_dir or Path("runs") / _run_name(options)
    checkpoint = _open_run_folder(folder, options)
    if options.resume and (finished := _finished(folder)) is not None:
        logger.info("%s is a finished run; nothing is left to do", folder)
        return finished
    keep_freed_memory()
    set_seed(options.seed)
    dataset = _load(options)
    train = dataset.splits["train"]
    model, tokenizer = models.build(options, train.texts, train.labels, dataset.label_names)
    encoded = {
        split: EncodedTexts(
            encode(tokenizer, part.texts, options.max_length, progress=f"encoding {split}"),
            part.labels,
        )
        for split, part in dataset.splits.items()
        if split != "unsupervised"
    }
    trainer = _trainer(options, folder, device, model, tokenizer, encoded)
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        "%s: %s parameters, vocabulary %s, %s steps a pass on %s",
        options.model,
        f"{parameters:,}",
        f"{len(tokenizer):,}",
        f"{len(trainer.get_train_dataloader()):,}",
        trainer.args.device,
    )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        logger.error("stopped; the same command with --resume goes on from the last whole epoch")
        raise
    metrics: dict[str, Any] = {
        "dataset": options.dataset,
        "data_source": dataset.source,
        "data_fingerprint": dataset.fingerprint(),
        "notes": dataset.notes,
        "label_names": dataset.label_names,
        "train_examples": len(train),
        "model": options.model,
        "architecture": type(model).__name__,
        "parameters": parameters,
        "seed": options.seed,
        "epochs_run": round(trainer.state.epoch or 0),
        "best_epoch": _best_epoch(trainer),
        "steps": trainer.state.global_step,
        "train_seconds": round(trainer.seconds, 2),
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "command": _command(),
        "options": _plain(options),
        "environment": report.environment(trainer.args.device),
        "history": trainer.state.log_history,
    }
    for split in ("validation", "test"):
        clock = time.perf_counter()
        logits = trainer.logits(encoded[split], progress=f"evaluating {split}")
        seconds = time.perf_counter() - clock
        metrics[split] = classification_metrics(logits, encoded[split].labels, dataset.label_names)
        metrics[split]["seconds"] = round(seconds, 2)
    metrics["peak_memory_mb"] = round(report.peak_memory_mb(), 1)
    metrics["total_seconds"] = round(time.perf_counter() - started, 2)
    if trainer.is_world_process_zero():
        _leave(folder, trainer.best_model, tokenizer, metrics)
    return _summary(metrics, folder)


def _run_name(options: TrainOptions) -> str:
    parts = [Path(options.dataset).name, Path(options.model).name, f"seed{options.seed}"]
    return "-".join(re.sub(r"[^\w.-]+", "_", part).strip("._-") for part in parts)


def _plain(options: Any) -> dict[str, Any]:
    """Options as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def _command() -> str:
    # The folder with the data is part of what was run, though it is not an argument.
    folder = os.environ.get("NIN_TEXT_DATA")
    prefix = f"NIN_TEXT_DATA={shlex.quote(folder)} " if folder else ""
    return f"{prefix}python {shlex.join(sys.argv)}"


def _open_run_folder(folder: Path, options: TrainOptions) -> Path | None:
    """Make the run folder, and the checkpoint to go on from if the run is to be resumed."""
    essential = {k: v for k, v in _plain(options).items() if k not in INCIDENTAL}
    record, checkpoints = folder / OPTIONS_FILE, folder / "checkpoints"
    if options.resume:
        if not record.is_file():
            logger.warning("there is no run to resume in %s; starting one", folder)
        else:
            _check_same(essential, record, folder)
            checkpoint = last_checkpoint(checkpoints)
            if checkpoint is not None:
                logger.info("resuming from %s", checkpoint)
            elif not (folder / METRICS_FILE).is_file():
                logger.warning("%s holds no whole checkpoint yet; starting anew", folder)
            return checkpoint
    elif last_checkpoint(checkpoints) is not None:
        logger.warning("an unfinished run in %s is discarded (--resume would continue it)", folder)
    shutil.rmtree(checkpoints, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(record, essential)
    return None


def _check_same(essential: dict[str, Any], record: Path, folder: Path) -> None:
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{record} is damaged; start anew without --resume") from error
    for name, value in essential.items():
        if before.get(name) != value:
            raise UserError(
                f"the run in {folder} has {name.replace('_', ' ')} {before.get(name)}, not {value};"
                f" repeat its options to resume it, or give another --output-dir"
            )


def _finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that came to its end, None otherwise."""
    try:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    options = json.loads((folder / OPTIONS_FILE).read_text(encoding="utf-8"))
    same = all(metrics["options"].get(name) == value for name, value in options.items())
    return _summary(metrics, folder) if same and not (folder / "checkpoints").exists() else None


def _load(options: TrainOptions) -> data.TextDataset:
    dataset = data.load_text_dataset(
        options.dataset,
        data_dir=options.data_dir,
        text_column=options.text_column,
        label_column=options.label_column,
        drop_empty=options.drop_empty,
        limit=options.limit,
    )
    sizes = ", ".join(f"{len(part):,} {split}" for split, part in dataset.splits.items())
    logger.info("%s from %s: %s", dataset.name, dataset.source, sizes)
    logger.info("classes: %s", ", ".join(dataset.label_names))
    for note in dataset.notes:
        logger.warning("note: %s", note)
    return dataset


def _trainer(
    options: TrainOptions,
    folder: Path,
    device: torch.device,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: dict[str, EncodedTexts],
) -> TextTrainer:
    arguments = training_arguments(
        folder / "checkpoints",
        epochs=options.epochs,
        batch_size=options.batch_size,
        gradient_accumulation=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup=options.warmup,
        seed=options.seed,
        bf16=use_bf16(options.precision, device),
        device=device,
    )
    return TextTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        pad_token_id=tokenizer.pad_token_id or 0,
        batch_tokens=options.batch_tokens,
        similar_lengths=not isinstance(model, NiNTextPreTrainedModel),
        ema_decay=options.ema_decay,
        patience=options.patience,
    )


def _best_epoch(trainer: TextTrainer) -> int | None:
    step = trainer.state.best_global_step
    epochs = [e["epoch"] for e in trainer.state.log_history if e["step"] == step]
    return round(epochs[0]) if epochs else None


def _leave(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict[str, Any],
) -> None:
    """Put the results into the run folder; metrics.json, written last, says that it is whole."""
    aside = folder / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    report.plot_curves(metrics["history"], aside / "curves.png")
    matrix = metrics["test"]["confusion_matrix"]
    report.plot_confusion(matrix, metrics["label_names"], aside / "confusion.png")
    (aside / "README.md").write_text(report.model_card(metrics), encoding="utf-8")
    (folder / METRICS_FILE).unlink(missing_ok=True)
    for path in aside.iterdir():
        path.replace(folder / path.name)
    aside.rmdir()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    report.write_json(folder / METRICS_FILE, metrics)
    logger.info("the model, its metrics and plots are in %s", folder)


def _summary(metrics: dict[str, Any], folder: Path) -> dict[str, Any]:
    values = {
        **metrics,
        "validation_accuracy": metrics["validation"]["accuracy"],
        "test_accuracy": metrics["test"]["accuracy"],
        "test_macro_f1": metrics["test"]["macro_f1"],
        "output_dir": str(folder),
    }
    summary = {name: values[name] for name in SUMMARY}
    return summary | ({"notes": metrics["notes"]} if metrics["notes"] else {})


# ---- evaluating --------------------------------------------------------------------------------


def _load_model(
    options: EvaluateOptions | PredictOptions,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str], torch.dtype | None]:
    """Model on its device, tokenizer, class names by index, and the autocast dtype."""
    check(options)
    device = pick_device(options.device)
    keep_freed_memory()
    model, tokenizer = models.load(options.model)
    if options.max_length is None:
        options.max_length = models.trained_max_length(options.model)
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
    model, tokenizer, names, autocast = _load_model(options)
    part, source, notes = data.load_split(
        options.dataset,
        options.split,
        names,
        data_dir=options.data_dir,
        text_column=options.text_column,
        label_column=options.label_column,
        drop_empty=options.drop_empty,
        limit=options.limit,
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
        report.plot_confusion(matrix, names, options.output_dir / "confusion.png")
        report.write_json(
            options.output_dir / METRICS_FILE,
            result | {"command": _command(), "environment": report.environment(model.device)},
        )
    return result


# ---- predicting --------------------------------------------------------------------------------


def predict_text(options: PredictOptions, texts: Iterable[str] | None) -> Iterator[dict[str, Any]]:
    """Classify texts as they come.

    Args:
        options: the model, and the file to read if `texts` is None.
        texts: any strings; an iterator is read in small portions, so that it may be a pipe.

    Yields:
        For each text, in order: text, label, probability, probabilities by class name, and with
        `explain` the evidence of each token for the label.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    model, tokenizer, names, autocast = _load_model(options)
    if options.explain and not isinstance(model, NiNTextForSequenceClassification):
        raise UserError("--explain needs a NiN model: only its answers are a sum over tokens")
    if texts is None:
        texts = _read_texts(options)
    if options.limit is not None:
        texts = itertools.islice(texts, options.limit)
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
                result["evidence"] = _explain(model, tokenizer, text, answer, names, options)
            yield result


def _explain(
    model: NiNTextForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    answer: int,
    names: list[str],
    options: PredictOptions,
) -> list[list[Any]]:
    explanation = explain(model, tokenizer, text, options.max_length)
    colored = to_terminal(explanation, answer)
    print(f"{names[answer]}: {colored}", file=sys.stderr, flush=True)
    scores = contrast(explanation, answer)
    return [
        [explanation.text[start:end], round(float(score), 5)]
        for (start, end), score in zip(explanation.spans, scores, strict=True)
    ]


def _read_texts(options: PredictOptions) -> list[str]:
    path = options.file
    if path is None:
        raise UserError("there is nothing to classify; give texts, --file, or standard input")
    if path.suffix.lower() == ".txt":
        return readers.read_lines(path)
    table = readers.read_file(path)
    column = readers.pick_column(table, options.text_column, readers.TEXT_COLUMNS, "--text-column")
    return ["" if text is None else str(text) for text in table[column]]


def _portions(texts: Iterable[str], size: int = 512) -> Iterator[list[str]]:
    """Lists of growing length up to `size`: the first answer comes at once, the rest fast."""
    iterator, length = iter(texts), 1
    while portion := list(itertools.islice(iterator, length)):
        yield portion
        length = min(2 * length, size)
