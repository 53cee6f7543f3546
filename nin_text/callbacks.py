"""What goes along with a training: averaged weights, the progress bar, early stopping, NaN."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from nin_text.errors import UserError

logger = logging.getLogger(__name__)

COMPLETE_FILE = "complete.json"  # written last: a checkpoint without it was cut short


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; those that were cut short are removed."""
    whole: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE_FILE).is_file():
            whole.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(whole)[1] if whole else None


class WeightAverage(TrainerCallback):
    """Exponential moving average of the weights, updated after every optimizer step.

    The decay grows with the number n of updates, min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    ExponentialMovingAverage: the average of a short run does not hang on to its first weights.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.averaged = AveragedModel(model)
        self.averaged.module.eval()

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        # As `AveragedModel.update_parameters`, which would also copy the table of n-grams.
        n = int(self.averaged.n_averaged)
        weight = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        torch._foreach_lerp_([*self.averaged.module.parameters()], [*model.parameters()], weight)
        self.averaged.n_averaged += 1

    @torch.no_grad()
    def on_epoch_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        # Before the averaged model is judged or saved. Statistics of batch normalization change.
        for mine, theirs in zip(self.averaged.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def save(self, path: Path) -> None:
        save_file({k: v.contiguous() for k, v in self.averaged.state_dict().items()}, path)

    def load(self, path: Path) -> None:
        self.averaged.load_state_dict(load_file(path))


class ProgressBar(TrainerCallback):
    """One bar for the whole training, and a line for each epoch."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.bar: tqdm[None] = tqdm(
            desc=self.title,
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            # Where nobody watches (a log file), a bar would fill the file.
            mininterval=0.5 if sys.stderr.isatty() else 30,
            disable=not logger.isEnabledFor(logging.INFO),
        )

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in (logs or {}):
            self.bar.set_postfix({"loss": f"{logs['loss']:.3f}"}, refresh=False)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):  # type: ignore[no-untyped-def]
        line = (
            f"epoch {round(state.epoch)}/{args.num_train_epochs:.0f}: "
            f"validation accuracy {metrics['eval_accuracy']:.4f}, "
            f"log loss {metrics['eval_loss']:.3f}"
        )
        with tqdm.external_write_mode(sys.stderr):
            logger.info(line)

    def on_train_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.bar.close()


class Patience(EarlyStoppingCallback):
    """Early stopping that, when a run is resumed, remembers how long nothing has improved."""

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        super().on_train_begin(args, state, control, **kwargs)
        name = f"eval_{args.metric_for_best_model}"
        seen = [entry[name] for entry in state.log_history if name in entry]
        best = (max if args.greater_is_better else min)(seen, default=None)
        self.early_stopping_patience_counter = len(seen) - 1 - seen.index(best) if seen else 0


class StopOnNaN(TrainerCallback):
    """A loss that is not a number never recovers; stop while the last good checkpoint is there.

    Args:
        option: that sets the learning rate.
    """

    def __init__(self, option: str = "--learning-rate") -> None:
        self.option = option

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        losses = [(logs or {}).get(name, 0.0) for name in ("loss", "train_loss", "eval_loss")]
        if not all(math.isfinite(loss) for loss in losses):
            raise no_number(args, f"by step {state.global_step}", self.option)


def no_number(args: TrainingArguments, where: str, option: str) -> UserError:
    """What to say of a loss that is NaN or infinite: where, what to do, and what there is left."""
    kept = last_checkpoint(Path(cast(str, args.output_dir)))
    return UserError(
        f"the loss is no longer a number {where}; lower {option} (now {args.learning_rate:g}) or "
        f"use --precision fp32. "
        + (f"The last good weights are in {kept}" if kept else "No pass was finished before")
    )
