"""What a NiN classifier goes through beside training on labels, in this order.

`fit_ngrams`, `pretrain`, training on the labels, `fuse`, `label_unlabelled` and training again on
labelled and unlabelled texts, `fuse`; at the end `refit_ngrams`. If few texts are labelled and
others are not, `probe` takes the place of training on the labels and what follows from it. If asked
for, `borrow_embeddings` comes first, and what `ask_teachers` brings is learned in place of
`label_unlabelled`. The slow ones leave a file, so that a run that was stopped does not repeat them.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nin_text import ngrams
from nin_text.device import use_bf16
from nin_text.errors import UserError
from nin_text.evaluation import predict_logits, softmax
from nin_text.options import TrainOptions
from nin_text.pretraining import LongEnoughTexts, Targets, TwoViewModel, cut_in_two
from nin_text.probe import start_from_probe
from nin_text.text import NiNTextForSequenceClassification
from nin_text.training import (
    EncodedTexts,
    RunTrainer,
    TextTrainer,
    training_arguments,
)
from nin_text.transfer import Teacher, borrowed_embeddings, mean_answers

logger = logging.getLogger(__name__)


def branch_of(model: NiNTextForSequenceClassification) -> ngrams.NGramEvidence:
    """The n-gram branch of a model that has one."""
    assert model.ngrams is not None
    return model.ngrams


def fit_ngrams(
    model: NiNTextForSequenceClassification, train: EncodedTexts, validation: EncodedTexts
) -> np.ndarray | None:
    """Fit the n-gram branch to the training split; what it can do alone is logged.

    Returns:
        (n, K) logits of the training split by branches that did not see the text in question, see
        `ngrams.held_out_logits`.
    """
    branch, weights = branch_of(model), model.config.class_weights
    ngrams.fit(branch, train.rows, train.labels, weights)
    logits = ngrams.predict(branch, validation.rows)
    right = logits.argmax(axis=1) == validation.labels
    logger.info("n-gram evidence alone: validation accuracy %.4f", right.mean())
    return ngrams.held_out_logits(branch, train.rows, train.labels, weights)


def expected_scales(
    held_out: np.ndarray | None, labels: np.ndarray, *, labels_alone: bool
) -> tuple[float, float]:
    """Factors on network and n-grams to be expected, for `fuse`, before the network is trained.

    A network that learns from few labels alone rarely adds to n-grams.

    Args:
        held_out: what `fit_ngrams` returned.
        labels: of the same texts.
        labels_alone: whether the network learns from nothing else.
    """
    ngrams_scale = 1.0 if held_out is None else float(ngrams.best_scales([held_out], labels)[0])
    return (0.0 if labels_alone else 0.5), ngrams_scale


def pretrain(
    model: NiNTextForSequenceClassification,
    texts: Sequence[np.ndarray],
    targets: Targets,
    folder: Path,
    options: TrainOptions,
    epochs: int,
    **arguments: Any,
) -> float:
    """Pretrain the encoder of a classifier (see `pretraining.py`).

    Args:
        model: its encoder is trained in place.
        texts: token ids of each, with or without labels.
        targets: what it learns to predict.
        folder: for checkpoints; beside it the result is left.
        options: with the recipe filled in.
        epochs: passes over the texts.
        arguments: further ones of `training_arguments`.

    Returns:
        Seconds that it took, those before a resumed checkpoint included.
    """
    done = folder.with_suffix(".safetensors")
    if done.is_file():
        model.nin.load_state_dict(_load(done))
        return _seconds(done)
    long_enough = LongEnoughTexts(texts)
    if len(targets) == 0 or len(long_enough) == 0:
        logger.warning("nothing to pretrain on: no text has two tokens, or none tells a class")
        return 0.0
    logger.info(
        "pretraining on %s texts: %s n-grams to predict",
        f"{len(long_enough):,}",
        f"{len(targets):,}",
    )
    trainer = RunTrainer(
        model=TwoViewModel(model.nin, targets, masked_lm=options.mlm_probability > 0),
        args=training_arguments(
            folder,
            epochs=epochs,
            learning_rate=options.pretrain_learning_rate,
            weight_decay=0.01,
            evaluate=False,
            **arguments,
        ),
        train_dataset=long_enough,
        collate=partial(
            cut_in_two,
            targets=targets,
            pad_token_id=model.config.pad_token_id or 0,
            mlm_probability=options.mlm_probability,
        ),
        batch_tokens=options.batch_tokens,
        compiled=options.compile,
        title=folder.name.replace("-", " "),
        rate_option="--pretrain-learning-rate",
    )
    trainer.train_or_resume()
    if trainer.is_world_process_zero():
        _save(model.nin.state_dict(), done, trainer.seconds)
    return trainer.seconds


def fuse(trainer: TextTrainer, expected: Sequence[float]) -> float:
    """Weigh network and n-grams against each other by the log loss of the validation split.

    Few validation texts may say anything by chance: they have to outweigh a pull towards what is
    to be expected.

    Args:
        trainer: has the classifier, whose branch is as it was fitted to the training split.
        expected: factors on network and n-grams.

    Returns:
        The factor on the n-grams, for `refit_ngrams`.
    """
    model, validation = trainer.best_model, trainer.eval_dataset
    assert isinstance(model, NiNTextForSequenceClassification)
    added = ngrams.predict(branch_of(model), validation.rows)
    network = trainer.logits(validation) - added
    scales = ngrams.cautious_scales([network, added], validation.labels, expected)
    model.rescale(*scales)
    logger.info("weights of network and n-grams: %.3f, %.3f", *scales)
    return float(scales[1])


def refit_ngrams(
    trainer: TextTrainer, train: EncodedTexts, scale: float, answered: Answered | None = None
) -> None:
    """Fit the n-gram branch again, to both splits, once nothing is chosen on validation any more.

    Whatever is to be said of the validation split must have been computed before.

    Args:
        trainer: has the classifier, fused, and the validation split.
        train: the labelled texts that the branch was fitted to.
        scale: the factor that `fuse` found for it.
        answered: what else it was fitted to.
    """
    model, validation = trainer.best_model, trainer.eval_dataset
    assert isinstance(model, NiNTextForSequenceClassification)
    labels = np.concatenate([train.labels, validation.labels])
    rows = [*train.rows, *validation.rows]
    fit_to(branch_of(model), rows, labels, answered, model.config.class_weights)
    model.rescale(1.0, scale)


def label_unlabelled(trainer: TextTrainer, unlabelled: EncodedTexts, path: Path) -> np.ndarray:
    """Class probabilities (n, K) of unlabelled texts by a trained and fused classifier.

    Args:
        trainer: has the classifier.
        unlabelled: the texts.
        path: where to leave the answers for `saved_answers`, with the seconds of training.
    """
    answers = softmax(trainer.logits(unlabelled, progress="labelling")).astype(np.float32)
    if trainer.is_world_process_zero():
        _save({"answers": torch.from_numpy(answers)}, path, trainer.seconds)
    return answers


@dataclass(frozen=True)
class Answered:
    """Texts without labels, and what a classifier says of them.

    Attributes:
        rows: token ids of each of m texts.
        answers: (m, K) float32 class probabilities.
    """

    rows: Sequence[np.ndarray]
    answers: np.ndarray


def probe(
    model: NiNTextForSequenceClassification,
    train: EncodedTexts,
    unlabelled: EncodedTexts,
    held_out: np.ndarray,
    path: Path,
    *,
    batch_tokens: int = 32_768,
    bf16: bool = False,
) -> tuple[Answered, float]:
    """What few labels tell of other texts: a linear probe of the pretrained encoder, and n-grams.

    They are weighed by what both say of labelled texts that they were not fitted to (stacked
    generalization, Wolpert 1992). See `probe.py`.

    Args:
        model: pretrained, its branch fitted to `train`. It is left as it is.
        train, unlabelled: the texts.
        held_out: what `fit_ngrams` returned.
        path: where the answers are left, or have been.
        batch_tokens, bf16: of labelling.

    Returns:
        The unlabelled texts with their answers, and the seconds that it took.
    """
    with PartialState().main_process_first():  # which answers, and the others read
        if not path.is_file():
            clock = time.perf_counter()
            before = copy.deepcopy(model.state_dict())
            probed = start_from_probe(model, train.rows, train.labels)
            assert probed is not None
            scales = ngrams.best_scales([probed, held_out], train.labels)
            logger.info(
                "accuracy on labelled texts not fitted to: linear probe %.4f, n-grams %.4f; "
                "weights %.3f, %.3f",
                *((part.argmax(axis=1) == train.labels).mean() for part in (probed, held_out)),
                *scales,
            )
            model.rescale(*scales)
            logits = predict_logits(
                model,
                unlabelled.rows,
                pad_token_id=model.config.pad_token_id or 0,
                batch_tokens=batch_tokens,
                autocast=torch.bfloat16 if bf16 else None,
                progress="labelling",
            )
            model.load_state_dict(before)
            answers = torch.from_numpy(softmax(logits).astype(np.float32))
            _save({"answers": answers}, path, time.perf_counter() - clock)
    return Answered(unlabelled.rows, _load(path)["answers"].numpy()), _seconds(path)


def fit_ngrams_to_answers(
    model: NiNTextForSequenceClassification, train: EncodedTexts, answered: Answered
) -> float:
    """Fit the n-gram branch to labelled texts and to answers: of many more n-grams it knows then.

    Returns:
        The factor that suits answers which it was not fitted to. The branch has been multiplied by
        it.
    """
    branch, weights = branch_of(model), model.config.class_weights
    order = np.random.default_rng(0).permutation(len(answered.rows))
    held, rest = np.split(order, [len(order) // ngrams.FOLDS])
    part = Answered([answered.rows[i] for i in rest], answered.answers[rest])
    fit_to(branch, train.rows, train.labels, part, weights)
    logits = ngrams.predict(branch, [answered.rows[i] for i in held])
    scale = float(ngrams.best_scales([logits], answered.answers[held])[0])
    fit_to(branch, train.rows, train.labels, answered, weights)
    model.rescale(1.0, scale)
    return scale


def fit_to(
    branch: ngrams.NGramEvidence,
    rows: Sequence[np.ndarray],
    labels: np.ndarray,
    answered: Answered | None,
    class_weights: Sequence[float] | None = None,
    sample_weight: np.ndarray | None = None,
) -> None:
    """`ngrams.fit` to labelled texts, and to the likeliest class of others by how sure it is."""
    if answered is not None:
        chance = 1 / answered.answers.shape[1]
        sure = np.maximum((answered.answers.max(axis=1) - chance) / (1 - chance), 1e-3)  # (m,)
        known = np.ones(len(labels)) if sample_weight is None else sample_weight
        sample_weight = np.concatenate([known, sure])
        rows = [*rows, *answered.rows]
        labels = np.concatenate([labels, answered.answers.argmax(axis=1)])
    ngrams.fit(branch, rows, labels, class_weights, sample_weight)


def saved_answers(path: Path) -> tuple[np.ndarray, float] | None:
    """What `label_unlabelled` left: the answers, and the seconds of training before them."""
    if not path.is_file():
        return None
    return _load(path)["answers"].numpy(), _seconds(path)


def with_answers(
    train: EncodedTexts, unlabelled: EncodedTexts, answers: np.ndarray
) -> EncodedTexts:
    """The training split with certain labels, and unlabelled texts with class probabilities."""
    certain = np.eye(answers.shape[1], dtype=np.float32)[train.labels]  # (n, K)
    return EncodedTexts([*train.rows, *unlabelled.rows], np.concatenate([certain, answers]))


def borrow_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    saved: Path | None,
    device: torch.device,
) -> None:
    """Start the token embeddings from vectors of another origin (see `borrowed_embeddings`).

    Args:
        model: its embeddings are changed in place.
        tokenizer: the model's.
        source: of the vectors.
        saved: embeddings that `save_embeddings` left, which are used instead if they are there.
        device: where to compute.
    """
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    with torch.no_grad():
        if saved is not None and saved.is_file():
            embeddings.weight.copy_(_load(saved)["embeddings"])
            return
        ids, vectors = borrowed_embeddings(source, tokenizer, embeddings.embedding_dim, device)
        embeddings.weight[torch.from_numpy(ids), : vectors.shape[1]] = torch.from_numpy(vectors)


def save_embeddings(model: PreTrainedModel, path: Path) -> None:
    """Leave the embeddings that training begins with, so that a resumed run needs no source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    _save({"embeddings": weight.detach()}, path, 0.0)


def ask_teachers(
    teachers: Sequence[Teacher],
    options: TrainOptions,
    texts: Sequence[str],
    path: Path,
    device: torch.device,
) -> tuple[np.ndarray, float]:
    """What teachers say of texts in the mean, (n, K), and the seconds that it took.

    Args:
        teachers: may be none if their answers have been saved.
        options: with the recipe filled in.
        texts: those with labels, and those without.
        path: where the answers are left, or have been.
        device: where to compute.
    """
    with PartialState().main_process_first():  # which asks, and the others read the answers
        saved = saved_answers(path)
        if saved is not None:
            return saved
        clock = time.perf_counter()
        answers = mean_answers(
            teachers,
            texts,
            device=device,
            bf16=use_bf16(options.precision, device),
            batch_tokens=options.batch_tokens,
        )
        seconds = time.perf_counter() - clock
        _save({"answers": torch.from_numpy(answers)}, path, seconds)
    return answers, seconds


def taught(
    train: EncodedTexts, unlabelled: EncodedTexts | None, answers: np.ndarray
) -> EncodedTexts:
    """Texts with what teachers say of them, halfway to the label where there is one.

    Args:
        train, unlabelled: the texts.
        answers: (n, K) class probabilities of all of them, in this order.
    """
    labels = np.eye(answers.shape[1], dtype=np.float32)[train.labels]  # (n, K)
    targets = answers.copy()
    targets[: len(train)] = (targets[: len(train)] + labels) / 2
    return EncodedTexts([*train.rows, *(unlabelled.rows if unlabelled else [])], targets)


def _save(tensors: dict[str, Tensor], path: Path, seconds: float) -> None:
    """Write aside and rename: a file of that name is whole."""
    aside = path.with_name(f".{path.name}")
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, aside, metadata={"seconds": repr(seconds)})
    aside.replace(path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); start anew without --resume") from error


def _seconds(path: Path) -> float:
    with safe_open(path, "pt") as file:
        return float((file.metadata() or {})["seconds"])
