"""Train a classifier from options to a finished run folder."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nin_text import models, ngrams, report, run_folder, stages, transfer
from nin_text.data import TextDataset, load_text_dataset
from nin_text.device import keep_freed_memory, pick_device
from nin_text.errors import UserError
from nin_text.explain_page import mistakes_html
from nin_text.options import TrainOptions, check, is_nin, saved_nin, with_recipe
from nin_text.pretraining import Targets, choose_targets
from nin_text.run_folder import CHECKPOINTS
from nin_text.text import NiNTextForSequenceClassification
from nin_text.tokenization import encode
from nin_text.training import (
    EncodedTexts,
    TextTrainer,
    shared_arguments,
    text_trainer,
)
from nin_text.transfer import Teacher

logger = logging.getLogger(__name__)

# Of the folder of checkpoints.
TEACHER_FILE, EMBEDDINGS_FILE = "teacher.safetensors", "embeddings.safetensors"
ANSWERS_FILE = "answers.safetensors"


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
    if options.resume and (finished := run_folder.finished_run(folder, record)) is not None:
        return finished
    # Of several processes (torchrun), one prepares what all use, while the others wait.
    processes = PartialState(cpu=device.type == "cpu")
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
        teacher = _take_over(options, folder, model, tokenizer, dataset.label_names, device)
    # Not before all that is named in the options has been found: this discards an unfinished run.
    if processes.is_main_process:
        if not options.resume:
            run_folder.open_run_folder(folder, record, resume=False)
        if options.init_embeddings is not None:
            stages.save_embeddings(model, folder / CHECKPOINTS / EMBEDDINGS_FILE)
    processes.wait_for_everyone()

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
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{len(tokenizer):,}",
        device,
    )
    clock = time.perf_counter()
    learner = _Learner(
        options,
        model,
        tokenizer,
        encoded["validation"],
        folder / CHECKPOINTS,
        shared_arguments(options, device),
    )
    texts_of = {split: dataset.splits[split].texts for split in encoded}
    with run_folder.saying_where(folder):
        trainer = _train(learner, encoded, texts_of, teacher, device)
    seconds = learner.seconds
    # Of a resumed run, the seconds before count as well.
    before = max(0.0, sum(seconds.values()) - (time.perf_counter() - clock))
    table = getattr(trainer.model, "ngrams", None)
    metrics = {
        **run_folder.facts(options, dataset, record, trainer, sum(seconds.values())),
        "labelled_fingerprint": dataset.labelled().fingerprint(),
        "ngram_table_entries": 0 if table is None else table.weight.numel(),
        "stage_seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "notes": dataset.notes + transfer.notes(options),
    }
    answers = {}

    def score(split: str) -> None:
        metrics[split], answers[split] = run_folder.score(trainer, split, encoded[split], dataset)

    score("validation")
    mistakes = _mistakes(options, dataset, trainer, tokenizer, answers["validation"])
    if options.ngrams:
        stages.refit_ngrams(trainer, encoded["train"], learner.ngram_scale, learner.answered)
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


def _texts_to_prepare_for(options: TrainOptions, dataset: TextDataset) -> Sequence[str]:
    """What the vocabulary and the sizes of the model are made for: the labelled training texts.

    If they are few, the vocabulary is also made for unlabelled ones, of which more will be learned.
    """
    texts = dataset.splits["train"].texts
    if len(texts) <= ngrams.FEW and options.unlabelled and "unsupervised" in dataset.splits:
        return [*texts, *dataset.splits["unsupervised"].texts]
    return texts


@dataclass
class _Learner:
    """A model on its way through the stages, and what all of them need.

    Attributes:
        seconds: of each stage so far.
        expected: factors on network and n-grams, for `stages.fuse`.
        answered: unlabelled texts to which the n-gram branch has been fitted, too.
        ngram_scale: the factor that `stages.fuse` found for the branch last.
    """

    options: TrainOptions
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    validation: EncodedTexts
    checkpoints: Path
    common: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    expected: tuple[float, float] = (1.0, 1.0)
    answered: stages.Answered | None = None
    ngram_scale: float = 1.0

    def train(
        self, name: str, epochs: int, texts: EncodedTexts, *, best_pass: bool = True
    ) -> TextTrainer:
        """Train the model, and weigh it against the n-grams."""
        trainer = text_trainer(
            self.model,
            self.tokenizer,
            self.options,
            self.checkpoints / name,
            texts,
            self.validation,
            epochs=epochs,
            best_pass=best_pass,
            **self.common,
        )
        trainer.train_or_resume()
        self.seconds[name] = trainer.seconds
        if self.options.ngrams:
            self.ngram_scale = stages.fuse(trainer, self.expected)
        return trainer

    def pretrain(
        self, name: str, epochs: int, texts: Sequence[np.ndarray], targets: Targets
    ) -> None:
        """Pretrain the encoder."""
        self.seconds[name] = stages.pretrain(
            self.nin, texts, targets, self.checkpoints / name, self.options, epochs, **self.common
        )

    @property
    def nin(self) -> NiNTextForSequenceClassification:
        """The model, which is a NiN."""
        assert isinstance(self.model, NiNTextForSequenceClassification)
        return self.model


def _train(
    learner: _Learner,
    encoded: dict[str, EncodedTexts],
    texts: Mapping[str, Sequence[str]],
    teacher: Teacher | None,
    device: torch.device,
) -> TextTrainer:
    """All stages of training; the trainer of the last one.

    Args:
        learner: its model is trained.
        encoded, texts: of each split but "test", and of "unsupervised" if it is to be learned from.
        teacher: may be None if its answers have been saved, or if there is none.
        device: where to compute.
    """
    options = learner.options
    learner.checkpoints.mkdir(parents=True, exist_ok=True)
    labelled, unlabelled = encoded["train"], encoded.get("unsupervised")
    opinions = None
    if options.teacher is not None:
        opinions, learner.seconds["teacher"] = stages.ask_teacher(
            teacher,
            options,
            [*texts["train"], *texts.get("unsupervised", [])],
            learner.checkpoints / TEACHER_FILE,
            device,
        )
    if options.ngrams:
        held_out = stages.fit_ngrams(learner.nin, labelled, learner.validation)
        outside = (options.teacher, options.init_embeddings, saved_nin(options.model), unlabelled)
        learner.expected = stages.expected_scales(
            held_out, labelled.labels, labels_alone=not any(outside)
        )
        learns_answers = opinions is None and options.self_training_epochs
        if held_out is not None and unlabelled and learns_answers:
            return _learn_from_few_labels(learner, labelled, unlabelled, held_out)
        if options.pretrain_epochs:
            rows = [*labelled.rows, *(unlabelled.rows if unlabelled else [])]
            targets = choose_targets(stages.branch_of(learner.nin), labelled.rows)
            learner.pretrain("pretraining", options.pretrain_epochs, rows, targets)
    if opinions is not None:
        labelled, unlabelled = stages.taught(labelled, unlabelled, opinions), None
    if not options.self_training_epochs or not unlabelled:
        return learner.train("training", options.epochs, labelled)
    path = learner.checkpoints / ANSWERS_FILE
    saved = stages.saved_answers(path)
    if saved is None:
        start = copy.deepcopy(learner.model.state_dict())
        first = learner.train("training", options.epochs, labelled)
        answers = stages.label_unlabelled(first, unlabelled, path)
        learner.model.load_state_dict(start)
    else:
        answers, learner.seconds["training"] = saved
    together = stages.with_answers(labelled, unlabelled, answers)
    return learner.train("self-training", options.self_training_epochs, together)


def _learn_from_few_labels(
    learner: _Learner, labelled: EncodedTexts, unlabelled: EncodedTexts, held_out: np.ndarray
) -> TextTrainer:
    """Few texts with labels, and more without: pretraining and a probe, twice, then self-training.

    What is worth predicting is told by the labels at first, and then by the first answers.
    """
    passes = learner.options.pretrain_epochs
    rounds = [("pretraining", passes), ("pretraining-again", -(-passes // 2))]
    for i, (name, epochs) in enumerate(rounds if passes else rounds[:1]):
        if epochs:
            rows = [*labelled.rows, *unlabelled.rows]
            targets = choose_targets(stages.branch_of(learner.nin), rows)
            learner.pretrain(name, epochs, rows, targets)
        if i:  # back to what labels alone tell, as it was held out
            branch, weights = stages.branch_of(learner.nin), learner.nin.config.class_weights
            ngrams.fit(branch, labelled.rows, labelled.labels, weights)
        answered, learner.seconds[f"probe {i + 1}"] = stages.probe(
            learner.nin,
            labelled,
            unlabelled,
            held_out,
            learner.checkpoints / f"probe-{i + 1}.safetensors",
        )
        scale = stages.fit_ngrams_to_answers(learner.nin, labelled, answered)
    learner.answered = answered
    learner.expected = 0.5, scale / 2  # the mean of two that have learned the same
    together = stages.with_answers(labelled, unlabelled, answered.answers)
    # So few labels as there are to choose a pass by would choose by chance.
    return learner.train(
        "self-training", learner.options.self_training_epochs, together, best_pass=False
    )


def _take_over(
    options: TrainOptions,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    device: torch.device,
) -> Teacher | None:
    """Start the embeddings from elsewhere, and find the teacher, if that is asked for.

    Raises:
        UserError: if either cannot be had. Nothing has been written or discarded then.
    """
    checkpoints = folder / CHECKPOINTS
    for name in ("init_embeddings", "teacher"):
        source = getattr(options, name)
        if source is not None and Path(source).resolve() == folder.resolve():
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is the folder that this run writes; give another --output-dir")
    if options.init_embeddings is not None:
        saved = checkpoints / EMBEDDINGS_FILE if options.resume else None
        stages.borrow_embeddings(model, tokenizer, options.init_embeddings, saved, device)
    if options.teacher is None or (options.resume and (checkpoints / TEACHER_FILE).is_file()):
        return None
    return Teacher(options.teacher, label_names)


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
