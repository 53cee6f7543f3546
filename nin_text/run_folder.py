"""The folder of a run, of texts or images: opened, resumed, and filled with the results."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nin_text import report
from nin_text.callbacks import last_checkpoint
from nin_text.errors import UserError
from nin_text.evaluation import classification_metrics, softmax
from nin_text.options import CONFIG_FILE, ESTIMATOR_FILE, WEIGHTS_FILE, run_metrics
from nin_text.training import ClassifierTrainer

logger = logging.getLogger(__name__)

OPTIONS_FILE = "options.json"
CHECKPOINTS = "checkpoints"  # what a resumed run needs
ANSWERS_FILE = "answers.safetensors"  # class probabilities (n, K) of "validation" and "test"
# What a run leaves beside model and tokenizer.
RUN_FILES = (
    *(report.METRICS_FILE, OPTIONS_FILE, ANSWERS_FILE, report.MISTAKES_FILE),
    *(report.CLASS_MAPS_FILE, "README.md", "curves.png", "confusion.png"),
)
# Options that do not change what is trained: a resumed run may differ in them.
INCIDENTAL = set("data_dir device explain output_dir overwrite quiet resume verbose".split())
# Values of options that came later, in runs from before. Any other was off.
BEFORE = {"ngram_smoothing": 0.5}
SUMMARY = (
    "dataset model seed parameters validation_accuracy test_accuracy test_macro_f1 train_seconds "
    "peak_memory_mb output_dir"
).split()


def folder_of(options: Any) -> Path:
    """The run folder that options name, or would have."""
    parts = [dataset_slug(options), report.slug(Path(options.model).name), f"seed{options.seed}"]
    if getattr(options, "labelled", None) is not None:
        parts.insert(1, f"labelled{options.labelled}")
    return options.output_dir or Path("runs") / "-".join(parts)


def dataset_slug(options: Any) -> str:
    """The data set that options name, as a part of the name of a folder."""
    names = (Path(options.dataset).name, getattr(options, "dataset_config", None))
    return "-".join(report.slug(name) for name in names if name)


def essentials(options: Any, data_fingerprint: str) -> dict[str, Any]:
    """What decides the weights, as JSON values: options and data."""
    plain = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    essential = {name: value for name, value in plain.items() if name not in INCIDENTAL}
    return essential | {"data_fingerprint": data_fingerprint}


def check_free(folder: Path, record: dict[str, Any], options: Any) -> None:
    """Refuse a folder in which a new run would replace something else.

    A finished run of the same options may be repeated: it will give the same.

    Raises:
        UserError: if there is something else, without --resume and --overwrite.
    """
    if options.resume or options.overwrite:
        return
    if _begun(folder / CHECKPOINTS):
        raise UserError(
            f"{folder} holds an unfinished run; go on with --resume, or start anew with --overwrite"
        )
    before = _metrics(folder).get("options")
    if isinstance(before, dict):
        difference = _difference(before, record)
        held = difference and f"a finished run with {difference}"
    else:
        names = {CONFIG_FILE, WEIGHTS_FILE, ESTIMATOR_FILE, *RUN_FILES} - {OPTIONS_FILE}
        held = next((name for name in sorted(names) if (folder / name).exists()), None)
    if held:
        raise UserError(f"{folder} holds {held}; give another --output-dir, or --overwrite")


def open_run_folder(folder: Path, record: dict[str, Any], *, resume: bool) -> None:
    """Make the run folder; keep what is in it if the run is to be resumed, else start clean."""
    path, checkpoints = folder / OPTIONS_FILE, folder / CHECKPOINTS
    if resume and path.is_file():
        _check_same(record, path, folder)
        if not _begun(checkpoints):
            logger.warning("%s holds no whole checkpoint yet; starting anew", folder)
        return
    if resume:
        logger.warning("there is no run to resume in %s; starting one", folder)
    folder.mkdir(parents=True, exist_ok=True)
    discard(checkpoints)
    report.write_json(path, record)


def _begun(checkpoints: Path) -> bool:
    """Whether there is a whole checkpoint of any stage, or what a stage left."""
    return any(last_checkpoint(stage) for stage in checkpoints.glob("*/")) or any(
        checkpoints.glob("*.safetensors")
    )


def _difference(before: dict[str, Any], record: dict[str, Any]) -> str | None:
    """What is not the same in two runs; an option that came later was off before."""
    before = BEFORE | before
    for name, value in record.items():
        old = before.get(name)
        if isinstance(value, list) and not isinstance(old, list):  # when it took but one value
            old = [] if old is None else [old]
        if old == value or (name not in before and not value):
            continue
        if name == "data_fingerprint":
            return "other data"
        return f"{name.replace('_', ' ')} {old}, not {value}"
    return None


def _check_same(record: dict[str, Any], path: Path, folder: Path) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged; start anew without --resume") from error
    if not isinstance(before, dict):
        raise UserError(f"{path} is damaged; start anew without --resume")
    if difference := _difference(before, record):
        raise UserError(
            f"the run in {folder} has {difference}; repeat its options to resume it, or give "
            f"another --output-dir"
        )


def finished_run(
    folder: Path, record: dict[str, Any], label_names: Sequence[str]
) -> dict[str, Any] | None:
    """The summary of a run of these options that came to its end, None otherwise."""
    try:
        metrics = _metrics(folder)
        if _difference(metrics["options"], record) or metrics["label_names"] != list(label_names):
            return None
        finished = summary(metrics, folder)
    except (ValueError, KeyError, TypeError):
        return None
    logger.info("%s is a finished run; nothing is left to do", folder)
    return finished


def _metrics(folder: Path) -> dict[str, Any]:
    return run_metrics(str(folder.absolute()))  # which is the name of no ready-made model


@contextmanager
def saying_where(folder: Path) -> Iterator[None]:
    """Tell whoever stops the training in between how to go on with it."""
    try:
        yield
    except KeyboardInterrupt:
        logger.error(
            "stopped; the same command with --resume goes on from the last whole epoch in %s",
            folder,
        )
        raise


def discard(checkpoints: Path) -> None:
    """Remove the checkpoints of a run; one that is half removed must not look whole."""
    aside = checkpoints.with_name(".discarded")
    shutil.rmtree(aside, ignore_errors=True)
    if checkpoints.exists():
        checkpoints.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def best_epoch(trainer: ClassifierTrainer) -> int | None:
    """The epoch whose weights were kept."""
    if not trainer.args.load_best_model_at_end:
        return round(trainer.state.epoch or 0)
    step = trainer.state.best_global_step
    epochs = [e["epoch"] for e in trainer.state.log_history if e["step"] == step]
    return round(epochs[0]) if epochs else None


def facts(
    options: Any,
    dataset: Any,
    record: dict[str, Any],
    trainer: ClassifierTrainer,
    train_seconds: float,
) -> dict[str, Any]:
    """Everything about a run but the quality of its answers; of the last stage, if it has several.

    Args:
        options: with the recipe filled in.
        dataset: a `TextDataset` or `ImageDataset`.
        record: see `essentials`.
        trainer: of the last stage.
        train_seconds: of all stages.
    """
    return {
        "dataset": options.dataset,
        "data_source": dataset.source,
        "tested_on": getattr(dataset, "tested_on", "test"),
        "data_fingerprint": record["data_fingerprint"],
        "notes": dataset.notes,
        "label_names": dataset.label_names,
        "train_examples": len(dataset.splits["train"]),
        "model": options.model,
        "architecture": type(trainer.model).__name__,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": options.seed,
        "epochs_run": round(trainer.state.epoch or 0),
        "best_epoch": best_epoch(trainer),
        "steps": trainer.state.global_step,
        "train_seconds": round(train_seconds, 2),
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "command": report.command(),
        "options": record,
        "environment": report.environment(trainer.args.device),
        "history": trainer.state.log_history,
    }


def score(
    trainer: ClassifierTrainer, split: str, examples: Any, dataset: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """The quality of the answers on a split, and the class probabilities (n, K).

    Args:
        trainer: whose `best_model` answers.
        split: "validation" or "test".
        examples: the split as the trainer takes it.
        dataset: gives the truth.
    """
    clock = time.perf_counter()
    logits = trainer.logits(examples, progress=f"evaluating {split}")
    seconds = round(time.perf_counter() - clock, 2)
    quality = classification_metrics(logits, dataset.splits[split].labels, dataset.label_names)
    return quality | {"seconds": seconds}, softmax(logits).astype(np.float32)


def leave(
    folder: Path,
    metrics: dict[str, Any],
    answers: dict[str, np.ndarray],
    save: Callable[[Path], None],
    pages: dict[str, str],
) -> None:
    """Put the results into the run folder; metrics.json, written last, says that it is whole.

    Args:
        folder: of the run.
        metrics: all that is known about it.
        answers: class probabilities (n, K) of each split.
        save: writes the model and what its input needs to a folder.
        pages: names of further files to what they hold.
    """
    aside = folder / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    save(aside)
    save_file(answers, aside / ANSWERS_FILE)
    report.plot_curves(metrics["history"], aside / "curves.png")
    matrix = metrics["test"]["confusion_matrix"]
    report.plot_confusion(matrix, metrics["label_names"], aside / "confusion.png")
    for name, text in pages.items():
        report.write_text(aside / name, text)
    report.write_text(aside / "README.md", report.model_card(metrics))
    for name in (report.METRICS_FILE, report.MISTAKES_FILE, report.CLASS_MAPS_FILE, ESTIMATOR_FILE):
        (folder / name).unlink(missing_ok=True)
    report.move_files(aside, folder)
    report.write_json(folder / report.METRICS_FILE, metrics)
    discard(folder / CHECKPOINTS)
    logger.info("the model, its metrics and plots are in %s", folder)
    if report.MISTAKES_FILE in pages:
        logger.info("its most confident mistakes: %s", folder / report.MISTAKES_FILE)


def summary(metrics: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a training script prints of a run."""
    values = {
        **metrics,
        "validation_accuracy": metrics["validation"]["accuracy"],
        "test_accuracy": metrics["test"]["accuracy"],
        "test_macro_f1": metrics["test"]["macro_f1"],
        "output_dir": str(folder),
    }
    line = {name: values[name] for name in SUMMARY}
    return line | ({"notes": metrics["notes"]} if metrics["notes"] else {})
