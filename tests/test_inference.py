"""Saved classifiers on labelled data and on new texts, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from nin_text import NiNTextClassifier, Predictor, load_text_dataset
from nin_text.errors import UserError
from nin_text.evaluation import classification_metrics
from nin_text.inference import evaluate_text, load_predictor, predict_text
from nin_text.options import EvaluateOptions, PredictOptions, TrainOptions
from nin_text.run_folder import ANSWERS_FILE
from nin_text.runs import train_text
from nin_text.transfer import Teacher

GOOD, BAD = "The plot is witty .", "The plot is not witty at all ."


def predict(model: Path, **options) -> list[dict]:
    return list(predict_text(PredictOptions(model=str(model), **options)))


def test_texts_and_files_are_classified_alike(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{GOOD}\n{BAD}\n")
    table = pd.DataFrame({"review": [GOOD, BAD]})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    expected = predict(trained, texts=[GOOD, BAD])
    assert [line["label"] for line in expected] == ["positive", "negative"]
    for name in ("a.txt", "a.csv", "a.parquet"):
        assert predict(trained, file=tmp_path / name) == expected
    assert predict(trained, texts=[GOOD, BAD], limit=1) == expected[:1]


def test_a_run_on_the_hub_answers_as_the_run_does(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed, and cut to the length of its training."""
    folder = shutil.copytree(trained, tmp_path / "downloaded")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["options"]["max_length"] = 3
    (folder / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr("nin_text.model_files.snapshot_download", lambda *_, **__: str(folder))
    options = PredictOptions(model="someone/model")
    predictor = load_predictor(options)
    assert isinstance(predictor, Predictor)
    assert predictor.max_length == 3
    texts = [GOOD, BAD]
    assert predict(Path("someone/model"), texts=texts) == predict(folder, texts=texts)
    losses = []
    for model, length in (("someone/model", None), (str(folder), 3), (str(folder), 0)):
        data = {"dataset": "demo_reviews", "limit": 10}
        evaluated = EvaluateOptions(model=model, max_length=length, **data)
        losses.append(evaluate_text(evaluated)["log_loss"])
        assert evaluated.max_length == length  # as given
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) != losses[2]
    assert NiNTextClassifier.load("someone/model").max_length_ == 3
    assert Teacher("someone/model", ["negative", "positive"]).max_length == 3


def test_the_batch_that_a_text_is_in_does_not_change_its_answer(trained: Path) -> None:
    texts = [GOOD, BAD, "We saw it on Friday . " * 20 + GOOD] * 3
    for line in predict(trained, texts=texts, batch_tokens=1):
        (alone,) = predict(trained, texts=[line["text"]])
        assert alone["label"] == line["label"]
        assert alone["probability"] == pytest.approx(line["probability"], abs=1e-5)


def test_missing_texts_of_a_file_get_an_answer_like_empty_ones(
    trained: Path, tmp_path: Path
) -> None:
    pd.DataFrame({"text": [None, "", GOOD]}).to_parquet(tmp_path / "a.parquet")
    missing, empty, good = predict(trained, file=tmp_path / "a.parquet")
    assert missing == empty
    assert good["label"] == "positive"


def test_mistakes_in_what_to_predict_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        predict(trained, file=tmp_path / "nothing.txt")
    pd.DataFrame({"text": ["a"]}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(UserError, match="no column 'body'"):
        predict(trained, file=tmp_path / "a.csv", text_column="body")
    with pytest.raises(UserError, match="not both"):
        predict(trained, file=tmp_path / "a.csv", texts=["b"])


def test_evaluating_repeats_the_figures_of_training(trained: Path, tmp_path: Path) -> None:
    """Those of the validation split are of answers given before its labels were learned."""
    metrics = json.loads((trained / "metrics.json").read_text())
    answers = load_file(trained / ANSWERS_FILE)["validation"]
    dataset = load_text_dataset("demo_reviews")
    labels = dataset.splits["validation"].labels
    given = classification_metrics(np.log(answers), labels, dataset.label_names)
    for split in ("validation", "test"):
        result = evaluate_text(
            EvaluateOptions(
                model=str(trained), dataset="demo_reviews", split=split, output_dir=tmp_path
            )
        )
        if split == "test":
            for name in ("accuracy", "macro_f1", "confusion_matrix", "accuracy_interval_95"):
                assert result[name] == metrics[split][name]
            assert result["log_loss"] == pytest.approx(metrics[split]["log_loss"], rel=0.05)
        else:  # its labels are known to the n-grams of the saved model: see refit_ngrams
            for name in ("accuracy", "macro_f1", "confusion_matrix", "accuracy_interval_95"):
                assert given[name] == metrics[split][name]
            assert given["log_loss"] == pytest.approx(metrics[split]["log_loss"], rel=0.05)
            assert result["accuracy"] >= metrics[split]["accuracy"]
            assert result["log_loss"] <= metrics[split]["log_loss"]
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["accuracy"] == result["accuracy"]
    assert (tmp_path / "evaluation.png").stat().st_size > 1000


def test_a_run_is_evaluated_on_its_own_split_unless_data_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"{word} number {i}" for i in range(60) for word in ("good", "bad")]
    data = tmp_path / "mine.csv"
    frame = pd.DataFrame({"said": texts, "mood": ["up", "down"] * 60})
    frame.to_csv(data, index=False)
    names = {"text_column": "said", "label_column": "mood"}
    summary = train_text(
        TrainOptions(
            dataset=str(data),
            model="nin-text-small",
            epochs=2,
            quiet=True,
            **names,
            output_dir=tmp_path / "run",
        )
    )
    run = str(tmp_path / "run")
    own = evaluate_text(EvaluateOptions(model=run))
    assert own["split"] == "test" and own["dataset"] == str(data) and own["n"] < 40
    assert own["accuracy"] == summary["test_accuracy"]
    assert evaluate_text(EvaluateOptions(model=run, limit=4))["n"] == 4
    everything = evaluate_text(EvaluateOptions(model=run, dataset=str(data), **names))
    assert everything["split"] == "all rows" and everything["n"] == 120
    assert "was trained on most of these rows" in everything["notes"][-1]
    assert everything["notes"][-1] in caplog.text
    with pytest.raises(UserError, match="--text-column needs --dataset"):
        evaluate_text(EvaluateOptions(model=run, text_column="said"))
    frame.iloc[::-1].to_csv(data, index=False)
    with pytest.raises(UserError, match=r"mine\.csv has changed since"):
        evaluate_text(EvaluateOptions(model=run))
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(
        UserError,
        match=r"it is no run that .*; name others with --dataset",
    ):
        evaluate_text(EvaluateOptions(model=run))


def test_evaluating_into_the_run_folder_leaves_the_run_as_it_was(
    trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    evaluate_text(EvaluateOptions(model=str(folder), dataset="demo_reviews", output_dir=folder))
    for path in trained.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_multi_label_model_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    config = json.loads((folder / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="one class for each text"):
        predict(folder, texts=[GOOD])


def test_labels_that_a_model_does_not_know_are_refused(trained: Path, tmp_path: Path) -> None:
    pd.DataFrame({"text": ["fine", "odd"], "label": ["positive", "strange"]}).to_csv(
        tmp_path / "a.csv", index=False
    )
    with pytest.raises(UserError, match=r"'strange' \(row 2\)"):
        evaluate_text(EvaluateOptions(model=str(trained), dataset=str(tmp_path / "a.csv")))
    with pytest.raises(UserError, match="classes trained on"):
        evaluate_text(EvaluateOptions(model=str(trained), dataset="demo_topics"))
