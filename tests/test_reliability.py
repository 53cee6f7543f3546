"""What is promised of runs that are broken, and of answers that must not depend on chance."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.numpy import load_file
from test_training import small_trainer
from test_untrusted_models import Planted

from nin_text import cli, models, report, tokenization
from nin_text.callbacks import last_checkpoint
from nin_text.errors import UserError
from nin_text.evaluation import predict_logits
from nin_text.options import TrainOptions
from nin_text.runs import train_text
from nin_text.tokenization import cached_tokenizer, encode
from nin_text.training import RunTrainer

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("v*"))
QUICK: dict[str, Any] = {
    "model": "nin-text-small",
    "limit": 60,
    "epochs": 2,
    "pretrain_epochs": 0,
    "quiet": True,
}


# ---- runs that are stopped -----------------------------------------------------------------------


def test_struck_at_random_moments_a_work_ends_as_if_it_had_not_been() -> None:
    """`python -m tests.faults` is the whole campaign: every work, as often as one likes."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--count", "3", "training", "bulk"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert {name: result["survived"] for name, result in found.items()} == {
        "training": 3,
        "bulk": 3,
    }


def test_sigterm_stops_like_ctrl_c_and_has_its_own_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stopped = []

    def work() -> dict[str, Any]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            stopped.append(True)
            raise
        return {}

    with pytest.raises(SystemExit) as caught:
        cli.run(work)
    assert caught.value.code == 143
    assert stopped
    assert capsys.readouterr().err == "error: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_between_two_models_a_folder_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after any of the files of a new model, nobody takes the mixture for a model."""

    class Killed(BaseException):
        pass

    source = FIXTURES[0]
    names = [path.name for path in source.iterdir()]
    replace, left = Path.replace, 0

    def dying(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return replace(path, target)

    for moved in range(len(names)):
        folder, aside = tmp_path / f"{moved}", tmp_path / f"{moved}.aside"
        shutil.copytree(source, folder)
        shutil.copytree(source, aside)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "replace", dying)
            left = moved
            report.move_files(aside, folder)
        with pytest.raises(UserError, match="no model folder"):
            models.load(str(folder))
        report.move_files(aside, folder)
        models.load(str(folder))


# ---- checkpoints ---------------------------------------------------------------------------------


def stopped_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run stopped after its first pass; its checkpoint."""
    save = RunTrainer._save_checkpoint

    def save_and_stop(self: RunTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunTrainer, "_save_checkpoint", save_and_stop)
        train_text(TrainOptions(**QUICK, output_dir=folder))
    checkpoint = last_checkpoint(folder / "checkpoints" / "training")
    assert checkpoint is not None
    return checkpoint


def test_a_pickle_in_a_checkpoint_is_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stopped_run(tmp_path / "run", monkeypatch)
    planted = tmp_path / "planted"
    torch.save({"a": Planted(planted)}, tmp_path / "evil.pt")
    with pytest.raises(FileExistsError):  # the premise: it does act if it is let
        for _ in range(2):
            torch.load(tmp_path / "evil.pt", weights_only=False)
    planted.rmdir()
    pickles = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
    assert {path.name for path in checkpoint.iterdir()} >= set(pickles)
    for name in pickles:
        whole = tmp_path / f"with {name}"
        shutil.copytree(tmp_path / "run", whole)
        place = whole / checkpoint.relative_to(tmp_path / "run")
        shutil.copy(tmp_path / "evil.pt", place / name)
        options = TrainOptions(**QUICK, output_dir=whole, resume=True)
        if name == "training_args.bin":  # nobody reads it
            train_text(options)
        else:
            with pytest.raises(UserError, match=r"is damaged .*start anew without --resume"):
                train_text(options)
        assert not planted.exists()


@pytest.mark.parametrize("name", ["trainer_state.json", "averaged.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = stopped_run(tmp_path / "run", monkeypatch) / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"is damaged .*start anew without --resume") as caught:
        train_text(TrainOptions(**QUICK, output_dir=tmp_path / "run", resume=True))
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_is_told_with_its_step_and_the_last_good_weights_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 30, 10, dtype=np.int32) for _ in range(40)]
    trainer = small_trainer(tmp_path, rows, [int(row[0] > 15) for row in rows], ema_decay=0.5)
    compute = trainer.compute_loss

    def poisoned(*arguments: Any, **named: Any) -> Any:
        loss = compute(*arguments, **named)
        return loss * torch.nan if trainer.state.global_step == 6 else loss

    monkeypatch.setattr(trainer, "compute_loss", poisoned)
    with pytest.raises(UserError) as caught:
        trainer.train()
    for part in (
        r"in step 7 of 10",
        "a batch of shape (8, 10)",
        "lower --learning-rate (now 0.001)",
    ):
        assert part in str(caught.value)
    assert str(caught.value).endswith(f"The last good weights are in {tmp_path / 'checkpoint-5'}")
    kept = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    assert all(np.isfinite(weight).all() for weight in kept.values())


def test_a_cache_on_a_full_disk_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, folder: Path) -> None:
        Path(folder).mkdir(parents=True)
        raise Exception("No space left on device (os error 28)")  # as the library does

    monkeypatch.setattr(tokenization.PreTrainedTokenizerFast, "save_pretrained", fail)
    assert len(cached_tokenizer(["good", "good"], kind="word")) == 4
    assert not list((tokenization.cache_dir() / "tokenizers").iterdir())


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_a_model_of_every_released_version_gives_the_answers_that_it_gave(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model, tokenizer = models.load(str(folder))
    rows = encode(tokenizer, expected["texts"])
    logits = predict_logits(model, rows, pad_token_id=tokenizer.pad_token_id)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)


def test_answers_depend_neither_on_the_order_nor_on_the_size_of_batches() -> None:
    model, tokenizer = models.load(str(FIXTURES[0]))
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, len(tokenizer), n) for n in rng.integers(1, 60, 200)]
    expected = predict_logits(model, rows, pad_token_id=0, batch_tokens=1)
    for batch_tokens in (64, 1000, 10**6):
        order = rng.permutation(len(rows))
        logits = predict_logits(
            model, [rows[i] for i in order], pad_token_id=0, batch_tokens=batch_tokens
        )
        np.testing.assert_allclose(logits, expected[order], atol=1e-5)
        assert (logits.argmax(axis=1) == expected[order].argmax(axis=1)).all()
