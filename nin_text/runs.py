"""Train a classifier from options to a finished run folder."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nin_text import models, report, run_folder, stages, transfer
from nin_text.data import TextDataset, load_text_dataset
from nin_text.device import keep_freed_memory, pick_device
from nin_text.errors import UserError
from nin_text.explain_page import mistakes_html
from nin_text.learning import TEACHER_FILE, Learner, few_labels, learn
from nin_text.options import TrainOptions, check, is_nin, saved_nin, with_recipe
from nin_text.run_folder import CHECKPOINTS
from nin_text.text import NiNTextForSequenceClassification
from nin_text.tokenization import encode
from nin_text.training import EncodedTexts, TextTrainer
from nin_text.transfer import Teacher

logger = logging.getLogger(__name__)

LONGEST_WAIT = timedelta(days=1)  # of processes, while one asks a teacher or labels texts
EMBEDDINGS_FILE, NOTES_FILE = "embeddings.safetensors", "notes.json"  # among the checkpoints


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
    texts = _texts_to_prepare_for(options, dataset)
    options = with_recipe(options, len(texts))
    device = pick_device(options.device)
    folder = run_folder.folder_of(options)
    record = run_folder.essentials(options, dataset.fingerprint())
    run_folder.check_free(folder, record, options)
    names = dataset.label_names
    if options.resume and (finished := run_folder.finished_run(folder, record, names)):
        return finished
    model, tokenizer, teachers, taken_over = _prepare(
        options, dataset, texts, folder, record, device
    )

    def encode_split(split: str) -> EncodedTexts:
        part = dataset.splits[split]
        title = f"encoding {split}"
        return EncodedTexts(
            encode(tokenizer, part.texts, options.max_length, progress=title), part.labels
        )

    left_out = {"test"} if options.unlabelled else {"test", "unsupervised"}
    encoded = {split: encode_split(split) for split in dataset.splits if split not in left_out}
    logger.info(
        "%s: %s parameters, vocabulary %s, on %s",
        options.model,
        f"{model.num_parameters():,}",
        f"{len(tokenizer):,}",
        device,
    )
    clock = time.perf_counter()
    learner = Learner(
        options,
        model,
        tokenizer,
        encoded["validation"],
        folder / CHECKPOINTS,
        device,
        new_head=saved_nin(options.model),
    )
    texts_of = {split: dataset.splits[split].texts for split in encoded}
    with run_folder.saying_where(folder):
        trainer = learn(learner, encoded, texts_of, teachers)
    seconds = learner.seconds
    # Of a resumed run, the seconds before count as well.
    before = max(0.0, sum(seconds.values()) - (time.perf_counter() - clock))
    table = getattr(trainer.model, "ngrams", None)
    metrics = {
        **run_folder.facts(options, dataset, record, trainer, sum(seconds.values())),
        "labelled_fingerprint": dataset.labelled().fingerprint(),
        "ngram_table_entries": 0 if table is None else table.weight.numel(),
        "stage_seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "notes": dataset.notes + taken_over,
    }
    answers = {}

    def score(split: str) -> None:
        metrics[split], answers[split] = run_folder.score(trainer, split, encoded[split], dataset)

    score("validation")
    mistakes = _mistakes(options, dataset, trainer, tokenizer, answers["validation"])
    if options.refit:
        with run_folder.saying_where(folder):
            trainer = learner.refit()
        before += trainer.seconds_before
        metrics["stage_seconds"]["refit"] = round(trainer.seconds, 2)
        metrics["train_seconds"] = round(sum(seconds.values()), 2)
    if options.ngrams:
        splits = encoded["train"], encoded["validation"]
        stages.refit_ngrams(trainer, *splits, learner.ngram_scale, learner.pseudo_labelled)
    models.round_weights(trainer.best_model, options.save_dtype)
    # All that it took to make the classifier, reading the data left out.
    metrics["fit_seconds"] = round(before + time.perf_counter() - started, 2)
    metrics["fit_peak_memory_mb"] = round(report.peak_memory_mb(), 1)
    encoded["test"] = encode_split("test")
    score("test")
    metrics["peak_memory_mb"] = round(report.peak_memory_mb(), 1)
    metrics["total_seconds"] = round(time.perf_counter() - started, 2)
    if trainer.is_world_process_zero():

        def save(place: Path) -> None:
            models.save(trainer.best_model, place, options.save_dtype)
            tokenizer.save_pretrained(place)

        pages = {} if mistakes is None else {report.MISTAKES_FILE: mistakes}
        run_folder.leave(folder, metrics, answers, save, pages)
    return run_folder.summary(metrics, folder)


def _prepare(
    options: TrainOptions,
    dataset: TextDataset,
    texts: Sequence[str],
    folder: Path,
    record: dict[str, Any],
    device: torch.device,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Teacher], list[str]]:
    """A model to train, its tokenizer and teachers, notes on their origin; and the run folder."""
    # Of several processes (torchrun), one prepares what all use, while the others wait.
    processes = PartialState(cpu=device.type == "cpu", timeout=LONGEST_WAIT)
    if processes.is_main_process and options.resume:
        run_folder.open_run_folder(folder, record, resume=True)
    if is_nin(options.model):
        # Whose batches have few sizes. Those of a transformer are all different: the heap would
        # fragment (14 GB after MiniLM-L6 had scored IMDB).
        keep_freed_memory()
    set_seed(options.seed)
    with processes.main_process_first():  # it trains the tokenizer, the others find it in the cache
        labels = dataset.splits["train"].labels
        model, tokenizer = models.build(options, texts, labels, dataset.label_names)
        with torch.random.fork_rng(devices=[]):  # what a source lacks is drawn when it is loaded
            teachers = _take_over(options, folder, model, tokenizer, dataset.label_names, device)
    taken_over = _notes(options, folder)
    # Not before all that is named in the options has been found: this discards an unfinished run.
    if processes.is_main_process:
        if not options.resume:
            run_folder.open_run_folder(folder, record, resume=False)
        if options.init_embeddings is not None:
            stages.save_embeddings(model, folder / CHECKPOINTS / EMBEDDINGS_FILE)
        if taken_over:
            (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            report.write_json(folder / CHECKPOINTS / NOTES_FILE, taken_over)
    processes.wait_for_everyone()
    return model, tokenizer, teachers, taken_over


def _texts_to_prepare_for(options: TrainOptions, dataset: TextDataset) -> Sequence[str]:
    """What the vocabulary and the sizes of the model are made for: the labelled training texts.

    If they are few, the vocabulary is also made for unlabelled ones, of which more will be learned.
    """
    texts = dataset.splits["train"].texts
    more = dataset.splits["unsupervised"].texts if "unsupervised" in dataset.splits else []
    return [*texts, *more] if few_labels(options, len(texts), len(more)) else texts


def _take_over(
    options: TrainOptions,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    device: torch.device,
) -> list[Teacher]:
    """Start the embeddings from elsewhere, and find the teachers, if that is asked for.

    Raises:
        UserError: if either cannot be had. Nothing has been written or discarded then.
    """
    checkpoints = folder / CHECKPOINTS
    sources = [("--teacher", name) for name in options.teacher]
    if options.init_embeddings is not None:
        sources.append(("--init-embeddings", options.init_embeddings))
    for flag, name in sources:
        if Path(name).resolve() == folder.resolve():
            raise UserError(f"{flag} is the folder that this run writes; give another --output-dir")
    if options.init_embeddings is not None:
        saved = checkpoints / EMBEDDINGS_FILE if options.resume else None
        stages.borrow_embeddings(model, tokenizer, options.init_embeddings, saved, device)
    if options.resume and (checkpoints / TEACHER_FILE).is_file():
        return []
    return [Teacher(name, label_names) for name in options.teacher]


def _notes(options: TrainOptions, folder: Path) -> list[str]:
    """What the run takes over; of a resumed one as it was, since the sources may have gone."""
    saved = folder / CHECKPOINTS / NOTES_FILE
    if options.resume and saved.is_file():
        with contextlib.suppress(ValueError):
            return list(map(str, json.loads(saved.read_text(encoding="utf-8"))))
    return transfer.notes(options)


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
