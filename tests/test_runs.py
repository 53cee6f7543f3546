"""Training from options to a run folder, in this process."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.numpy import load_file

from nin_text import Predictor, load, load_text_dataset, ngrams, stacking
from nin_text.errors import UserError
from nin_text.evaluation import predict_logits, softmax
from nin_text.options import TrainOptions
from nin_text.packed_files import read_packed
from nin_text.run_folder import ANSWERS_FILE
from nin_text.runs import train_text
from nin_text.tokenization import encode
from nin_text.training import RunTrainer

QUICK = {"model": "nin-text-small", "limit": 100, "epochs": 2, "quiet": True}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_weights_in_any_process(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        train_text(TrainOptions(**QUICK, seed=seed, output_dir=tmp_path / name))
    subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "train_text.py", "--model", "nin-text-small"),
            *("--limit", "100", "--epochs", "2", "--quiet", "--seed", "1", "--output-dir", "c"),
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


@pytest.mark.parametrize(("patience", "made", "kept"), [(0, 3, 3), (1, 2, 1)])
def test_the_last_pass_is_kept_unless_there_is_patience(
    tmp_path: Path, patience: int, made: int, kept: int
) -> None:
    """At a learning rate of nothing no pass is better than the first."""
    options = {**QUICK, "epochs": 3, "patience": patience, "learning_rate": 1e-12}
    train_text(TrainOptions(**options, output_dir=tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["epochs_run"], metrics["best_epoch"]) == (made, kept)


def test_a_resumed_run_must_have_the_same_options_and_data(tmp_path: Path) -> None:
    options = {**QUICK, "output_dir": tmp_path / "run"}
    first = train_text(TrainOptions(**options))
    assert train_text(TrainOptions(**options, resume=True)) == first
    with pytest.raises(UserError, match=r"learning rate 0\.001, not 0\.1"):
        train_text(TrainOptions(**options, resume=True, learning_rate=0.1))
    with pytest.raises(UserError, match="limit 100, not 50"):
        train_text(TrainOptions(**{**options, "limit": 50}, resume=True))
    (tmp_path / "run" / "metrics.json").unlink()
    for damage in ("{", "[]"):
        (tmp_path / "run" / "options.json").write_text(damage)
        with pytest.raises(UserError, match=r"options\.json is damaged"):
            train_text(TrainOptions(**options, resume=True))


def test_an_option_that_came_later_was_off_or_fixed_in_runs_before(tmp_path: Path) -> None:
    options = {**QUICK, "output_dir": tmp_path / "run"}
    first = train_text(TrainOptions(**options))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    record = json.loads((tmp_path / "run" / "options.json").read_text())
    assert metrics["options"].pop("mlm_probability") == record.pop("mlm_probability") == 0
    assert metrics["options"].pop("ngram_smoothing") == record.pop("ngram_smoothing") == 0.5
    metrics["options"]["teacher"] = record["teacher"] = None  # it was one name, or none
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "run" / "options.json").write_text(json.dumps(record))
    assert train_text(TrainOptions(**options, resume=True)) == first
    (tmp_path / "run" / "metrics.json").unlink()  # not finished, then
    resumed = train_text(TrainOptions(**options, resume=True))
    assert resumed["test_accuracy"] == first["test_accuracy"]
    with pytest.raises(UserError, match=r"mlm probability None, not 0\.1"):
        train_text(TrainOptions(**options, resume=True, mlm_probability=0.1))
    with pytest.raises(UserError, match=r"ngram smoothing 0\.5, not 5"):
        train_text(TrainOptions(**options, resume=True, ngram_smoothing=5.0))


def test_a_run_killed_while_its_checkpoints_are_removed_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patch:
        patch.setattr("nin_text.run_folder.discard", lambda path: None)
        first = train_text(TrainOptions(**options))
    assert (tmp_path / "run" / "checkpoints").exists()
    assert train_text(TrainOptions(**options, resume=True)) == first


def test_a_finished_run_of_other_class_names_is_made_anew(tmp_path: Path) -> None:
    options = {**QUICK, "output_dir": tmp_path / "run", "resume": True}
    dataset = load_text_dataset("demo_reviews", limit=100)
    train_text(TrainOptions(**options), dataset)
    renamed = dataclasses.replace(dataset, label_names=["bad", "good"])
    assert renamed.fingerprint() == dataset.fingerprint()
    train_text(TrainOptions(**options), renamed)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["label_names"] == ["bad", "good"]


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}; give another --output-dir"):
        train_text(TrainOptions(**QUICK, output_dir=tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}


def test_another_finished_run_is_replaced_only_if_that_is_asked_for(tmp_path: Path) -> None:
    """And so is a classifier that an estimator saved there; the same run may be repeated."""
    options = {**QUICK, "output_dir": tmp_path / "run"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "estimator.json").write_text('{"classes": ["x", "y"]}')
    with pytest.raises(UserError, match=r"holds estimator\.json"):
        train_text(TrainOptions(**options))
    train_text(TrainOptions(**options, overwrite=True))
    assert not (tmp_path / "run" / "estimator.json").exists()
    before = weights(tmp_path / "run")
    train_text(TrainOptions(**options))
    assert weights(tmp_path / "run") == before
    with pytest.raises(UserError, match="holds a finished run with seed 0, not 5; give another"):
        train_text(TrainOptions(**options, seed=5))
    with pytest.raises(UserError, match="holds a finished run with limit 100, not 50"):
        train_text(TrainOptions(**{**options, "limit": 50}))
    with pytest.raises(UserError, match="holds a finished run with other data"):
        other = load_text_dataset("demo_reviews", limit=99)
        train_text(TrainOptions(**options), other)
    assert weights(tmp_path / "run") == before
    train_text(TrainOptions(**options, seed=5, overwrite=True))
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

    monkeypatch.setattr("nin_text.callbacks.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        train_text(TrainOptions(**options, seed=6, overwrite=True))
    assert (weights(tmp_path / "run"), (tmp_path / "run" / "metrics.json").read_bytes()) == before


def write_splits(folder: Path, **splits: list[dict[str, object]]) -> str:
    folder.mkdir()
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    return str(folder)


@pytest.fixture(scope="module")
def finished() -> dict[str, tuple[dict, Path]]:
    """What `whole` has made, each once."""
    return {}


@pytest.fixture
def whole(
    request: pytest.FixtureRequest,
    finished: dict[str, tuple[dict, Path]],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[dict, Path]:
    """Options and folder of a run with unlabelled texts beside few labelled ones, or many.

    "refit" is "many" with the last stage repeated.
    """
    if request.param != "few":
        monkeypatch.setattr(stacking, "FEW", 0)
    if request.param not in finished:
        finished[request.param] = run_with_unlabelled(tmp_path_factory, request.param)
    return finished[request.param]


def run_with_unlabelled(
    tmp_path_factory: pytest.TempPathFactory, labelled: str
) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("whole")
    corpus = load_text_dataset("demo_reviews", limit=120).splits
    others = load_text_dataset("demo_reviews").splits["train"]
    data = write_splits(
        folder / "data",
        train=[
            {"text": text, "label": label}
            for text, label in zip(corpus["train"].texts, corpus["train"].labels, strict=True)
        ],
        unsupervised=[{"text": text} for text in others.texts[:250]],
    )
    options = {
        "dataset": data,
        "model": "nin-text-small",
        "quiet": True,
        "pretrain_epochs": 2,
        "mlm_probability": 0.15,
        "epochs": 2,
        "self_training_epochs": 2,
    }
    between, after = ["training"], []
    if labelled == "few":
        between = ["probe 1", "pretraining-again", "probe 2"]
    elif labelled == "refit":
        options["refit"], after = True, ["refit"]
    train_text(TrainOptions(**options, output_dir=folder / "run"))
    stages = json.loads((folder / "run" / "metrics.json").read_text())["stage_seconds"]
    assert list(stages) == ["pretraining", *between, "self-training", *after]
    return options, folder / "run"


@pytest.mark.parametrize(
    ("whole", "saves"),
    [
        *(("many", 1), ("many", 2), ("many", 3), ("many", 4), ("many", 5), ("few", 3), ("few", 4)),
        ("refit", 7),
    ],
    indirect=["whole"],
)
def test_a_run_interrupted_in_any_stage_ends_with_the_same_weights(
    whole: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    """Two passes of each stage (of pretraining again: one), a checkpoint after each."""
    options, run = whole
    save, saved = RunTrainer._save_checkpoint, []

    def save_and_stop(self, *args):
        save(self, *args)
        saved.append(self)
        if len(saved) == saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "_save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_text(TrainOptions(**options, output_dir=tmp_path / "stopped"))
    resumed = train_text(TrainOptions(**options, output_dir=tmp_path / "stopped", resume=True))
    metrics = json.loads((run / "metrics.json").read_text())
    assert resumed["test_accuracy"] == metrics["test"]["accuracy"]
    assert weights(tmp_path / "stopped") == weights(run)


@pytest.mark.parametrize("ngrams", [0, 2])
def test_refitting_adds_the_validation_split_once_all_has_been_said_of_it(
    ngrams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, bool]] = []
    train = RunTrainer.train_or_resume

    def record(self) -> None:
        trained.append((len(self.train_dataset), self.eval_dataset is not None))
        train(self)

    monkeypatch.setattr(RunTrainer, "train_or_resume", record)
    options = {**QUICK, "limit": 60, "ngrams": ngrams, "pretrain_epochs": 0, "patience": 1}
    for name, refit in (("once", False), ("twice", True)):
        train_text(TrainOptions(**options, refit=refit, output_dir=tmp_path / name))
    once, twice = (load_file(tmp_path / name / ANSWERS_FILE) for name in ("once", "twice"))
    assert trained == [(60, True), (60, True), (120, False)]
    assert np.array_equal(once["validation"], twice["validation"])
    assert not np.array_equal(once["test"], twice["test"])
    metrics = json.loads((tmp_path / "twice" / "metrics.json").read_text())
    assert metrics["train_seconds"] == pytest.approx(sum(metrics["stage_seconds"].values()), 0.1)


@pytest.mark.parametrize("whole", ["few"], indirect=True)
def test_a_run_stopped_between_stages_ends_with_the_same_weights(
    whole: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second round of pretraining begins alike, whether the first was made or read."""
    options, run = whole

    def stop(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nin_text.stages.pseudo_label_by_probe", stop)
        train_text(TrainOptions(**options, output_dir=tmp_path / "stopped"))
    train_text(TrainOptions(**options, output_dir=tmp_path / "stopped", resume=True))
    assert weights(tmp_path / "stopped") == weights(run)


@pytest.mark.parametrize("few", [True, False])
def test_unlabelled_texts_are_learned_from(
    few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two words tell the class of labelled texts; unlabelled texts show what goes with them."""
    if not few:
        monkeypatch.setattr(stacking, "FEW", 0)
    draw = random.Random(0)

    def row(known: str, companion: str, label: int | None) -> dict[str, object]:
        filler = [draw.choice("one two three four five six".split()) for _ in range(6)]
        text = " ".join([*filler, known, companion])
        return {"text": text} if label is None else {"text": text, "label": label}

    known, companions = ("bad", "good"), ("stale", "fresh")
    pairs = [(label, other) for label in (0, 1) for other in (0, 1)]
    parts = {
        "train": [row(known[y], companions[other], y) for y, other in pairs * 15],
        "validation": [row(known[y], companions[y], y) for y in (0, 1) * 20],
        "unsupervised": [row(known[y], companions[y], None) for y in (0, 1) * 200],
        "test": [row("seven", companions[y], y) for y in (0, 1) * 50],
    }
    data = write_splits(tmp_path / "data", **parts)
    accuracy = {}
    for self_training in (True, False):
        options = {**QUICK, "limit": None, "dataset": data, "unlabelled": self_training}
        options |= {"word_dropout": 0.5}  # what is hidden must be guessed from its companion
        summary = train_text(TrainOptions(**options, output_dir=tmp_path / str(self_training)))
        accuracy[self_training] = summary["test_accuracy"]
    assert accuracy[True] > 0.9
    assert accuracy[False] < 0.7


def test_the_saved_model_adds_ngrams_weighed_on_the_validation_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights are those of least log loss for n-grams fitted to the training split alone.

    What is saved are n-grams fitted to both splits, times that weight.
    """
    dataset = load_text_dataset("demo_reviews", limit=200)
    with caplog.at_level(logging.INFO, logger="nin_text.stages"):
        train_text(TrainOptions(**QUICK, output_dir=tmp_path / "run"), dataset)
    (weights,) = [r.args for r in caplog.records if r.msg.startswith("weights of network")]
    model, tokenizer = load(str(tmp_path / "run"))
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    rows, held_out = encode(tokenizer, train.texts), encode(tokenizer, validation.texts)
    logits = predict_logits(model, held_out, pad_token_id=0)
    network = (logits - ngrams.predict(model.ngrams, held_out)) / weights[0]
    branch = ngrams.NGramEvidence(model.ngrams.size, model.ngrams.buckets, 2)
    ngrams.fit(branch, rows, np.array(train.labels))
    added = ngrams.predict(branch, held_out)
    assert np.abs(added).max() > 0.1
    logits_outside = ngrams.out_of_fold_logits(branch, rows, np.array(train.labels))
    expected = stacking.best_scales([logits_outside], np.array(train.labels))[0]
    scales = stacking.cautious_scales(
        [network, added], np.array(validation.labels), (0.0, expected)
    )
    np.testing.assert_allclose(scales, weights, rtol=0.02)
    ngrams.fit(branch, [*rows, *held_out], np.array(train.labels + validation.labels))
    factor = (model.ngrams.weight * branch.weight).sum() / (branch.weight**2).sum()
    np.testing.assert_allclose(model.ngrams.weight, factor * branch.weight, atol=1e-4)
    np.testing.assert_allclose(factor, scales[1], rtol=0.02)
    # The validation score was computed before: by n-grams that had not seen its texts.
    answers = load_file(tmp_path / "run" / "answers.safetensors")
    assert np.abs(answers["validation"] - softmax(logits)).max() > 1e-3


def test_a_device_or_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no device 'tpu'"):
        train_text(TrainOptions(**QUICK, output_dir=tmp_path / "run", device="tpu"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):  # cli.run turns it into one sentence
        train_text(TrainOptions(**QUICK, output_dir=tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("save_dtype", "types"), [("float16", {"F16"}), ("float8", {"F16", "F8_E4M3"})]
)
def test_weights_saved_in_few_bits_are_those_that_were_scored(
    save_dtype: str, types: set[str], tmp_path: Path
) -> None:
    """A smaller file, loaded in 32 bits, and its answers are those that the metrics speak of."""
    folder = tmp_path / "run"
    options = TrainOptions(
        "demo_reviews",
        limit=200,
        epochs=1,
        save_dtype=save_dtype,
        ngram_buckets=4096,
        precision="fp32",
        output_dir=folder,
    )
    train_text(options)
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no dict
    assert {part.get_dtype() for part in slices.values()} == types
    eighths = {name for name, part in slices.items() if part.get_dtype() == "F8_E4M3"}
    if save_dtype == "float8":
        assert eighths == {"nin.embeddings.weight", "ngrams.weight"}
    model, tokenizer = load(str(folder))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert model.config.ngram_buckets == 4096
    texts = load_text_dataset("demo_reviews", limit=200).splits["test"].texts
    logits = predict_logits(model, encode(tokenizer, texts), pad_token_id=0, batch_tokens=4096)
    answers = load_file(folder / ANSWERS_FILE)["test"]
    assert softmax(logits) == pytest.approx(answers, abs=1e-5)
    assert read_packed(folder) is not None  # what a run leaves is read without transformers
    assert Predictor(folder, precision="fp32").predict_proba(texts) == pytest.approx(
        answers, abs=1e-5
    )
