"""Train a classifier from options to a finished run folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nin_text import models, report
from nin_text.data import TextDataset, load_text_dataset
from nin_text.device import keep_freed_memory, pick_device, use_bf16
from nin_text.errors import UserError
from nin_text.evaluation import classification_metrics
from nin_text.options import TrainOptions, check, with_recipe
from nin_text.text import NiNTextPreTrainedModel
from nin_text.tokenization import encode
from nin_text.training import EncodedTexts, TextTrainer, last_checkpoint, training_arguments

logger = logging.getLogger(__name__)

OPTIONS_FILE = "options.json"
# Options that do not change what is trained: a resumed run may differ in them.
INCIDENTAL = {"data_dir", "device", "output_dir", "quiet", "resume", "verbose"}
SUMMARY = (
    "dataset model seed parameters validation_accuracy test_accuracy test_macro_f1 train_seconds "
    "peak_memory_mb output_dir"
).split()


def train_text(options: TrainOptions, dataset: TextDataset | None = None) -> dict[str, Any]:
    """Train a text classifier and leave everything about it in a run folder.

    Args:
        options: see `TrainOptions`; what is None is filled in by the recipe.
        dataset: the data, if it has been read already.

    Returns:
        The summary that `scripts/train_text.py` prints; the folder's metrics.json has the rest.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    started = time.perf_counter()
    check(options)
    if dataset is None:
        dataset = load_text_dataset(options.dataset, **options.arguments())
    train = dataset.splits["train"]
    options = with_recipe(options, len(train))
    device = pick_device(options.device)
    folder = options.output_dir or Path("runs") / _run_name(options)
    record = _record(options, dataset)
    if options.resume and (finished := _finished(folder, record)) is not None:
        logger.info("%s is a finished run; nothing is left to do", folder)
        return finished
    checkpoint = _open_run_folder(folder, record, resume=options.resume)
    keep_freed_memory()
    set_seed(options.seed)
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
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        logger.error("stopped; the same command with --resume goes on from the last whole epoch")
        raise
    metrics = _metrics(options, dataset, record, trainer)
    for split in ("validation", "test"):
        clock = time.perf_counter()
        logits = trainer.logits(encoded[split], progress=f"evaluating {split}")
        seconds = round(time.perf_counter() - clock, 2)
        metrics[split] = classification_metrics(logits, encoded[split].labels, dataset.label_names)
        metrics[split]["seconds"] = seconds
    metrics["peak_memory_mb"] = round(report.peak_memory_mb(), 1)
    metrics["total_seconds"] = round(time.perf_counter() - started, 2)
    if trainer.is_world_process_zero():
        _leave(folder, trainer.best_model, tokenizer, metrics)
    return _summary(metrics, folder)


def _run_name(options: TrainOptions) -> str:
    parts = [Path(options.dataset).name, Path(options.model).name, f"seed{options.seed}"]
    return "-".join(re.sub(r"[^\w.-]+", "_", part).strip("._-") for part in parts)


def _record(options: TrainOptions, dataset: TextDataset) -> dict[str, Any]:
    """What decides the weights, as JSON values: options and data."""
    plain = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    essential = {name: value for name, value in plain.items() if name not in INCIDENTAL}
    return essential | {"data_fingerprint": dataset.fingerprint()}


def _open_run_folder(folder: Path, record: dict[str, Any], *, resume: bool) -> Path | None:
    """Make the run folder; find the checkpoint to go on from if the run is to be resumed."""
    path, checkpoints = folder / OPTIONS_FILE, folder / "checkpoints"
    if resume and path.is_file():
        _check_same(record, path, folder)
        checkpoint = last_checkpoint(checkpoints)
        if checkpoint is not None:
            logger.info("resuming from %s", checkpoint)
        else:
            logger.warning("%s holds no whole checkpoint yet; starting anew", folder)
        return checkpoint
    if resume:
        logger.warning("there is no run to resume in %s; starting one", folder)
    elif last_checkpoint(checkpoints) is not None:
        logger.warning("an unfinished run in %s is discarded (--resume would continue it)", folder)
    folder.mkdir(parents=True, exist_ok=True)
    _discard(checkpoints)
    report.write_json(path, record)
    return None


def _check_same(record: dict[str, Any], path: Path, folder: Path) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged; start anew without --resume") from error
    if not isinstance(before, dict):
        raise UserError(f"{path} is damaged; start anew without --resume")
    for name, value in record.items():
        if before.get(name) != value:
            raise UserError(
                f"the run in {folder} has {name.replace('_', ' ')} {before.get(name)}, not {value};"
                f" repeat its options to resume it, or give another --output-dir"
            )


def _finished(folder: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a run of these options that came to its end, None otherwise."""
    try:
        metrics = json.loads((folder / report.METRICS_FILE).read_text(encoding="utf-8"))
        return _summary(metrics, folder) if metrics["options"] == record else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _discard(checkpoints: Path) -> None:
    """Remove the checkpoints of a run; one that is half removed must not look whole."""
    aside = checkpoints.with_name(".discarded")
    shutil.rmtree(aside, ignore_errors=True)
    if checkpoints.exists():
        checkpoints.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _metrics(
    options: TrainOptions, dataset: TextDataset, record: dict[str, Any], trainer: TextTrainer
) -> dict[str, Any]:
    """Everything about a run but the quality of its answers."""
    return {
        "dataset": options.dataset,
        "data_source": dataset.source,
        "data_fingerprint": record["data_fingerprint"],
        "notes": dataset.notes,
        "label_names": dataset.label_names,
        "train_examples": len(dataset.splits["train"]),
        "model": options.model,
        "architecture": type(trainer.model).__name__,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": options.seed,
        "epochs_run": round(trainer.state.epoch or 0),
        "best_epoch": _best_epoch(trainer),
        "steps": trainer.state.global_step,
        "train_seconds": round(trainer.seconds, 2),
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "command": report.command(),
        "options": record,
        "environment": report.environment(trainer.args.device),
        "history": trainer.state.log_history,
    }


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
    trainer = TextTrainer(
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
    logger.info(
        "%s: %s parameters, vocabulary %s, %s steps a pass on %s",
        options.model,
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{len(tokenizer):,}",
        f"{-(-len(trainer.get_train_dataloader()) // options.gradient_accumulation):,}",
        trainer.args.device,
    )
    return trainer


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
    (folder / report.METRICS_FILE).unlink(missing_ok=True)
    for path in aside.iterdir():
        path.replace(folder / path.name)
    aside.rmdir()
    report.write_json(folder / report.METRICS_FILE, metrics)
    _discard(folder / "checkpoints")
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
