"""Batches, averaged weights, accumulation, checkpoints: what training promises."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import STILL
from transformers import TrainerCallback, TrainingArguments

from nin_text import NiNTextConfig, NiNTextForSequenceClassification
from nin_text.callbacks import Patience, StopOnNaN, WeightAverage, last_checkpoint
from nin_text.errors import UserError
from nin_text.training import (
    EncodedTexts,
    TextTrainer,
    TokenBatchSampler,
    training_arguments,
)

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@settings(max_examples=100, deadline=None)
@given(
    lengths=LENGTHS,
    tokens=st.integers(10, 200),
    size=st.integers(1, 20),
    parts=st.integers(1, 4),
    similar=st.booleans(),
)
def test_every_epoch_is_a_new_partition_into_equally_many_batches(
    lengths: list[int], tokens: int, size: int, parts: int, similar: bool
) -> None:
    sampler = TokenBatchSampler(lengths, tokens, size, seed=7, similar_lengths=similar, parts=parts)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        epochs.append(batches)
        assert len(batches) % parts == 0 or len(lengths) < parts
    assert epochs[0] == epochs[2]
    if len(lengths) > 30 and len(sampler) > 3:
        assert epochs[0] != epochs[1]


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, tokens=st.integers(10, 200), size=st.integers(1, 20))
def test_a_batch_is_over_its_bounds_by_one_text_at_most(
    lengths: list[int], tokens: int, size: int
) -> None:
    for batch in TokenBatchSampler(lengths, tokens, size):
        assert sum(lengths[i] for i in batch) <= tokens + max(lengths)
        assert len(batch) <= size + 1


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 5, 20, 300, 100_000]), min_size=1, max_size=60),
    tokens=st.integers(1, 500),
    size=st.integers(1, 20),
    parts=st.integers(1, 4),
)
def test_no_batch_is_empty_however_long_a_text_is(
    lengths: list[int], tokens: int, size: int, parts: int
) -> None:
    sampler = TokenBatchSampler(lengths, tokens, size, parts=parts)
    batches = list(sampler)
    assert all(batches)
    assert len(batches) == len(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))


@settings(max_examples=100, deadline=None)
@given(
    lengths=LENGTHS,
    tokens=st.integers(10, 200),
    size=st.integers(1, 20),
    parts=st.sampled_from([2, 3]),
)
def test_a_step_draws_the_same_texts_in_one_batch_or_in_parts(
    lengths: list[int], tokens: int, size: int, parts: int
) -> None:
    whole = list(TokenBatchSampler(lengths, tokens * parts, size * parts, seed=3))
    cut = list(TokenBatchSampler(lengths, tokens, size, seed=3, parts=parts))
    if len(cut) == len(whole) * parts:  # unless there are too few texts for that many parts
        steps = [list(chain(*cut[i : i + parts])) for i in range(0, len(cut), parts)]
        if all(len(step) > parts for step in whole):
            assert steps == whole


def test_similar_lengths_save_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 500)

    def padded(similar: bool) -> int:
        sampler = TokenBatchSampler(lengths, 1000, 64, similar_lengths=similar)
        return sum(len(batch) * lengths[batch].max() for batch in sampler)

    assert padded(True) < 1.15 * lengths.sum() < padded(False)


def test_averaged_weights_are_the_exponential_moving_average() -> None:
    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, decay=0.9)
    expected = None
    for n in range(100):
        with torch.no_grad():
            model.weight.normal_()
        average.on_step_end(None, None, None, model=model)
        new = model.weight.detach().clone()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = new if expected is None else decay * expected + (1 - decay) * new
    assert torch.allclose(average.averaged.module.weight, expected, atol=1e-6)


def test_statistics_of_normalization_are_those_of_the_end_of_the_pass() -> None:
    model = torch.nn.BatchNorm1d(2)
    average = WeightAverage(model, decay=0.9)
    for _ in range(3):
        model(torch.randn(8, 2) + 5)
        average.on_step_end(None, None, None, model=model)
    average.on_epoch_end(None, None, None, model=model)
    assert average.averaged.module.running_mean.equal(model.running_mean)
    assert (model.running_mean > 1).all()


def test_averaged_weights_survive_saving(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    first = WeightAverage(model, 0.5)
    for _ in range(3):
        with torch.no_grad():
            model.weight.normal_()
        first.on_step_end(None, None, None, model=model)
    first.save(tmp_path / "a.safetensors")
    second = WeightAverage(torch.nn.Linear(2, 2), 0.5)
    second.load(tmp_path / "a.safetensors")
    for average in (first, second):
        average.on_step_end(None, None, None, model=model)
    assert torch.equal(first.averaged.module.weight, second.averaged.module.weight)


def small_trainer(folder: Path, rows, labels, **options) -> TextTrainer:
    torch.manual_seed(0)
    model = NiNTextForSequenceClassification(
        NiNTextConfig.from_preset("nin-text-small", vocab_size=30, num_labels=2, **STILL)
    )
    arguments = {
        "epochs": 2,
        "batch_size": 8,
        "gradient_accumulation": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "warmup": 0.0,
        "seed": 0,
        "bf16": False,
        "device": torch.device("cpu"),
        "find_unused_parameters": False,
        **options,
    }
    ema_decay = arguments.pop("ema_decay", 0.0)
    return TextTrainer(
        model=model,
        args=training_arguments(folder, **arguments),
        train_dataset=EncodedTexts(rows, labels),
        eval_dataset=EncodedTexts(rows, labels),
        pad_token_id=0,
        batch_tokens=1000,
        similar_lengths=False,
        ema_decay=ema_decay,
        patience=5,
    )


def test_accumulated_gradients_equal_those_of_a_large_batch(tmp_path: Path) -> None:
    """All texts are alike, so that it does not matter which of them share a batch."""
    rows, labels = [np.arange(1, 9, dtype=np.int32)] * 16, [1] * 16
    weights = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = small_trainer(
            tmp_path / str(batch_size),
            rows,
            labels,
            batch_size=batch_size,
            gradient_accumulation=accumulation,
            weight_decay=0.0,
        )
        trainer.args.max_grad_norm = 1e-3  # shows a gradient of the wrong size at once
        trainer.train()
        assert trainer.state.global_step == 4
        norms = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
        weights.append((trainer.model.classifier.weight.detach().clone(), norms))
    for weight, norms in weights[1:]:
        assert torch.allclose(weight, weights[0][0], atol=1e-6)
        assert norms == pytest.approx(weights[0][1], rel=1e-3)


def test_the_best_epoch_is_the_one_that_is_kept(tmp_path: Path) -> None:
    """The learning rate is so high that a later epoch is worse."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 30, 10, dtype=np.int32) for _ in range(40)]
    labels = [int(row[0] > 15) for row in rows]
    trainer = small_trainer(tmp_path, rows, labels, epochs=4, learning_rate=0.1, ema_decay=0.5)
    trainer.train()
    seen = [e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e]
    assert len(seen) == 4
    assert trainer.evaluate()["eval_accuracy"] == max(seen)


def test_a_resumed_run_remembers_how_long_nothing_has_improved(tmp_path: Path) -> None:
    """Whether and when training stops early must not depend on its having been killed."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 30, 10, dtype=np.int32) for _ in range(40)]
    labels = rng.integers(0, 2, 40).tolist()

    def patience(trainer: TextTrainer) -> Patience:
        return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Patience))

    # A learning rate of nothing: the first pass stays the best.
    first = small_trainer(tmp_path, rows, labels, epochs=9, learning_rate=1e-12)
    patience(first).early_stopping_patience = 3
    first.add_callback(KillAfter(step=13))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = small_trainer(tmp_path, rows, labels, epochs=9, learning_rate=1e-12)
    patience(again).early_stopping_patience = 3
    again.train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))
    assert again.state.epoch == 4


class KillAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_loss_that_is_no_number_stops_training(tmp_path: Path) -> None:
    rows = [np.arange(1, 9, dtype=np.int32)] * 16
    trainer = small_trainer(tmp_path, rows, [0, 1] * 8, learning_rate=1e-3)
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(math.nan)
    with pytest.raises(UserError, match="--learning-rate"):
        trainer.train()


def test_losses_that_are_numbers_do_not(tmp_path: Path) -> None:
    StopOnNaN().on_log(None, None, None, logs={"loss": 0.3, "epoch": 1.0})


def test_the_newest_whole_checkpoint_is_found_and_those_cut_short_are_removed(
    tmp_path: Path,
) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, whole in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
        if whole:
            (folder / "complete.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()


def test_a_checkpoint_is_removed_only_when_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 30, 10, dtype=np.int32) for _ in range(40)]
    trainer = small_trainer(tmp_path, rows, [int(row[0] > 15) for row in rows], ema_decay=0.5)
    save, saved = trainer.average.save, []

    def save_once(path: Path) -> None:
        if saved:
            raise OSError("killed here")
        saved.append(path)
        save(path)

    monkeypatch.setattr(trainer.average, "save", save_once)
    with pytest.raises(OSError, match="killed here"):
        trainer.train()
    assert (tmp_path / "checkpoint-10").exists(), "the second checkpoint was begun"
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_the_best_and_the_last_checkpoint_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 30, 10, dtype=np.int32) for _ in range(40)]
    labels = [int(row[0] > 15) for row in rows]
    trainer = small_trainer(tmp_path, rows, labels, epochs=4, learning_rate=0.1, ema_decay=0.5)
    trainer.train()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {Path(trainer.state.best_model_checkpoint).name, "checkpoint-20"}


def test_checkpoints_hold_no_pickled_weights(tmp_path: Path) -> None:
    rows = [np.arange(1, 9, dtype=np.int32)] * 16
    small_trainer(tmp_path, rows, [0, 1] * 8, ema_decay=0.5).train()
    names = {path.name for path in last_checkpoint(tmp_path).iterdir()}
    assert {"model.safetensors", "averaged.safetensors", "complete.json"} <= names
    assert "pytorch_model.bin" not in names


def test_a_run_that_had_stopped_early_is_not_trained_further(tmp_path: Path) -> None:
    """Killed after its last pass and before its result was saved, it has nothing left to train."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 30, 10, dtype=np.int32) for _ in range(40)]
    labels = rng.integers(0, 2, 40).tolist()

    def trainer() -> TextTrainer:
        made = small_trainer(tmp_path, rows, labels, epochs=9, learning_rate=1e-12, ema_decay=0.5)
        for callback in made.callback_handler.callbacks:
            if isinstance(callback, Patience):
                callback.early_stopping_patience = 2
        return made

    first, again = trainer(), trainer()
    first.train_or_resume()
    assert first.state.epoch == 3
    again.train_or_resume()
    assert again.state.epoch == 3
    assert again.state.global_step == first.state.global_step
    expected = first.best_model.state_dict()
    for name, value in again.best_model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_one_process_uses_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn.DataParallel would cut batches apart whose rows belong together."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 4)
    rows = [np.arange(1, 9, dtype=np.int32)] * 16
    assert small_trainer(tmp_path, rows, [0, 1] * 8).args._n_gpu <= 1
