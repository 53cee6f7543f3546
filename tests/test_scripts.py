"""The scripts as a user runs them: what they leave, what they print, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, Script
from safetensors.numpy import load_file

SCRIPTS = ("train_text", "evaluate_text", "predict_text", "compare_text")
SUMMARY = {
    "dataset": str,
    "model": str,
    "seed": int,
    "parameters": int,
    "validation_accuracy": float,
    "test_accuracy": float,
    "test_macro_f1": float,
    "train_seconds": float,
    "peak_memory_mb": float,
    "output_dir": str,
}
QUICK = ("--model", "nin-text-small", "--limit", "200", "--epochs", "1", "--output-dir", "run")


def write(path: Path, texts: list, labels: list) -> Path:
    pd.DataFrame({"text": texts, "label": labels}).to_csv(path, index=False)
    return path


# ---- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_defaults_and_three_examples_and_imports_nothing_heavy(
    script: Script, name: str
) -> None:
    help_text = script(name, "--help").out
    examples = help_text.partition("examples:\n")[2].strip().splitlines()
    assert sum(f"scripts/{name}.py" in line for line in examples) >= 3
    assert "(default: auto)" in help_text
    probe = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'scripts' / f'{name}.py')!r}, run_name='__main__')\n"
        f"except SystemExit: print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


# ---- training ----------------------------------------------------------------------------------


def test_a_run_leaves_everything_about_it(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("metrics.json", "options.json", "curves.png", "confusion.png", "README.md"),
        *("answers.safetensors", "mistakes.html"),
    }
    (line,) = (trained.parent / "stdout").read_text().splitlines()
    summary = json.loads(line)
    for name, kind in SUMMARY.items():
        assert isinstance(summary[name], kind), name
    assert 0.95 <= summary["test_accuracy"] <= 1
    metrics = json.loads((trained / "metrics.json").read_text())
    for split in ("validation", "test"):
        assert {
            *("accuracy", "macro_f1", "per_class", "roc_auc", "log_loss", "calibration_error"),
            *("accuracy_interval_95", "macro_f1_interval_95", "confusion_matrix", "n", "seconds"),
        } <= set(metrics[split])
    assert {
        *("parameters", "train_seconds", "peak_memory_mb", "environment", "seed", "command"),
        *(
            "ngram_table_entries",
            "stage_seconds",
            "data_fingerprint",
            "data_source",
            "notes",
            "options",
            "precision",
            "best_epoch",
        ),
    } <= set(metrics)
    assert metrics["test"]["accuracy"] == summary["test_accuracy"]
    low, high = metrics["test"]["accuracy_interval_95"]
    assert low <= summary["test_accuracy"] <= high
    for split, probabilities in load_file(trained / "answers.safetensors").items():
        assert probabilities.shape == (metrics[split]["n"], 2)
        assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_a_pipeline_answers_with_the_class_names_of_the_data(trained: Path) -> None:
    code = (
        "import sys, json, nin_text\n"
        "from transformers import pipeline\n"
        "classify = pipeline('text-classification', model=sys.argv[1])\n"
        "print(json.dumps(classify(['The plot is witty .', 'The plot is not witty at all .'])))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(trained)], capture_output=True, text=True, check=True
    )
    answers = json.loads(out.stdout.splitlines()[-1])
    assert [answer["label"] for answer in answers] == ["positive", "negative"]
    assert all(answer["score"] > 0.5 for answer in answers)


def test_any_csv_trains_and_the_saved_model_evaluates_on_it(script: Script, tmp_path: Path) -> None:
    verbs = {"cat": ["purrs", "sleeps", "hunts"], "dog": ["barks", "runs", "fetches"]}
    texts = [f"it {v[i % 3]} and {v[i // 3 % 3]} {i}" for i in range(60) for v in verbs.values()]
    write(tmp_path / "pets.csv", texts, list(verbs) * 60)
    result = script(
        "train_text",
        *("--dataset", "pets.csv", "--model", "nin-text-small", "--seed", "3"),
    ).result
    assert result["output_dir"] == "runs/pets.csv-nin-text-small-seed3"
    assert result["test_accuracy"] > 0.8
    again = script(
        "evaluate_text", "--model", result["output_dir"], "--dataset", "pets.csv", "--quiet"
    ).result
    assert again["n"] == 120
    assert again["split"] == "all rows"
    assert again["accuracy"] > 0.9
    assert set(again["per_class"]) == {"cat", "dog"}


def test_a_transformer_goes_through_the_same_command(script: Script, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    from nin_text import demo_data
    from nin_text.tokenization import train_tokenizer

    tokenizer = train_tokenizer(demo_data.generate("demo_topics")["train"][0], kind="word")
    tokenizer.save_pretrained(tmp_path / "bert")
    BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
    ).save_pretrained(tmp_path / "bert")
    result = script(
        "train_text",
        *("--dataset", "demo_topics", "--model", "bert", "--output-dir", "run"),
        *("--epochs", "2", "--learning-rate", "3e-3", "--limit", "1000"),
    ).result
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["architecture"] == "BertForSequenceClassification"
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert min(losses) < losses[0] != losses[-1]
    assert result["output_dir"] == "run"
    line = script("predict_text", "--model", "run", "our subject is the senate").result
    assert set(line["probabilities"]) == set(demo_data.LABELS["demo_topics"])
    refused = script("predict_text", "--model", "run", "--explain", "our subject")
    assert "NiN" in refused.complaint


# ---- killed and resumed ------------------------------------------------------------------------


def test_a_run_killed_in_the_middle_and_resumed_ends_with_the_same_weights(
    script: Script, tmp_path: Path
) -> None:
    arguments = ("--model", "nin-text-small", "--limit", "300", "--epochs", "4")
    whole = script("train_text", *arguments, "--output-dir", "whole").result
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [
            *(sys.executable, ROOT / "scripts" / "train_text.py", *arguments),
            *("--output-dir", folder),
        ],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoints/*/*/complete.json")):
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)  # into the next epoch
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "model.safetensors").exists()
    folder = folder.rename(tmp_path / "moved")
    resume = ("train_text", *arguments, "--output-dir", "moved", "--resume")
    resumed = script(*resume, PYTHONHASHSEED="1")  # no other process had this
    assert "resuming from" in resumed.err
    assert resumed.result["test_accuracy"] == whole["test_accuracy"]
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == set(expected)
    for name, value in expected.items():
        assert (weights[name] == value).all(), name
    again = script("train_text", *arguments, "--output-dir", "moved", "--resume")
    assert again.result == resumed.result
    assert "finished" in again.err
    other = script("train_text", *arguments[:-1], "5", "--output-dir", "moved", "--resume")
    assert "epochs 4, not 5" in other.complaint


# ---- predicting --------------------------------------------------------------------------------

GOOD, BAD = "The plot is witty .", "The plot is not witty at all ."


def test_texts_are_classified_from_arguments_and_pipe_alike(script: Script, trained: Path) -> None:
    run = script("predict_text", "--model", trained, GOOD, BAD)
    assert run.status == 0, run.err
    first, second = run.lines
    assert (first["text"], first["label"]) == (GOOD, "positive")
    assert (second["text"], second["label"]) == (BAD, "negative")
    assert first["probability"] == first["probabilities"]["positive"] > 0.5
    assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert script("predict_text", "--model", trained, stdin=f"{GOOD}\r\n{BAD}").lines == run.lines


def test_explain_colours_the_tokens_and_adds_the_evidence(script: Script, trained: Path) -> None:
    run = script("predict_text", "--model", trained, "--explain", BAD)
    assert "\x1b[48;2;" in run.err
    assert "\x1b" not in run.out
    evidence = run.result["evidence"]
    assert [token for token, _ in evidence] == BAD.split()
    p = run.result["probabilities"]
    assert sum(score for _, score in evidence) > 0, p


def test_any_text_gets_an_answer(script: Script, trained: Path) -> None:
    odd = ["", "   ", "x" * 1_000_000, "good " * 200_000, "\x00\x1b[2J", "é😀漢字", "\udcff"]
    stdin = "\n".join(odd[:-1]) + "\n"
    run = script("predict_text", "--model", trained, stdin=stdin)
    assert run.status == 0, run.err
    assert len(run.lines) == len(odd) - 1
    assert all(0.5 <= line["probability"] <= 1 for line in run.lines)


def test_a_reader_that_stops_early_is_no_error(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The plot is witty .\n" * 5000)
    command = f"{sys.executable} {ROOT}/scripts/predict_text.py --model {trained} --file a.txt"
    run = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["label"] == "positive"
    assert "Traceback" not in run.stderr


# ---- mistakes ----------------------------------------------------------------------------------

TEXTS = [f"some text {i}" for i in range(40)]


def bad_input(kind: str, folder: Path) -> tuple[list[str], str]:
    """Make a bad input; the arguments that meet it, and what the sentence must say."""
    csv = folder / "bad.csv"
    match kind:
        case "missing file":
            return ["--dataset", "nothing.csv"], "there is no file or folder nothing.csv"
        case "empty file":
            csv.touch()
            return ["--dataset", "bad.csv"], "bad.csv is empty"
        case "wrong column":
            write(csv, TEXTS, [0, 1] * 20)
            arguments = ["--dataset", "bad.csv", "--text-column", "body"]
            return arguments, "no column 'body'; the columns are 'text', 'label'"
        case "one class":
            write(csv, TEXTS, [1] * 40)
            return ["--dataset", "bad.csv"], "at least two classes"
        case "labels in test unseen in train":
            write(folder / "train.csv", TEXTS, [0, 1] * 20)
            write(folder / "test.csv", TEXTS, [0, 2] * 20)
            return ["--dataset", "."], "the test split has the label '2'"
        case "NaN labels":
            write(csv, TEXTS, [0, float("nan")] * 20)
            return ["--dataset", "bad.csv"], "20 of 40 labels of the train split are missing"
        case "empty and null texts":
            write(csv, ["", None, "  ", *TEXTS[3:]], [0, 1] * 20)
            return ["--dataset", "bad.csv"], "3 of 40 texts of the train split are empty"
        case "binary file":
            csv.write_bytes(os.urandom(5000) + b"\0")
            return ["--dataset", "bad.csv"], "bad.csv is a binary file"
        case "a folder that is no model":
            (folder / "nomodel").mkdir()
            return ["--model", "nomodel"], "nomodel is no model folder"
        case "no network":
            return ["--dataset", "yelp_polarity"], "data/yelp_polarity"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *("missing file", "empty file", "wrong column", "one class"),
        *("labels in test unseen in train", "NaN labels", "empty and null texts", "binary file"),
        *("a folder that is no model", "no network"),
    ],
)
def test_a_mistake_gets_one_sentence_and_no_traceback(
    script: Script, tmp_path: Path, kind: str
) -> None:
    arguments, message = bad_input(kind, tmp_path)
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    run = script("train_text", *arguments, **unreachable if kind == "no network" else {})
    assert message in run.complaint
    assert run.err.count("\n") <= 4  # the sentence, and at most what was found before
    assert not list(tmp_path.glob("**/*.safetensors"))


@pytest.mark.parametrize("name", ["evaluate_text", "predict_text"])
def test_a_model_that_is_none_is_refused_everywhere(
    script: Script, tmp_path: Path, name: str
) -> None:
    (tmp_path / "nomodel").mkdir()
    extra = ["text"] if name == "predict_text" else []
    assert "no model folder" in script(name, "--model", "nomodel", *extra).complaint


def test_what_is_evaluated_must_be_named(script: Script) -> None:
    assert script("evaluate_text").status == 2  # --model is required
