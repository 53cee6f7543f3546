"""The way of a classifier through the stages of training (see `stages.py`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nin_text import ngrams, stacking, stages
from nin_text.device import use_bf16
from nin_text.options import TrainOptions, is_nin, saved_nin
from nin_text.pretraining import Targets, choose_targets
from nin_text.probe import fit_head
from nin_text.text import NiNTextForSequenceClassification
from nin_text.training import EncodedTexts, TextTrainer, text_trainer
from nin_text.transfer import Teacher

# Of the folder of checkpoints.
TEACHER_FILE, LABELLED_FILE = "teacher.safetensors", "answers.safetensors"
TIMES_AS_MANY = 2  # unlabelled texts, at least, as labelled ones to learn from few labels


def few_labels(options: TrainOptions, labelled: int, unlabelled: int) -> bool:
    """Whether `learn` takes the way for few labels and many texts without.

    Args:
        options: the recipe may have been filled in or not.
        labelled, unlabelled: how many texts there are to train on.
    """
    few = stacking.are_few(labelled) and unlabelled >= TIMES_AS_MANY * labelled
    wanted = options.unlabelled and not options.teacher and is_nin(options.model)
    return few and wanted and 0 not in (options.ngrams, options.self_training_epochs)


@dataclass
class Learner:
    """A model on its way through the stages, and what all of them need.

    Attributes:
        seconds: of each stage so far.
        new_head: whether the encoder is a saved one, and the head that it was trained with gone.
        prior_scales: factors on network and n-grams taken for likely beforehand, for `stages.fuse`.
        pseudo_labelled: unlabelled texts to which the n-gram branch has been fitted, too.
        keep_best_epoch: see `text_trainer`.
        network_scale, ngram_scale: the factors that `stages.fuse` found, the second for the branch
            as it is fitted to labels and answers in the end.
        last: epochs and texts of the last training, and the weights before it, for `refit`.
    """

    options: TrainOptions
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    validation: EncodedTexts
    checkpoints: Path
    device: torch.device
    new_head: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    prior_scales: tuple[float, float] = (1.0, 1.0)
    pseudo_labelled: stages.PseudoLabelled | None = None
    keep_best_epoch: bool = True
    network_scale: float = 1.0
    ngram_scale: float = 1.0
    last: tuple[int, EncodedTexts, dict[str, Any]] | None = None

    def train(self, name: str, epochs: int, texts: EncodedTexts) -> TextTrainer:
        """Train the model, and weigh it against the n-grams."""
        if self.options.refit:
            self.last = epochs, texts, copy.deepcopy(self.model.state_dict())
        trainer = self._trained(name, epochs, texts, self.validation)
        if getattr(trainer.best_model, "ngrams", None) is not None:
            self.network_scale, self.ngram_scale = stages.fuse(trainer, self.prior_scales)
        return trainer

    def _trained(
        self, name: str, epochs: int, texts: EncodedTexts, validation: EncodedTexts | None
    ) -> TextTrainer:
        trainer = text_trainer(
            self.model,
            self.tokenizer,
            self.options,
            self.checkpoints / name,
            texts,
            validation,
            epochs=epochs,
            keep_best_epoch=self.keep_best_epoch,
            device=self.device,
        )
        trainer.train_or_resume()
        self.seconds[name] = trainer.seconds
        return trainer

    def refit(self) -> TextTrainer:
        """Repeat the last training on training and validation split together, with all passes.

        What is to be said of the validation split must have been computed before. The n-grams are
        left to `stages.refit_ngrams`.
        """
        assert self.last is not None
        epochs, texts, start = self.last
        labels = self.validation.labels
        if texts.labels.ndim > labels.ndim:  # probabilities
            labels = np.eye(texts.labels.shape[1], dtype=texts.labels.dtype)[labels]
        both = EncodedTexts(
            [*texts.rows, *self.validation.rows], np.concatenate([texts.labels, labels])
        )
        self.model.load_state_dict(start)
        trainer = self._trained("refit", epochs, both, None)
        best = trainer.best_model
        if getattr(best, "ngrams", None) is not None:
            assert isinstance(best, NiNTextForSequenceClassification)
            best.rescale(self.network_scale, 1.0)
        return trainer

    def pretrain(
        self, name: str, epochs: int, texts: Sequence[np.ndarray], targets: Targets
    ) -> None:
        """Pretrain the encoder."""
        self.seconds[name] = stages.pretrain(
            self.nin, texts, targets, self.checkpoints / name, self.options, epochs, self.device
        )

    def probe_head(
        self,
        rows: Sequence[np.ndarray],
        labels: np.ndarray,
        out_of_fold: np.ndarray | None,
        sample_weight: np.ndarray | None = None,
    ) -> None:
        """Let the head of a saved encoder begin with what a few labels tell a linear probe.

        A random one on vectors as long as those of a trained encoder is so wrong, and so sure, that
        the few steps there are go into unlearning it. Many labels make up for that.

        Args:
            rows, labels, sample_weight: see `probe.fit_head`; nothing is done for several labels.
            out_of_fold: what `stages.fit_ngrams` returned; None without n-grams.
        """
        if not self.new_head or len(rows) > stacking.FEW or labels.ndim == 2:
            return
        if sample_weight is not None:
            sample_weight = sample_weight / sample_weight.mean()
        self.model.to(self.device)  # type: ignore[arg-type]
        probed = fit_head(self.nin, rows, labels, sample_weight)
        if probed is not None and out_of_fold is not None:
            network, branch = stacking.best_scales([probed, out_of_fold], labels)
            self.prior_scales = float(network), float(branch)

    @property
    def nin(self) -> NiNTextForSequenceClassification:
        """The model, which is a NiN."""
        assert isinstance(self.model, NiNTextForSequenceClassification)
        return self.model


def learn(
    learner: Learner,
    encoded: dict[str, EncodedTexts],
    texts: Mapping[str, Sequence[str]],
    teachers: Sequence[Teacher],
    sample_weight: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> TextTrainer:
    """All stages of training; the trainer of the last one.

    Args:
        learner: its model is trained.
        encoded, texts: of each split but "test", and of "unsupervised" if it is to be learned from.
        teachers: may be none if their answers have been saved.
        sample_weight: (n,) how often each training text counts; once if None.
        targets: what the network learns of the training texts in place of their labels, and with
            their weights: see `training.targets_of`.
    """
    options = learner.options
    learner.checkpoints.mkdir(parents=True, exist_ok=True)
    labelled, unlabelled = encoded["train"], encoded.get("unsupervised")
    opinions = out_of_fold = None
    if options.teacher:
        opinions, learner.seconds["teacher"] = stages.ask_teachers(
            teachers,
            options,
            [*texts["train"], *texts.get("unsupervised", [])],
            learner.checkpoints / TEACHER_FILE,
            learner.device,
        )
    if options.ngrams:
        out_of_fold = stages.fit_ngrams(learner.nin, labelled, learner.validation, sample_weight)
        more = unlabelled and (options.pretrain_epochs or options.self_training_epochs)
        outside = (options.teacher, options.init_embeddings, saved_nin(options.model), more)
        learner.prior_scales = stages.prior_scales(
            out_of_fold, labelled.labels, labels_alone=not any(outside)
        )
        if unlabelled and few_labels(options, len(labelled), len(unlabelled)):
            assert out_of_fold is not None
            learner.model.to(learner.device)  # type: ignore[arg-type]
            return _from_few_labels(learner, labelled, unlabelled, out_of_fold)
        if options.pretrain_epochs:
            rows = [*labelled.rows, *(unlabelled.rows if unlabelled else [])]
            telling = choose_targets(stages.branch_of(learner.nin), labelled.rows)
            learner.pretrain("pretraining", options.pretrain_epochs, rows, telling)
    learner.probe_head(labelled.rows, labelled.labels, out_of_fold, sample_weight)
    if targets is not None:
        labelled = EncodedTexts(labelled.rows, targets)
    if opinions is not None:
        labelled, unlabelled = stages.distillation_targets(labelled, unlabelled, opinions), None
    if not options.self_training_epochs or not unlabelled:
        return learner.train("training", options.epochs, labelled)
    path = learner.checkpoints / LABELLED_FILE
    saved = stages.saved_probabilities(path)
    if saved is None:
        start = copy.deepcopy(learner.model.state_dict())
        first = learner.train("training", options.epochs, labelled)
        answers = stages.pseudo_label(first, unlabelled, path)
        learner.model.load_state_dict(start)
    else:
        answers, learner.seconds["training"] = saved
    together = stages.with_pseudo_labels(labelled, unlabelled, answers)
    return learner.train("self-training", options.self_training_epochs, together)


def _from_few_labels(
    learner: Learner, labelled: EncodedTexts, unlabelled: EncodedTexts, out_of_fold: np.ndarray
) -> TextTrainer:
    """Few texts with labels, and more without: pretraining and a probe, twice, then self-training.

    What is worth predicting is told by the labels at first, and then by the first answers.
    """
    passes, rows = learner.options.pretrain_epochs, [*labelled.rows, *unlabelled.rows]
    rounds = [("pretraining", passes), ("pretraining-again", -(-passes // 2))]
    for i, (name, epochs) in enumerate(rounds if passes else rounds[:1]):
        if epochs:
            # Whether or not the first round has just been made: a resumed run takes it from a file.
            torch.manual_seed(learner.options.seed + i)
            targets = choose_targets(stages.branch_of(learner.nin), rows)
            learner.pretrain(name, epochs, rows, targets)
        if i:  # back to what labels alone tell, as it was held out
            branch, weights = stages.branch_of(learner.nin), learner.nin.config.class_weights
            ngrams.fit(branch, labelled.rows, labelled.labels, weights)
        pseudo_labelled, learner.seconds[f"probe {i + 1}"] = stages.pseudo_label_by_probe(
            learner.nin,
            labelled,
            unlabelled,
            out_of_fold,
            learner.checkpoints / f"probe-{i + 1}.safetensors",
            batch_tokens=2 * learner.options.batch_tokens,
            bf16=use_bf16(learner.options.precision, learner.device),
        )
        scale = stages.fit_ngrams_to_pseudo_labels(learner.nin, labelled, pseudo_labelled)
    learner.pseudo_labelled = pseudo_labelled
    learner.prior_scales = 0.5, 0.5  # the mean of two that have learned the same
    together = stages.with_pseudo_labels(labelled, unlabelled, pseudo_labelled.probabilities)
    learner.keep_best_epoch = False  # so few labels as there are to choose one by choose by chance
    trainer = learner.train("self-training", learner.options.self_training_epochs, together)
    learner.ngram_scale *= scale
    return trainer
