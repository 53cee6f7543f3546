"""NiN as a scikit-learn classifier.

It takes texts where other estimators take a matrix: a list, a Series or an array of strings, or a
table of one column.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from nin_text import models, stages
from nin_text.configuration import MULTI_LABEL
from nin_text.device import pick_device
from nin_text.errors import UserError
from nin_text.estimator_inputs import (
    as_labels,
    as_texts,
    check_numbers,
    encode_labels,
    hold_out,
    in_parameters,
    own_random_numbers,
    plain,
    targets_of,
    threads,
    weights_of,
    with_weight,
)
from nin_text.evaluation import pad, predict_logits, softmax
from nin_text.learning import Learner, few_labels, learn
from nin_text.options import (
    ESTIMATOR_FILE,
    METRICS_FILE,
    PRECISIONS,
    PRESET_NAMES,
    READY_MADE,
    TrainOptions,
    check,
    saved_nin,
    trained_max_length,
    with_recipe,
)
from nin_text.recipes import DEFAULT_RECIPE
from nin_text.report import move_files, write_json
from nin_text.run_folder import RUN_FILES
from nin_text.text import NiNTextForSequenceClassification
from nin_text.tokenization import encode
from nin_text.training import (
    EncodedTexts,
    TokenBatchSampler,
)

# Random numbers, threads and what accelerate knows are of the process: fits in threads take turns.
_ONE_AT_A_TIME = threading.RLock()


class NiNTextClassifier(ClassifierMixin, BaseEstimator):
    """A Network in Network for texts, with n-gram evidence, as a scikit-learn classifier.

    Labels may be strings, integers or booleans; an indicator matrix (n, K) of zeros and ones makes
    it a multi-label classifier, which has no n-gram evidence.

    Args:
        model: preset ("nin-text-small", "nin-text-base", "nin-text-paper", "nin-text-large"). The
            last is for a GPU, thousands of unlabelled texts and a learning rate of 4e-4. Or a
            ready-made model ("imdb-sentiment", "ag-news-topics") or the folder of a saved NiN:
            its encoder and tokenizer are trained on, its labels and n-grams are left behind.
        tokenizer: "wordpiece", "bpe" or "word" to train one on the texts, or a folder. A saved
            model has its own.
        vocab_size: most tokens in a trained vocabulary; None for as many as there are training
            texts, but at least 500 and at most 30,000, which is also what `partial_fit` and words
            take.
        max_length: cut texts to this many tokens; 0 for never.
        ngrams: tokens of the longest n-gram whose evidence is added; 0 for none.
        pretrain_epochs: passes in which the network first learns to predict telling n-grams; None
            for 4 (of nin-text-large 9) if `fit` is given unlabelled texts and 0 otherwise.
        epochs: most passes over the texts.
        learning_rate: peak learning rate of AdamW; that of `partial_fit` throughout.
        weight_decay: of AdamW.
        batch_size: most texts in a batch; chosen by the number of texts if None.
        dropout: hidden and embedding dropout; the preset's if None.
        class_weight: None, "balanced" or a dict from label to weight. With several labels a text,
            "balanced" lets yes and no count the same for each of them; there is no dict then.
        early_stopping: stop when the texts held out are no longer judged better and keep the best
            pass; else every pass is made and the last one kept. (With few labels and many
            unlabelled texts there is nothing to stop: see `learning.py`.)
        validation_fraction: part of the texts held out from the network in any case, stratified:
            network and n-grams are weighed on it. Weights play no part in judging it.
        n_iter_no_change: passes without a better accuracy before training stops.
        warm_start: `fit` goes on from the weights of the last `fit`, if the labels are the same.
        random_state: seed, or a RandomState; None draws one.
        n_jobs: threads; None leaves the number as it is, -1 is one for each core.
        precision: "fp32", "bf16" or "auto" for bf16 in training where the processor has it.
            Answers are computed in float32.
        device: "cpu", "cuda", "mps", or "auto".
        verbose: 1 for a progress bar on standard error.

    Attributes:
        classes_: labels, sorted; of a multi-label classifier the column numbers.
        model_: the Hugging Face model.
        tokenizer_: its tokenizer.
        n_iter_: passes made.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "nin-text-base",
        *,
        tokenizer: str = "wordpiece",
        vocab_size: int | None = None,
        max_length: int = 0,
        ngrams: int = 3,
        pretrain_epochs: int | None = None,
        epochs: int = 8,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        batch_size: int | None = None,
        dropout: float | None = None,
        class_weight: str | dict[Any, float] | None = None,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 3,
        warm_start: bool = False,
        random_state: Any = None,
        n_jobs: int | None = None,
        precision: str = "auto",
        device: str = "auto",
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.ngrams = ngrams
        self.pretrain_epochs = pretrain_epochs
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.dropout = dropout
        self.class_weight = class_weight
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.precision = precision
        self.device = device
        self.verbose = verbose

    # ---- training ------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,  # noqa: N803
        y: Any,
        sample_weight: Any = None,
        unlabelled: Any = None,
    ) -> Self:
        """Train on labelled texts, and on others.

        Args:
            X: n texts.
            y: (n,) labels, or (n, K) zeros and ones.
            sample_weight: (n,) how much each text counts; 0 is as good as absent.
            unlabelled: texts of the same kind without labels. Thousands of them are worth more than
                hundreds of further labels. They cannot go with weights or several labels a text.

        Raises:
            UserError: a ValueError, if texts, labels or parameters cannot be used.
        """
        texts, y = as_texts(X), as_labels(y)
        labels, classes = encode_labels(texts, y, None)
        if len(classes) < 2:
            raise UserError(f"all labels are {classes[0]!r}; a classifier needs two classes")
        weight = weights_of(y, labels, classes, sample_weight, self.class_weight)
        unlabelled = [] if unlabelled is None else unlabelled
        more = as_texts(unlabelled) if not hasattr(unlabelled, "__len__") or len(unlabelled) else []
        if more and (weight is not None or labels.ndim == 2):
            raise UserError("unlabelled texts cannot go with weights or with several labels a text")
        texts, labels, weight = with_weight(texts, labels, weight)
        if weight is not None and labels.ndim == 1 and len(np.unique(labels)) < 2:
            raise UserError("only one class has texts whose weight is not zero")
        with _ONE_AT_A_TIME, self._session() as options:
            again = (
                self.warm_start
                and hasattr(self, "model_")
                and np.array_equal(self.classes_, classes)
                and self._is_multi_label() == (labels.ndim == 2)
            )
            if again:
                branch = self.model_.ngrams
                options.ngrams = 0 if branch is None else branch.size
            learned = len(texts) - round(len(texts) * self.validation_fraction)
            prepared = [*texts, *more] if few_labels(options, learned, len(more)) else texts
            if more and self.pretrain_epochs is None and self.ngrams and not again:
                options.pretrain_epochs = None  # type: ignore[assignment]  # left to the recipe
            if again:
                # A copy: a fit that is interrupted leaves the last one as it was.
                model, tokenizer = copy.deepcopy(self.model_), self.tokenizer_
            else:
                model, tokenizer = self._build(options, prepared, labels, classes)
            options = with_recipe(options, len(prepared))
            new_head = saved_nin(options.model) and not again
            best, passes = self._train(
                options, model, tokenizer, texts, labels, weight, more, new_head
            )
        self._take(best, tokenizer, classes, passes)
        return self

    def _take(
        self,
        model: NiNTextForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        classes: np.ndarray,
        passes: int,
    ) -> None:
        self.model_, self.tokenizer_, self.classes_ = model.eval(), tokenizer, classes
        self.max_length_, self.n_iter_ = self.max_length, passes
        self._optimizer: torch.optim.Optimizer | None = None

    def partial_fit(
        self,
        X: Any,  # noqa: N803
        y: Any,
        classes: Any = None,
        sample_weight: Any = None,
    ) -> Self:
        """One pass over some labelled texts, going on from the weights so far.

        The first call makes the tokenizer from its texts, unless a saved model has one, and needs
        all `classes` that will come.
        N-gram evidence is fitted to all texts at once and therefore left out, unless `fit` came
        before: then it stays as it is. The learning rate is constant. Weights count in proportion
        to each other within a call.

        Args:
            X, y, sample_weight: as of `fit`.
            classes: all labels that will come, for the first call; of a matrix of labels those of
                its columns, which must be sorted.

        Raises:
            UserError: a ValueError, if texts, labels or parameters cannot be used.
        """
        texts, y, begun = as_texts(X), as_labels(y), hasattr(self, "model_")
        if not begun:
            if classes is None:
                raise UserError("the first call of partial_fit needs classes, all that will come")
            given = np.asarray(classes)
            classes = np.unique(given)
            if y.ndim == 2 and not np.array_equal(given, classes):
                raise UserError("classes of a matrix of labels must be distinct and sorted")
            if len(classes) < 2:
                raise UserError("classes must hold two labels or more, all that will come")
        elif classes is not None and set(np.asarray(classes).tolist()) != set(
            self.classes_.tolist()
        ):
            raise UserError("classes are not those of the first call of partial_fit")
        else:
            classes = self.classes_
        if begun and (y.ndim == 2) != self._is_multi_label():
            raise UserError("labels must be of one kind in all calls: one a text, or a matrix")
        labels, _ = encode_labels(texts, y, classes)
        weight = weights_of(y, labels, classes, sample_weight, self.class_weight)
        texts, labels, weight = with_weight(texts, labels, weight)
        if not texts:
            if begun:
                return self
            raise UserError("all texts of the first call of partial_fit have a weight of zero")
        with _ONE_AT_A_TIME, self._session() as options:
            if not begun:
                options.ngrams = options.pretrain_epochs = 0
                if not saved_nin(options.model):  # the first texts are not all that will come
                    options.vocab_size = options.vocab_size or DEFAULT_RECIPE["vocab_size"]
                built = self._build(options, texts, labels, classes)
                self._take(*built, classes, passes=0)
            self._one_pass(with_recipe(options, len(texts)), texts, labels, weight)
        return self

    def _options(self) -> TrainOptions:
        """The parameters as options of a training run, checked."""
        check_numbers(self.get_params(deep=False))
        saved = saved_nin(str(self.model))
        if not saved and self.model not in PRESET_NAMES:
            raise UserError(
                f"model must be one of {', '.join((*PRESET_NAMES, *READY_MADE))} or the folder of "
                f"a saved NiN text classifier, not {self.model!r}"
            )
        if saved and (self.tokenizer, self.vocab_size) != ("wordpiece", None):
            raise UserError(f"{self.model} has a tokenizer; leave out tokenizer and vocab_size")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}")
        if not 0 < self.validation_fraction < 1:
            raise UserError("validation_fraction must be between 0 and 1")
        options = TrainOptions(
            "",
            model=str(self.model),
            tokenizer=None if saved else self.tokenizer,  # type: ignore[arg-type]
            vocab_size=self.vocab_size,  # type: ignore[arg-type]
            max_length=self.max_length,
            ngrams=self.ngrams,
            pretrain_epochs=(self.pretrain_epochs or 0) if self.ngrams else 0,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,  # type: ignore[arg-type]
            dropout=self.dropout,
            patience=self.n_iter_no_change,
            precision=self.precision,
        )
        try:
            check(options)
        except UserError as error:
            raise UserError(in_parameters(str(error))) from error
        return options

    @contextmanager
    def _session(self) -> Iterator[TrainOptions]:
        """Options with a seed; threads, logging and random numbers are as before afterwards."""
        options = self._options()
        options.seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        logger = logging.getLogger("nin_text")
        level = logger.level
        logger.setLevel(logging.INFO if self.verbose else logging.ERROR)
        bars = is_progress_bar_enabled()
        disable_progress_bar()  # of checkpoints
        try:
            with threads(self.n_jobs), own_random_numbers(options.seed):
                yield options
        finally:
            logger.setLevel(level)
            if bars:
                enable_progress_bar()

    def _build(
        self,
        options: TrainOptions,
        texts: Sequence[str],
        labels: np.ndarray,
        classes: np.ndarray,
    ) -> tuple[NiNTextForSequenceClassification, PreTrainedTokenizerBase]:
        multi_label = labels.ndim == 2
        if multi_label:
            options.ngrams = options.pretrain_epochs = 0
        torch.manual_seed(options.seed)
        names = [str(label) for label in classes]
        model, tokenizer = models.build(with_recipe(options, len(texts)), texts, [], names)
        assert isinstance(model, NiNTextForSequenceClassification)
        model.config.problem_type = MULTI_LABEL if multi_label else "single_label_classification"
        return model, tokenizer

    def _train(
        self,
        options: TrainOptions,
        model: NiNTextForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        labels: np.ndarray,
        weight: np.ndarray | None,
        unlabelled: Sequence[str],
        new_head: bool,
    ) -> tuple[NiNTextForSequenceClassification, int]:
        """The best model and the number of passes."""
        rows = encode(tokenizer, texts, self.max_length)
        held, rest = hold_out(labels, self.validation_fraction)
        validation = EncodedTexts([rows[i] for i in held], labels[held])
        device = pick_device(self.device)
        with tempfile.TemporaryDirectory(prefix="nin-text-") as folder:
            learner = Learner(
                options,
                model,
                tokenizer,
                validation,
                Path(folder) / "run",
                device,
                new_head,
                keep_best_epoch=self.early_stopping,
            )
            encoded = {"train": EncodedTexts([rows[i] for i in rest], labels[rest])}
            if unlabelled:
                more = encode(tokenizer, unlabelled, self.max_length)
                encoded["unsupervised"] = EncodedTexts(more, np.full(len(more), -1))
                trainer = learn(learner, encoded, {}, [])
            else:
                parts = None if weight is None else weight[rest]
                targets = self._targets(labels, weight, model.classifier.out_features)[rest]
                trainer = learn(learner, encoded, {}, [], parts, targets)
            # The averaged copy: the Trainer leaves the model itself wrapped for bfloat16.
            best = trainer.best_model
            assert isinstance(best, NiNTextForSequenceClassification) and best is not model
            if best.ngrams is not None:
                stages.fit_to(
                    best.ngrams, rows, labels, learner.pseudo_labelled, sample_weight=weight
                )
                best.rescale(1.0, learner.ngram_scale)
        return best, round(trainer.state.epoch or 0)

    def _targets(self, labels: np.ndarray, weight: np.ndarray | None, classes: int) -> np.ndarray:
        return targets_of(labels, weight, classes, balanced=self.class_weight == "balanced")

    def _one_pass(
        self,
        options: TrainOptions,
        texts: Sequence[str],
        labels: np.ndarray,
        weight: np.ndarray | None,
    ) -> None:
        model = self._on_device()
        rows = encode(self.tokenizer_, texts, self.max_length_)
        targets = torch.from_numpy(self._targets(labels, weight, len(self.classes_)))
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(
                model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
            )
        optimizer = self._optimizer
        for group in optimizer.param_groups:  # they may have been set anew since
            group |= {"lr": options.learning_rate, "weight_decay": options.weight_decay}
        sampler = TokenBatchSampler(
            [len(row) for row in rows],
            options.batch_tokens,
            options.batch_size,
            seed=options.seed + self.n_iter_,
        )
        torch.manual_seed(options.seed + self.n_iter_)
        model.train()
        for batch in sampler:
            input_ids, mask = pad([rows[i] for i in batch], model.config.pad_token_id or 0)
            batch_on_device = (t.to(model.device) for t in (input_ids, mask, targets[batch]))
            loss = model(*batch_on_device).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        self.n_iter_ += 1

    # ---- answers -------------------------------------------------------------------------------

    def _logits(self, X: Any) -> np.ndarray:  # noqa: N803
        check_is_fitted(self, "model_")
        texts = as_texts(X)
        model = self._on_device().eval()
        with threads(self.n_jobs):
            rows = encode(self.tokenizer_, texts, self.max_length_)
            return predict_logits(model, rows, pad_token_id=model.config.pad_token_id or 0)

    def _on_device(self) -> NiNTextForSequenceClassification:
        self.model_.to(pick_device(self.device))
        return self.model_

    def _is_multi_label(self) -> bool:
        return bool(self.model_.config.problem_type == MULTI_LABEL)

    def decision_function(self, X: Any) -> np.ndarray:  # noqa: N803
        """(n, K) logits; of two classes (n,), that of the second minus that of the first."""
        logits = self._logits(X)
        if len(self.classes_) == 2 and not self._is_multi_label():
            return np.asarray(logits[:, 1] - logits[:, 0])
        return logits

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """(n, K) class probabilities; multi-label ones are independent of each other."""
        logits = self._logits(X)
        return np.asarray(expit(logits)) if self._is_multi_label() else softmax(logits)

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """(n,) labels, or (n, K) zeros and ones."""
        logits = self._logits(X)
        if self._is_multi_label():
            return (logits > 0).astype(int)
        return np.asarray(self.classes_[logits.argmax(axis=1)])

    # ---- files ---------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Leave a Hugging Face model folder that also holds parameters and labels, as JSON."""
        check_is_fitted(self, "model_")
        place = Path(folder)
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file; save the classifier to a folder")
        aside = place / ".saving"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        models.save(self.model_, aside)
        self.tokenizer_.save_pretrained(aside)
        parameters = {name: plain(value) for name, value in self.get_params().items()}
        state = parameters.pop("random_state")
        parameters["random_state"] = int(state) if isinstance(state, (int, np.integer)) else None
        if isinstance(self.class_weight, dict):
            parameters["class_weight"] = [
                [plain(k), plain(v)] for k, v in self.class_weight.items()
            ]
        write_json(
            aside / ESTIMATOR_FILE,
            {
                "parameters": parameters,
                "classes": [plain(label) for label in self.classes_],
                "dtype": "object" if self.classes_.dtype == object else str(self.classes_.dtype),
                "max_length": self.max_length_,
                "n_iter": self.n_iter_,
            },
        )
        if (place / METRICS_FILE).is_file():  # what a run has left there is of another model
            for name in RUN_FILES:
                (place / name).unlink(missing_ok=True)
        move_files(aside, place)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """A classifier that `save` left, a run folder of train_text.py, or a ready-made model.

        Raises:
            UserError: if there is no such classifier, or it is damaged.
        """
        folder = models.local(str(folder))
        model, tokenizer = models.load(folder, multi_label=True)
        if not isinstance(model, NiNTextForSequenceClassification):
            raise UserError(f"{folder} holds no NiN text classifier")
        path = Path(folder) / ESTIMATOR_FILE
        try:
            saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            parameters = dict(saved.get("parameters", {}))
            if isinstance(parameters.get("class_weight"), list):
                parameters["class_weight"] = dict(parameters["class_weight"])
            estimator = cls(**parameters)
            names = saved.get("classes", models.label_names(model))
            estimator.classes_ = np.array(names, dtype=saved.get("dtype"))
            estimator.max_length_ = int(saved.get("max_length", trained_max_length(folder) or 0))
            estimator.n_iter_ = int(saved.get("n_iter", 0))
        except (TypeError, ValueError, AttributeError, MemoryError, OverflowError) as error:
            raise UserError(f"{path} is damaged ({error}); save the classifier again") from error
        if len(estimator.classes_) != model.config.num_labels:
            raise UserError(f"{path} is of another model; save the classifier again")
        order = np.argsort(estimator.classes_)
        estimator.classes_ = estimator.classes_[order]
        models.reorder_classes(model, order.tolist())
        estimator.model_, estimator.tokenizer_, estimator._optimizer = model, tokenizer, None
        return estimator

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        tags.classifier_tags.multi_label = True
        tags.non_deterministic = self.random_state is None
        return tags
