"""Train a classifier from options to a finished run folder."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.numpy import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nin_text import models, report, stages
from nin_text.data import TextDataset, load_text_dataset
from nin_text.device import keep_freed_memory, pick_device
from nin_text.errors import UserError
from nin_text.evaluation import classification_metrics, softmax
from nin_text.explain_page import mistakes_html
from nin_text.options import TrainOptions, check, is_nin, with_recipe
from nin_text.text import NiNTextForSequenceClassification
from nin_text.tokenization import encode
from nin_text.training import (
    EncodedTexts,
    TextTrainer,
    last_checkpoint,
    shared_arguments,
    text_trainer,
)

logger = logging.getLogger(__name__)

OPTIONS_FILE = "options.json"
ANSWERS_FILE = "answers.safetensors"  # class probabilities (n, K) of "validation" and "test"
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
    # Of several processes (torchrun), one prepares what all use, while the others wait.
    processes = PartialState(cpu=device.type == "cpu")
    if processes.is_main_process:
        _open_run_folder(folder, record, resume=options.resume)
    processes.wait_for_everyone()
    if is_nin(options.model):
        # Whose batches have few sizes. Those of a transformer are all different: the heap would
        # fragment (14 GB after MiniLM-L6 had scored IMDB).
        keep_freed_memory()
    set_seed(options.seed)
    with processes.main_process_first():  # it trains the tokenizer, the others find it in the cache
        model, tokenizer = models.build(options, train.texts, train.labels, dataset.label_names)
    encoded = {
        split: EncodedTexts(
            encode(tokenizer, part.texts, options.max_length, progress=f"encoding {split}"),
            part.labels,
        )
        for split, part in dataset.splits.items()
    }
    logger.info(
        "%s: %s parameters, vocabulary %s, on %s",
        options.model,
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{len(tokenizer):,}",
        device,
    )
    try:
        clock = time.perf_counter()
        trainer, seconds, ngram_scale = _train(options, folder, device, model, tokenizer, encoded)
        # Of a resumed run, the seconds before count as well.
        before = max(0.0, sum(seconds.values()) - (time.perf_counter() - clock))
    except KeyboardInterrupt:
        logger.error(
            "stopped; the same command with --resume goes on from the last whole epoch in %s",
            folder,
        )
        raise
    metrics = _metrics(options, dataset, record, trainer, seconds)
    answers = {}

    def score(split: str) -> None:
        clock = time.perf_counter()
        logits = trainer.logits(encoded[split], progress=f"evaluating {split}")
        elapsed = round(time.perf_counter() - clock, 2)
        truth = dataset.splits[split].labels
        metrics[split] = classification_metrics(logits, truth, dataset.label_names)
        metrics[split]["seconds"] = elapsed
        answers[split] = softmax(logits).astype(np.float32)

    score("validation")
    mistakes = _mistakes(options, dataset, trainer, tokenizer, answers["validation"])
    if options.ngrams:
        stages.refit_ngrams(trainer, encoded["train"], ngram_scale)
    dtype = getattr(torch, options.save_dtype)
    models.round_weights(trainer.best_model, dtype)
    # All that it took to make the classifier, reading the data left out.
    metrics["fit_seconds"] = round(before + time.perf_counter() - started, 2)
    metrics["fit_peak_memory_mb"] = round(report.peak_memory_mb(), 1)
    score("test")
    metrics["peak_memory_mb"] = round(report.peak_memory_mb(), 1)
    metrics["total_seconds"] = round(time.perf_counter() - started, 2)
    if trainer.is_world_process_zero():
        _leave(folder, trainer.best_model, dtype, tokenizer, metrics, answers, mistakes)
    return _summary(metrics, folder)


def _run_name(options: TrainOptions) -> str:
    parts = [Path(options.dataset).name, Path(options.model).name, f"seed{options.seed}"]
    return "-".join(map(report.slug, parts))


def _record(options: TrainOptions, dataset: TextDataset) -> dict[str, Any]:
    """What decides the weights, as JSON values: options and data."""
    plain = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    essential = {name: value for name, value in plain.items() if name not in INCIDENTAL}
    return essential | {"data_fingerprint": dataset.fingerprint()}


def _open_run_folder(folder: Path, record: dict[str, Any], *, resume: bool) -> None:
    """Make the run folder; keep what is in it if the run is to be resumed, else start clean."""
    path, checkpoints = folder / OPTIONS_FILE, folder / "checkpoints"
    if resume and path.is_file():
        _check_same(record, path, folder)
        if not _begun(checkpoints):
            logger.warning("%s holds no whole checkpoint yet; starting anew", folder)
        return
    if resume:
        logger.warning("there is no run to resume in %s; starting one", folder)
    elif _begun(checkpoints):
        logger.warning("an unfinished run in %s is discarded (--resume would continue it)", folder)
    folder.mkdir(parents=True, exist_ok=True)
    _discard(checkpoints)
    report.write_json(path, record)


def _begun(checkpoints: Path) -> bool:
    """Whether there is a whole checkpoint of any stage, or what a stage left."""
    return any(last_checkpoint(stage) for stage in checkpoints.glob("*/")) or any(
        checkpoints.glob("*.safetensors")
    )


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
    options: TrainOptions,
    dataset: TextDataset,
    record: dict[str, Any],
    trainer: TextTrainer,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Everything about a run but the quality of its answers."""
    table = getattr(trainer.model, "ngrams", None)
    return {
        "dataset": options.dataset,
        "data_source": dataset.source,
        "data_fingerprint": record["data_fingerprint"],
        "labelled_fingerprint": dataset.labelled().fingerprint(),
        "notes": dataset.notes,
        "label_names": dataset.label_names,
        "train_examples": len(dataset.splits["train"]),
        "model": options.model,
        "architecture": type(trainer.model).__name__,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "ngram_table_entries": 0 if table is None else table.weight.numel(),
        "seed": options.seed,
        # What follows, up to the seconds, and the history are of the last stage.
        "epochs_run": round(trainer.state.epoch or 0),
        "best_epoch": _best_epoch(trainer),
        "steps": trainer.state.global_step,
        "train_seconds": round(sum(seconds.values()), 2),
        "stage_seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "command": report.command(),
        "options": record,
        "environment": report.environment(trainer.args.device),
        "history": trainer.state.log_history,
    }


def _train(
    options: TrainOptions,
    folder: Path,
    device: torch.device,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: dict[str, EncodedTexts],
) -> tuple[TextTrainer, dict[str, float], float]:
    """All stages of training.

    Returns:
        The trainer of the last stage, the seconds of each, and the factor on the n-grams.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    common = shared_arguments(options, device)
    ngram_scale = 1.0

    def train(name: str, epochs: int, texts: EncodedTexts) -> TextTrainer:
        nonlocal ngram_scale
        validation = encoded["validation"]
        trainer = text_trainer(
            model,
            tokenizer,
            options,
            checkpoints / name,
            texts,
            validation,
            epochs=epochs,
            **common,
        )
        trainer.train_or_resume()
        seconds[name] = trainer.seconds
        if options.ngrams:
            ngram_scale = stages.fuse(trainer)
        return trainer

    labelled, unlabelled = encoded["train"], encoded.get("unsupervised")
    if not options.unlabelled or not unlabelled:
        unlabelled = None
    seconds: dict[str, float] = {}
    if options.ngrams:
        assert isinstance(model, NiNTextForSequenceClassification)
        stages.fit_ngrams(model, labelled, encoded["validation"])
        if options.pretrain_epochs:
            seconds["pretraining"] = stages.pretrain(
                model, labelled, unlabelled, checkpoints, options, **common
            )
    if not options.self_training_epochs or unlabelled is None:
        return train("training", options.epochs, labelled), seconds, ngram_scale
    path = checkpoints / "answers.safetensors"
    saved = stages.saved_answers(path)
    if saved is None:
        start = copy.deepcopy(model.state_dict())
        teacher = train("training", options.epochs, labelled)
        answers = stages.label_unlabelled(teacher, unlabelled, path)
        model.load_state_dict(start)
    else:
        answers, seconds["training"] = saved
    texts = stages.with_answers(labelled, unlabelled, answers)
    return train("self-training", options.self_training_epochs, texts), seconds, ngram_scale


def _best_epoch(trainer: TextTrainer) -> int | None:
    step = trainer.state.best_global_step
    epochs = [e["epoch"] for e in trainer.state.log_history if e["step"] == step]
    return round(epochs[0]) if epochs else None


def _mistakes(
    options: TrainOptions,
    dataset: TextDataset,
    trainer: TextTrainer,
    tokenizer: PreTrainedTokenizerBase,
    probabilities: np.ndarray,
) -> str | None:
    """The page of mistakes on the validation split, before the n-grams are fitted to it, too."""
    model = trainer.best_model
    if not isinstance(model, NiNTextForSequenceClassification):
        return None
    part = dataset.splits["validation"]
    return mistakes_html(
        model, tokenizer, part.texts, part.labels, probabilities, max_length=options.max_length
    )


def _leave(
    folder: Path,
    model: PreTrainedModel,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict[str, Any],
    answers: dict[str, np.ndarray],
    mistakes: str | None,
) -> None:
    """Put the results into the run folder; metrics.json, written last, says that it is whole."""
    aside = folder / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    models.save(model, aside, dtype)
    tokenizer.save_pretrained(aside)
    save_file(answers, aside / ANSWERS_FILE)
    report.plot_curves(metrics["history"], aside / "curves.png")
    matrix = metrics["test"]["confusion_matrix"]
    report.plot_confusion(matrix, metrics["label_names"], aside / "confusion.png")
    if mistakes is not None:
        report.write_text(aside / report.MISTAKES_FILE, mistakes)
    report.write_text(aside / "README.md", report.model_card(metrics))
    for name in (report.METRICS_FILE, report.MISTAKES_FILE):
        (folder / name).unlink(missing_ok=True)
    report.move_files(aside, folder)
    report.write_json(folder / report.METRICS_FILE, metrics)
    _discard(folder / "checkpoints")
    logger.info("the model, its metrics and plots are in %s", folder)
    if mistakes is not None:
        logger.info("its most confident mistakes: %s", folder / report.MISTAKES_FILE)


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
