"""One way to train: the Hugging Face Trainer, with batches bounded in tokens and averaged weights.

NiN models for text and images and transformers go through the same code, so that a comparison
compares models.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import DistributedType
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from nin_text.blocks import Rows
from nin_text.callbacks import (
    COMPLETE_FILE,
    Patience,
    ProgressBar,
    StopOnNaN,
    WeightAverage,
    last_checkpoint,
    no_number,
)
from nin_text.cuda_graphs import block_graphs, encoder_of
from nin_text.device import use_bf16
from nin_text.errors import UserError, in_one_line
from nin_text.evaluation import pad, predict_logits, softmax
from nin_text.options import TrainOptions, is_nin
from nin_text.report import write_json

logger = logging.getLogger(__name__)

AVERAGE_FILE = "averaged.safetensors"


class EncodedTexts(Dataset):
    """Token ids of each text, as long as it is, with its class index or (K,) probabilities."""

    def __init__(self, rows: Sequence[np.ndarray], labels: Sequence[int] | np.ndarray) -> None:
        self.rows = rows
        self.labels = np.asarray(labels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[i], self.labels[i]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(row) for row in self.rows]


class TokenBatchSampler(Sampler[list[int]]):
    """Random batches of about `batch_tokens` tokens and at most about `batch_size` texts.

    Every epoch has the same number of batches, which learning rate schedules and resumed runs rely
    on: the shuffled texts are cut at equal shares of the epoch's work, so a batch is over its
    bound by at most one text.

    Args:
        lengths: tokens of each text.
        batch_tokens, batch_size: bounds on a batch.
        seed: with the epoch, decides the order.
        similar_lengths: put texts of similar length together, for models that compute padding.
            NiN does not and trains better on batches drawn at random.
        parts: batches that make up one optimizer step: the number of processes times that of
            accumulated batches. Which texts a step learns from is the same for one batch of 32
            and for two of 16.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_tokens: int,
        batch_size: int,
        *,
        seed: int = 0,
        similar_lengths: bool = False,
        parts: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths)
        # The share of a step that each text takes; a text longer than a step fills one.
        self.work = np.clip(self.lengths / (batch_tokens * parts), 1 / (batch_size * parts), 1)
        self.parts = min(parts, len(self.lengths))
        steps = math.ceil(round(self.work.sum(), 6))
        self.steps = max(1, min(steps, len(self.lengths) // self.parts))
        self.seed = seed
        self.similar_lengths = similar_lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        if self.similar_lengths:
            order = order[np.argsort(self.lengths[order], kind="stable")]
        steps = self._cut(order, self.steps, least=self.parts)
        for i in rng.permutation(self.steps):
            for batch in self._cut(steps[i], self.parts, least=1):
                yield batch.tolist()

    def _cut(self, texts: np.ndarray, pieces: int, least: int) -> list[np.ndarray]:
        """Cut texts, in their order, into pieces of about equal work and `least` texts or more."""
        work = self.work[texts]
        middle = np.cumsum(work) - work / 2
        bounds = np.linspace(0, work.sum(), pieces + 1)[1:-1]
        cuts = np.searchsorted(middle, bounds)
        # The i-th cut lies at i times `least` or later, and leaves enough for the rest.
        floor = np.arange(1, pieces) * least
        cuts = np.maximum.accumulate(np.maximum(cuts - floor, 0)) + floor
        cuts = np.minimum(cuts, len(texts) - pieces * least + floor)
        return np.split(texts, cuts)


class RunTrainer(Trainer):
    """Trainer with token-bounded batches, averaged weights and checkpoints that are whole.

    Args:
        collate: makes a batch of a list of items of `train_dataset`, or of what its `__getitems__`
            returns for their indices. If the model has a NiN text encoder, the batch also gets the
            `layout` of its `attention_mask`, which the model is to take.
        batch_tokens: bound on the sum of the `lengths` of a batch; that on its items is among the
            arguments.
        similar_lengths: see `TokenBatchSampler`.
        ema_decay: of the averaged weights; 0 for none.
        title: of the progress bar.
        rate_option: that sets the learning rate, for advice.
        loaders: processes that make the batches of a GPU ahead of it.
        compiled: compile the blocks of a NiN text encoder (torch.compile).
    """

    train_dataset: Any  # with `lengths`, the tokens of each item

    def __init__(
        self,
        *,
        collate: Callable[[Any], dict[str, Tensor]],
        batch_tokens: int,
        similar_lengths: bool = False,
        ema_decay: float = 0.0,
        title: str = "training",
        rate_option: str = "--learning-rate",
        loaders: int = 2,
        compiled: bool = False,
        **kwargs: Any,
    ) -> None:
        self.loaders = loaders
        self.batch_tokens = batch_tokens
        self.similar_lengths = similar_lengths
        self.rate_option = rate_option
        self.seconds = self.seconds_before = 0.0
        self.compiled = compiled
        encoder = encoder_of(kwargs["model"])
        if encoder is not None:
            collate = partial(_with_layout, collate, encoder.layout_of)
        super().__init__(data_collator=collate, **kwargs)
        self.remove_callback(PrinterCallback)
        self.average = (
            WeightAverage(cast(torch.nn.Module, self.model), ema_decay) if ema_decay else None
        )
        for callback in (self.average, ProgressBar(title), StopOnNaN(rate_option)):
            if callback is not None:
                self.add_callback(callback)

    def get_train_dataloader(self) -> DataLoader:
        if len(self.train_dataset) < self.args.world_size:
            raise UserError(
                f"{len(self.train_dataset)} examples are too few for {self.args.world_size} "
                f"processes"
            )
        sampler = TokenBatchSampler(
            self.train_dataset.lengths,
            self.batch_tokens,
            self.args.train_batch_size,
            seed=self.args.seed,
            similar_lengths=self.similar_lengths,
            parts=self.args.world_size * self.args.gradient_accumulation_steps,
        )
        can_fork = hasattr(os, "fork") and not multiprocessing.current_process().daemon
        workers = self.loaders if can_fork and self.args.device.type == "cuda" else 0
        if workers:  # tokenizers, which they never use, would warn of a fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        return self.accelerator.prepare(loader)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; `seconds` tells afterwards how long it took."""
        self.clock = time.perf_counter()
        # Not where other processes, or other batches of a step, add to the gradients.
        on_gpu = self.args.device.type == "cuda"
        graphs = (
            on_gpu
            and self.accelerator.distributed_type == DistributedType.NO
            and self.args.gradient_accumulation_steps == 1
        )
        compiled = self.compiled and (graphs or not on_gpu)
        if self.compiled and not compiled:  # launched one by one they are slower
            logger.warning("--compile is for one process and --gradient-accumulation 1: left out")
        model = cast(torch.nn.Module, self.model)
        try:
            with block_graphs(model, graphs=graphs, compiled=compiled):
                return super().train(*args, **kwargs)
        finally:
            self.seconds = self._elapsed()

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """As of the Trainer; on a CPU, where it costs nothing, every loss is looked at.

        Raises:
            UserError: if it is no number; the weights have not been touched by this batch.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            shape = tuple(next(iter(inputs.values())).shape)
            raise no_number(
                self.args,
                f"in step {self.state.global_step + 1} of {self.state.max_steps}, with a batch of "
                f"shape {shape}",
                self.rate_option,
            )
        return loss

    def train_or_resume(self) -> None:
        """Train, from the last whole checkpoint in the output folder if there is one."""
        checkpoint = last_checkpoint(Path(cast(str, self.args.output_dir)))
        if checkpoint is not None:
            logger.info("resuming from %s", checkpoint)
            with _whole(checkpoint):
                record = json.loads((checkpoint / COMPLETE_FILE).read_text())
                TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if record["stopped"]:  # out of patience: nothing is left but to take the best pass
                self.args.num_train_epochs = record["epoch"]
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _elapsed(self) -> float:
        """Seconds of training up to now, those before a resumed checkpoint included."""
        return self.seconds_before + time.perf_counter() - self.clock

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(cast(str, self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            if self.average is not None:
                self.average.save(folder / AVERAGE_FILE)
            record = {
                "epoch": round(self.state.epoch or 0),
                "stopped": self.control.should_training_stop,
                "seconds": self._elapsed(),
            }
            write_json(folder / COMPLETE_FILE, record)
            # Only now, and not in the Trainer (save_total_limit), which would remove the last whole
            # checkpoint while this one still lacks its averaged weights.
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=1,
                best_model_checkpoint=self._best_checkpoint(),
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _whole(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            record = json.loads((Path(resume_from_checkpoint) / COMPLETE_FILE).read_text())
            self.seconds_before = record["seconds"]
            if self.average is not None:
                self.average.load(Path(resume_from_checkpoint) / AVERAGE_FILE)

    # The states of optimizer, schedule and random numbers are pickles; transformers opens them with
    # `weights_only`, which runs none of what they say.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _whole(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _whole(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint = self._best_checkpoint()
        if self.average is None:
            super()._load_best_model()
        elif best is not None:
            with _whole(best):
                self.average.load(Path(best) / AVERAGE_FILE)

    def _best_checkpoint(self) -> str | None:
        """Its path now: the run may have been moved, or resumed from another working directory."""
        best = self.state.best_model_checkpoint
        return (
            None if best is None else str(Path(cast(str, self.args.output_dir)) / Path(best).name)
        )


def _with_layout(
    collate: Callable[[Any], dict[str, Tensor]], layout_of: Callable[[Tensor], Rows], items: Any
) -> dict[str, Any]:
    """A batch, and where its tokens lie in the rows layout: what a GPU would be waited for."""
    batch = collate(items)
    layout = layout_of(batch["attention_mask"])
    # The mask as bool is part of the layout: workers send it once, in an eighth of the memory.
    return batch | {"attention_mask": layout.token_mask, "layout": layout}


@contextmanager
def _whole(checkpoint: Path | str | None) -> Iterator[None]:
    """Turn whatever a damaged checkpoint provokes into one sentence."""
    try:
        yield
    except Exception as error:  # of json, safetensors, torch and pickle
        reason = in_one_line(error)
        raise UserError(
            f"the checkpoint {checkpoint} is damaged ({reason}); remove it, or start anew without "
            f"--resume"
        ) from error


class ClassifierTrainer(RunTrainer):
    """Trains a classifier and judges it once an epoch by its averaged weights.

    Args:
        patience: stop after this many epochs without a better validation score; None for never.
    """

    model: PreTrainedModel
    eval_dataset: Any  # with `labels`

    def __init__(self, *, patience: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if patience is not None:
            self.add_callback(Patience(early_stopping_patience=patience))

    @property
    def best_model(self) -> PreTrainedModel:
        """The model to judge and to save: the averaged weights if there are any."""
        if self.average is None:
            return self.model
        return cast(PreTrainedModel, self.average.averaged.module)

    def logits(self, dataset: Any, progress: str | None = None) -> np.ndarray:
        """(n, K) logits of `best_model`; `progress` is the title of a bar."""
        raise NotImplementedError

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        truth = dataset.labels
        logits = self.logits(dataset)
        if truth.ndim == 2:  # multi-label: every decision counts
            right = (logits > 0) == (truth > 0)
            losses = np.logaddexp(0, np.where(truth > 0, -logits, logits))
        else:
            right = logits.argmax(axis=1) == truth
            picked = softmax(logits)[np.arange(len(truth)), truth]
            losses = -np.log(np.maximum(picked, 1e-12))
        metrics = {
            f"{metric_key_prefix}_accuracy": float(right.mean()),
            f"{metric_key_prefix}_loss": float(losses.mean()),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class TextTrainer(ClassifierTrainer):
    """A `ClassifierTrainer` for texts, padded to the longest of a batch."""

    train_dataset: EncodedTexts
    eval_dataset: EncodedTexts

    def __init__(self, *, pad_token_id: int, **kwargs: Any) -> None:
        self.pad_token_id = pad_token_id
        super().__init__(collate=self.collate, **kwargs)

    def collate(self, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        """A padded batch with its labels."""
        rows, labels = zip(*examples, strict=True)
        input_ids, attention_mask = pad(rows, self.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": torch.from_numpy(np.stack(labels)),
        }

    def logits(self, dataset: EncodedTexts, progress: str | None = None) -> np.ndarray:
        """(n, K) logits of `best_model`."""
        return predict_logits(
            self.best_model,
            dataset.rows,
            pad_token_id=self.pad_token_id,
            batch_tokens=2 * self.batch_tokens,
            autocast=torch.bfloat16 if self.args.bf16 else None,
            progress=progress,
        )


def shared_arguments(options: TrainOptions, device: torch.device) -> dict[str, Any]:
    """Those of `training_arguments` that all stages of a run have in common."""
    return {
        "batch_size": options.batch_size,
        "gradient_accumulation": options.gradient_accumulation,
        "warmup": options.warmup,
        "seed": options.seed,
        "bf16": use_bf16(options.precision, device),
        "device": device,
        "find_unused_parameters": not is_nin(options.model),
    }


def text_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    folder: Path,
    train: EncodedTexts,
    validation: EncodedTexts | None,
    *,
    epochs: int,
    device: torch.device,
    keep_best_epoch: bool = True,
) -> TextTrainer:
    """The trainer of a classifier.

    Args:
        model: is trained in place.
        tokenizer: goes into the checkpoints.
        options: with the recipe filled in.
        folder: for checkpoints; the progress bar has its name.
        train, validation: what to learn from, and what to judge by; None to judge nothing, make
            all passes and keep the last.
        epochs: passes over `train`.
        device: where to compute.
        keep_best_epoch: whether `options.patience`, if there is any, is heeded: keep the pass that
            is right most often, or with several labels a text that of least loss, and stop early.
            Else all passes are made and the last is kept.
    """
    keep_best_epoch = keep_best_epoch and options.patience > 0 and validation is not None
    settings = training_arguments(
        folder,
        epochs=epochs,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        evaluate=validation is not None,
        **shared_arguments(options, device),
    )
    settings.load_best_model_at_end = keep_best_epoch
    # "No" to each of many labels is nearly always right.
    if validation is not None and validation.labels.ndim == 2:
        settings.metric_for_best_model, settings.greater_is_better = "loss", False
    return TextTrainer(
        model=model,
        args=settings,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        pad_token_id=tokenizer.pad_token_id or 0,
        batch_tokens=options.batch_tokens,
        similar_lengths=not is_nin(options.model),
        ema_decay=options.ema_decay,
        patience=options.patience if keep_best_epoch else None,
        title=folder.name.replace("-", " "),
    )


def training_arguments(
    folder: Path,
    *,
    epochs: int,
    batch_size: int,
    gradient_accumulation: int,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    seed: int,
    bf16: bool,
    device: torch.device,
    find_unused_parameters: bool,
    evaluate: bool = True,
    compile: bool = False,  # noqa: A002
) -> TrainingArguments:
    """The Trainer's arguments for a run: save once an epoch, and evaluate if asked to.

    `find_unused_parameters` is for models of which some get no gradient, in several processes.
    """
    if compile and device.type == "cuda":
        # For what is compiled, transformers turns TF32 on, through the newer of torch's two
        # settings. With the older one at odds, torch refuses to read it, and to compile.
        torch.set_float32_matmul_precision("high")
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_steps=warmup,
        lr_scheduler_type="linear",
        adam_beta2=0.98,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        seed=seed,
        bf16=bf16,
        torch_compile=compile,
        use_cpu=device.type == "cpu",
        eval_strategy="epoch" if evaluate else "no",
        save_strategy="epoch",
        load_best_model_at_end=evaluate,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        logging_steps=10,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=device.type == "cuda",
        # The sampler already gives every process equally many batches.
        accelerator_config={"even_batches": False},
        ddp_find_unused_parameters=find_unused_parameters,
        # They are equal everywhere and never change, or are brought together when it is judged.
        ddp_broadcast_buffers=False,
    )
    # One process, one device: torch.nn.DataParallel would cut the rows of a batch apart. Several
    # devices are for torchrun.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
