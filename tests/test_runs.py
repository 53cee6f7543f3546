"""Training from options to a run folder, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from nin_text.errors import UserError
from nin_text.options import TrainOptions
from nin_text.runs import train_text

QUICK = {"model": "nin-text-small", "limit": 200, "epochs": 2, "quiet": True}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_weights_in_any_process(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        train_text(TrainOptions(**QUICK, seed=seed, output_dir=tmp_path / name))
    subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "train_text.py", "--model", "nin-text-small"),
            *("--limit", "200", "--epochs", "2", "--quiet", "--seed", "1", "--output-dir", "c"),
        ],
        cwd=tmp_path,
        check=True,
    )
    assert weights(tmp_path / "a") == weights(tmp_path / "c") != weights(tmp_path / "b")


def test_the_default_folder_is_named_after_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = train_text(TrainOptions(**QUICK, seed=4))
    assert summary["output_dir"] == "runs/demo_reviews-nin-text-small-seed4"
    assert (tmp_path / summary["output_dir"] / "metrics.json").is_file()


def test_resuming_what_was_never_begun_begins_it(tmp_path: Path) -> None:
    options = TrainOptions(**QUICK, output_dir=tmp_path / "run", resume=True)
    assert train_text(options)["output_dir"] == str(tmp_path / "run")


def test_a_resumed_run_must_have_the_same_options_and_data(tmp_path: Path) -> None:
    options = {**QUICK, "output_dir": tmp_path / "run"}
    first = train_text(TrainOptions(**options))
    assert train_text(TrainOptions(**options, resume=True)) == first
    with pytest.raises(UserError, match=r"learning rate 0\.001, not 0\.1"):
        train_text(TrainOptions(**options, resume=True, learning_rate=0.1))
    with pytest.raises(UserError, match="limit 200, not 100"):
        train_text(TrainOptions(**{**options, "limit": 100}, resume=True))
    (tmp_path / "run" / "metrics.json").unlink()
    for damage in ("{", "[]"):
        (tmp_path / "run" / "options.json").write_text(damage)
        with pytest.raises(UserError, match=r"options\.json is damaged"):
            train_text(TrainOptions(**options, resume=True))


def test_a_run_killed_while_its_checkpoints_are_removed_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patch:
        patch.setattr("nin_text.runs._discard", lambda path: None)
        first = train_text(TrainOptions(**options))
    assert (tmp_path / "run" / "checkpoints").exists()
    assert train_text(TrainOptions(**options, resume=True)) == first


def test_training_again_replaces_a_finished_run(tmp_path: Path) -> None:
    options = {**QUICK, "output_dir": tmp_path / "run"}
    train_text(TrainOptions(**options))
    before = weights(tmp_path / "run")
    train_text(TrainOptions(**options, seed=5))
    assert weights(tmp_path / "run") != before
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["seed"] == 5
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_failure_in_training_leaves_the_finished_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "output_dir": tmp_path / "run"}
    train_text(TrainOptions(**options))
    before = weights(tmp_path / "run"), (tmp_path / "run" / "metrics.json").read_bytes()

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nin_text.training.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        train_text(TrainOptions(**options, seed=6))
    assert (weights(tmp_path / "run"), (tmp_path / "run" / "metrics.json").read_bytes()) == before


def test_a_device_or_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no device 'tpu'"):
        train_text(TrainOptions(**QUICK, output_dir=tmp_path / "run", device="tpu"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):  # cli.run turns it into one sentence
        train_text(TrainOptions(**QUICK, output_dir=tmp_path / "file" / "run"))
