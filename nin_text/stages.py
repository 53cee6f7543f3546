"""What a NiN classifier goes through beside training on labels. The order is in `learning.py`:

1. `borrow_embeddings`, if asked for;
2. `fit_ngrams` to the training split;
3. `pretrain` the encoder;
4. training on the labels, and `fuse`: network and n-grams are weighed against each other;
5. `pseudo_label` the unlabelled texts (Lee 2013), train again on them and the labelled, `fuse`;
6. `refit_ngrams` to training and validation split, after the last training is repeated on both
   (`Learner.refit`), if asked for.

With teachers, the network learns in 4 what `ask_teachers` brings (distillation, Hinton et al. 2015,
arXiv 1503.02531), and 5 is left out. If few texts are labelled and many are not, the pseudo-labels
are those of `pseudo_label_by_probe`, and 4 is left out. The slow stages leave a file, so that a run
that was stopped does not repeat them.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nin_text import ngrams, stacking
from nin_text.device import use_bf16
from nin_text.errors import UserError
from nin_text.evaluation import predict_logits, softmax
from nin_text.options import TrainOptions
from nin_text.pretraining import LongEnoughTexts, Targets, TwoViewModel, cut_in_two
from nin_text.probe import fit_head
from nin_text.text import NiNTextForSequenceClassification
from nin_text.training import (
    EncodedTexts,
    RunTrainer,
    TextTrainer,
    shared_arguments,
    training_arguments,
)
from nin_text.transfer import Teacher, borrowed_embeddings, mean_probabilities

logger = logging.getLogger(__name__)


def branch_of(model: NiNTextForSequenceClassification) -> ngrams.NGramEvidence:
    """The n-gram branch of a model that has one."""
    assert model.ngrams is not None
    return model.ngrams


def fit_ngrams(
    model: NiNTextForSequenceClassification,
    train: EncodedTexts,
    validation: EncodedTexts,
    sample_weight: np.ndarray | None = None,
) -> np.ndarray | None:
    """Fit the n-gram branch to the training split; what it can do alone is logged.

    Args:
        model: has the branch.
        train, validation: the splits.
        sample_weight: (n,) how often each text of the training split counts; once if None.

    Returns:
        (n, K) logits of the training split by branches that did not see the text in question, see
        `ngrams.out_of_fold_logits`.
    """
    branch, weights = branch_of(model), model.config.class_weights
    ngrams.fit(branch, train.rows, train.labels, weights, sample_weight)
    logits = ngrams.predict(branch, validation.rows)
    right = logits.argmax(axis=1) == validation.labels
    logger.info("n-gram evidence alone: validation accuracy %.4f", right.mean())
    return ngrams.out_of_fold_logits(branch, train.rows, train.labels, weights, sample_weight)


def prior_scales(
    out_of_fold: np.ndarray | None, labels: np.ndarray, *, labels_alone: bool
) -> tuple[float, float]:
    """Factors on network and n-grams for `fuse` to expect, before the network is trained.

    A network that learns from few labels alone rarely adds to n-grams.

    Args:
        out_of_fold: what `fit_ngrams` returned.
        labels: of the same texts.
        labels_alone: whether the network learns from nothing else.
    """
    ngrams_scale = (
        1.0 if out_of_fold is None else float(stacking.best_scales([out_of_fold], labels)[0])
    )
    return (0.0 if labels_alone else 0.5), ngrams_scale


def pretrain(
    model: NiNTextForSequenceClassification,
    texts: Sequence[np.ndarray],
    targets: Targets,
    folder: Path,
    options: TrainOptions,
    epochs: int,
    device: torch.device,
) -> float:
    """Pretrain the encoder of a classifier (see `pretraining.py`).

    Args:
        model: its encoder is trained in place.
        texts: token ids of each, with or without labels.
        targets: what it learns to predict.
        folder: for checkpoints; beside it the result is left.
        options: with the recipe filled in.
        epochs: passes over the texts.
        device: where to compute.

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
            **shared_arguments(options, device),
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


def fuse(trainer: TextTrainer, prior: Sequence[float]) -> tuple[float, float]:
    """Weigh network and n-grams against each other by the log loss of the validation split.

    Few validation texts may say anything by chance: they have to outweigh the prior.

    Args:
        trainer: has the classifier, whose branch is as it was fitted to the training split.
        prior: factors on network and n-grams, see `cautious_scales`.

    Returns:
        The factors on network and n-grams, for those that are fitted again.
    """
    model, validation = trainer.best_model, trainer.eval_dataset
    assert isinstance(model, NiNTextForSequenceClassification)
    added = ngrams.predict(branch_of(model), validation.rows)
    network = trainer.logits(validation) - added
    scales = stacking.cautious_scales([network, added], validation.labels, prior)
    model.rescale(*scales)
    logger.info("weights of network and n-grams: %.3f, %.3f", *scales)
    return float(scales[0]), float(scales[1])


def refit_ngrams(
    trainer: TextTrainer,
    train: EncodedTexts,
    validation: EncodedTexts,
    scale: float,
    pseudo_labelled: PseudoLabelled | None = None,
) -> None:
    """Fit the n-gram branch again, to both splits, once nothing is chosen on validation any more.

    Whatever is to be said of the validation split must have been computed before.

    Args:
        trainer: has the classifier, fused.
        train, validation: the labelled texts; the branch was fitted to the first.
        scale: the factor that `fuse` found for it.
        pseudo_labelled: what else it was fitted to.
    """
    model = trainer.best_model
    assert isinstance(model, NiNTextForSequenceClassification)
    labels = np.concatenate([train.labels, validation.labels])
    rows = [*train.rows, *validation.rows]
    fit_to(branch_of(model), rows, labels, pseudo_labelled, model.config.class_weights)
    model.rescale(1.0, scale)


def pseudo_label(trainer: TextTrainer, unlabelled: EncodedTexts, path: Path) -> np.ndarray:
    """Class probabilities (n, K) of unlabelled texts by a trained and fused classifier.

    Args:
        trainer: has the classifier.
        unlabelled: the texts.
        path: where to leave the answers for `saved_probabilities`, with the seconds of training.
    """
    answers = softmax(trainer.logits(unlabelled, progress="labelling")).astype(np.float32)
    if trainer.is_world_process_zero():
        _save({"answers": torch.from_numpy(answers)}, path, trainer.seconds)
    return answers


@dataclass(frozen=True)
class PseudoLabelled:
    """Texts without labels, and what a classifier takes them for.

    Attributes:
        rows: token ids of each of m texts.
        probabilities: (m, K) float32 of the classes.
    """

    rows: Sequence[np.ndarray]
    probabilities: np.ndarray


def pseudo_label_by_probe(
    model: NiNTextForSequenceClassification,
    train: EncodedTexts,
    unlabelled: EncodedTexts,
    out_of_fold: np.ndarray,
    path: Path,
    *,
    batch_tokens: int = 32_768,
    bf16: bool = False,
) -> tuple[PseudoLabelled, float]:
    """What few labels tell of other texts: a linear probe of the pretrained encoder, and n-grams.

    They are weighed by what both say of labelled texts that they were not fitted to (stacked
    generalization, Wolpert 1992). See `probe.py`.

    Args:
        model: pretrained, its branch fitted to `train`. It is left as it is.
        train, unlabelled: the texts.
        out_of_fold: what `fit_ngrams` returned.
        path: where the answers are left, or have been.
        batch_tokens, bf16: of labelling.

    Returns:
        The unlabelled texts with their answers, and the seconds that it took.
    """
    with PartialState().main_process_first():  # which labels, and the others read
        if not path.is_file():
            clock = time.perf_counter()
            before = copy.deepcopy(model.state_dict())
            probed = fit_head(model, train.rows, train.labels)
            assert probed is not None
            scales = stacking.best_scales([probed, out_of_fold], train.labels)
            logger.info(
                "accuracy on labelled texts not fitted to: linear probe %.4f, n-grams %.4f; "
                "weights %.3f, %.3f",
                *((part.argmax(axis=1) == train.labels).mean() for part in (probed, out_of_fold)),
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
    return PseudoLabelled(unlabelled.rows, _load(path)["answers"].numpy()), _seconds(path)


def fit_ngrams_to_pseudo_labels(
    model: NiNTextForSequenceClassification, train: EncodedTexts, pseudo_labelled: PseudoLabelled
) -> float:
    """Fit the n-gram branch to pseudo-labels, too: of many more n-grams it knows then.

    Returns:
        The factor that suits pseudo-labels which it was not fitted to. The branch has been
        multiplied by it.
    """
    branch, weights = branch_of(model), model.config.class_weights
    order = np.random.default_rng(0).permutation(len(pseudo_labelled.rows))
    held, rest = np.split(order, [len(order) // stacking.FOLDS])
    part = PseudoLabelled(
        [pseudo_labelled.rows[i] for i in rest], pseudo_labelled.probabilities[rest]
    )
    fit_to(branch, train.rows, train.labels, part, weights)
    logits = ngrams.predict(branch, [pseudo_labelled.rows[i] for i in held])
    scale = float(stacking.best_scales([logits], pseudo_labelled.probabilities[held])[0])
    fit_to(branch, train.rows, train.labels, pseudo_labelled, weights)
    model.rescale(1.0, scale)
    return scale


def fit_to(
    branch: ngrams.NGramEvidence,
    rows: Sequence[np.ndarray],
    labels: np.ndarray,
    pseudo_labelled: PseudoLabelled | None,
    class_weights: Sequence[float] | None = None,
    sample_weight: np.ndarray | None = None,
) -> None:
    """`ngrams.fit` to labelled texts, and to the likeliest class of others by how sure it is."""
    if pseudo_labelled is not None:
        chance = 1 / pseudo_labelled.probabilities.shape[1]
        sure = np.maximum(
            (pseudo_labelled.probabilities.max(axis=1) - chance) / (1 - chance), 1e-3
        )  # (m,)
        known = np.ones(len(labels)) if sample_weight is None else sample_weight
        sample_weight = np.concatenate([known, sure])
        rows = [*rows, *pseudo_labelled.rows]
        labels = np.concatenate([labels, pseudo_labelled.probabilities.argmax(axis=1)])
    ngrams.fit(branch, rows, labels, class_weights, sample_weight)


def saved_probabilities(path: Path) -> tuple[np.ndarray, float] | None:
    """What `pseudo_label` left: the answers, and the seconds of training before them."""
    if not path.is_file():
        return None
    return _load(path)["answers"].numpy(), _seconds(path)


def with_pseudo_labels(
    train: EncodedTexts, unlabelled: EncodedTexts, answers: np.ndarray
) -> EncodedTexts:
    """The training split with its labels for certain, and unlabelled texts with pseudo-labels."""
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
        saved = saved_probabilities(path)
        if saved is not None:
            return saved
        clock = time.perf_counter()
        answers = mean_probabilities(
            teachers,
            texts,
            device=device,
            bf16=use_bf16(options.precision, device),
            batch_tokens=options.batch_tokens,
        )
        seconds = time.perf_counter() - clock
        _save({"answers": torch.from_numpy(answers)}, path, seconds)
    return answers, seconds


def distillation_targets(
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
